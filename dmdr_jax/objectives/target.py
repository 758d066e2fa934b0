"""GDMD (arXiv 2604.19009): rewards judge where distribution matching is about to take a sample.

The gradient g of distribution matching (`dmdr_jax.distill.dm`) is a regression onto the implicit target x - g. Its
image is scored beside the sample's own, and how much better it is decides whether it is followed ::

    r = 1/2 + 1/2 clip( mean_m (R_m(x - g) - R_m(x)) / Z_m, -1, 1 )                                          (1)
    L = r mean (x+ - target)^2 + (1 - r) mean (x- - target)^2                                                (2)
    x+ = (1 - beta) x_old + beta x,   x- = (1 + beta) x_old - beta x

(2) is DiffusionNFT's loss (arXiv 2509.16117) about the target, x - g at the student's estimate x before the block of
updates that share a rollout; x_old is that estimate too. Its gradient at x is ``2 beta [(2r - 1)(x_old - target) +
beta (x - x_old)]`` per element: at x = x_old, where x_old - target = g, distribution matching with the weight
2 beta (2r - 1). With ``lambda L_dm`` it is a DM step of weight ``lambda + 2 beta gamma (2r - 1)`` as a whole, which
does not turn its sign as long as ``2 beta gamma <= lambda``. No reward gradient, no group of samples, no stochastic
sampler.

Published are (1), (2) and that the group is made of renoise levels and of successive fake scores; no numbers are. The
defaults beta = 1, gamma = 1/2, lambda = 1 give weights in [0, 2]; Z_m is the running deviation of the gains of reward
m (the text names a global deviation), each reward by its own before the average, so that scales do not matter; g
carries DMD's normaliser, as the algorithm's "grads" do, without which the targets could not be decoded at all levels
alike. The alternatives: ``gdmd.group``; ``gdmd.spread``; ``gdmd.normalised=False``, the bare difference of estimates,
which the paper's equation 3 has, in target and matching; ``gdmd.old="average"``, x_old of the run's averaged student,
which adds a pull to it and one forward to a block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.base import DM_DRAW, FAKE_ON_ROLLOUT, TARGETS, Context, Metrics
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.combine import reward_weight

Array = jax.Array

SPREAD_FLOOR = 1e-4


@dataclasses.dataclass(frozen=True)
class TargetPreference:
    """(2) as a term.

    Attributes:
      specs: the rewards, with their shares in the mean of (1).
      beta, weight: of (2); the weight is the paper's gamma.
    """

    specs: tuple[RewardSpec, ...]
    beta: float = 1.0
    weight: float = 0.5
    name: str = "gdmd"
    needs: frozenset[str] = frozenset({DM_DRAW, TARGETS, FAKE_ON_ROLLOUT})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and any(spec.weight and step >= spec.start for spec in self.specs)

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        r = self.optimality(ctx)
        target = ctx.sampled_x0 - ctx.draw.gradient
        loss = self.weight * nft_loss(ctx.x0, ctx.old_x0, target, r, self.beta)
        metrics = {"gdmd/loss": loss, "gdmd/optimality": r.mean(), "gdmd/better": (r > 0.5).astype(jnp.float32).mean()}
        for spec in self.specs:
            metrics[f"reward/{spec.name}"] = ctx.target_gain.sample[spec.name].astype(jnp.float32).mean()
            metrics[f"gdmd/spread/{spec.name}"] = ctx.target_gain.spread[spec.name]
        return loss, metrics

    def optimality(self, ctx: Context) -> Array:
        """(1), ``[b]``; 1/2 where no reward counts yet."""
        gain, weights = ctx.target_gain, {s.name: reward_weight(s, ctx.step) for s in self.specs}
        whole = sum(abs(spec.weight) for spec in self.specs)
        mean = sum(
            w * (gain.target[name] - gain.sample[name]) / jnp.maximum(gain.spread[name], SPREAD_FLOOR)
            for name, w in weights.items()
        )
        return jax.lax.stop_gradient(0.5 + 0.5 * jnp.clip(mean / whole, -1.0, 1.0))


def nft_loss(x: Array, old: Array, target: Array, r: Array, beta: float) -> Array:
    """(2), averaged over everything; gradient flows to ``x`` alone. ``r`` is ``[b]``, the others ``[b, h, w, c]``.

    The gradient is given in its reduced form, so that at r = 1/2 and x = x_old it is 0 and not the difference of two
    equal numbers: with equal rewards the update is distribution matching's bit for bit.
    """
    now, old, target, r = jax.lax.stop_gradient((x, old, target, r[:, None, None, None]))
    positive = (1.0 - beta) * old + beta * now
    negative = (1.0 + beta) * old - beta * now
    value = (r * (positive - target) ** 2 + (1.0 - r) * (negative - target) ** 2).mean()
    gradient = 2.0 * beta * ((2.0 * r - 1.0) * (old - target) + beta * (now - old)) / x.size
    return value + (gradient * (x - now)).sum()
