"""The reward term of DMDR's generator loss (arXiv 2511.13649, section 4.1, eq. 2).

    L_reward = sum_m w_m(step) * mean_b relu(margin_m - v_m)

with v_m the score of reward m, raw or in standard deviations of the teacher's scores. Cosine
scores hardly reach DMDR's margin of 0.7, so the term is in effect linear; in z-units a margin of
two or three is a hinge that acts.

Methods that compare the samples of a group (GRPO, DPO, DrPO) take `group_z_scores` instead: each reward in units of its
own spread within the group (`objectives/advantages.py`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import RewardSpec

Array = jax.Array
Step = Array | int

GROUP_FLOOR = 1e-4


def reward_weight(spec: RewardSpec, step: Step) -> Array:
    """The weight at a generator step, fp32: 0 before `start`, from there `ramp` equal rises to `weight`."""
    counted = jnp.asarray(step, jnp.float32) - spec.start + 1
    return spec.weight * jnp.clip(counted / max(spec.ramp, 1), 0.0, 1.0)


def reward_value(spec: RewardSpec, scores: Array) -> Array:
    """Scores `[b]` in the spec's units, fp32."""
    scores = scores.astype(jnp.float32)
    if spec.units == "raw":
        return scores
    if not spec.std:
        raise UserError(f"Reward {spec.name!r}: units 'z' need the mean and std of the teacher's scores.")
    return (scores - spec.mean) / spec.std


def shortfall(spec: RewardSpec, scores: Array) -> Array:
    """What a score lacks, `[b]` fp32: `relu(margin - value)`, or `-value` without a margin."""
    value = reward_value(spec, scores)
    return -value if spec.margin is None else jax.nn.relu(spec.margin - value)


def refl_loss(specs: Sequence[RewardSpec], scores: Mapping[str, Array], step: Step) -> tuple[Array, dict[str, Array]]:
    """The reward loss of a batch (DMDR eq. 2 without the distribution matching term).

    Args:
      specs: the rewards that count.
      scores: by reward name, `[b]`; may hold more than `specs` names.
      step: generator step, for start and ramp.

    Returns:
      (loss, metrics): fp32 scalars; metrics `reward/loss` and per reward `reward/NAME` (mean score),
      `reward/NAME/weight` and, with a margin, `reward/NAME/beyond_margin` (fraction without gradient).
    """
    loss = jnp.zeros((), jnp.float32)
    metrics: dict[str, Array] = {}
    for spec in specs:
        lack = shortfall(spec, scores[spec.name])
        weight = reward_weight(spec, step)
        loss = loss + weight * lack.mean()
        metrics[f"reward/{spec.name}"] = scores[spec.name].astype(jnp.float32).mean()
        metrics[f"reward/{spec.name}/weight"] = weight
        if spec.margin is not None:
            metrics[f"reward/{spec.name}/beyond_margin"] = (lack <= 0).astype(jnp.float32).mean()
    metrics["reward/loss"] = loss
    return loss, metrics


def combined_reward(specs: Sequence[RewardSpec], scores: Mapping[str, Array], step: Step) -> Array:
    """`sum_m w_m(step) v_m`, `[b]` fp32: one number per sample, for ranking and for advantages."""
    return sum((reward_weight(s, step) * reward_value(s, scores[s.name]) for s in specs), jnp.float32(0.0))


def differ(scores: Array) -> Array:
    """Whether the scores `[..., g]` of a group are not all equal, `[...]`."""
    return scores.max(-1) > scores.min(-1)


def group_z_scores(scores: Array, floor: float = GROUP_FLOOR) -> Array:
    """Scores of the samples of each prompt in standard deviations of their group.

    Args:
      scores: `[..., g]`, the g samples of a prompt along the last axis.
      floor: added to the standard deviation (Flow-GRPO: 1e-4).

    Returns:
      `(s - mean) / (std + floor)`, fp32, of the same shape; zeros for a group of one or of equal scores.
    """
    scores = scores.astype(jnp.float32)
    centred = scores - scores.mean(-1, keepdims=True)
    # The mean of equal numbers may differ from them in the last digit, which the floor would let through.
    centred = jnp.where(differ(scores)[..., None], centred, 0.0)
    return centred / (jnp.sqrt((centred * centred).mean(-1, keepdims=True)) + floor)
