"""What the host prepares while the devices work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A function of 0, 1, 2, ..., computed in a thread of its own before it is asked for.

    Args:
      function: pure, for it may be called for numbers that are never asked for. What it raises is raised where its
        result is asked for.
      depth: how many numbers ahead.
    """

    def __init__(self, function: Callable[[int], T], depth: int = 2):
        self._function, self._depth = function, depth
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._coming: dict[int, Future[T]] = {}

    def __call__(self, n: int) -> T:
        """The result for ``n``; those for the next numbers are begun."""
        for i in range(n, n + 1 + self._depth):
            if i not in self._coming:
                self._coming[i] = self._thread.submit(self._function, i)
        result = self._coming.pop(n).result()
        for past in [i for i in self._coming if i < n]:
            self._coming.pop(past).cancel()
        return result

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
