"""Matching of realised latents: the bridge, its velocity, and its limit, plain distribution matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.kernels import Kernel
from dmdr_jax.diffusion.process import Flow, VariancePreserving
from dmdr_jax.distill.bridge import Boundary, boundary_draw, bridge, bridge_loss, bridge_target, consistency_loss
from dmdr_jax.distill.dm import dm_draw
from dmdr_jax.distill.scores import Scores
from tests.distill import toy

FLOW = Flow()
SHAPE = (3, 4, 4, 3)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_bridge_has_the_noise_level_of_its_end():
    """The released code's variance does; the printed (t - s)/(1 - s) does not: .3125 where .5625 is due."""
    s, t = 0.5, 0.75
    _, sigma = bridge(FLOW, jnp.zeros((1, 1, 1, 1)), jnp.array([s]), jnp.array([t]), jnp.zeros((1, 1, 1, 1)))
    a = (1 - t) / (1 - s)
    assert float(sigma[0, 0, 0, 0]) ** 2 + a**2 * s**2 == pytest.approx(t**2, abs=1e-6)
    assert ((t - s) / (1 - s)) ** 2 + a**2 * s**2 == pytest.approx(0.3125)


@pytest.mark.parametrize("process", [FLOW, VariancePreserving()], ids=["flow", "vp"])
def test_renoised_noisy_data_have_the_marginal_of_t(process):
    n, s, t = 200_000, 0.4, 0.7
    data = 0.5 + 0.3 * normal(0, (n, 1, 1, 1))
    rows = jnp.full((n,), s), jnp.full((n,), t)
    x_t, _ = bridge(process, process.add_noise(data, normal(1, data.shape), rows[0]), *rows, normal(2, data.shape))
    alpha, sigma = process.coefficients(jnp.float32(t))
    assert float(x_t.mean()) == pytest.approx(0.5 * float(alpha), abs=5e-3)
    assert float(x_t.var()) == pytest.approx(float(alpha * 0.3) ** 2 + float(sigma) ** 2, rel=1e-2)


def test_the_target_is_the_velocity_of_the_bridge():
    """Equal to d/dt of a(t) x_s + sigma_b(t) e, and to the released code's expression."""
    x_s, e, s, t = normal(3), normal(4), jnp.array([0.0, 0.5, 0.75]), jnp.array([0.4, 0.8, 0.9])
    x_t, velocity = jax.jvp(lambda t: bridge(FLOW, x_s, s, t, e)[0], (t,), (jnp.ones_like(t),))
    sigma = bridge(FLOW, x_s, s, t, e)[1]
    target = bridge_target(FLOW, x_t, t, e, sigma)
    assert np.allclose(target, velocity, rtol=1e-3, atol=2e-4)
    t, s = (x[:, None, None, None] for x in (t, s))
    published = -x_s / (1 - s) + (t + (1 - t) * s**2 / (1 - s) ** 2) / sigma * e
    assert np.allclose(target, published, rtol=1e-3, atol=2e-4)


def test_the_bridge_target_of_noise_prediction_is_the_score():
    """Of Gaussian data the mean target at x_t is -sigma_t times the score of the renoised distribution."""
    process, n, s, t = VariancePreserving(), 100_000, 0.3, 0.6
    rows = jnp.full((n,), s), jnp.full((n,), t)
    x_s, e = process.add_noise(0.8 * normal(5, (n, 1, 1, 1)), normal(6, (n, 1, 1, 1)), rows[0]), normal(7, (n, 1, 1, 1))
    x_t, sigma_b = bridge(process, x_s, *rows, e)
    target = bridge_target(process, x_t, rows[1], e, sigma_b)
    slope = float((target * x_t).mean() / (x_t * x_t).mean())
    alpha, sigma = (float(c) for c in process.coefficients(jnp.float32(t)))
    assert slope == pytest.approx(sigma / ((0.8 * alpha) ** 2 + sigma**2), rel=2e-2)


@pytest.mark.parametrize("eta", [0.0, 0.6, 0.9, 1.0])
def test_two_transitions_of_equal_noise_differ_by_a_factor(eta):
    """x_s^real - x_s^fake = f (x0_real - x0_fake), f = (1 - s) - s cos(eta pi/2) (1 - t)/t."""
    x_t, real, fake, n = (normal(8 + i) for i in range(4))
    s, t = jnp.array([0.0, 0.3, 0.5]), jnp.array([0.5, 0.7, 0.9])
    kernel = Kernel(eta)
    steps = [kernel.step(FLOW, x, FLOW.eps_from_x0(x_t, x, t), s, n, x_t, t) for x in (real, fake)]
    s, t = (x[:, None, None, None] for x in (s, t))
    f = (1 - s) - s * np.cos(eta * np.pi / 2) * (1 - t) / t
    assert np.allclose(steps[0] - steps[1], f * (real - fake), atol=1e-5)


