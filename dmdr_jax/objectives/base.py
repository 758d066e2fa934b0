"""What a generator objective is: a sum of terms, each a pure function of one shared context.

A term says what it needs; the train step computes the union of the needs of the terms that are
active, at trace time, so that nothing unused enters the program.

Rows. A batch has b rows. Where an active term needs ``GROUPS``, each run of ``group`` consecutive rows
has one prompt: ``[b, ...]`` is then ``[prompts, group, ...]`` flattened, and `as_groups` gives it back.
The prompt axis is the one that is split over devices, so statistics of a group never leave theirs.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import DMDraw

Array = jax.Array
Metrics = dict[str, Array]

DM_DRAW = "dm_draw"
"""`Context.draw`: the score difference at a renoised point."""
REWARDS_WITH_GRADIENT = "rewards_with_gradient"
"""`Context.images` and `Context.rewards`, carrying gradient to x0."""
REWARDS = "rewards"
"""`Context.images` and `Context.rewards`; no gradient unless another term asks for it."""
GROUPS = "groups"
"""Rows of a group share their prompt and their grid index."""
SAMPLE_REWARDS = "sample_rewards"
"""`Context.sample_rewards`: of the stored rollout's final images, no gradient."""
TRANSITIONS = "transitions"
"""`Context.transitions`: log-probabilities of steps of the stored rollout."""
PAIRS = "pairs"
"""`Context.pairs`: log-probabilities of each group's best and worst rollout, under student and reference."""
DENOISING_PAIRS = "denoising_pairs"
"""`Context.pair_errors`: denoising errors of each group's best and worst sample, of student and reference."""
REFERENCE = "reference"
"""A reference student is kept: with it, `Transitions.kl` and the second halves of pairs."""
REFERENCE_X0 = "reference_x0"
"""`Context.reference_x0`: the reference's prediction at the student's input."""
TARGETS = "targets"
"""`Context.target_gain`: rewards of the implicit target and of the sample; `Context.sampled_x0`: the student's
prediction before the first of the updates that share a rollout; `Context.old_x0`: the old student's."""
DM_REWARD = "dm_reward"
"""`Context.sample_rewards["dm"]`: distribution matching as a number per sample."""
IMPORTANCE = "importance"
"""`Context.importance`: how likelier the student now is to come to its input than when the rollout was made."""
FEATURES = "features"
"""`Context.features`: of the samples, of the reference's samples, in the frozen base."""
ADVERSARY = "adversary"
"""`Context.realness`: what the discriminator makes of the renoised x0, carrying gradient."""
FAKE_ON_ROLLOUT = "fake_on_rollout"
"""The fake score is trained inside the generator's program, on the stored rollout, and nowhere else."""
LAST_STEP = "last_step"
"""The student's call is at the last step of its grid."""

FAKE_SCORE_NEEDS = frozenset({DM_DRAW, TARGETS, DM_REWARD, ADVERSARY, FAKE_ON_ROLLOUT})
"""What is computed from the fake score, which must then be trained."""
SAMPLE_NEEDS = frozenset({SAMPLE_REWARDS, TRANSITIONS, PAIRS, DENOISING_PAIRS, DM_REWARD, IMPORTANCE})
"""What is computed from whole rollouts."""
REUSE = frozenset({TRANSITIONS, PAIRS, DENOISING_PAIRS, IMPORTANCE, TARGETS})
"""What lets a rollout serve several updates."""


class Transitions(NamedTuple):
    """Steps of stored rollouts, seen by the student as it is now.

    Attributes:
      log_prob: of the stored transitions ``[b, m]`` (mean over elements), carrying gradient.
      old_log_prob: the same when the rollout was made.
      kl: to the reference's transition ``[b, m]``, carrying gradient, or None.
      x0: the student's estimates ``[b, m, h, w, c]``, carrying gradient.
      dlogp_dx0: derivative of ``log_prob`` with respect to ``x0``, without gradient, ``[b, m, h, w, c]``.
      scale: the inverse of the fraction of the stochastic steps that m is.
    """

    log_prob: Array
    old_log_prob: Array
    kl: Array | None
    x0: Array
    dlogp_dx0: Array
    scale: float


class Pairs(NamedTuple):
    """Winner (0) and loser (1) of each group: log-probabilities ``[prompts, 2, m]`` of their stored transitions."""

    log_prob: Array
    reference_log_prob: Array


