"""Reward feedback learning: gradient of differentiable rewards on the decoded x0 (DMDR eq. 2, section 4.1).

The rewarded image is the x0 estimate of the very call that gets the distribution matching
gradient, at whatever grid level was drawn, so the reward reaches the first step directly. Weights,
margins and their schedules belong to the rewards (`dmdr_jax.rewards.base.RewardSpec`).
"""

import dataclasses

import jax

from dmdr_jax.objectives.base import REWARDS_WITH_GRADIENT, Context, Metrics
from dmdr_jax.rewards.base import RewardSpec, saturated_fraction
from dmdr_jax.rewards.combine import refl_loss

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ReFL:
    """``sum_m w_m(step) mean_b relu(margin_m - s_m)``: linear in each reward s_m until it reaches its margin."""

    specs: tuple[RewardSpec, ...]
    name: str = "refl"
    needs: frozenset[str] = frozenset({REWARDS_WITH_GRADIENT})

    def active(self, step: int) -> bool:
        return any(spec.weight and step >= spec.start for spec in self.specs)

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        loss, metrics = refl_loss(self.specs, ctx.rewards, ctx.step)
        metrics["reward/clipped_values"] = saturated_fraction(ctx.images).mean()
        return loss, metrics
