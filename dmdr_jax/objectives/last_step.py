"""The reward's own gradient in the sampler's last step: the second half of RTDMD's policy gradient (arXiv 2605.26108).

With the last step deterministic the gradient of E[r] is the sum of the policy gradients of the K - 1 steps before
(`dmdr_jax.objectives.policy`) and of the pathwise gradient of the last, its input held fixed (eq. 14):
back-propagating further would count the earlier steps twice. The two halves are in proportion where advantages are not
divided (``group.normalise = "none"``) and this one's weight is ``policy.weight (G - 1)/(G D)``, D being the elements of
a latent and G the group; the released weights are another choice. ::

    L = K mean_b 1[i = K - 1] relu( margin - sum_m w_m s_m(decode(x0)) )                                     (1)

The student's call is at a grid index i drawn per prompt; K makes the expectation that of the last step alone. Where
every call is at the last step (``every``) the factor is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.base import LAST_STEP, REWARDS_WITH_GRADIENT, Context, Metrics
from dmdr_jax.rewards.base import RewardSpec, saturated_fraction
from dmdr_jax.rewards.combine import combined_reward

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LastStepReward:
    """(1) as a term.

    Attributes:
      specs: the rewards with their weights.
      margin: of the weighted sum; None: no hinge.
      every: every call is at the last step, as the released code has it.
    """

    specs: tuple[RewardSpec, ...]
    weight: float = 1e-4
    margin: float | None = 3.0
    every: bool = False
    name: str = "last_step"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REWARDS_WITH_GRADIENT}) | ({LAST_STEP} if self.every else frozenset())

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and any(spec.weight and step >= spec.start for spec in self.specs)

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        reward = combined_reward(self.specs, ctx.rewards, ctx.step)
        lack = -reward if self.margin is None else jax.nn.relu(self.margin - reward)
        last = (ctx.index == ctx.steps - 1).astype(jnp.float32)
        factor = 1.0 if self.every else float(ctx.steps)
        loss = self.weight * factor * (last * lack).mean()
        return loss, {"last_step/loss": loss, "reward/clipped_values": saturated_fraction(ctx.images).mean()}
