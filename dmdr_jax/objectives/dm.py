"""Distribution matching as a term: DMDR eq. 1 (see `dmdr_jax.distill.dm`)."""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import DMDraw, dm_loss
from dmdr_jax.objectives.base import DM_DRAW, IMPORTANCE, Context, Metrics

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
    """Pulls the student's distribution to the teacher's; the loss's gradient at x0 is weight g / (b h w c).

    Attributes:
      start, until: the generator steps between which it counts; ``until`` 0: for ever.
      importance: rows are weighted by how likelier the student now is to come to its input, clipped to 1 +- this;
        0: they are not (it matters where a rollout serves several updates).
      extra: further needs, of a method whose fake score is trained in another place.
    """

    weight: float = 1.0
    name: str = "dm"
    start: int = 0
    until: int = 0
    importance: float = 0.0
    extra: frozenset[str] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({DM_DRAW}) | self.extra | ({IMPORTANCE} if self.importance else frozenset())

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.start and (not self.until or step < self.until)

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        draw = ctx.draw
        matched = ctx.x0 if ctx.matched is None else ctx.matched
        gradient, metrics = draw.gradient, {}
        if self.importance:
            ratio = jnp.clip(ctx.importance, 1.0 - self.importance, 1.0 + self.importance)
            gradient = ratio[:, None, None, None] * gradient
            metrics["dm/importance_distance"] = jnp.abs(ctx.importance - 1.0).mean()
        loss = self.weight * dm_loss(matched, gradient)
        return loss, {"dm/loss": loss} | draw_metrics(draw) | metrics


def draw_metrics(draw: DMDraw) -> Metrics:
    """What a draw says of student and fake score."""
    return {
        "dm/gradient_norm": _norm(draw.gradient).mean(),
        "dm/score_gap": jnp.abs(draw.scores.fake - draw.real).mean(),
        "dm/distribution_gap": jnp.abs(draw.matching).mean(),
        "dm/guidance_gap": jnp.abs(draw.augmentation).mean(),
        "dm/normaliser": draw.normaliser.mean(),
    }


def _norm(x: Array) -> Array:
    """Euclidean norm per sample, ``[b]``."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))
