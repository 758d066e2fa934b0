"""DrPO (arXiv 2606.02521): good samples attract, bad ones repel, in a feature space; rewards only rank.

For one prompt and one kind of features, everything detached but x in (4): generated x ``[N, D]``, targets
T = (x, negatives, positives) with weights w = (1, w-, w+), radii rho ::

    dist_ij = |x_i - T_j|,   s = sum_ij dist w / (count mean w),   s_D = s / sqrt(D)                          (1)
    A = sqrt( softmax_j(-dist / (s rho)) softmax_i(-dist / (s rho)) ) w                                       (2)
    F_rho = sum_pos A m- (T - x)/s_D - sum_{x, neg} A m+ (T - x)/s_D,   m+, m- the sums of A over pos, (x, neg)
    F = sum_rho F_rho / rms(F_rho)                                                                             (3)
    L = mean | x / s_D - sg(x / s_D + F) |^2                                                                   (4)

The preference drift has the best and the worst samples of the prompt as positives and negatives; the reference drift
has the reference student's samples of the same noise as positives and the samples themselves as negatives. By (3) the
loss hardly changes in value: watch the rewards.

This is the released code's form; the paper's body was not at hand. One departure: the best and worst are samples of the
batch itself, whose features are gathered, where the release computes them once more with other noise. A sample is then
its own support at distance 0, which at small radii would outweigh all else; like the release for the cloud x, we leave
such pairs out (-100/rho).

``anchor = "dm"`` replaces the reference drift by distribution matching, its counterpart with learned scores (towards
the teacher, away from the student), and saves the reference's pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import FEATURES, GROUPS, REFERENCE, REFERENCE_X0, REWARDS, Context, Metrics, as_groups
from dmdr_jax.rewards.combine import differ

Array = jax.Array

_SELF = 100.0
_SCALE_FLOOR = 1e-3
_RMS_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Drift:
    """(4) as a term.

    Attributes:
      ranking: from rewards of x0 to ranks.
      count: how many best and how many worst, at most half a group.
      radii: of (2).
      positive, negative: w+ and w- of the preference drift.
      reference_positive, reference_negative: of the reference drift.
      reference_weight: of the reference drift in the loss; 0 leaves it out.
    """

    ranking: Advantages
    count: int
    weight: float = 1.0
    radii: tuple[float, ...] = (0.02, 0.05, 0.2)
    positive: float = 3000.0
    negative: float = 2000.0
    reference_positive: float = 3500.0
    reference_negative: float = 5000.0
    reference_weight: float = 0.25
    name: str = "drift"

    @property
    def needs(self) -> frozenset[str]:
        reference = {REFERENCE, REFERENCE_X0} if self.reference_weight else set()
        return frozenset({GROUPS, REWARDS, FEATURES, *reference})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.ranking.start

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        score = as_groups(self.ranking(ctx.rewards, ctx.step, ctx.group), ctx.group)
        order = jnp.argsort(-score, axis=1)  # sorted once: best and worst are never the same row
        best, worst = order[:, : self.count], order[:, -self.count :]
        losses, anchors, pull = [], [], []
        for key, features in ctx.features.sample.items():
            x = as_groups(features, ctx.group)
            drift = jax.vmap(lambda x, b, w: self._preference(x, b, w))(x, best, worst)
            # Equal rewards rank nothing.
            losses.append(jnp.where(differ(score), drift, 0.0).mean())
            if self.reference_weight:
                reference = as_groups(ctx.features.reference[key], ctx.group)
                anchors.append(jax.vmap(self._anchor)(x, reference).mean())
                pull.append(_distance(x, reference))
        preference = sum(losses) / len(losses)
        loss = self.weight * self.ranking.strength(ctx.step) * preference
        metrics: dict[str, Any] = {
            f"reward/{s.name}": ctx.rewards[s.name].astype(jnp.float32).mean() for s in self.ranking.specs
        }
        if anchors:
            loss = loss + self.weight * self.reference_weight * sum(anchors) / len(anchors)
            metrics["drift/distance_to_reference"] = sum(pull) / len(pull)
        return loss, metrics | {"drift/loss": loss}

    def _preference(self, x: Array, best: Array, worst: Array) -> Array:
        own = jnp.arange(x.shape[0])
        same = jnp.concatenate([own[:, None] == j[None] for j in (own, worst, best)], axis=1)
        return drift_loss(x, x[worst], x[best], same, self.negative, self.positive, self.radii)

    def _anchor(self, x: Array, reference: Array) -> Array:
        own = jnp.eye(x.shape[0], dtype=bool)
        same = jnp.concatenate([own, own, jnp.zeros_like(own)], axis=1)
        return drift_loss(x, x, reference, same, self.reference_negative, self.reference_positive, self.radii)


def drift_loss(
    x: Array, negatives: Array, positives: Array, same: Array, w_neg: float, w_pos: float, radii: tuple[float, ...]
) -> Array:
    """(4) for one prompt: ``x`` ``[N, D]``, supports ``[M, D]`` and ``[P, D]``, ``same`` ``[N, N + M + P]``."""
    force, scale = drift_force(*jax.lax.stop_gradient((x, negatives, positives)), same, w_neg, w_pos, radii)
    y = x / scale
    return ((y - jax.lax.stop_gradient(y + force)) ** 2).mean()


def drift_force(
    x: Array, negatives: Array, positives: Array, same: Array, w_neg: float, w_pos: float, radii: tuple[float, ...]
) -> tuple[Array, Array]:
    """F of (3), ``[N, D]``, and s_D of (1)."""
    n, m = x.shape[0], negatives.shape[0]
    targets = jnp.concatenate([x, negatives, positives])
    weights = jnp.concatenate([jnp.ones(n), jnp.full(m, w_neg), jnp.full(positives.shape[0], w_pos)])
    away = targets[None] - x[:, None]
    dist = jnp.sqrt((away**2).sum(-1))
    scale = jnp.maximum((dist * weights).sum() / (dist.size * weights.mean()), _SCALE_FLOOR)
    unit = scale / x.shape[1] ** 0.5
    force = jnp.zeros_like(x)
    for radius in radii:
        logits = -dist / (scale * radius) - jnp.where(same, _SELF / radius, 0.0)
        affinity = jnp.exp(0.5 * (jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0))) * weights
        repel, attract = affinity[:, : n + m], affinity[:, n + m :]
        pull = (attract * repel.sum(1, keepdims=True)) @ positives - _row_sum(attract, repel) * x
        push = (repel * attract.sum(1, keepdims=True)) @ targets[: n + m] - _row_sum(repel, attract) * x
        one = (pull - push) / unit
        force = force + one / jnp.maximum(jnp.sqrt((one**2).mean()), _RMS_FLOOR)
    return force, unit


def _row_sum(a: Array, b: Array) -> Array:
    """``sum_j a_ij sum_k b_ik`` as a column."""
    return (a.sum(1) * b.sum(1))[:, None]


def _distance(x: Array, y: Array) -> Array:
    return jax.lax.stop_gradient(jnp.sqrt(((x - y) ** 2).mean()))
