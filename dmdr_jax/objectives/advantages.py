"""Group statistics: how much better a sample is than others of its prompt.

    A = clip( (r - mean_group r) / (std + 1e-4), +- limit )                                     (1)

the mean is over the samples of a prompt, the deviation over the same ("group"; GRPO), over the whole batch ("batch";
Flow-GRPO's default) or left out ("none"; Dr. GRPO). Several rewards are each brought to (1) and then averaged with
their weights ("each"; RTDMD's practice, scales do not matter), or added with their weights first ("sum"; Flow-GRPO).
While rewards set in, their weights count here against one another; how much they count at all is `Advantages.strength`,
with which a term multiplies.

The mean counts the sample itself: of the score-function gradient (G - 1)/G is left, G being the group's size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.base import as_groups
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.combine import GROUP_FLOOR, combined_reward, group_z_scores, reward_value, reward_weight

Array = jax.Array

NORMALISE = ("group", "batch", "none")
COMBINE = ("each", "sum")


@dataclasses.dataclass(frozen=True)
class Advantages:
    """From rewards to advantages.

    Attributes:
      specs: the rewards that count, with their weights.
      normalise, combine, limit: see the module's text.
    """

    specs: tuple[RewardSpec, ...]
    normalise: str = "group"
    combine: str = "each"
    limit: float = 5.0

    @property
    def start(self) -> int:
        """The first step at which one of the rewards counts."""
        return min((spec.start for spec in self.specs if spec.weight), default=0)

    def __call__(self, rewards: Mapping[str, Array], step: Array, group: int) -> Array:
        """Advantages ``[b]`` of raw rewards ``[b]`` by name, without gradient."""
        rewards = jax.lax.stop_gradient(dict(rewards))
        if self.combine == "sum":
            values = combined_reward(self.specs, rewards, step)
            return self.of(values / jnp.maximum(self.strength(step), 1e-12), group)
        weights = {spec.name: reward_weight(spec, step) for spec in self.specs}
        whole = sum(jnp.abs(w) for w in weights.values())
        parts = [weights[s.name] * self.of(reward_value(s, rewards[s.name]), group) for s in self.specs]
        return sum(parts) / jnp.maximum(whole, 1e-12)

    def of(self, values: Array, group: int) -> Array:
        """(1) of one number per row ``[b]``."""
        groups = as_groups(values.astype(jnp.float32), group)
        centred = groups - groups.mean(1, keepdims=True)
        if self.normalise == "group":
            centred = group_z_scores(groups)
        elif self.normalise == "batch":
            centred = centred / (groups.std() + GROUP_FLOOR)
        return jnp.clip(centred, -self.limit, self.limit).reshape(-1)

    def strength(self, step: Array) -> Array:
        """How much of their full weight the rewards have at ``step``, in [0, 1]: the ramp."""
        full = sum(abs(spec.weight) for spec in self.specs)
        now: Any = sum(jnp.abs(reward_weight(spec, step)) for spec in self.specs)
        return now / full
