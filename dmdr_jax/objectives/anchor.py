"""Staying near the reference: the regulariser of a reward-only run that has none of its own.

    L = weight mean (x0 - x0_ref)^2

x0_ref is the estimate of the reference student (that of the end of the cold start) at the same input. The original
ReFL (arXiv 2304.05977) kept its model near by denoising real images; there are none here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.base import REFERENCE, REFERENCE_X0, Context, Metrics

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Anchor:
    """The loss as a term, from generator step ``start`` on."""

    weight: float
    start: int = 0
    name: str = "anchor"
    needs: frozenset[str] = frozenset({REFERENCE, REFERENCE_X0})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.start

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        distance = jnp.mean((ctx.x0 - jax.lax.stop_gradient(ctx.reference_x0)) ** 2)
        return self.weight * distance, {"anchor/distance": distance}
