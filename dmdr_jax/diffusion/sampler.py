"""The sampler: one function for inference and for the simulation inside training.

Students are trained on the states this very function visits, so that there is no gap between what
a student sees in training and what it sees when somebody draws with it.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.kernels import Kernel
from dmdr_jax.diffusion.process import Process

Array = jax.Array
OutputFn = Callable[[Array, Array], Array]
"""Maps a state ``[b, h, w, c]`` and a scalar time to the network's output (guided or not)."""

MEAN_TURNS = "mean_turns_"
"""Begins the name of a scope (`jax.named_scope`) around a loop whose turns are drawn at random; their mean ends it."""


class Trajectory(NamedTuple):
    """What a rollout visited: ``states[i]`` is the state at grid index i, ``x0[i]`` the estimate there."""

    states: Array  # [steps + 1, b, h, w, c], from the initial noise to the end of the grid
    x0: Array  # [steps, b, h, w, c]


def at_index(stack: Array, index: Array) -> Array:
    """Of each row its own step: ``[n, b, ...]`` and ``[b]`` to ``[b, ...]``.

    Row by row, so that a batch that is split over devices is never put together.
    """
    return jax.vmap(lambda steps, i: steps[i], in_axes=(1, 0))(stack, index)


def step_noise(key: Array, i: Array | int, like: Array) -> Array:
    """The noise of step i: from one key for the batch, or from a key per row ``[b]``, which makes rows independent.

    Keys per step and row ``[steps, b]`` are used as they are: rows with equal keys then get equal noise.
    """
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, i), like.shape, like.dtype)
    if key.ndim == 2:
        return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(key[i])
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), like.shape[1:], like.dtype))(key)


def advance(
    output_fn: OutputFn, process: Process, kernel: Kernel, z: Array, i: Array, grid: Array, key: Array
) -> tuple[Array, Array]:
    """Step i of the grid from the state ``z``: returns the next state and the x0 estimate at ``z``."""
    t = grid[i]
    out = output_fn(z, t)
    x0 = process.to_x0(z, out, t)
    noise = step_noise(key, i, z) if kernel.stochastic else None
    return kernel.step(process, x0, process.to_eps(z, out, t), grid[i + 1], noise, z, t), x0


def rollout(
    output_fn: OutputFn, process: Process, kernel: Kernel, noise: Array, grid: Sequence[float] | Array, key: Array
) -> Trajectory:
    """Runs the whole grid from ``noise`` and keeps every state.

    Args:
      output_fn: the network, see `OutputFn`.
      process: the noise process.
      kernel: the transition kernel.
      noise: the initial state ``[b, h, w, c]`` at ``grid[0]``, fp32.
      grid: ``steps + 1`` decreasing times, the last one being the target of the last step (0).
      key: randomness of the kernel, see `step_noise`.
    """
    grid = jnp.asarray(grid, jnp.float32)

    def step(z, i):
        z_next, x0 = advance(output_fn, process, kernel, z, i, grid, key)
        return z_next, (z, x0)

    final, (states, x0) = jax.lax.scan(step, noise, jnp.arange(grid.shape[0] - 1))
    return Trajectory(jnp.concatenate([states, final[None]]), x0)


def sample(
    output_fn: OutputFn, process: Process, kernel: Kernel, noise: Array, grid: Sequence[float] | Array, key: Array
) -> Array:
    """As `rollout`, keeping only the final state ``[b, h, w, c]`` at ``grid[-1]``."""
    return run_prefix(output_fn, process, kernel, noise, grid, key, len(grid) - 1)


def run_prefix(
    output_fn: OutputFn,
    process: Process,
    kernel: Kernel,
    noise: Array,
    grid: Sequence[float] | Array,
    key: Array,
    steps: Array | int,
    mean: float | None = None,
) -> Array:
    """The state after the first ``steps`` steps of the grid; no gradient flows through it.

    Args:
      steps: known or traced.
      mean: of ``steps`` where they are drawn at random; who counts the work takes the loop for so many turns.
    """
    grid = jnp.asarray(grid, jnp.float32)

    def body(i, z):
        return advance(output_fn, process, kernel, z, i, grid, key)[0]

    with contextlib.nullcontext() if mean is None else jax.named_scope(f"{MEAN_TURNS}{mean:g}"):
        return jax.lax.fori_loop(0, steps, body, noise)
