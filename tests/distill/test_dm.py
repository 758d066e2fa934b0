"""The distribution matching gradient and the one scoring pass (checks 1, 2 and 6 of the method)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax import lora
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.distill.dm import dm_draw, dm_loss
from dmdr_jax.distill.scores import Scores, score_pass
from tests.distill import toy

B = 3


def inputs(seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    shape = (B, *toy.LATENT)
    return jax.random.normal(k[0], shape), jnp.array([0.2, 0.5, 0.9]), jax.random.normal(k[1], shape)


def test_gradient_of_the_loss_is_g_over_the_number_of_elements():
    x, _, g = inputs()
    grad = jax.grad(dm_loss)(x, g)
    assert np.allclose(grad, g / x.size, rtol=1e-5, atol=1e-9)


def test_g_equals_the_published_formula():
    x, tau, _ = inputs()
    fake, cond, uncond = (jax.random.normal(jax.random.key(10 + i), x.shape) for i in range(3))
    draw = dm_draw(x, tau, Scores(fake, cond, uncond), 7.0, floor=1e-8)
    x, fake, cond, uncond = (np.asarray(a, np.float64) for a in (x, fake, cond, uncond))
    real = uncond + 7.0 * (cond - uncond)
    # DMD2: p_real = x - x0_real; p_fake = x - x0_fake; grad = (p_real - p_fake) / mean |p_real|
    p_real, p_fake = x - real, x - fake
    expected = (p_real - p_fake) / (np.abs(p_real).mean(axis=(1, 2, 3), keepdims=True) + 1e-8)
    assert np.allclose(draw.gradient, expected, rtol=2e-4, atol=2e-5)


def test_equal_scores_give_no_gradient_and_guidance_alone_gives_its_own():
    """With a zero delta the fake score is the real one: g = 0 at w = 1, else -(w - 1)(c - u) / norm."""
    denoiser, base, delta = toy.networks()
    zero = jax.tree.map(jnp.zeros_like, delta)
    x, tau, noise = inputs()
    x_tau = denoiser.process.add_noise(x, noise, tau)
    cond, uncond = toy.cond(B, 0), toy.cond(1, 9)
    scores = jax.jit(
        lambda: score_pass(denoiser, base, zero, x_tau, tau, cond, uncond, fake_scale=2.0, real_scale=0.5)
    )()
    assert (
        np.array_equal(dm_draw(x, tau, scores, 1.0).gradient, np.zeros_like(x))
        or np.abs(dm_draw(x, tau, scores, 1.0).gradient).max() < 1e-5
    )
    draw = dm_draw(x, tau, scores, 5.0)
    expected = -4.0 * (scores.real_cond - scores.real_uncond) / draw.normaliser
    assert np.abs(expected).max() > 0.1
    assert np.allclose(draw.gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("real_scale", [0.0, 0.5])
def test_one_pass_equals_three_separate_calls(real_scale):
    denoiser, base, delta = toy.networks()
    x, tau, noise = inputs(1)
    x_tau = denoiser.process.add_noise(x, noise, tau)
    cond, uncond = toy.cond(B, 1), toy.cond(1, 8)
    one = jax.jit(
        lambda: score_pass(denoiser, base, delta, x_tau, tau, cond, uncond, fake_scale=2.0, real_scale=real_scale)
    )()
    three = (
        denoiser.x0(Weights(base, delta, 2.0), x_tau, tau, cond),
        denoiser.x0(Weights(lora.merge(base, delta, real_scale)), x_tau, tau, cond),
        denoiser.x0(
            Weights(lora.merge(base, delta, real_scale)),
            x_tau,
            tau,
            jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape[1:])), uncond),
        ),
    )
    for got, expected in zip(one, three):
        assert np.allclose(got, expected, rtol=2e-4, atol=2e-5)
    if real_scale == 0.0:
        assert not np.allclose(one.fake, one.real_cond, atol=1e-2)


def test_nothing_in_a_draw_carries_gradient():
    x, tau, g = inputs()
    grad = jax.grad(lambda s: dm_draw(s, tau, Scores(s, 2 * s, g), 3.0).gradient.sum())(x)
    assert np.array_equal(grad, np.zeros_like(x))
