"""The compiled programs of a run, as the loop runs them and as `dmdr_jax.plan` compiles them for machines elsewhere."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from dmdr_jax.objectives.base import Term
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.state import TrainState
from dmdr_jax.training.step import Batch, Frozen, Plan, fake_step, generator_step

Update = Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, jax.Array]]]


def fake_program(plan: Plan, layout: Layout, state: TrainState) -> Any:
    """The update of the fake score, jitted; see `_program`."""
    return _program(partial(fake_step, plan), layout, state)


def generator_program(plan: Plan, terms: Sequence[Term], layout: Layout, state: TrainState) -> Any:
    """The update of the generator by the sum of ``terms``, jitted; see `_program`."""
    return _program(partial(generator_step, plan, tuple(terms)), layout, state)


def _program(update: Update, layout: Layout, state: TrainState) -> Any:
    """An update on a mesh: the state is donated, and comes back where it was.

    Args:
      state: arrays, or shapes with shardings.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(layout.on_mesh(update), donate_argnums=0, out_shardings=(where, None))
