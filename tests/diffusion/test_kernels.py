"""Kernels as policies: their Gaussians, their log-probabilities, and the noise they leave."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dmdr_jax.diffusion.kernels import Kernel, Transition, gaussian_kl, log_prob, parse_kernel
from dmdr_jax.diffusion.process import Flow, VariancePreserving
from dmdr_jax.diffusion.sampler import rollout
from dmdr_jax.errors import UserError

FLOW = Flow()
GRID = (1.0, 0.9, 0.75, 0.5, 0.0)
KERNELS = [Kernel(1.0), Kernel(0.9), Kernel(0.7, "flow_sde"), Kernel(0.3, "dance")]


def normal(seed, shape=(3, 4, 4, 2)):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("process", [FLOW, VariancePreserving()], ids=["flow", "vp"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.9, 1.0])
def test_a_step_is_its_mean_plus_its_deviation_times_noise(process, eta):
    z, x0, n = normal(0), normal(1), normal(2)
    t, t_next, kernel = jnp.array([1.0, 0.9, 0.6]), jnp.array([0.7, 0.5, 0.1]), Kernel(eta)
    eps = process.eps_from_x0(z, x0, t)
    mean, std = kernel.transition(process, z, t, x0, eps, t_next)
    assert np.allclose(kernel.step(process, x0, eps, t_next, n, z, t), mean + std * n, atol=1e-5)
    # Each row as if it were alone.
    alone = kernel.step(process, x0[1:2], eps[1:2], t_next[1], n[1:2], z[1:2], t[1])
    assert np.allclose(alone, (mean + std * n)[1:2], atol=1e-5)


def test_cps_at_its_ends_is_euler_and_renoising():
    z, x0, n = normal(3), normal(4), normal(5)
    t, t_next = 0.8, 0.55
    eps = FLOW.eps_from_x0(z, x0, jnp.float32(t))
    euler = z + (t_next - t) * (eps - x0)
    arguments = FLOW, x0, eps, jnp.float32(t_next)
    assert np.allclose(Kernel(0.0).step(*arguments, None), euler, atol=1e-5)
    assert np.allclose(Kernel(1.0).step(*arguments, n), (1 - t_next) * x0 + t_next * n, atol=1e-6)


def level(kernel, t, t_next):
    """Deviation of the step's noise, and of all noise after it, where the network knows x0."""
    one = jnp.ones((1, 1))
    mean, std = kernel.transition(FLOW, t * one, jnp.float32(t), 0.0 * one, one, jnp.float32(t_next))
    std = float(jnp.squeeze(std))
    return std, float(np.hypot(float(mean[0, 0]), std))


def test_noise_budgets_of_four_steps():
    """The published SDE steps, made for many steps, leave more noise than the level they arrive at."""
    steps = list(itertools.pairwise(GRID))
    flow_grpo = [level(Kernel(0.7, "flow_sde", noisy_end=True), *s) for s in steps]
    assert np.allclose(flow_grpo, [(0.700, 0.959), (0.813, 0.899), (0.606, 0.658), (0.495, 0.552)], atol=2e-3)
    dance = [level(Kernel(0.3, "dance", noisy_end=True), *s)[1] for s in steps]
    assert np.allclose(dance, [0.901, 0.752, 0.508, 0.217], atol=2e-3)
    for eta in (0.2, 0.9, 1.0):
        assert np.allclose([level(Kernel(eta), *s)[1] for s in steps], GRID[1:], atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_last_step_returns_the_estimate(kernel):
    z, x0 = normal(6), normal(7)
    mean, std = kernel.transition(FLOW, z, jnp.float32(0.5), x0, FLOW.eps_from_x0(z, x0, 0.5), jnp.float32(0.0))
    assert np.allclose(mean, x0, atol=1e-6) and np.all(np.asarray(std) == 0.0)


def test_the_flow_sde_keeps_the_marginals_in_many_steps():
    """Gaussian data with its exact velocity: after 200 steps mean and deviation are the data's."""
    mean, std, steps = 0.7, 0.4, 200

    def output(z, t):
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        x0 = mean + gain * (z - (1 - t) * mean)
        return (z - x0) / t

    noise = normal(8, (20_000, 1, 1, 1))
    for kernel in (Kernel(0.7, "flow_sde"), Kernel(0.3, "dance")):
        final = rollout(output, FLOW, kernel, noise, np.linspace(1.0, 0.0, steps + 1), jax.random.key(9)).states[-1]
        assert float(final.mean()) == pytest.approx(mean, abs=0.02)
        assert float(final.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_log_prob_is_the_gaussian_density(kernel):
    z, x0 = normal(10), normal(11)
    eps = FLOW.eps_from_x0(z, x0, 0.9)
    transition = kernel.transition(FLOW, z, jnp.float32(0.9), x0, eps, jnp.float32(0.75))
    z_next = kernel.step(FLOW, x0, eps, jnp.float32(0.75), normal(12), z, jnp.float32(0.9))
    expected = stats.norm.logpdf(
        np.asarray(z_next, np.float64), np.asarray(transition.mean), np.asarray(transition.std)
    )
    assert np.allclose(log_prob(transition, z_next), expected.mean((1, 2, 3)), atol=1e-5)


def test_gaussian_kl_against_quadrature():
    grid = np.linspace(-8, 8, 20_001)
    p, q = stats.norm(0.3, 0.8), stats.norm(-0.5, 0.8)
    expected = np.trapezoid(p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid)), grid)
    a, b = (Transition(jnp.full((1, 1, 1, 1), m), jnp.float32(0.8)) for m in (0.3, -0.5))
    assert float(gaussian_kl(a, b)[0]) == pytest.approx(expected, rel=1e-5)


def test_names_of_kernels():
    for text in ("ode", "renoise", "cps(0.9)", "flow_sde(0.7)", "dance(0.3)"):
        assert str(parse_kernel(text)) == text
    for text in ("heun", "cps(1.5)", "flow_sde"):
        with pytest.raises(UserError, match="Unknown kernel"):
            parse_kernel(text)
    with pytest.raises(UserError, match="for flow models"):
        Kernel(0.7, "flow_sde").check(VariancePreserving())
