"""What every reward with an image tower has in common: scoring batch by batch, outside of training."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.rewards.base import Params
from dmdr_jax.rewards.preprocess import Preprocessing

Array = jax.Array


def gathers_layers(reward: Any) -> bool:
    """Whether a reward gathers its own layers as it computes, so that its parameters may lie in parts."""
    return isinstance(reward, TowerScorer)


class TowerScorer:
    """`score`, `score_prompts` and `score_files` of a reward from its `preprocess` and its `score_pixels`."""

    params: Params
    preprocess: Preprocessing
    differentiable = True
    prompt_features: Callable[..., np.ndarray]
    score_pixels: Callable[[Params, Array, Array], Array]

    def score(self, params: Params, images: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of images `[b, h, w, 3]` in [0, 1] (clamped) with `text_features` `[b, ...]`.

        Neither the parameters nor the text features receive a gradient.
        """
        return self.score_pixels(params, self.preprocess(images), text_features)

    def score_prompts(self, images: np.ndarray, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of images `[n, h, w, 3]` in [0, 1] with their prompts, batch by batch; for evaluation."""
        return self._in_batches(self._score, lambda rows: images[rows], prompts, batch)

    def score_files(self, images: Sequence[np.ndarray], prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of uint8 images `[h, w, 3]` of any sizes, preprocessed as the reward's own program does it.

        Raises:
          UserError: an image is not uint8 with three channels.
        """
        return self._in_batches(self._score_pixels, lambda r: self.preprocess.published(images[r]), prompts, batch)

    def _in_batches(
        self, score: Callable, images_of: Callable[[slice], Any], prompts: Sequence[str], batch: int
    ) -> np.ndarray:
        found = []
        for rows in slices(len(prompts), batch):
            images, features = images_of(rows), self.prompt_features(prompts[rows])
            count = len(features)
            # The last batch is filled up, so that one program serves all.
            padded = [fill_up(np.asarray(x), min(batch, len(prompts))) for x in (images, features)]
            found.append(np.asarray(score(self.params, *map(jnp.asarray, padded)))[:count])
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    @functools.cached_property
    def _score(self) -> Callable:
        return jax.jit(self.score)

    @functools.cached_property
    def _score_pixels(self) -> Callable:
        return jax.jit(self.score_pixels)


def slices(count: int, size: int) -> Iterator[slice]:
    """`count` rows in lots of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows` `[m, ...]`, its last one repeated until there are `count`."""
    missing = count - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, 0)]) if missing > 0 else rows
