"""A tensor of a file that is read when it is needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and how to get its values.

    Attributes:
      shape: of the values.
      load: reads them; the array may be a view of the file and must not be written to.
    """

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a lazy tensor cannot be unpickled")  # nor changed by a pickle that holds one

    def transposed(self) -> "LazyTensor":
        """The matrix with its two axes exchanged."""
        return LazyTensor(self.shape[::-1], lambda: self.load().T)

    def third(self, index: int) -> "LazyTensor":
        """The first, second or last third along the first axis, such as the queries of a joint q, k, v projection."""
        rows = self.shape[0] // 3
        return LazyTensor((rows, *self.shape[1:]), lambda: self.load()[index * rows : (index + 1) * rows])
