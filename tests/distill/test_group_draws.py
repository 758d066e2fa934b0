"""Draws normalised over a group, and what a group's mean must not be taken from."""

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.distill.dm import DMDraw, dm_draw, dm_reward, group_draw, share_normaliser
from dmdr_jax.distill.scores import Scores

SHAPE = (4, 3, 3, 2)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def stacked(count):
    x = normal(99)
    draws = [dm_draw(x, jnp.full(4, 0.5), Scores(*(normal(10 * s + i) for i in range(3))), 2.0) for s in range(count)]
    return x, jax.tree.map(lambda *a: jnp.stack(a), *draws)


def test_one_draw_with_its_own_normaliser_is_distribution_matching():
    _, draws = stacked(1)
    assert np.array_equal(group_draw(draws, rms=False).gradient, draws.gradient[0])


def test_several_draws_are_averaged_over_one_number():
    _, draws = stacked(5)
    difference = np.asarray(draws.scores.fake - draws.real)
    rms = np.sqrt((difference**2).mean((0, 2, 3, 4)))[:, None, None, None]
    assert np.allclose(group_draw(draws, floor=0.0).gradient, difference.mean(0) / rms, rtol=1e-5, atol=1e-6)


def test_a_prompts_rows_share_their_mean_normaliser():
    _, draws = stacked(1)
    draw = jax.tree.map(lambda a: a[0], draws)
    shared, own = share_normaliser(draw, 2), np.asarray(draw.normaliser).reshape(2, 2)
    assert np.allclose(np.asarray(shared.normaliser).reshape(2, 2), own.mean(1, keepdims=True))
    assert np.allclose(shared.gradient * shared.normaliser, draw.gradient * draw.normaliser, rtol=1e-5, atol=1e-6)


def gaussian_draw(x, student_mean, teacher_mean, tau=0.5, variance=1.0):
    """The draw of two Gaussians of equal variance at renoised x."""
    alpha, x_tau = 1 - tau, (1 - tau) * x + tau * normal(1, x.shape)
    gain = alpha * variance / (alpha**2 * variance + tau**2)
    fake, real = (m + gain * (x_tau - alpha * m) for m in (student_mean, teacher_mean))
    return DMDraw(jnp.full(len(x), tau), Scores(fake, real, real), real, fake - real, jnp.ones((len(x), 1, 1, 1)))


def test_centring_the_direction_over_samples_leaves_nothing():
    """Why GNDM's group cannot be the samples of a prompt: all directions are one vector."""
    x = 1.0 + normal(2, (64, 1, 1, 2))
    direction = np.asarray(gaussian_draw(x, 1.0, 0.0).gradient)
    assert np.abs(direction).min() > 0.1
    assert np.abs(direction - direction.mean(0)).max() < 1e-5


def test_the_scalar_reward_has_the_direction_of_distribution_matching():
    x = 1.0 + normal(3, (8, 1, 1, 2))
    draw = gaussian_draw(x, 1.0, 0.0)
    draws = jax.tree.map(lambda a: a[None], draw)
    slope = jax.grad(lambda y: dm_reward(y, draws).sum())(x)
    assert np.allclose(slope, 2.0 * (draw.real - draw.scores.fake) / x[0].size, atol=1e-5)
    # Samples nearer to the teacher are worth more.
    near, far = jnp.full((8, 1, 1, 2), 0.2), jnp.full((8, 1, 1, 2), 1.8)
    rewards = [dm_reward(y, jax.tree.map(lambda a: a[None], gaussian_draw(y, 1.0, 0.0))).mean() for y in (near, far)]
    assert rewards[0] > rewards[1]
