"""What a reward is: a frozen scorer of (image, prompt) pairs, with the place it takes in the loss.

A reward's parameters are arguments of `Reward.score`, so that a compiled step neither contains
them as constants nor differentiates them by accident. Prompts are turned into features once, by
`Reward.text_features`; only the image side runs inside the training step.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError

Array = jax.Array
Params = Any

UNITS = ("raw", "z")
ACTIVATIONS = ("gelu", "quick_gelu")


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """A reward's name and its term `weight * mean relu(margin - value)` of the generator loss.

    Attributes:
      name: name in metrics and tables; unique in a run.
      path: the folder or file that the scorer is read from, or "file.py:function" for one of your own.
      weight: factor of the term (DMDR: 0.3 for SDXL and SD3-Medium, 0.1 for SD3.5-Large).
      margin: the hinge, in `units`; a sample that scores above it has no gradient. None: no hinge,
        the term is `-weight * mean value`.
      units: "raw" scores, or "z" for (score - mean) / std.
      mean, std: of the teacher's scores, for "z"; with a std of 0 they are to be measured, see `calibrated`.
      prompt_prefix: put before each prompt, for this reward alone (DMDR: "Realistic photo " for HPSv2.1).
      start: the generator step from which the term counts.
      ramp: number of steps in which the weight then grows linearly; 0 switches it on at once.
      kind: what the scorer is, a name of `dmdr_jax.rewards.registry.KINDS`; "" infers it from name and path.
      tokenizer: folder of the tokenizer where it does not lie beside the weights.
      backbone: CLIP ViT-L/14 of an aesthetic head.
      arch: open_clip's name of the architecture where the weights leave it open, such as "ViT-H-14".
      activation: "gelu" or "quick_gelu" against what the files say (the authors ran DFN with "gelu").
      resize: "squash", "crop" or "pad" in place of the kind's own.
      positive_words, negative_words: switch on the contrast of texts, see `dmdr_jax.rewards.contrast`.
      contrast: its strength k.
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
    kind: str = ""
    tokenizer: str = ""
    backbone: str = ""
    arch: str = ""
    activation: str = ""
    resize: str = ""
    positive_words: tuple[str, ...] = ()
    negative_words: tuple[str, ...] = ()
    contrast: float = 0.1

    @property
    def scorer(self) -> tuple[str, ...]:
        """What decides on a score, whatever it counts for."""
        files = self.path, self.kind, self.tokenizer, self.backbone, self.arch
        return (self.name, *files, self.activation, self.resize, self.prompt_prefix)

    def __post_init__(self) -> None:
        # A configuration has lists; a spec is hashed.
        object.__setattr__(self, "positive_words", tuple(self.positive_words))
        object.__setattr__(self, "negative_words", tuple(self.negative_words))
        if self.units not in UNITS:
            raise UserError(f"Reward {self.name!r}: units must be one of {', '.join(UNITS)}, not {self.units!r}.")
        if not self.std >= 0:
            raise UserError(f"Reward {self.name!r}: std must not be negative, and is {self.std}.")
        if self.start < 0 or self.ramp < 0:
            raise UserError(f"Reward {self.name!r}: start and ramp are numbers of steps and must not be negative.")
        if self.activation not in ("", *ACTIVATIONS):
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"Reward {self.name!r}: activation must be one of {known}, not {self.activation!r}.")
        if bool(self.positive_words) != bool(self.negative_words):
            raise UserError(f"Reward {self.name!r}: a contrast needs both positive_words and negative_words.")

    @property
    def contrasted(self) -> bool:
        """Whether the text side is a contrast of two texts."""
        return bool(self.positive_words)


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
    """A loaded reward; `dmdr_jax.rewards.registry.open_reward` opens every kind."""

    @property
    def spec(self) -> RewardSpec:
        """Name, weight and the rest."""

    @property
    def params(self) -> Params:
        """The frozen image side, given back to `score` as its first argument."""

    @property
    def differentiable(self) -> bool:
        """Whether `score` has a gradient; gradient methods refuse one that has none."""

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """What the text side needs of the prompts, an array `[b, ...]`, prefix included, truncated and padded."""

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """Features `[b, ...]` of what `tokenize` gave."""

    def prompt_features(self, prompts: Sequence[str], place: Callable[[np.ndarray], Array] = jnp.asarray) -> np.ndarray:
        """`text_features(place(tokenize(prompts)))` on the host, each prompt computed once and remembered."""

    def score(self, params: Params, images: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of images `[b, h, w, 3]` in [0, 1]; pure, and differentiable in the images."""

    def score_prompts(self, images: np.ndarray, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of images `[n, h, w, 3]` in [0, 1] with their prompts, batch by batch; for evaluation."""

    def score_files(self, images: Sequence[np.ndarray], prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of uint8 images of any sizes, preprocessed as the reward's own program does it."""


def require_gradient(rewards: Iterable[Reward], method: str) -> None:
    """Refuses rewards without gradient.

    Raises:
      UserError: names the first such reward, the method that needs its gradient, and the methods that do not.
    """
    for reward in rewards:
        if not reward.differentiable:
            raise UserError(
                f"Reward {reward.spec.name!r} has no gradient{why_no_gradient(reward)}, and {method} needs one: "
                "write its score in JAX, or use it with a method that only compares scores."
            )


def why_no_gradient(reward: Any) -> str:
    """A reward's own reason, in brackets, or nothing."""
    reason = getattr(reward, "reason", "")
    return f" ({reason})" if reason else ""


def refuse_contrast(spec: RewardSpec) -> None:
    """UserError if a contrast of texts is asked of a score that is not linear in the text's features."""
    if spec.contrasted:
        raise UserError(f"Reward {spec.name!r}: only a CLIP's score can be contrasted; give no positive_words.")


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
