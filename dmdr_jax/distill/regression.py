"""Regression on the teacher's ODE: where the student is called, and what its answer costs.

A pair is noise e and the latents x that the teacher's sampler makes of it. The student is called at a grid
index i, uniform per sample::

    z = e                                       i = 0: what it is called with when it draws
    z = alpha(t_i) x + sigma(t_i) n,  n fresh   i > 0: what the renoising sampler calls it with    (1)
    L = mean_b rho( mean_hwc (x0(z, t_i) - x)^2 )                                                  (2)

For one step this is the initialisation of DMD2's one-step student (arXiv 2405.14867), on latents in place of
LPIPS on decoded images.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.process import Process

Array = jax.Array

HUBER = 0.00054
"""c of the Pseudo-Huber loss, per root of the dimension as in the paper; it supposes latents of a deviation near 1."""

LOSSES: dict[str, Callable[[Array], Array]] = {
    "mse": lambda error: error,
    "huber": lambda error: jnp.sqrt(error + HUBER**2) - HUBER,
}
"""rho of equation (2), of a sample's mean squared error.

``huber`` is Pseudo-Huber on the sample as a vector (Song & Dhariwal 2023, arXiv 2310.14189): the gradient of
every sample is of one size, so that the noisiest step, where errors are largest, does not drown the others.
"""


def regression_input(
    process: Process, grid: Sequence[float], noise: Array, latents: Array, key: Array
) -> tuple[Array, Array]:
    """Equation (1): the student's inputs ``z`` ``[b, h, w, c]`` and their times ``[b]``, both fp32.

    Args:
      grid: the student's times, ``steps + 1`` of them.
      noise, latents: e and x of the pairs, ``[b, h, w, c]``.
      key: of indices and fresh noise.
    """
    key_index, key_noise = jax.random.split(key)
    index = jax.random.randint(key_index, latents.shape[:1], 0, len(grid) - 1)
    t = jnp.asarray(grid, jnp.float32)[index]
    renoised = process.add_noise(latents, jax.random.normal(key_noise, latents.shape, jnp.float32), t)
    return jnp.where((index == 0)[:, None, None, None], noise, renoised), t


def squared_error(x0: Array, latents: Array) -> Array:
    """The mean squared error of every sample, ``[b]``, fp32."""
    return jnp.mean((x0 - latents) ** 2, axis=(1, 2, 3))
