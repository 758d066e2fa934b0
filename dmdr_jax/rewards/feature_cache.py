"""Features of texts that have been computed before."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

CAPACITY = 65536
"""Texts remembered by default: a quarter of a gibibyte of ViT-H features."""


class FeatureCache:
    """Rows by text, the least recently used forgotten first.

    Args:
      capacity: texts to remember; a batch with more is computed all the same.
    """

    def __init__(self, capacity: int = CAPACITY):
        self._capacity = capacity
        self._rows: OrderedDict[str, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, texts: Sequence[str], compute: Callable[[Sequence[str]], Any]) -> np.ndarray:
        """Features `[m, d]` of at least one text, on the host.

        Args:
          compute: texts to features. It is called where a text is new, always with m texts (some of them given
            twice or known already), so that one compiled program serves and m divides over the devices as ever.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            filled = new + list(texts)[: len(texts) - len(new)]
            rows = on_host(compute(filled))[: len(new)]
            self._rows.update((text, row.copy()) for text, row in zip(new, rows))
        for text in texts:
            self._rows.move_to_end(text)
        found = np.stack([self._rows[text] for text in texts])
        while len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return found


def on_host(array: Any) -> np.ndarray:
    """The whole array on this host, also where its devices are those of several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
