"""The distribution matching gradient (DMDR arXiv 2511.13649 eq. 1, normalised as in DMD2, 2405.14867).

With x the student's data estimate and x_tau its renoised version::

    g     = (x0_fake - x0_real) / (mean_hwc |x - x0_real| + floor)         (1)
    L_dm  = mean_b,h,w,c (x - sg(x - g))^2 / 2,   so dL_dm/dx = g / (b h w c)   (2)

Up to a positive factor x0_fake - x0_real is the difference of the scores of the student's and the
teacher's distributions at x_tau: descending it moves the student's samples to where the teacher
finds them likelier than the fake score does. The loss value itself means nothing; the norms do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.distill.scores import Scores

Array = jax.Array


class DMDraw(NamedTuple):
    """One evaluation of the score difference at one renoised point per sample; nothing carries gradient."""

    tau: Array  # [b]
    scores: Scores
    real: Array  # guided real x0, [b, h, w, c]
    gradient: Array  # g of (1), [b, h, w, c]
    normaliser: Array  # [b, 1, 1, 1]


def dm_draw(x0: Array, tau: Array, scores: Scores, guidance_scale: Array, floor: float = 1e-3) -> DMDraw:
    """Equation (1). A score that is not finite makes g so too, and the train step then refuses the update."""
    real = scores.real(guidance_scale)
    normaliser = jnp.abs(x0 - real).mean(axis=(1, 2, 3), keepdims=True) + floor
    gradient = (scores.fake - real) / normaliser
    draw = DMDraw(tau, scores, real, gradient, normaliser)
    return jax.tree.map(jax.lax.stop_gradient, draw)


def dm_loss(x0: Array, gradient: Array) -> Array:
    """Equation (2): a scalar whose gradient with respect to ``x0`` is ``gradient / x0.size``."""
    return 0.5 * jnp.mean((x0 - jax.lax.stop_gradient(x0 - gradient)) ** 2)
