"""The fake score's loss: plain denoising regression on the student's samples (DMD2, arXiv 2405.14867)."""

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.models.conditioning import Conditioning

Array = jax.Array


def fake_score_loss(
    denoiser: Denoiser, fake: Weights, x0: Array, tau: Array, noise: Array, cond: Conditioning
) -> tuple[Array, Array]:
    """Unweighted error of the network's own output (velocity for SD3, noise for SDXL).

    Args:
      fake: base parameters with the guidance LoRA at its full runtime scale.
      x0: the student's samples ``[b, h, w, c]``; no gradient flows into them.
      tau, noise: renoise times ``[b]`` and noise ``[b, h, w, c]``.

    Returns:
      the mean over everything, and the mean per sample ``[b]`` (for curves by noise level).
    """
    x0 = jax.lax.stop_gradient(x0)
    x_tau = denoiser.process.add_noise(x0, noise, tau)
    error = denoiser.output(fake, x_tau, tau, cond) - denoiser.process.target(x0, noise, tau)
    per_sample = jnp.mean(error**2, axis=(1, 2, 3))
    return per_sample.mean(), per_sample
