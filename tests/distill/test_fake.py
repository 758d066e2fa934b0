"""The fake score's loss against its definition, and where its gradient goes."""

import jax
import numpy as np

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.distill.fake import fake_score_loss
from tests.distill import toy


def test_loss_is_the_velocity_error_and_only_the_delta_gets_gradient():
    denoiser, base, delta = toy.networks()
    k = jax.random.split(jax.random.key(0), 3)
    x0, noise = jax.random.normal(k[0], (4, *toy.LATENT)), jax.random.normal(k[1], (4, *toy.LATENT))
    tau, cond = jax.random.uniform(k[2], (4,)), toy.cond(4, 2)

    @jax.jit
    def loss(x0, delta):
        return fake_score_loss(denoiser, Weights(base, delta, 2.0), x0, tau, noise, cond)[0]

    t = np.asarray(tau)[:, None, None, None]
    x_tau = (1 - t) * np.asarray(x0) + t * np.asarray(noise)
    v = jax.jit(denoiser.output)(Weights(base, delta, 2.0), x_tau, tau, cond)
    expected = np.mean((np.asarray(v) - (np.asarray(noise) - np.asarray(x0))) ** 2)
    assert np.allclose(loss(x0, delta), expected, rtol=1e-5)
    grad_x, grad_delta = jax.jit(jax.grad(loss, argnums=(0, 1)))(x0, delta)
    assert np.array_equal(grad_x, np.zeros_like(x0))
    leaves = jax.tree_util.tree_leaves_with_path(grad_delta)
    without = {jax.tree_util.keystr(path) for path, g in leaves if not np.abs(g).max() > 0}
    # The text queries of the last block lead nowhere: its text stream ends there.
    assert without == {f"['transformer_blocks.1']['attn']['add_q_proj']['kernel']['{name}']" for name in "ab"}
