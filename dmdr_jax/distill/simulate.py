"""Backward simulation: the inputs on which the student is trained, drawn from its own sampler.

A generator update back-propagates through one student call at one grid level t_i. Two ways of
making the input z_i of that call are built:

* a kernel's name (``renoise``, ``ode``, ``cps(eta)``): z_i is the i-th state of the very sampler that
  draws images afterwards (`dmdr_jax.diffusion.sampler`). ``renoise`` is DMD2's backward simulation.
* ``ode_final``: the student's whole Euler trajectory is run and its *final* sample is renoised to t_i,
  as DMDR's authors ran their SD3 models. Inference then uses ``ode``; the inputs differ from the states
  that sampler visits, which is why it is not the default.

At i = 0 the input is pure noise either way.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.diffusion.process import Process
from dmdr_jax.diffusion.sampler import OutputFn, Trajectory, at_index, rollout, run_prefix, sample

Array = jax.Array


class StudentInput(NamedTuple):
    """Where the student is called: input ``z`` ``[b, h, w, c]`` at times ``t`` ``[b]``, grid index ``[b]``."""

    z: Array
    t: Array
    index: Array  # type: ignore[assignment]  # tuple.index is not missed
    simulated: Array | None
    """The simulated clean sample [b, h, w, c]: the final one for ``ode_final``, else the student's x0 at z."""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """How student inputs are made.

    Attributes:
      mode: ``ode_final`` or a kernel's name.
      grid: the student's times, ``steps + 1`` of them.
      shared_index: draw one grid index for the whole batch (and simulate only the prefix it needs)
        in place of one per sample.
    """

    mode: str
    grid: tuple[float, ...]
    shared_index: bool = False

    @property
    def kernel(self) -> Kernel:
        """The kernel to draw images with."""
        return parse_kernel("ode" if self.mode == "ode_final" else self.mode)

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    def draw_index(self, key: Array, batch: int, group: int = 1, last: bool = False) -> Array:
        """Grid indices ``[batch]``: one per ``group`` consecutive rows, one for all, or the ``last`` everywhere."""
        if last:
            return jnp.full((batch,), self.steps - 1, jnp.int32)
        if self.shared_index:
            return jnp.broadcast_to(jax.random.randint(key, (), 0, self.steps), (batch,))
        index = jax.random.randint(key, (batch // group,), 0, self.steps)
        return index if group == 1 else jnp.broadcast_to(index[:, None], (batch // group, group)).reshape(-1)

    def student_input(
        self,
        output_fn: OutputFn,
        process: Process,
        noise: Array,
        key: Array,
        with_sample: bool = True,
        group: int = 1,
        last: bool = False,
    ) -> StudentInput:
        """Simulates from ``noise`` without gradient and picks a grid index per sample, see `draw_index`.

        Without ``with_sample`` the network calls that only ``simulated`` needs are left out.
        """
        output_fn = _without_gradient(output_fn)
        key_index, key_kernel, key_renoise = jax.random.split(key, 3)
        batch = noise.shape[0]
        index = self.draw_index(key_index, batch, group, last)
        t = jnp.asarray(self.grid, jnp.float32)[index]
        if self.mode == "ode_final":
            final = sample(output_fn, process, self.kernel, noise, self.grid, key_kernel)
            fresh = jax.random.normal(key_renoise, noise.shape, noise.dtype)
            z = _rows_where(index == 0, noise, process.add_noise(final, fresh, t))
            return StudentInput(z, t, index, final)
        if self.shared_index:
            mean = (self.steps - 1) / 2
            z = run_prefix(output_fn, process, self.kernel, noise, self.grid, key_kernel, index[0], mean)
            return StudentInput(z, t, index, process.to_x0(z, output_fn(z, t), t) if with_sample else None)
        grid = self.grid if with_sample else self.grid[:-1]
        trajectory = rollout(output_fn, process, self.kernel, noise, grid, key_kernel)
        x0 = at_index(trajectory.x0, index) if with_sample else None
        return StudentInput(at_index(trajectory.states, index), t, index, x0)

    def whole_input(
        self,
        output_fn: OutputFn,
        process: Process,
        kernel: Kernel,
        noise: Array,
        key: Array,
        keys: Array | None = None,
        group: int = 1,
        last: bool = False,
    ) -> tuple[StudentInput, Trajectory]:
        """A whole rollout without gradient, and the student's input among its states.

        Args:
          kernel: of the rollout; the mode's own or another.
          keys: the noise of the steps, where not drawn from ``key``: see `dmdr_jax.diffusion.sampler.step_noise`.
        """
        key_index, key_kernel, _ = jax.random.split(key, 3)
        index = self.draw_index(key_index, noise.shape[0], group, last)
        randomness = key_kernel if keys is None else keys
        trajectory = rollout(_without_gradient(output_fn), process, kernel, noise, self.grid, randomness)
        z = at_index(trajectory.states, index)
        return StudentInput(z, jnp.asarray(self.grid, jnp.float32)[index], index, None), trajectory


def _without_gradient(output_fn: OutputFn) -> OutputFn:
    return lambda z, t: jax.lax.stop_gradient(output_fn(z, t))


def _rows_where(condition: Array, yes: Array, no: Array) -> Array:
    return jnp.where(condition[:, None, None, None], yes, no)
