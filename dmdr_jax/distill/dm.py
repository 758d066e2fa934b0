"""The distribution matching gradient (DMDR arXiv 2511.13649 eq. 1, normalised as in DMD2, 2405.14867).

With x the student's data estimate and x_tau its renoised version::

    g     = (x0_fake - x0_real) / (mean_hwc |x - x0_real| + floor)         (1)
    L_dm  = mean_b,h,w,c (x - sg(x - g))^2 / 2,   so dL_dm/dx = g / (b h w c)   (2)

Up to a positive factor x0_fake - x0_real is the difference of the scores of the student's and the
teacher's distributions at x_tau: descending it moves the student's samples to where the teacher
finds them likelier than the fake score does. The loss value itself means nothing; the norms do.

Of several draws at one x (`group_draw`) the mean of the differences is taken, divided by one number. This is our
reading of GNDM (arXiv 2603.28460), of which only the abstract is public: "group-mean statistics" for a steadier
direction. Subtracting a group's mean over *samples* cannot be meant: of two Gaussians of equal variance the difference
is the same for every sample, and nothing would be left (`tests/distill/test_group_draws.py`).
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

    @property
    def matching(self) -> Array:
        """The part of ``x0_fake - x0_real`` without guidance, ``[b, h, w, c]``."""
        return self.scores.fake - self.scores.real_cond

    @property
    def augmentation(self) -> Array:
        """What guidance adds to the real estimate, ``(w - 1)(c - u)``: the difference is matching - augmentation."""
        return self.real - self.scores.real_cond


def dm_draw(x0: Array, tau: Array, scores: Scores, guidance_scale: Array, floor: float = 1e-3) -> DMDraw:
    """Equation (1). A score that is not finite makes g so too, and the train step then refuses the update."""
    real = scores.real(guidance_scale)
    normaliser = jnp.abs(x0 - real).mean(axis=(1, 2, 3), keepdims=True) + floor
    gradient = (scores.fake - real) / normaliser
    draw = DMDraw(tau, scores, real, gradient, normaliser)
    return jax.tree.map(jax.lax.stop_gradient, draw)


def group_draw(draws: DMDraw, floor: float = 1e-3, rms: bool = True) -> DMDraw:
    """One draw from several at the same x, stacked on a leading axis: the mean difference over one number.

    The number is the root mean square of all differences of a sample, or (``rms`` off) the mean of the draws' own
    normalisers; with that, a single draw is left as it is.
    """
    difference = draws.scores.fake - draws.real
    if rms:
        scale = jnp.sqrt((difference**2).mean(axis=(0, 2, 3, 4)))[:, None, None, None] + floor
    else:
        scale = draws.normaliser.mean(0)
    mean = jax.tree.map(lambda a: a.mean(0), draws)
    return mean._replace(gradient=difference.mean(0) / scale, normaliser=scale)


def share_normaliser(draw: DMDraw, group: int) -> DMDraw:
    """The draw with the mean normaliser of its prompt, of ``group`` consecutive rows, in every row."""
    own = draw.normaliser.reshape(-1, group)
    shared = jnp.broadcast_to(own.mean(1, keepdims=True), own.shape).reshape(draw.normaliser.shape)
    return draw._replace(gradient=(draw.scores.fake - draw.real) / shared, normaliser=shared)


def dm_reward(x0: Array, draws: DMDraw) -> Array:
    """Distribution matching as a number per sample, ``[b]``: larger where the teacher denoises x0 better than the fake.

    ``mean_s mean_hwc (x0_fake - x0)^2 - (x0_real - x0)^2`` over draws stacked on a leading axis: the difference of the
    two models' denoising errors, hence of their bounds of log p(x0), up to weights of the levels. With the estimates
    held fixed its gradient at x0 is ``2 mean_s (x0_real - x0_fake)``, DMD's own direction, guidance included.
    """
    error = (draws.scores.fake - x0) ** 2 - (draws.real - x0) ** 2
    return error.mean(axis=(0, 2, 3, 4))


def dm_loss(x0: Array, gradient: Array) -> Array:
    """Equation (2): a scalar whose gradient with respect to ``x0`` is ``gradient / x0.size``."""
    return 0.5 * jnp.mean((x0 - jax.lax.stop_gradient(x0 - gradient)) ** 2)
