"""Transition kernels: how a sampler moves from noise level t to t' once the network has spoken.

With the network's estimates ``x0`` and ``e`` of data and noise at time t, every kernel is ::

    z' = (1 - t') x0 + t' (cos(eta pi/2) e + sin(eta pi/2) n),    n ~ N(0, I)

coefficients-preserving sampling (CPS): the noise level after the step is exactly t'. ``eta = 0``
is the Euler step of the probability flow ODE (``ode``), ``eta = 1`` replaces all noise
(``renoise``, the consistency-model sampler of DMD2), anything between is ``cps(eta)``.
The step to t' = 0 returns ``x0`` for every kernel.
"""

import dataclasses
import math
import re

import jax

from dmdr_jax.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A member of the family above."""

    eta: float

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def step(self, x0: Array, eps: Array, t_next: Array, noise: Array | None) -> Array:
        """``z'`` at ``t_next`` (scalar), from estimates and fresh noise of shape ``[b, ...]`` (fp32)."""
        if not self.stochastic:
            return (1.0 - t_next) * x0 + t_next * eps
        if self.eta == 1.0:
            return (1.0 - t_next) * x0 + t_next * noise
        angle = self.eta * math.pi / 2.0
        return (1.0 - t_next) * x0 + t_next * (math.cos(angle) * eps + math.sin(angle) * noise)

    def __str__(self) -> str:
        return {0.0: "ode", 1.0: "renoise"}.get(self.eta, f"cps({self.eta:g})")


def parse_kernel(text: str) -> Kernel:
    """``ode``, ``renoise`` or ``cps(eta)`` with 0 <= eta <= 1.

    Raises:
      UserError: anything else.
    """
    text = text.strip()
    if text in ("ode", "renoise"):
        return Kernel(0.0 if text == "ode" else 1.0)
    match = re.fullmatch(r"cps\(\s*(\d*\.?\d+)\s*\)", text)
    if match and float(match[1]) <= 1.0:
        return Kernel(float(match[1]))
    raise UserError(f"Unknown kernel {text!r}: use ode, renoise or cps(eta) with 0 <= eta <= 1, e.g. 'cps(0.9)'.")
