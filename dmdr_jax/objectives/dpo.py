"""Online direct preference optimisation: each group's best sample against its worst, by the reward.

Two forms, with s = sigmoid and a reference student that is the student of the end of the cold start or a later one:

**Transitions** (PSO, arXiv 2410.03190; DMDR's authors advise it for distilled students, whose velocity is no score).
On the stored steps of two rollouts of the student's own, ``d = log pi(z_{k+1} | z_k) - log pi_ref(z_{k+1} | z_k)`` ::

    L = -log s( beta (d~_w - d~_l) ),   d~ = log clip(exp d, 1 - e, 1 + e)                                  (1)

averaged over steps. Outside the clip a side gives no gradient.

**Denoising** (Diffusion-DPO, arXiv 2311.12908; Flow-GRPO's code). Both samples are renoised to one time of the
student's own grid with one noise, and m is the mean squared error of the network's output ::

    L = -log s( -(beta / 2) ( (m(w) - m_ref(w)) - (m(l) - m_ref(l)) ) )                                      (2)

Both are log 2 where the student is its reference. Where all samples of a prompt have one reward there is no
preference, and the prompt counts log 2 without a gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import (
    DENOISING_PAIRS,
    GROUPS,
    PAIRS,
    REFERENCE,
    SAMPLE_REWARDS,
    Context,
    Metrics,
    as_groups,
)
from dmdr_jax.rewards.combine import differ

Array = jax.Array

FORMS = ("transitions", "denoising")


@dataclasses.dataclass(frozen=True)
class PairPreference:
    """(1) or (2) as a term.

    Attributes:
      ranking: what makes winner and loser.
      beta: 50 for transitions (PSO), 100 for denoising (SD3.5 in Flow-GRPO's code), both with means over elements.
      clip: e of (1).
    """

    ranking: Advantages
    form: str = "transitions"
    beta: float = 50.0
    clip: float = 0.1
    weight: float = 1.0
    name: str = "dpo"

    @property
    def needs(self) -> frozenset[str]:
        pairs = PAIRS if self.form == "transitions" else DENOISING_PAIRS
        return frozenset({GROUPS, SAMPLE_REWARDS, REFERENCE, pairs})

    def active(self, step: int) -> bool:
        return self.weight != 0.0 and step >= self.ranking.start

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        if self.form == "transitions":
            margin = transition_margin(ctx.pairs.log_prob, ctx.pairs.reference_log_prob, self.clip)
        else:
            margin = denoising_margin(ctx.pair_errors.student, ctx.pair_errors.reference)
        decided = differ(as_groups(self.ranking(ctx.sample_rewards, ctx.step, ctx.group), ctx.group))
        margin = jnp.where(decided.reshape(-1, *(1,) * (margin.ndim - 1)), margin, 0.0)
        preference = -jax.nn.log_sigmoid(self.beta * margin).mean()
        loss = self.weight * self.ranking.strength(ctx.step) * preference
        scores = {s.name: ctx.sample_rewards[s.name].astype(jnp.float32) for s in self.ranking.specs}
        rewards = {f"reward/{name}": score.mean() for name, score in scores.items()}
        right = 0.5 * (1.0 + jnp.sign(margin)).mean()  # where both sides are at the clip they are even
        return loss, {"dpo/loss": loss, "dpo/preference": preference, "dpo/right": right} | rewards


def transition_margin(log_prob: Array, reference: Array, clip: float) -> Array:
    """``d~_w - d~_l`` ``[prompts, m]`` of log-probabilities ``[prompts, 2, m]``, winners first."""
    ratio = jnp.log(jnp.clip(jnp.exp(log_prob - reference), 1.0 - clip, 1.0 + clip))
    return ratio[:, 0] - ratio[:, 1]


def denoising_margin(student: Array, reference: Array) -> Array:
    """Half of what the winner's error fell more than the loser's, ``[prompts]``, of errors ``[prompts, 2]``."""
    change = student - reference
    return -0.5 * (change[:, 0] - change[:, 1])


def best_and_worst(values: Array) -> Array:
    """Indices ``[prompts, 2]`` of the largest and the smallest of ``values`` ``[prompts, group]``; never the same one.

    Of equal values the first is best and the last is worst.
    """
    last = values.shape[1] - 1
    return jnp.stack([values.argmax(1), last - values[:, ::-1].argmin(1)], axis=1)
