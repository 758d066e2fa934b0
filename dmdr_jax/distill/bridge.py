"""Distribution matching of realised latents: AC-DMD, the first stage of RTDMD (arXiv 2605.26108, section 3.1).

What is matched is not the estimate x0 of a student call but the latent x_s that the sampler makes of it, at the noise
level s of the grid's next time. It is renoised to t in [s, 1] by the bridge of the process ::

    x_t = a x_s + sigma_b e,   a = alpha_t / alpha_s,   sigma_b^2 = sigma_t^2 - a^2 sigma_s^2              (1)

which has the noise level of t whatever s was. For the flow a = (1 - t)/(1 - s) and sigma_b^2 = t^2 - a^2 s^2. (The
paper prints sigma_b = (t - s)/(1 - s); with independent noise that has another level than t, .559 in place of .75 at
s = .5, and the released code has (1).)

The fake score learns the scores of these x_t, by the noise e of (1): ``-e / sigma_b`` in place of the score, hence ::

    e* = sigma_t e / sigma_b,   x0* = (x_t - sigma_t e*) / alpha_t,   target = the process's, of (x0*, e*)    (2)

For the flow the target is ``d/dt (a x_s + sigma_b e)``, the released code's. It grows as t -> s, so the error is
weighted by ``sigma_b^2 min(1 / sigma_b^2, 10)``, the released code's too.

The student's direction compares one transition t -> s made by the teacher with one made by the fake score, of equal
noise n (CPS, `dmdr_jax.diffusion.kernels`)::

    x_s^real - x_s^fake = f (x0_real - x0_fake),   f = alpha_s - sigma_s cos(eta pi/2) alpha_t / sigma_t      (3)
    g = (x_s^fake - x_s^real) / (mean |x_s - x_s^real| + floor)                                               (4)

At s = 0 (3) and (4) are plain DMD, and so is the fake score's loss but for its weight and its consistency term. The
normaliser of (4) is the released code's: x_s^real has the noise n in it, so that it does not vanish where student and
teacher agree. ``normaliser = "estimate"`` takes ``mean |x0 - x0_real|`` instead.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.kernels import Kernel
from dmdr_jax.diffusion.process import Process
from dmdr_jax.distill.dm import DMDraw
from dmdr_jax.distill.scores import Scores
from dmdr_jax.models.conditioning import Conditioning, interleave, interleave_rows, parted

Array = jax.Array

NORMALISERS = ("transition", "estimate")
CONSISTENCY_TIMES = ("renoised", "grid")
MAX_WEIGHT = 10.0
MIN_GAP = 0.01
"""The bridge's t is at least this far above s."""


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Settings of matching realised latents.

    Attributes:
      normaliser: see (4).
      consistency: weight of the fake score's consistency term.
      max_jump: how far below t its two reverse steps end, at most.
      low, high: range of t.
      grid: times between which the consistency term steps; empty: from t down by a jump.
    """

    normaliser: str = "transition"
    consistency: float = 0.01
    max_jump: float = 0.2
    low: float = 0.02
    high: float = 0.98
    grid: tuple[float, ...] = ()

    def times(self, key: Array, s: Array) -> Array:
        """Renoise times ``[b]``: uniform in [s + .01, 1], clipped to [low, high] but kept above s."""
        u = jax.random.uniform(key, s.shape, jnp.float32)
        t = s + MIN_GAP + u * (1.0 - s - MIN_GAP)
        return jnp.maximum(jnp.clip(t, self.low, self.high), s + MIN_GAP)

    def jump(self, key: Array, t: Array) -> Array:
        """Where the steps from ``t`` ``[b]`` end: up to `max_jump` below, and not below `low`."""
        down = self.max_jump * (1.0 - jax.random.uniform(key, t.shape, jnp.float32))
        return self._not_too_low(t - down, t)

    def neighbours(self, key: Array, s: Array) -> tuple[Array, Array]:
        """A time of the grid above ``s`` ``[b]``, any of them, and the next one, which may be ``s``."""
        grid = jnp.asarray(self.grid, jnp.float32)
        above = (grid[:, None] > s).sum(0)
        index = jnp.floor(jax.random.uniform(key, s.shape, jnp.float32) * above).astype(jnp.int32)
        return grid[index], self._not_too_low(grid[index + 1], grid[index])

    def _not_too_low(self, later: Array, t: Array) -> Array:
        return jnp.maximum(later, jnp.minimum(self.low, t))


def bridge(process: Process, x_s: Array, s: Array, t: Array, noise: Array) -> tuple[Array, Array]:
    """(1): ``x_t`` ``[b, h, w, c]`` and ``sigma_b`` ``[b, 1, 1, 1]`` from ``x_s`` at times ``s`` to ``t`` ``[b]``."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.coefficients(_rows(s)), process.coefficients(_rows(t))
    a = alpha_t / alpha_s
    sigma_b = jnp.sqrt(jnp.maximum(sigma_t**2 - (a * sigma_s) ** 2, 0.0))
    return a * x_s + sigma_b * noise, sigma_b


