"""Grids of the variance preserving process against diffusers' schedulers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion import ddpm_grids
from dmdr_jax.diffusion.grids import student_grid
from dmdr_jax.diffusion.kernels import parse_kernel
from dmdr_jax.diffusion.process import VariancePreserving
from dmdr_jax.errors import UserError

NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SDXL = VariancePreserving()


def noise_over_signal(process, times):
    alpha, sigma = process.coefficients(jnp.asarray(times, jnp.float32))
    return sigma / alpha


@pytest.mark.parametrize("steps", [1, 3, 4, 25, 30, 50])
@pytest.mark.parametrize(
    "spacing", [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}, {}]
)
def test_the_euler_grid_is_diffusers(steps, spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE, **spacing)
    scheduler.set_timesteps(steps)
    grid = ddpm_grids.euler_grid(scheduler.config, steps)
    assert np.allclose(SDXL.model_time(grid[:-1]), scheduler.timesteps, atol=1e-3)
    assert np.allclose(noise_over_signal(SDXL, grid), scheduler.sigmas, rtol=1e-4, atol=1e-5)
    config = {**scheduler.config, "_class_name": "EulerDiscreteScheduler"}
    scale = ddpm_grids.initial_scale(config, SDXL, grid[0])
    first = float(scheduler.init_noise_sigma) / np.sqrt(float(scheduler.sigmas[0]) ** 2 + 1)
    assert scale == pytest.approx(first, abs=1e-6)


def test_eulers_step_in_sigma_is_our_ode_kernel():
    torch = pytest.importorskip("torch")
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(5)
    grid = ddpm_grids.euler_grid(scheduler.config, 5)
    rng = np.random.default_rng(0)
    z, kernel = rng.standard_normal((2, 3, 3, 1)).astype(np.float32), parse_kernel("ode")
    theirs = torch.from_numpy(z) * scheduler.init_noise_sigma
    ours = jnp.asarray(z)
    for i, k in enumerate(scheduler.timesteps):
        eps = rng.standard_normal(z.shape).astype(np.float32)
        theirs = scheduler.step(torch.from_numpy(eps), k, theirs).prev_sample
        x0 = SDXL.to_x0(ours, jnp.asarray(eps), grid[i])
        ours = kernel.step(SDXL, x0, jnp.asarray(eps), grid[i + 1], None)
    assert np.allclose(ours, theirs, atol=1e-4)


def test_the_four_step_grid_is_dmd2s():
    grid = [*np.asarray(SDXL.snap(student_grid(4, 1.0)[:-1])), 0.0]
    assert ddpm_grids.timesteps_of(SDXL, grid) == [999, 749, 499, 249]


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [399], [999, 500]])
def test_lcm_visits_the_students_timesteps(timesteps):
    diffusers = pytest.importorskip("diffusers")
    config = ddpm_grids.student_scheduler(NOISE, timesteps, stochastic=True)
    scheduler = diffusers.LCMScheduler.from_config(config)
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    if timesteps[0] == 999 and len(timesteps) == 4:  # then the plain call draws it too
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    "change, steps, message",
    [
        ({}, 0, "at least 1"),
        ({}, 1001, "more than the 1000"),
        ({"use_karras_sigmas": True}, 4, "use_karras_sigmas=True"),
        ({"final_sigmas_type": "sigma_min"}, 4, "final_sigmas_type"),
        ({"timestep_spacing": "odd"}, 4, "timestep_spacing is 'odd'"),
    ],
)
def test_unknown_settings_are_named(change, steps, message):
    with pytest.raises(UserError, match=message):
        ddpm_grids.euler_grid({**NOISE, **change}, steps)
