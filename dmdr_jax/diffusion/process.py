"""Noise processes: how data becomes noise, and what a network's output says about both.

A process fixes the forward operator and the meaning of the network's output. For the flow
(rectified) process of Stable Diffusion 3, with data ``x0`` and noise ``e``::

    x_t = (1 - t) x0 + t e          t in [0, 1], t = 1 is noise      (1)
    v   = e - x0                     the network's output             (2)
    x0  = x_t - t v                  from (1), (2)                    (3)
    e   = x_t + (1 - t) v            from (1), (2)                    (4)

All conversions run in fp32 whatever the network computes in: ``x0_fake - x0_real`` is a small
difference of nearly equal numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


def _rows(t: Array, x: Array) -> Array:
    """Shapes ``t`` (scalar or ``[b]``) to broadcast against ``x`` of shape ``[b, ...]``, in fp32 or wider."""
    t = jnp.asarray(t, jnp.promote_types(jnp.result_type(t), jnp.float32))
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Flow:
    """Rectified flow, equations (1) to (4); ``time_scale`` turns t into the network's timestep input."""

    time_scale: float = 1000.0

    def add_noise(self, x0: Array, noise: Array, t: Array) -> Array:
        """Equation (1): ``x_t`` from data and noise ``[b, ...]`` at times ``t`` (scalar or ``[b]``)."""
        t = _rows(t, x0)
        return (1.0 - t) * _wide(x0) + t * _wide(noise)

    def target(self, x0: Array, noise: Array) -> Array:
        """Equation (2): what the network is trained to output."""
        return _wide(noise) - _wide(x0)

    def to_x0(self, x_t: Array, output: Array, t: Array) -> Array:
        """Equation (3)."""
        return _wide(x_t) - _rows(t, x_t) * _wide(output)

    def to_eps(self, x_t: Array, output: Array, t: Array) -> Array:
        """Equation (4)."""
        return _wide(x_t) + (1.0 - _rows(t, x_t)) * _wide(output)

    def eps_from_x0(self, x_t: Array, x0: Array, t: Array) -> Array:
        """The noise that (1) implies for a given data estimate; ``t`` must be positive."""
        t = _rows(t, x_t)
        return (_wide(x_t) - (1.0 - t) * _wide(x0)) / t

    def sigma_ratio(self, t: Array) -> Array:
        """Noise over signal, ``t / (1 - t)``: the noise level on the EDM axis."""
        t = jnp.asarray(t, jnp.float32)
        return t / (1.0 - t)

    def model_time(self, t: Array) -> Array:
        """The timestep the network is conditioned on."""
        return jnp.asarray(t, jnp.float32) * self.time_scale
