"""What a reward is: a frozen scorer of (image, prompt) pairs, with the place it takes in the loss.

A reward's parameters are arguments of `Reward.score`, so that a compiled step neither contains
them as constants nor differentiates them by accident. Prompts are turned into features once, by
`Reward.text_features`; only the image side runs inside the training step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError

Array = jax.Array
Params = Any

UNITS = ("raw", "z")


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """A reward's name and its term `weight * mean relu(margin - value)` of the generator loss.

    Attributes:
      name: name in metrics and tables; unique in a run.
      path: the folder that the scorer is read from.
      weight: factor of the term (DMDR: 0.3 for SDXL and SD3-Medium, 0.1 for SD3.5-Large).
      margin: the hinge, in `units`; a sample that scores above it has no gradient. None: no hinge,
        the term is `-weight * mean value`.
      units: "raw" scores, or "z" for (score - mean) / std.
      mean, std: of the teacher's scores, see `calibrated`.
      prompt_prefix: put before each prompt, for this reward alone (DMDR: "Realistic photo " for HPSv2.1).
      start: the generator step from which the term counts.
      ramp: number of steps in which the weight then grows linearly; 0 switches it on at once.
    """

    name: str
    path: str = ""
    weight: float = 1.0
    margin: float | None = 0.7
    units: str = "raw"
    mean: float = 0.0
    std: float = 1.0
    prompt_prefix: str = ""
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        if self.units not in UNITS:
            raise UserError(f"Reward {self.name!r}: units must be one of {', '.join(UNITS)}, not {self.units!r}.")
        if not self.std > 0:
            raise UserError(f"Reward {self.name!r}: std must be positive, not {self.std}.")
        if self.start < 0 or self.ramp < 0:
            raise UserError(f"Reward {self.name!r}: start and ramp are numbers of steps and must not be negative.")


def calibrated(spec: RewardSpec, teacher_scores: np.ndarray) -> RewardSpec:
    """The spec with mean and standard deviation of the teacher's scores `[m]` (one to two thousand samples do).

    Raises:
      UserError: fewer than two scores, or all the same, or not finite.
    """
    scores = np.asarray(teacher_scores, np.float64)
    if scores.size < 2 or not np.isfinite(scores).all() or scores.std() == 0:
        raise UserError(f"Reward {spec.name!r} cannot be calibrated: give at least two finite, different scores.")
    return dataclasses.replace(spec, mean=float(scores.mean()), std=float(scores.std(ddof=1)))


@runtime_checkable
class Reward(Protocol):
    """A loaded reward.

    Attributes:
      spec: name, weight and the rest.
      params: the frozen image side, given back to `score` as its first argument.
    """

    spec: RewardSpec
    params: Params

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids `[b, n]` of the prompts, prefix included, truncated and padded."""

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """Features `[b, d]`, fp32, of token ids `[b, n]`; computed once per prompt."""

    def score(self, params: Params, images: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of images `[b, h, w, 3]` in [0, 1]; pure and differentiable in the images."""


def clamp_images(images: Array) -> Array:
    """Clamps to [0, 1]; the gradient is 1 inside, borders included, and 0 outside, as `torch.clamp` has it.

    `jnp.clip` halves the gradient at the borders, where a purely black or white pixel lies.
    """
    inside = (images >= 0) & (images <= 1)
    return jnp.where(inside, images, jax.lax.stop_gradient(jnp.clip(images, 0.0, 1.0)))


def saturated_fraction(images: Array) -> Array:
    """Fraction `[b]` of values of `images` `[b, h, w, 3]` outside [0, 1]: those get no reward gradient."""
    outside = (images < 0) | (images > 1)
    return outside.astype(jnp.float32).mean((1, 2, 3))