def test_at_clean_latents_the_draw_is_distribution_matching():
    x, x_t, n = normal(12), normal(13), normal(14)
    s, t = jnp.zeros(3), jnp.array([0.2, 0.5, 0.9])
    scores = Scores(normal(15), normal(16), normal(17))
    plain = dm_draw(x, t, scores, 3.0)
    for normaliser in ("transition", "estimate"):
        settings = Boundary(normaliser)
        ours = boundary_draw(FLOW, Kernel(0.9), settings, x, s, x, x_t, t, scores, 3.0, n)
        assert np.allclose(ours.gradient, plain.gradient, rtol=1e-5, atol=1e-6)
        assert np.allclose(ours.normaliser, plain.normaliser, rtol=1e-5)


def test_times_are_above_the_boundary_and_inside_the_range():
    s = jnp.repeat(jnp.array([0.0, 0.5, 0.9]), 2000)
    t = np.asarray(Boundary().times(jax.random.key(0), s)).reshape(3, -1)
    assert (t > np.array([[0.0], [0.5], [0.9]])).all() and t.max() <= 0.98 + 1e-6
    assert t[0].min() == pytest.approx(0.02) and t[1].min() >= 0.51
    assert t[1].mean() == pytest.approx(0.755, abs=0.01)


def test_the_consistency_terms_times():
    """From t down by a jump; or between neighbours of the student's grid, none of them below the latents' own time."""
    t = jnp.linspace(0.05, 1.0, 500)
    later = np.asarray(Boundary(max_jump=0.1).jump(jax.random.key(0), t))
    assert (later < t).all() and (later >= np.maximum(t - 0.1 - 1e-6, 0.02)).all()

    grid = (1.0, 0.9, 0.75, 0.5, 0.0)
    s = np.repeat(np.array(grid[1:], np.float32), 200)
    t, later = map(np.asarray, Boundary(grid=grid).neighbours(jax.random.key(1), jnp.asarray(s)))
    pairs = {(1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0.02)}  # not to 0, where there is nothing to estimate
    for i, end in enumerate(grid[1:]):
        found = {(round(float(a), 6), round(float(b), 6)) for a, b in zip(t[s == end], later[s == end])}
        assert found == set(sorted(pairs, reverse=True)[: i + 1])


def test_the_consistency_term_is_the_square_of_a_mean():
    """With independent steps the product is unbiased: it can be negative, the square of the mean cannot."""

    class Linear:
        process = FLOW

        def output(self, weights, z, t, cond):
            return (z - self.x0(weights, z, t, cond)) / t[:, None, None, None]

        def x0(self, weights, z, t, cond):
            return 0.6 * z + t[:, None, None, None]

    n = 20_000
    x_t, t, later = jnp.full((n, 1, 1, 1), 0.8), jnp.full((n,), 0.7), jnp.full((n,), 0.5)
    network = Linear()
    noises = [normal(20 + i, x_t.shape) for i in range(2)]
    output = network.output(None, x_t, t, None)
    cond = toy.cond(n, 0)
    got = consistency_loss(network, None, Kernel(1.0), x_t, t, output, later, noises, cond)
    start = 0.6 * 0.8 + 0.7
    mean_jump = 0.6 * 0.5 * start + 0.5 - start  # of h(x') - h(x) over the step's noise
    assert float(got) == pytest.approx(mean_jump**2, abs=5e-3)


GRID = pytest.param((1.0, 0.95, 0.5, 0.0), marks=pytest.mark.slow)


@pytest.mark.parametrize("grid", [(), GRID], ids=["renoised", "grid"])
def test_the_fake_loss_is_finite_and_moves_the_delta_alone(grid):
    denoiser, base, delta = toy.networks()
    x_s, s = normal(30, (3, *toy.LATENT)), jnp.array([0.0, 0.5, 0.9])
    t = Boundary().times(jax.random.key(1), s)

    def loss(x, d):
        settings = Kernel(1.0), Boundary(grid=grid)
        weights = Weights(base, d, 2.0)
        return bridge_loss(denoiser, weights, *settings, x, s, t, toy.cond(3, 0), jax.random.key(2))[0]

    value, (to_x, to_delta) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x_s, delta)
    assert np.isfinite(value) and not np.any(to_x)
    assert sum(np.abs(g).sum() for g in jax.tree.leaves(to_delta)) > 0
