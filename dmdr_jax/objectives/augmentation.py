"""Guidance augmentation weighted by the advantage: reinforcement learning inside the distillation gradient.

The difference that distribution matching descends has two parts (`dmdr_jax.distill.split`): matching, and augmentation
by guidance, the part that makes pictures. One of the two ways in which DMDR's authors combined GRPO with it (their
answers to questions; it was used after Z-Image's step distillation): no policy gradient and no log-probabilities, the
augmentation is multiplied by the sample's advantage in its group, matching stays as the regulariser ::

    g = ( matching - (shift + kappa A) augmentation ) / norm,   A = clip(A, +- 1)                            (1)

They multiply by A alone (``shift = 0``, ``kappa = 1``); the default 1 + A/2 keeps the mean dose of guidance at 1,
without which the student of a group with equal rewards would get none. With A = 0 and shift 1 it is Decoupled DMD.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import dm_loss
from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import DM_DRAW, GROUPS, REWARDS, Context, Metrics
from dmdr_jax.objectives.dm import draw_metrics

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AdvantageAugmentation:
    """(1) as a term, in the place of `dmdr_jax.objectives.dm.DistributionMatching`.

    Attributes:
      advantages: from rewards of x0, whose grid index a group shares.
      weight: of the loss.
      kappa, shift: of (1).
    """

    advantages: Advantages
    weight: float = 1.0
    kappa: float = 0.5
    shift: float = 1.0
    name: str = "augmentation"
    needs: frozenset[str] = frozenset({DM_DRAW, GROUPS, REWARDS})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.advantages.start

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        draw = ctx.draw
        advantage = jnp.clip(self.advantages(ctx.rewards, ctx.step, ctx.group), -1.0, 1.0)
        dose = self.shift + self.kappa * self.advantages.strength(ctx.step) * advantage
        gradient = (draw.matching - dose[:, None, None, None] * draw.augmentation) / draw.normaliser
        loss = self.weight * dm_loss(ctx.x0, gradient)
        metrics = {f"reward/{s.name}": ctx.rewards[s.name].astype(jnp.float32).mean() for s in self.advantages.specs}
        metrics["augmentation/dose_size"] = jnp.abs(dose).mean()
        return loss, {"dm/loss": loss} | draw_metrics(draw) | metrics
