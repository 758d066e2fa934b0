"""The flow process and the transition kernels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.diffusion.process import Flow, VariancePreserving
from dmdr_jax.errors import UserError

FLOW = Flow()
SDXL = VariancePreserving()
PROCESSES = {"flow": FLOW, "epsilon": SDXL, "v": VariancePreserving(prediction="v_prediction")}


def noise_over_signal(process, times):
    alpha, sigma = process.coefficients(jnp.asarray(times, jnp.float32))
    return sigma / alpha


def data(seed=0, b=3):
    k = jax.random.split(jax.random.key(seed), 3)
    x0, e = jax.random.normal(k[0], (b, 4, 4, 2)), jax.random.normal(k[1], (b, 4, 4, 2))
    return x0, e, jax.random.uniform(k[2], (b,), minval=0.05, maxval=0.95)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_conversions_invert_the_forward_process(process):
    x0, e, t = data()
    x_t, output = process.add_noise(x0, e, t), process.target(x0, e, t)
    assert np.allclose(process.to_x0(x_t, output, t), x0, atol=1e-5)
    assert np.allclose(process.to_eps(x_t, output, t), e, atol=1e-6)
    assert np.allclose(process.eps_from_x0(x_t, x0, t), e, atol=1e-4)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_every_process_ends_at_clean_data_and_starts_at_noise(process):
    assert tuple(map(float, process.coefficients(jnp.float32(0.0)))) == (1.0, 0.0)
    alpha, sigma = process.coefficients(jnp.float32(1.0))
    assert float(sigma) > 0.99 > 0.1 > float(alpha)
    times = jnp.linspace(0, 1, 101)
    assert np.all(np.diff(noise_over_signal(process, times[:-1])) > 0)
    snapped = process.snap(jnp.asarray([0.02, 0.5, 0.98]))
    assert np.allclose(snapped, [0.02, 0.5, 0.98], atol=1e-6)
    assert all(process.time_of(float(process.model_time(t))) == pytest.approx(float(t), abs=1e-6) for t in snapped)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}])
def test_variance_preserving_is_diffusers(prediction, settings):
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    defaults = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction)
    scheduler = DDIMScheduler(**{**defaults, **settings}, clip_sample=False)
    process = VariancePreserving.from_scheduler(scheduler.config)
    assert np.allclose(process.alphas_cumprod(), scheduler.alphas_cumprod, rtol=2e-5)
    k = np.array([0, 1, 249, 399, 749, 999])
    t = (jnp.asarray(k) + 1.0) / 1000
    assert np.array_equal(process.model_time(t), k)
    rng = np.random.default_rng(0)
    x0, e, out = rng.standard_normal((3, len(k), 2, 2, 1)).astype(np.float32)
    theirs = scheduler.add_noise(*map(torch.from_numpy, (x0, e, k)))
    assert np.allclose(process.add_noise(jnp.asarray(x0), jnp.asarray(e), t), theirs, atol=1e-5)
    if prediction == "v_prediction":
        velocity = scheduler.get_velocity(*map(torch.from_numpy, (x0, e, k)))
        assert np.allclose(process.target(jnp.asarray(x0), jnp.asarray(e), t), velocity, atol=1e-5)
    scheduler.set_timesteps(1000)
    for row, step in enumerate(k):
        x_t = np.asarray(x0[row])
        theirs = scheduler.step(torch.from_numpy(out[row]), int(step), torch.from_numpy(x_t)).pred_original_sample
        ours = process.to_x0(jnp.asarray(x_t), jnp.asarray(out[row]), t[row])
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_is_diffusers():
    pytest.importorskip("torch")
    from diffusers import EulerDiscreteScheduler

    settings = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    scheduler = EulerDiscreteScheduler(**settings, prediction_type="v_prediction")
    process = VariancePreserving.from_scheduler(scheduler.config)
    assert np.allclose(process.alphas_cumprod()[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-3, atol=1e-7)
    assert process.alphas_cumprod()[-1] == float(scheduler.alphas_cumprod[-1])


def test_noise_levels_between_training_steps_are_interpolated_as_diffusers_does():
    table = np.sqrt((1 - SDXL.alphas_cumprod()) / SDXL.alphas_cumprod())
    k = np.array([0.25, 437.5, 998.75])
    ratios = noise_over_signal(SDXL, (k + 1) / 1000)
    assert np.allclose(ratios, np.interp(k, np.arange(1000), table), rtol=1e-5)


def test_small_alpha_keeps_fp32(process=SDXL):
    """x0 at k = 999 divides by .068: a bf16 output must not make the conversion bf16."""
    x0 = process.to_x0(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16), jnp.float32(1.0))
    alpha = np.sqrt(process.alphas_cumprod()[-1])
    assert x0.dtype == jnp.float32
    assert np.allclose(x0, (1 - np.sqrt(1 - alpha**2)) / alpha, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_start": None}, "no beta_start"),
    ],
)
def test_schedulers_of_other_kinds_are_refused(change, message):
    config = {"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear"} | change
    with pytest.raises(UserError, match=message):
        VariancePreserving.from_scheduler({k: v for k, v in config.items() if v is not None})


def test_velocity_is_the_time_derivative_of_the_path():
    x0, e, t = data()
    _, derivative = jax.jvp(lambda t: FLOW.add_noise(x0, e, t), (t,), (jnp.ones_like(t),))
    assert np.allclose(derivative, FLOW.target(x0, e, t), atol=1e-6)


def test_conversions_stay_fp32_for_low_precision_outputs():
    x0, e, t = data()
    assert FLOW.to_x0(x0.astype(jnp.bfloat16), e.astype(jnp.bfloat16), t).dtype == jnp.float32
    assert FLOW.add_noise(x0.astype(jnp.bfloat16), e, 0.5).dtype == jnp.float32


def test_ode_kernel_is_eulers_step():
    x0, e, _ = data()
    z, v = FLOW.add_noise(x0, e, 0.9), FLOW.target(x0, e, 0.9)
    assert np.allclose(Kernel(0.0).step(FLOW, x0, e, 0.75, None), z + (0.75 - 0.9) * v, atol=1e-6)


def test_every_kernel_keeps_the_noise_level():
    """The total noise variance after a step is t'^2 whatever eta, unlike Euler-Maruyama discretisations."""
    e, n = jax.random.normal(jax.random.key(0), (2, 400_000))
    for process in (FLOW, SDXL):
        sigma = float(process.coefficients(jnp.float32(0.7))[1])
        for eta in (0.0, 0.3, 0.9, 1.0):
            z = Kernel(eta).step(process, jnp.zeros_like(e), e, jnp.float32(0.7), n)
            assert float(z.std()) == pytest.approx(sigma, rel=5e-3)


