"""The sampler: one function for inference and for the simulation inside training.

Students are trained on the states this very function visits, so that there is no gap between what
a student sees in training and what it sees when somebody draws with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.kernels import Kernel
from dmdr_jax.diffusion.process import Flow

Array = jax.Array
OutputFn = Callable[[Array, Array], Array]
"""Maps a state ``[b, h, w, c]`` and a scalar time to the network's output (guided or not)."""


class Trajectory(NamedTuple):
    """What a rollout visited: ``states[i]`` is the input at grid index i, ``x0[i]`` the estimate there."""

    states: Array  # [steps, b, h, w, c]
    x0: Array  # [steps, b, h, w, c]; x0[-1] is the sample


def advance(
    output_fn: OutputFn, process: Flow, kernel: Kernel, z: Array, t: Array, t_next: Array, key: Array
) -> tuple[Array, Array]:
    """One sampler step from ``z`` at ``t`` to ``t_next``: returns the next state and the x0 estimate at ``z``."""
    out = output_fn(z, t)
    x0 = process.to_x0(z, out, t)
    noise = jax.random.normal(key, z.shape, z.dtype) if kernel.stochastic else None
    return kernel.step(x0, process.to_eps(z, out, t), t_next, noise), x0


def rollout(
    output_fn: OutputFn, process: Flow, kernel: Kernel, noise: Array, grid: Sequence[float] | Array, key: Array
) -> Trajectory:
    """Runs the whole grid from ``noise`` and keeps every state.

    Args:
      output_fn: the network, see `OutputFn`.
      process: the noise process.
      kernel: the transition kernel.
      noise: the initial state ``[b, h, w, c]`` at ``grid[0]``, fp32.
      grid: ``steps + 1`` decreasing times, the last one being the target of the last step (0).
      key: randomness of the kernel; step i uses ``fold_in(key, i)``.
    """
    grid = jnp.asarray(grid, jnp.float32)

    def step(z, inputs):
        i, t, t_next = inputs
        z_next, x0 = advance(output_fn, process, kernel, z, t, t_next, jax.random.fold_in(key, i))
        return z_next, (z, x0)

    _, (states, x0) = jax.lax.scan(step, noise, (jnp.arange(grid.shape[0] - 1), grid[:-1], grid[1:]))
    return Trajectory(states, x0)


def sample(
    output_fn: OutputFn, process: Flow, kernel: Kernel, noise: Array, grid: Sequence[float] | Array, key: Array
) -> Array:
    """As `rollout`, keeping only the final state ``[b, h, w, c]`` at ``grid[-1]``."""
    return run_prefix(output_fn, process, kernel, noise, grid, key, len(grid) - 1)


def run_prefix(
    output_fn: OutputFn,
    process: Flow,
    kernel: Kernel,
    noise: Array,
    grid: Sequence[float] | Array,
    key: Array,
    steps: Array | int,
) -> Array:
    """The state after the first ``steps`` (possibly traced) steps of the grid; no gradient flows through it."""
    grid = jnp.asarray(grid, jnp.float32)

    def body(i, z):
        return advance(output_fn, process, kernel, z, grid[i], grid[i + 1], jax.random.fold_in(key, i))[0]

    return jax.lax.fori_loop(0, steps, body, noise)
