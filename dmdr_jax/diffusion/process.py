"""Noise processes: how data becomes noise, and what a network's output says about both.

A process fixes two coefficients and the meaning of the network's output. With data ``x0``, noise ``e`` and
a time t in [0, 1], t = 1 being the noisiest ::

    x_t = alpha(t) x0 + sigma(t) e                                                          (1)

**Flow** (rectified flow, Stable Diffusion 3)::

    alpha = 1 - t,  sigma = t,  output v = e - x0                                           (2)
    x0 = x_t - t v,  e = x_t + (1 - t) v                           from (1), (2)            (3)

**Variance preserving** (DDPM, Stable Diffusion XL), on the training steps k = 0 .. K - 1 with
``abar_k = prod_{j <= k} (1 - beta_j)``::

    alpha_k = sqrt(abar_k),  sigma_k = sqrt(1 - abar_k),  t = (k + 1) / K                   (4)
    output e:              x0 = (x_t - sigma e) / alpha                                     (5)
    output v = alpha e - sigma x0:  x0 = alpha x_t - sigma v,  e = sigma x_t + alpha v      (6)

so that t = 0 is clean data here too, and the four-step grid 999, 749, 499, 249 of DMD2 is
t = 1, .75, .5, .25. Between the steps ``sigma / alpha`` is interpolated linearly, as diffusers does.

All conversions run in fp32 whatever the network computes in: ``x0_fake - x0_real`` is a small
difference of nearly equal numbers, and (5) divides by alpha, .068 at SDXL's noisiest step.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError

Array = jax.Array

PREDICTIONS = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear")


def _rows(t: Array, x: Array) -> Array:
    """Shapes ``t`` (scalar or ``[b]``) to broadcast against ``x`` of shape ``[b, ...]``, in fp32 or wider."""
    t = jnp.asarray(t, jnp.promote_types(jnp.result_type(t), jnp.float32))
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Process:
    """What every process offers: times are scalars or ``[b]``, states ``[b, ...]``, results fp32 or wider."""

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        """``alpha(t), sigma(t)`` of equation (1), of the shape of ``t``; exactly (1, 0) at t = 0."""
        raise NotImplementedError

    def target(self, x0: Array, noise: Array, t: Array) -> Array:
        """What the network is trained to output at ``t``."""
        raise NotImplementedError

    def to_x0(self, x_t: Array, output: Array, t: Array) -> Array:
        """The data estimate that an output stands for."""
        raise NotImplementedError

    def to_eps(self, x_t: Array, output: Array, t: Array) -> Array:
        """The noise estimate that an output stands for."""
        raise NotImplementedError

    def model_time(self, t: Array) -> Array:
        """The timestep that the network is conditioned on."""
        raise NotImplementedError

    def time_of(self, timestep: float) -> float:
        """The time at which the network is conditioned on ``timestep``: the inverse of `model_time`."""
        raise NotImplementedError

    def snap(self, t: Array) -> Array:
        """The nearest time that the network was trained at."""
        raise NotImplementedError

    def add_noise(self, x0: Array, noise: Array, t: Array) -> Array:
        """Equation (1)."""
        alpha, sigma = self.coefficients(_rows(t, x0))
        return alpha * _wide(x0) + sigma * _wide(noise)

    def eps_from_x0(self, x_t: Array, x0: Array, t: Array) -> Array:
        """The noise that (1) implies for a given data estimate; ``t`` must be positive."""
        alpha, sigma = self.coefficients(_rows(t, x_t))
        return (_wide(x_t) - alpha * _wide(x0)) / sigma


@dataclasses.dataclass(frozen=True)
class Flow(Process):
    """Rectified flow, equations (2) and (3); ``time_scale`` turns t into the network's timestep input."""

    time_scale: float = 1000.0

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        return 1.0 - t, t

    def target(self, x0: Array, noise: Array, t: Array) -> Array:
        return _wide(noise) - _wide(x0)

    def to_x0(self, x_t: Array, output: Array, t: Array) -> Array:
        return _wide(x_t) - _rows(t, x_t) * _wide(output)

    def to_eps(self, x_t: Array, output: Array, t: Array) -> Array:
        return _wide(x_t) + (1.0 - _rows(t, x_t)) * _wide(output)

    def model_time(self, t: Array) -> Array:
        return jnp.asarray(t, jnp.float32) * self.time_scale

    def time_of(self, timestep: float) -> float:
        return timestep / self.time_scale

    def snap(self, t: Array) -> Array:
        return t


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Process):
    """DDPM's process on K training steps, equations (4) to (6); the defaults are Stable Diffusion XL's.

    Attributes:
      betas: how beta runs from ``beta_start`` to ``beta_end``: "linear", or "scaled_linear" in its square root.
      prediction: what the network outputs, "epsilon" or "v_prediction".
      zero_terminal_snr: abar is rescaled to end at 0 (Lin et al. 2024, arXiv 2305.08891, algorithm 1).
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: str = "scaled_linear"
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> "VariancePreserving":
        """Reads a ``scheduler_config.json`` of any of diffusers' schedulers for DDPM models.

        Raises:
          UserError: it is a flow model's, or asks for something that is not known here.
        """
        name = config.get("_class_name", "EulerDiscreteScheduler")
        if "beta_start" not in config:
            raise UserError(
                f"the scheduler {name} has no beta_start: it is not a scheduler of a noise-predicting model."
            )
        if config.get("trained_betas") is not None:
            raise UserError(f"the scheduler {name} has trained_betas, which are not supported; set it to null.")
        process = cls(
            train_steps=config.get("num_train_timesteps", 1000),
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            betas=config.get("beta_schedule", "linear"),
            prediction=config.get("prediction_type", "epsilon"),
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )
        for what, value, known in (
            ("prediction_type", process.prediction, PREDICTIONS),
            ("beta_schedule", process.betas, BETA_SCHEDULES),
        ):
            if value not in known:
                raise UserError(f"the scheduler's {what} is {value!r}; supported are {' and '.join(known)}.")
        return process

    def alphas_cumprod(self) -> np.ndarray:
        """abar of every training step, ``[K]`` float64."""
        return _alphas_cumprod(self)

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        ratios = jnp.asarray(_ratios(self), jnp.promote_types(jnp.result_type(t), jnp.float32))
        position = self.model_time(t) + 1.0
        below = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, self.train_steps - 1)
        fraction = position - below
        ratio = (1.0 - fraction) * ratios[below] + fraction * ratios[below + 1]
        alpha = jax.lax.rsqrt(1.0 + ratio * ratio)
        return alpha, ratio * alpha

    def target(self, x0: Array, noise: Array, t: Array) -> Array:
        if self.prediction == "epsilon":
            return _wide(noise)
        alpha, sigma = self.coefficients(_rows(t, x0))
        return alpha * _wide(noise) - sigma * _wide(x0)

    def to_x0(self, x_t: Array, output: Array, t: Array) -> Array:
        alpha, sigma = self.coefficients(_rows(t, x_t))
        if self.prediction == "epsilon":
            return (_wide(x_t) - sigma * _wide(output)) / alpha
        return alpha * _wide(x_t) - sigma * _wide(output)

    def to_eps(self, x_t: Array, output: Array, t: Array) -> Array:
        if self.prediction == "epsilon":
            return _wide(output)
        alpha, sigma = self.coefficients(_rows(t, x_t))
        return sigma * _wide(x_t) + alpha * _wide(output)

    def model_time(self, t: Array) -> Array:
        """``k = K t - 1``; a whole number where t is (k + 1) / K up to rounding."""
        k = jnp.asarray(t, jnp.promote_types(jnp.result_type(t), jnp.float32)) * self.train_steps - 1.0
        nearest = jnp.round(k)
        return jnp.where(jnp.abs(k - nearest) < _WHOLE, nearest, k)

    def time_of(self, timestep: float) -> float:
        return (timestep + 1.0) / self.train_steps

    def snap(self, t: Array) -> Array:
        k = jnp.clip(jnp.round(self.model_time(t)), 0, self.train_steps - 1)
        return (k + 1.0) / self.train_steps


_WHOLE = 1e-3
"""Steps k closer than this to a whole number are meant to be whole: fp32 cannot tell 0.4 from 400/1000."""

_ALMOST_ZERO = 2.0**-24
"""diffusers' abar in place of 0 at the last step of a schedule with zero terminal signal."""


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(process: VariancePreserving) -> np.ndarray:
    start, end, steps = process.beta_start, process.beta_end, process.train_steps
    if process.betas == "linear":
        betas = np.linspace(start, end, steps)
    else:
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    alphas_cumprod = np.cumprod(1.0 - betas)
    if process.zero_terminal_snr:
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_cumprod[-1] = _ALMOST_ZERO
    return alphas_cumprod


@functools.lru_cache(maxsize=8)
def _ratios(process: VariancePreserving) -> np.ndarray:
    """``sigma / alpha`` at clean data and at every training step, ``[K + 1]`` float64."""
    alphas_cumprod = _alphas_cumprod(process)
    return np.concatenate([[0.0], np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)])