def bridge_target(process: Process, x_t: Array, t: Array, noise: Array, sigma_b: Array) -> Array:
    """(2): what the network should output at ``x_t``."""
    alpha, sigma = process.coefficients(_rows(t))
    eps = sigma / sigma_b * noise
    return process.target((x_t - sigma * eps) / alpha, eps, t)


def bridge_loss(
    denoiser: Denoiser,
    fake: Weights,
    kernel: Kernel,
    settings: Boundary,
    x_s: Array,
    s: Array,
    t: Array,
    cond: Conditioning,
    key: Array,
) -> tuple[Array, Array, Array]:
    """The fake score's loss on realised latents; gradient flows to ``fake`` alone.

    Args:
      x_s: ``[b, h, w, c]`` at times ``s`` ``[b]``.
      t: bridge times ``[b]``, above ``s``.
      key: of the bridge's noise and of the consistency term.

    Returns:
      denoising error plus weighted consistency, the plain error per sample ``[b]``, and the consistency.
    """
    key_noise, key_jump, *key_steps = jax.random.split(key, 4)
    x_s, process = jax.lax.stop_gradient(x_s), denoiser.process
    noise = jax.random.normal(key_noise, x_s.shape, jnp.float32)
    x_t, sigma_b = bridge(process, x_s, s, t, noise)
    output = denoiser.output(fake, x_t, t, cond)
    error = (output - bridge_target(process, x_t, t, noise, sigma_b)) ** 2
    weight = jnp.minimum(1.0, MAX_WEIGHT * sigma_b**2)
    consistency = jnp.zeros(())
    if settings.consistency:
        if settings.grid:
            t, later = settings.neighbours(key_jump, s)
            x_t, _ = bridge(process, x_s, s, t, noise)
            output = denoiser.output(fake, x_t, t, cond)
        else:
            later = settings.jump(key_jump, t)
        later = process.snap(later)
        noises = [jax.random.normal(k, x_s.shape, jnp.float32) for k in key_steps]
        consistency = consistency_loss(denoiser, fake, kernel, x_t, t, output, later, noises, cond)
    loss = (weight * error).mean() + settings.consistency * consistency
    return loss, error.mean(axis=(1, 2, 3)), consistency


def consistency_loss(
    denoiser: Denoiser,
    fake: Weights,
    kernel: Kernel,
    x_t: Array,
    t: Array,
    output: Array,
    later: Array,
    noises: list[Array],
    cond: Conditioning,
) -> Array:
    """``E (h(x1) - h(x_t)) . (h(x2) - h(x_t))``, averaged over elements: an unbiased square of a mean.

    h is the estimate of x0, x1 and x2 are two independent steps of the fake score's own sampler to ``later`` ``[b]``,
    without gradient. (Eqs. 11, 12 and 22 take neighbouring times of the student's grid, `Boundary.grid`; the released
    code, followed by default, any t and a jump of at most 200 of 1000 steps, which spares a forward.)
    """
    process = denoiser.process
    start = process.to_x0(x_t, output, t)
    x0, eps = jax.lax.stop_gradient((start, process.to_eps(x_t, output, t)))
    steps = [kernel.step(process, x0, eps, later, noise, x_t, t) for noise in noises]
    rows = interleave_rows([cond, cond])
    first, second = parted(denoiser.x0(fake, interleave(steps), interleave([later, later]), rows), 2)
    return ((first - start) * (second - start)).mean()


def boundary_draw(
    process: Process,
    kernel: Kernel,
    settings: Boundary,
    x_s: Array,
    s: Array,
    x0: Array,
    x_t: Array,
    t: Array,
    scores: Scores,
    guidance_scale: Array,
    noise: Array,
    floor: float = 1e-3,
) -> DMDraw:
    """(4) at ``x_s`` ``[b, h, w, c]``; ``scores`` are at ``x_t``, and nothing carries gradient."""
    real = scores.real(guidance_scale)
    x_real, x_fake = (
        kernel.step(process, x, process.eps_from_x0(x_t, x, t), s, noise, x_t, t) for x in (real, scores.fake)
    )
    away = x_s - x_real if settings.normaliser == "transition" else x0 - real
    scale = jnp.abs(away).mean(axis=(1, 2, 3), keepdims=True) + floor
    return jax.tree.map(jax.lax.stop_gradient, DMDraw(t, scores, real, (x_fake - x_real) / scale, scale))


def _rows(t: Array) -> Array:
    return jnp.reshape(t, (-1, 1, 1, 1))
