"""Features of texts that have been computed before: of single texts, and of training's batches."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dmdr_jax.arrays import on_host
from dmdr_jax.rewards.base import Reward
from dmdr_jax.rewards.contrast import texts

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


class BatchFeatures:
    """Text features of training's batches, on the devices: a batch whose prompts are all known is not computed again.

    Nothing waits for a device: what one call computes is fetched at the next, when it has long been there.

    Args:
      reward: whose features they are.
      place: puts rows ``[b, ...]`` on the devices.
      capacity: prompts to remember.
    """

    def __init__(self, reward: Reward, place: Callable[[np.ndarray], Any], capacity: int = CAPACITY):
        self._reward, self._place, self._capacity = reward, place, capacity
        self._rows: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self._pending: tuple[list[tuple[str, ...]], Any] | None = None

    def __call__(self, prompts: Sequence[str]) -> Any:
        """Features ``[b, ...]`` of a batch of prompts."""
        self._remember()
        # By what is read, not by the prompt: a contrast's words differ from batch to batch.
        keys = [tuple(row) for row in texts(self._reward.spec, prompts)]
        if all(key in self._rows for key in keys):
            for key in keys:
                self._rows.move_to_end(key)
            return self._place(np.stack([self._rows[key] for key in keys]))
        features = self._reward.text_features(self._place(self._reward.tokenize(prompts)))
        self._pending = keys, features
        return features

    def _remember(self) -> None:
        if self._pending is not None:
            keys, features = self._pending
            self._rows.update((key, row.copy()) for key, row in zip(keys, on_host(features)))
            self._pending = None
        while len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