def test_cps_interpolates_between_ode_and_renoise():
    x0, e, _ = data()
    n = jax.random.normal(jax.random.key(5), x0.shape)
    nearly = [Kernel(eta).step(FLOW, x0, e, 0.6, n) for eta in (1e-7, 1 - 1e-7)]
    assert np.allclose(nearly[0], Kernel(0.0).step(FLOW, x0, e, 0.6, n), atol=1e-5)
    assert np.allclose(nearly[1], Kernel(1.0).step(FLOW, x0, e, 0.6, n), atol=1e-5)


def test_the_last_step_returns_x0_exactly():
    x0, e, _ = data()
    for process in (FLOW, SDXL):
        for eta in (0.0, 0.5, 1.0):
            assert np.array_equal(Kernel(eta).step(process, x0, e, jnp.float32(0.0), e), x0)


@pytest.mark.parametrize("text", ["ode", "renoise", "cps(0.9)"])
def test_kernels_have_names(text):
    assert str(parse_kernel(text)) == text


@pytest.mark.parametrize("text", ["euler", "cps", "cps(1.5)", "cps(-1)", "cps(0.1.2)", ""])
def test_unknown_kernels_are_refused(text):
    with pytest.raises(UserError, match="ode, renoise or cps"):
        parse_kernel(text)
