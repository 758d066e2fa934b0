"""Policy gradients of few-step samplers: GRPO on the sampler's own Gaussian transitions, and SubGRPO.

Step k of the student's sampler draws z_{k+1} from a Gaussian around a mean that the network decides
(`dmdr_jax.diffusion.kernels`): a policy with a known density. With r = pi(z_{k+1} | z_k) / pi_old and the group
advantage A of the final image (`objectives.advantages`)::

    L = (K - 1)/M sum_{k in S} mean_b max( -A r, -A clip(r, 1 - e, 1 + e) ) + kl KL_k(pi || pi_ref)         (1)

over the M chosen of the K - 1 stochastic steps; the last step is deterministic and has no density. The factor keeps
the expectation that of all steps (RTDMD, arXiv 2605.26108, eq. 17); with all of them chosen this is GRPO. In DMDR
distribution matching stands in place of the KL term (the authors' advice), which only ``grpo_only`` uses.

Log-probabilities are averages over elements (Flow-GRPO, DanceGRPO), not sums: a clip of 1e-4 is then 6.6 nats of the
summed ratio at 512 pixels of SD3. ``policy.density = "rtdmd"`` drops the factor 1/(2 std^2) of the exponent as
RTDMD's code does, which weights step k by its 2 std^2; the density is the default because it is the reward's gradient.
``kl_form = "flow_grpo"`` divides by s^2 where the Gaussian's variance is s^2 |dt|, as that code does for its kernel.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import (
    DM_DRAW,
    DM_REWARD,
    GROUPS,
    REFERENCE,
    SAMPLE_REWARDS,
    TRANSITIONS,
    Context,
    Metrics,
    Transitions,
)

Array = jax.Array

DM = "dm"
"""Name of the distribution matching reward among the rewards."""


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """(1) as a term.

    Attributes:
      advantages: from the rewards of final samples.
      weight, clip, kl: of (1); e is ``clip``.
      dm_weight: the number R_dm (`dmdr_jax.distill.dm.dm_reward`) counts as one more reward, with this share (GNDM's
        scalar mode).
      balance: the loss is scaled until its gradient at the student's estimates has this ratio to distribution
        matching's (GNDMR's adaptive weights, our reading); 0: no scaling.
    """

    advantages: Advantages
    weight: float = 1.0
    clip: float = 1e-4
    kl: float = 0.0
    dm_weight: float = 0.0
    balance: float = 0.0
    name: str = "policy"

    @property
    def needs(self) -> frozenset[str]:
        optional = {REFERENCE: self.kl, DM_REWARD: self.dm_weight, DM_DRAW: self.balance}
        rewards = {SAMPLE_REWARDS} if self.advantages.specs else set()
        return frozenset({GROUPS, TRANSITIONS, *rewards, *(need for need, used in optional.items() if used)})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.advantages.start

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        advantage, steps = self.advantage(ctx), ctx.transitions
        ratio = jnp.exp(steps.log_prob - steps.old_log_prob)
        surrogate = clipped_surrogate(ratio, advantage[:, None], self.clip)
        factor = self.weight * self._balance(ctx, advantage)
        policy = factor * steps.scale * surrogate.sum(1).mean()
        loss = policy
        metrics: dict[str, Any] = {
            "policy/ratio_distance": jnp.abs(ratio - 1.0).mean(),
            "policy/clipped": (jnp.abs(ratio - 1.0) > self.clip).astype(jnp.float32).mean(),
            "policy/advantage_size": jnp.abs(advantage).mean(),
        }
        if self.balance:
            metrics["policy/balance"] = factor / self.weight
        if self.kl:
            divergence = steps.scale * steps.kl.sum(1).mean()
            loss = loss + self.kl * divergence
            metrics["policy/kl"] = divergence
        for spec in self.advantages.specs:
            metrics[f"reward/{spec.name}"] = ctx.sample_rewards[spec.name].astype(jnp.float32).mean()
        return loss, metrics | {"policy/loss": loss}

    def advantage(self, ctx: Context) -> Array:
        """``[b]``, external rewards by their weights and the ramp, R_dm by its share."""
        found = jnp.zeros(ctx.transitions.log_prob.shape[0])
        if self.advantages.specs:
            found = self.advantages.strength(ctx.step) * self.advantages(ctx.sample_rewards, ctx.step, ctx.group)
        if self.dm_weight:
            found = found + self.dm_weight * self.advantages.of(ctx.sample_rewards[DM], ctx.group)
        return found

    def _balance(self, ctx: Context, advantage: Array) -> Array | float:
        if not self.balance:
            return 1.0
        steps = ctx.transitions
        own = advantage_gradient_norm(steps, advantage) * steps.scale
        matching = _norm(ctx.draw.gradient) / ctx.draw.gradient.size
        return jax.lax.stop_gradient(self.balance * matching / (own + 1e-12))


def clipped_surrogate(ratio: Array, advantage: Array, clip: float) -> Array:
    """``max(-A r, -A clip(r, 1 - e, 1 + e))``, elementwise (PPO, arXiv 1707.06347, eq. 7, as a loss)."""
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + clip))


def advantage_gradient_norm(steps: Transitions, advantage: Array) -> Array:
    """Norm over the whole batch of the on-policy gradient ``-A dlogp/dx0`` of a mean over rows."""
    return _norm(advantage[:, None, None, None, None] * steps.dlogp_dx0) / advantage.shape[0]


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))
