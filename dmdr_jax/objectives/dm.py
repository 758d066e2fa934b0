"""Distribution matching as a term: DMDR eq. 1 (see `dmdr_jax.distill.dm`)."""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import dm_loss
from dmdr_jax.objectives.base import DM_DRAW, Context, Metrics

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
    """Pulls the student's distribution to the teacher's; the loss's gradient at x0 is weight g / (b h w c)."""

    weight: float = 1.0
    name: str = "dm"
    needs: frozenset[str] = frozenset({DM_DRAW})

    def active(self, step: int) -> bool:
        return self.weight != 0.0

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        draw, scores = ctx.draw, ctx.draw.scores
        loss = self.weight * dm_loss(ctx.x0, draw.gradient)
        return loss, {
            "dm/loss": loss,
            "dm/gradient_norm": _norm(draw.gradient).mean(),
            "dm/score_gap": jnp.abs(scores.fake - draw.real).mean(),
            "dm/distribution_gap": jnp.abs(scores.fake - scores.real_cond).mean(),
            "dm/guidance_gap": jnp.abs(draw.real - scores.real_cond).mean(),
            "dm/normaliser": draw.normaliser.mean(),
        }


def _norm(x: Array) -> Array:
    """Euclidean norm per sample, ``[b]``."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))
