"""Transition kernels: how a sampler moves from noise level t to t' once the network has spoken.

With the network's estimates ``x0`` and ``e`` of data and noise at time t, the kernels ``ode``, ``renoise`` and
``cps(eta)`` are ::

    z' = alpha(t') x0 + sigma(t') (cos(eta pi/2) e + sin(eta pi/2) n),    n ~ N(0, I)              (1)

with the process's coefficients: coefficients-preserving sampling (CPS, arXiv 2509.05952), as the noise level after
the step is exactly sigma(t'). ``eta = 0`` is the Euler step of the probability flow ODE (``ode``; DDIM for the
variance preserving process, and Euler in sigma / alpha, which is the same), ``eta = 1`` replaces all noise
(``renoise``, the consistency-model sampler of DMD2), anything between is ``cps(eta)``.
The step to t' = 0 returns ``x0`` for every one of them.

Two more are Euler-Maruyama steps of stochastic equations with the marginals of a flow, v = e - x0, dt = t' - t < 0::

    flow_sde(a):  mean = z (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt,  s = a sqrt(t / (1 - t)),
                  std = s sqrt(-dt)                                    Flow-GRPO, arXiv 2505.05470      (2)
    dance(eta):   mean = z + v dt - eta^2 score dt / 2,  score = -(z - (1 - t) x0) / t^2,
                  std = eta sqrt(-dt)                                  DanceGRPO, arXiv 2505.07818      (3)

(at t = 1, where s is infinite, 1 - t is replaced by 1 - t'). They are meant for many small steps. In four steps they
leave more noise than the level they arrive at (`tests/diffusion/test_kernels.py` has the numbers: .658 where .5 is
due, and .552 in the image), so that students are better trained with (1); and their last step returns ``x0`` here
unless ``noisy_end`` asks for the step as it was published.

Every stochastic kernel is a Gaussian policy: `Kernel.transition` has its mean and deviation, `log_prob` the density.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.process import Flow, Process
from dmdr_jax.errors import UserError

Array = jax.Array

FAMILIES = ("cps", "flow_sde", "dance")
_LAST = 2e-3
"""Targets below this are the end of the grid (the authors' grid ends at t = 0.001)."""


class Transition(NamedTuple):
    """The Gaussian of a step: ``mean`` ``[b, ...]`` and ``std``, which broadcasts against it; 0 where deterministic."""

    mean: Array
    std: Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
      eta: the family's number: eta of (1) and (3), a of (2).
      family: "cps" for (1), "flow_sde" for (2), "dance" for (3).
      noisy_end: (2) and (3) add noise in the last step too.
    """

    eta: float
    family: str = "cps"
    noisy_end: bool = False

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def check(self, process: Process) -> None:
        """UserError where the kernel is not one for this process."""
        if self.family != "cps" and not isinstance(process, Flow):
            raise UserError(f"the kernel {self} is for flow models; take renoise or cps(eta) for this one.")

    def step(
        self,
        process: Process,
        x0: Array,
        eps: Array,
        t_next: Array,
        noise: Array | None,
        z: Array | None = None,
        t: Array | None = None,
    ) -> Array:
        """``z'`` at ``t_next`` (scalar or ``[b]``), from estimates and fresh noise of shape ``[b, ...]`` (fp32).

        (2) and (3) need the state ``z`` and its time ``t`` as well.
        """
        if self.family != "cps":
            assert z is not None and t is not None and noise is not None
            mean, std = self.transition(process, z, t, x0, eps, t_next)
            return mean + std * noise
        alpha, sigma = process.coefficients(_rows(t_next, x0))
        if not self.stochastic:
            return alpha * x0 + sigma * eps
        assert noise is not None
        if self.eta == 1.0:
            return alpha * x0 + sigma * noise
        angle = self.eta * math.pi / 2.0
        return alpha * x0 + sigma * (math.cos(angle) * eps + math.sin(angle) * noise)

    def transition(self, process: Process, z: Array, t: Array, x0: Array, eps: Array, t_next: Array) -> Transition:
        """Mean and deviation of `step`, times scalar or ``[b]``; differentiable in ``x0`` and ``eps``."""
        t, t_next = _rows(t, x0), _rows(t_next, x0)
        if self.family == "cps":
            alpha, sigma = process.coefficients(t_next)
            carried, fresh = _parts(self.eta)
            mean = alpha * x0 if carried == 0.0 else alpha * x0 + sigma * carried * eps
            return Transition(mean, sigma * fresh)
        dt, velocity = t_next - t, eps - x0
        if self.family == "flow_sde":
            rate = self.eta * jnp.sqrt(t / (1.0 - jnp.where(t >= 1.0, t_next, t)))
            drift = rate**2 / (2.0 * t)
            mean = z * (1.0 + drift * dt) + velocity * (1.0 + drift * (1.0 - t)) * dt
        else:
            rate = jnp.full_like(t, self.eta)
            score = -(z - (1.0 - t) * x0) / t**2
            mean = z + velocity * dt - 0.5 * rate**2 * score * dt
        std = rate * jnp.sqrt(-dt)
        if self.noisy_end:
            return Transition(mean, std)
        last = t_next < _LAST
        return Transition(jnp.where(last, x0, mean), jnp.where(last, 0.0, std))

    def __str__(self) -> str:
        if self.family != "cps":
            return f"{self.family}({self.eta:g})"
        return {0.0: "ode", 1.0: "renoise"}.get(self.eta, f"cps({self.eta:g})")


def log_prob(transition: Transition, z_next: Array) -> Array:
    """``log N(z'; mean, std^2)`` per sample, ``[b]``, **averaged** over its elements; ``std`` must be positive.

    The average, as Flow-GRPO and its kin have it, keeps ratios of two policies near 1 at any resolution.
    """
    mean, std = transition
    per_element = -((z_next - mean) ** 2) / (2.0 * std**2) - jnp.log(std) - 0.5 * math.log(2.0 * math.pi)
    return per_element.mean(axis=tuple(range(1, per_element.ndim)))


def gaussian_kl(a: Transition, b: Transition) -> Array:
    """``KL(a || b)`` of two transitions with the same deviation, ``[b]``, averaged over elements."""
    per_element = (a.mean - b.mean) ** 2 / (2.0 * a.std**2)
    return per_element.mean(axis=tuple(range(1, per_element.ndim)))


def parse_kernel(text: str) -> Kernel:
    """``ode``, ``renoise``, ``cps(eta)`` with 0 <= eta <= 1, ``flow_sde(a)`` or ``dance(eta)``.

    Raises:
      UserError: anything else.
    """
    text = text.strip()
    if text in ("ode", "renoise"):
        return Kernel(0.0 if text == "ode" else 1.0)
    match = re.fullmatch(rf"({'|'.join(FAMILIES)})\(\s*(\d*\.?\d+)\s*\)", text)
    if match and (match[1] != "cps" or float(match[2]) <= 1.0):
        return Kernel(float(match[2]), match[1])
    raise UserError(
        f"Unknown kernel {text!r}: use ode, renoise or cps(eta) with 0 <= eta <= 1, e.g. 'cps(0.9)', or for flow models"
        " flow_sde(a) or dance(eta)."
    )


def _parts(eta: float) -> tuple[float, float]:
    """How much of the noise is carried over and how much is fresh."""
    if eta in (0.0, 1.0):
        return 1.0 - eta, eta
    return math.cos(eta * math.pi / 2.0), math.sin(eta * math.pi / 2.0)


def _rows(t: Array | float, x: Array) -> Array:
    """Shapes times ``[b]`` to broadcast against ``[b, ...]``; a scalar stays one."""
    return jnp.reshape(t, (-1, *(1,) * (x.ndim - 1))) if jnp.ndim(t) else jnp.asarray(t)
