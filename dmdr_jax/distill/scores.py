"""Real and fake score in one forward pass over one frozen base.

The real score is the base (with the guidance LoRA at DynaDG's small, decaying scale), the fake
score is the base with the guidance LoRA at full scale: the same frozen weights, read once for a
batch of three rows a sample, fake cond, real cond and real uncond, with a LoRA scale per row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.models.conditioning import Conditioning, broadcast_to, interleave, interleave_rows, parted

Array = jax.Array
Tree = Any


class Scores(NamedTuple):
    """Data estimates at one renoised batch, each ``[b, h, w, c]`` fp32; guidance is the caller's."""

    fake: Array
    real_cond: Array
    real_uncond: Array

    def real(self, guidance_scale: Array) -> Array:
        """Classifier-free guidance ``u + w (c - u)`` of the real score."""
        return self.real_uncond + guidance_scale * (self.real_cond - self.real_uncond)


def score_pass(
    denoiser: Denoiser,
    base: Tree,
    guidance_lora: Tree,
    x_tau: Array,
    tau: Array,
    cond: Conditioning,
    uncond: Conditioning,
    *,
    fake_scale: Array | float,
    real_scale: Array | float,
) -> Scores:
    """Evaluates the three scores at ``x_tau`` ``[b, h, w, c]``, ``tau`` ``[b]`` in one pass of 3 b rows.

    Args:
      uncond: the unconditional prompt, one row or b rows.
      fake_scale, real_scale: effective LoRA scales (runtime scale times alpha / rank), may be traced.
    """
    b = x_tau.shape[0]
    rows = interleave_rows([cond, cond, broadcast_to(uncond, b)])
    scale = interleave([jnp.full((b,), s, jnp.float32) for s in (fake_scale, real_scale, real_scale)])
    weights = Weights(base, guidance_lora, scale)
    return Scores(*parted(denoiser.x0(weights, interleave([x_tau] * 3), interleave([tau] * 3), rows), 3))