class PairErrors(NamedTuple):
    """Winner (0) and loser (1) of each group: mean squared denoising errors ``[prompts, 2]``, equal time and noise."""

    student: Array
    reference: Array


class TargetGain(NamedTuple):
    """GDMD's view of one implicit target: by reward name ``[b]``, and the spread to measure them in."""

    sample: dict[str, Array]
    target: dict[str, Array]
    spread: dict[str, Array]


class FeatureSets(NamedTuple):
    """Features by key, ``[b, n]`` each: of x0 (carrying gradient) and of the reference's x0 for the same noise."""

    sample: dict[str, Array]
    reference: dict[str, Array] | None


class Context(NamedTuple):
    """What the terms of one generator update see. A field is None where no active term needs it.

    Attributes:
      step: generator step.
      x0: the student's data estimate ``[b, h, w, c]``, fp32, carrying gradient.
      index, t: grid index and time of the student's call, ``[b]``.
      steps: K, of the student's grid.
      group: rows per prompt.
      matched: what distribution matching acts on where it is not x0, carrying gradient (`distill.bridge`).
      draw: the score difference at a renoised x0.
      images: decoded x0 in [0, 1] ``[b, H, W, 3]``.
      rewards: raw reward per name ``[b]`` on those images.

    The other fields are described beside the needs that fill them.
    """

    step: Array
    x0: Array
    index: Array  # type: ignore[assignment]  # tuple.index is not missed
    t: Array
    draw: DMDraw | None = None
    images: Array | None = None
    rewards: dict[str, Array] | None = None
    steps: int = 1
    group: int = 1
    matched: Array | None = None
    sample_rewards: dict[str, Array] | None = None
    transitions: Transitions | None = None
    pairs: Pairs | None = None
    pair_errors: PairErrors | None = None
    reference_x0: Array | None = None
    sampled_x0: Array | None = None
    old_x0: Array | None = None
    target_gain: TargetGain | None = None
    importance: Array | None = None
    features: FeatureSets | None = None
    realness: Array | None = None


MATCHING = {"dm", "adversarial"}
"""Terms that read no reward."""


class Term(Protocol):
    """A generator objective: a pure function of the context. Instances are hashable, static in the compiled step."""

    @property
    def name(self) -> str:
        """What its metrics are filed under."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of the context, of the words above."""
        ...

    def active(self, step: int) -> bool:
        """Whether the term counts at generator step ``step``; asked on the host, so that idle terms cost nothing."""
        ...

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        """The weighted loss and what to log."""
        ...


def active_terms(terms: Sequence[Term], step: int) -> tuple[Term, ...]:
    """The terms that count at generator step ``step``."""
    return tuple(term for term in terms if term.active(step))


def needs_of(terms: Iterable[Term]) -> frozenset[str]:
    """The union of what the terms need."""
    return frozenset().union(*(term.needs for term in terms))


def trains_fake(terms: Iterable[Term]) -> bool:
    """Whether the fake score is read by any of the terms."""
    return bool(needs_of(terms) & FAKE_SCORE_NEEDS)


def separate_fake_updates(terms: Iterable[Term], updates: int) -> int:
    """How many fake updates of their own come before each generator update: 0 where it makes them itself, or none."""
    needs = needs_of(terms)
    return updates if needs & FAKE_SCORE_NEEDS and FAKE_ON_ROLLOUT not in needs else 0


def stage(terms: Sequence[Term], step: int) -> str:
    """What the run is about after ``step`` generator steps, by the terms of its objective that count."""
    active = active_terms(terms, step)
    if {term.name for term in active} <= MATCHING:
        return "matching" if {term.name for term in terms} <= MATCHING else "cold start"
    return "joint stage" if trains_fake(active) else "rewards alone"


def total_loss(terms: Sequence[Term], ctx: Context) -> tuple[Array, Metrics]:
    """The sum of the terms' losses, and every term's metrics."""
    loss = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    for term in terms:
        value, term_metrics = term(ctx)
        loss = loss + value
        metrics |= term_metrics
    return loss, metrics


def as_groups(x: Array, group: int) -> Array:
    """``[b, ...]`` to ``[prompts, group, ...]``."""
    return x.reshape(-1, group, *x.shape[1:])
