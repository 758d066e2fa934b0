"""What a generator objective is: a sum of terms, each a pure function of one shared context.

A term says what it needs; the train step computes the union of the needs of the terms that are
active, at trace time, so that nothing unused enters the program.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import DMDraw

Array = jax.Array
Metrics = dict[str, Array]

DM_DRAW = "dm_draw"
REWARDS_WITH_GRADIENT = "rewards_with_gradient"


class Context(NamedTuple):
    """What the terms of one generator update see.

    Attributes:
      step: generator step.
      x0: the student's data estimate ``[b, h, w, c]``, fp32, carrying gradient.
      index, t: grid index and time of the student's call, ``[b]``.
      draw: the score difference at a renoised x0, if a term needs ``DM_DRAW``.
      images: decoded x0 in [0, 1] ``[b, H, W, 3]``, if a term needs ``REWARDS_WITH_GRADIENT``.
      rewards: raw reward per name ``[b]`` on those images, carrying gradient.
    """

    step: Array
    x0: Array
    index: Array
    t: Array
    draw: DMDraw | None = None
    images: Array | None = None
    rewards: dict[str, Array] | None = None


class Term(Protocol):
    """A generator objective: a pure function of the context. Instances are hashable, static in the compiled step."""

    name: str
    needs: frozenset[str]

    def active(self, step: int) -> bool:
        """Whether the term counts at generator step ``step``; asked on the host, so that idle terms cost nothing."""
        ...

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        """The weighted loss and what to log."""
        ...


def active_terms(terms: Sequence[Term], step: int) -> tuple[Term, ...]:
    """The terms that count at generator step ``step``."""
    return tuple(term for term in terms if term.active(step))


def total_loss(terms: Sequence[Term], ctx: Context) -> tuple[Array, Metrics]:
    """The sum of the terms' losses, and every term's metrics."""
    loss = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    for term in terms:
        value, term_metrics = term(ctx)
        loss = loss + value
        metrics |= term_metrics
    return loss, metrics
