"""Decoupled DMD (arXiv 2511.22677): guidance augmentation and distribution matching, each at its own noise level.

With guidance w on the real side alone the distribution matching direction is a sum of two (eqs. 5 to 7 there)::

    x0_real - x0_fake = (c - x0_fake) + (w - 1)(c - u)         c, u: real cond, real uncond          (1)
                        matching, at tau_dm   augmentation, at tau_ca

The second makes a few-step generator, the first keeps it from collapsing; they want different renoise levels. In our
time (1 = noise; the paper's runs the other way) the best schedule it found draws tau_ca below the student's own t,
where only what is cleaner than the student's input gets added, and tau_dm from the whole range ("hybrid").

The paper has a constant for a normaliser and leaves it open. Here the sum is divided by one number,
``mean |x - guided|`` with ``guided = c at tau_dm + (w - 1)(c - u) at tau_ca``: the proportion of the parts stays, and
with equal times and noises the whole is coupled DMD exactly. ``normaliser = "conditional"`` takes
``mean |x - c at tau_dm|`` in its place.

The authors draw uniformly *before* the time shift, tau_ca from below the student's unshifted time, and shift after. A
density of the run's own (DynaRS) is drawn from as it is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.grids import shift, unshift
from dmdr_jax.distill.dm import DMDraw
from dmdr_jax.distill.scores import Scores
from dmdr_jax.models.conditioning import Conditioning, broadcast_to, interleave, interleave_rows, parted

Array = jax.Array
Tree = Any

SCHEDULES = ("hybrid", "independent", "cleaner", "tied")
NORMALISERS = ("guided", "conditional")


@dataclasses.dataclass(frozen=True)
class SplitTimes:
    """The two renoise times.

    Attributes:
      schedule: "hybrid" (tau_ca below the student's t), "independent" (both anywhere), "cleaner" (both below t, each
        by itself) or "tied" (one time and one noise for both: coupled DMD).
      shift: of the student's grid; 1: none.
      low, high: smallest and largest time.
      uniform: the run's renoise density is uniform, and what is drawn from it is shifted too.
      normaliser: see the module's text.
    """

    schedule: str = "hybrid"
    shift: float = 1.0
    low: float = 0.02
    high: float = 0.98
    normaliser: str = "guided"
    uniform: bool = False

    def times(self, key: Array, tau: Array, t: Array, free: Array) -> tuple[Array, Array]:
        """``(tau_dm, tau_ca)`` ``[b]``.

        Args:
          key: for the times below ``t``.
          tau: a draw from the run's renoise density.
          t: of the student's call.
          free: a second, independent draw from the run's renoise density.
        """
        if self.uniform:
            tau, free = (jnp.clip(shift(x, self.shift), self.low, self.high) for x in (tau, free))
        if self.schedule == "tied":
            return tau, tau
        if self.schedule == "independent":
            return tau, free
        if self.schedule == "cleaner":
            tau = self.below(jax.random.fold_in(key, 1), t)
        return tau, self.below(key, t)

    def below(self, key: Array, t: Array) -> Array:
        """Times ``[b]`` in ``[low, t]``: uniform before the shift."""
        u = unshift(t, self.shift) * jax.random.uniform(key, t.shape, jnp.float32)
        return jnp.clip(shift(u, self.shift), jnp.minimum(self.low, t), t)


def split_score_pass(
    denoiser: Denoiser,
    base: Tree,
    guidance_lora: Tree,
    x_dm: Array,
    tau_dm: Array,
    x_ca: Array,
    tau_ca: Array,
    cond: Conditioning,
    uncond: Conditioning,
    *,
    fake_scale: Array | float,
    real_scale: Array | float,
) -> tuple[Scores, Array]:
    """The four estimates in one pass of 4 b rows.

    Returns:
      the scores at ``tau_dm`` (of which ``real_uncond`` is at ``tau_ca``), and real cond at ``tau_ca``.
    """
    b = x_dm.shape[0]
    rows = interleave_rows([cond, cond, cond, broadcast_to(uncond, b)])
    scale = interleave([jnp.full((b,), s, jnp.float32) for s in (fake_scale, real_scale, real_scale, real_scale)])
    z, t = interleave([x_dm, x_dm, x_ca, x_ca]), interleave([tau_dm, tau_dm, tau_ca, tau_ca])
    fake, real, real_ca, uncond_ca = parted(denoiser.x0(Weights(base, guidance_lora, scale), z, t, rows), 4)
    return Scores(fake, real, uncond_ca), real_ca


def split_draw(
    x0: Array,
    tau_dm: Array,
    scores: Scores,
    cond_at_ca: Array,
    guidance_scale: Array,
    floor: float = 1e-3,
    normaliser: str = "guided",
) -> DMDraw:
    """The draw whose ``real`` is ``c at tau_dm + (w - 1)(c - u) at tau_ca``; nothing carries gradient."""
    augmentation = (guidance_scale - 1.0) * (cond_at_ca - scores.real_uncond)
    real = scores.real_cond + augmentation
    near = real if normaliser == "guided" else scores.real_cond
    scale = jnp.abs(x0 - near).mean(axis=(1, 2, 3), keepdims=True) + floor
    draw = DMDraw(tau_dm, scores, real, (scores.fake - real) / scale, scale)
    return jax.tree.map(jax.lax.stop_gradient, draw)
