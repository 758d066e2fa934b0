"""The flow process and the transition kernels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.errors import UserError

FLOW = Flow()


def data(seed=0, b=3):
    k = jax.random.split(jax.random.key(seed), 3)
    x0, e = jax.random.normal(k[0], (b, 4, 4, 2)), jax.random.normal(k[1], (b, 4, 4, 2))
    return x0, e, jax.random.uniform(k[2], (b,), minval=0.05, maxval=0.95)


def test_conversions_invert_the_forward_process():
    x0, e, t = data()
    x_t, v = FLOW.add_noise(x0, e, t), FLOW.target(x0, e)
    assert np.allclose(FLOW.to_x0(x_t, v, t), x0, atol=1e-6)
    assert np.allclose(FLOW.to_eps(x_t, v, t), e, atol=1e-6)
    assert np.allclose(FLOW.eps_from_x0(x_t, x0, t), e, atol=1e-5)


def test_velocity_is_the_time_derivative_of_the_path():
    x0, e, t = data()
    _, derivative = jax.jvp(lambda t: FLOW.add_noise(x0, e, t), (t,), (jnp.ones_like(t),))
    assert np.allclose(derivative, FLOW.target(x0, e), atol=1e-6)


def test_conversions_stay_fp32_for_low_precision_outputs():
    x0, e, t = data()
    assert FLOW.to_x0(x0.astype(jnp.bfloat16), e.astype(jnp.bfloat16), t).dtype == jnp.float32
    assert FLOW.add_noise(x0.astype(jnp.bfloat16), e, 0.5).dtype == jnp.float32


def test_ode_kernel_is_eulers_step():
    x0, e, _ = data()
    z, v = FLOW.add_noise(x0, e, 0.9), FLOW.target(x0, e)
    assert np.allclose(Kernel(0.0).step(x0, e, 0.75, None), z + (0.75 - 0.9) * v, atol=1e-6)


def test_every_kernel_keeps_the_noise_level():
    """The total noise variance after a step is t'^2 whatever eta, unlike Euler-Maruyama discretisations."""
    e, n = jax.random.normal(jax.random.key(0), (2, 400_000))
    for eta in (0.0, 0.3, 0.9, 1.0):
        z = Kernel(eta).step(jnp.zeros_like(e), e, 0.7, n)
        assert float(z.std()) == pytest.approx(0.7, rel=5e-3)


def test_cps_interpolates_between_ode_and_renoise():
    x0, e, _ = data()
    n = jax.random.normal(jax.random.key(5), x0.shape)
    nearly = [Kernel(eta).step(x0, e, 0.6, n) for eta in (1e-7, 1 - 1e-7)]
    assert np.allclose(nearly[0], Kernel(0.0).step(x0, e, 0.6, n), atol=1e-5)
    assert np.allclose(nearly[1], Kernel(1.0).step(x0, e, 0.6, n), atol=1e-5)


def test_the_last_step_returns_x0_exactly():
    x0, e, _ = data()
    for eta in (0.0, 0.5, 1.0):
        assert np.array_equal(Kernel(eta).step(x0, e, 0.0, e), x0)


@pytest.mark.parametrize("text", ["ode", "renoise", "cps(0.9)"])
def test_kernels_have_names(text):
    assert str(parse_kernel(text)) == text


@pytest.mark.parametrize("text", ["euler", "cps", "cps(1.5)", "cps(-1)", "cps(0.1.2)", ""])
def test_unknown_kernels_are_refused(text):
    with pytest.raises(UserError, match="ode, renoise or cps"):
        parse_kernel(text)
