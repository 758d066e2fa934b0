"""The dynamic cold start of DMDR (arXiv 2511.13649, section 3.3) and the renoise density.

Both dynamics follow one cosine ``c(s) = (1 + cos(pi min(s, S) / S)) / 2`` in the number s of
generator updates: DynaDG scales the guidance LoRA on the real score by ``a_init c`` (the perceived
real distribution starts near the student and ends as the teacher), DynaRS draws renoise times from
``Beta(1 + 3c, 1 + c/2)`` (high noise first, where the two distributions overlap, uniform at the end).
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

BETA_START = (4.0, 1.5)
"""The Beta density at s = 0; it ends as (1, 1), the uniform one."""


def cosine_decay(step: Array | int, length: int) -> Array:
    """``c(s)``: 1 at step 0, 1/2 at ``length / 2``, 0 from ``length`` on; 0 throughout where length is 0."""
    if length <= 0:
        return jnp.zeros((), jnp.float32)
    fraction = jnp.minimum(jnp.asarray(step, jnp.float32), length) / length
    return 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))


def dyna_dg_scale(step: Array | int, initial: float, length: int) -> Array:
    """Runtime scale of the guidance LoRA on the *real* score at generator step ``step``."""
    return initial * cosine_decay(step, length)


def dyna_rs_beta(step: Array | int, length: int) -> tuple[Array, Array]:
    """Parameters of the Beta density of renoise times at generator step ``step``."""
    c = cosine_decay(step, length)
    return 1.0 + (BETA_START[0] - 1.0) * c, 1.0 + (BETA_START[1] - 1.0) * c


@dataclasses.dataclass(frozen=True)
class RenoiseTimes:
    """Density of the renoise time tau.

    Attributes:
      dynamic_steps: S of DynaRS; 0 draws uniformly from the start.
      low, high: tau is clipped to this range, away from 0 / 0 in the normaliser.
      hold: keep the density of step 0 for the whole run (no decay).
    """

    dynamic_steps: int = 0
    low: float = 0.02
    high: float = 0.98
    hold: bool = False

    def sample(self, key: Array, batch: int, step: Array | int) -> Array:
        """``[batch]`` renoise times in fp32."""
        if self.hold:
            a, b = (jnp.float32(x) for x in BETA_START)
        else:
            a, b = dyna_rs_beta(step, self.dynamic_steps)
        tau = jax.random.beta(key, a, b, (batch,), jnp.float32)
        return jnp.clip(tau, self.low, self.high)


def jittered_guidance(key: Array, guidance: float, jitter: float) -> Array:
    """One guidance scale per step, uniform within ``guidance +- jitter``."""
    return guidance + jitter * jax.random.uniform(key, (), jnp.float32, -1.0, 1.0)
