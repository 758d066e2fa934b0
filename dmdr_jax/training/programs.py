"""The compiled programs of a run, as the loop runs them and as `dmdr_jax.plan` compiles them for machines elsewhere."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from dmdr_jax.objectives.base import Term
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.state import TrainState
from dmdr_jax.training.step import Plan, fake_step, generator_step


def fake_program(plan: Plan, layout: Layout, state: TrainState) -> Any:
    """The update of the fake score, jitted; see `update_program`."""
    return update_program(partial(fake_step, plan), layout, state)


def generator_program(plan: Plan, terms: Sequence[Term], layout: Layout, state: TrainState) -> Any:
    """The update of the generator by the sum of ``terms``, jitted; see `update_program`."""
    return update_program(partial(generator_step, plan, tuple(terms)), layout, state)


def update_program(update: Callable, layout: Layout, state: Any) -> Any:
    """An update on a mesh, jitted: its first argument, the state, is donated, and its first result lies where that was.

    Args:
      update: ``(state, ...) -> (state, metrics)``.
      state: arrays, or shapes with shardings.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(layout.on_mesh(update), donate_argnums=0, out_shardings=(where, None))
