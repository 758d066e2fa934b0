"""Time grids against diffusers' own scheduler, and the student's grid drawn by it."""

import numpy as np
import pytest

from dmdr_jax.diffusion import grids
from dmdr_jax.errors import UserError

TEACHERS = {
    "plain": {},
    "sd3": {"shift": 3.0},
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic_linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.7},
    "karras": {"shift": 2.0, "use_karras_sigmas": True},
    "exponential": {"shift": 2.0, "use_exponential_sigmas": True},
    "beta": {"shift": 2.0, "use_beta_sigmas": True},
}


def scheduler(config):
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("steps", [2, 4, 7, 28])
def test_default_grid_is_diffusers(name, steps):
    config = TEACHERS[name]
    reference = scheduler(config)
    mu = {"mu": grids.dynamic_mu(config, 1024)} if config.get("use_dynamic_shifting") else {}
    reference.set_timesteps(steps, **mu)
    np.testing.assert_allclose(grids.flow_match_euler_sigmas(config, steps, 1024), reference.sigmas, atol=2e-7)

    given = np.linspace(1, 0.2, steps).tolist()
    reference.set_timesteps(sigmas=given, **mu)
    ours = grids.flow_match_euler_sigmas(config, image_seq_len=1024, sigmas=given)
    np.testing.assert_allclose(ours, reference.sigmas, atol=2e-7)


def test_dynamic_mu_is_diffusers():
    pytest.importorskip("torch")
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    config = {"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 100, "max_image_seq_len": 5000}
    assert grids.dynamic_mu(config, 777) == pytest.approx(calculate_shift(777, 100, 5000, 0.4, 1.3), abs=1e-12)


def test_published_student_grids():
    np.testing.assert_allclose(grids.student_grid(4, 3.0), [1, 0.9, 0.75, 0.5, 0], atol=1e-7)
    np.testing.assert_allclose(grids.student_grid(4, 5.0), [1, 0.9375, 0.8333333, 0.625, 0], atol=1e-7)
    np.testing.assert_allclose(grids.student_grid(1, 3.0), [1, 0])
    np.testing.assert_allclose(grids.authors_grid(4, 3.0), [1, 0.900, 0.750, 0.501, 0.001], atol=5e-4)
    np.testing.assert_allclose(grids.authors_grid(4, 5.0), [1, 0.938, 0.834, 0.626, 0.001], atol=5e-4)


def test_shift_and_its_inverse():
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(grids.unshift(grids.shift(u, 3.0), 3.0), u, atol=1e-15)
    assert grids.shift(0.25, 3.0) == 0.5


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 25])
def test_a_default_call_draws_the_student(steps, shift):
    grid = grids.student_grid(steps, shift)
    config = grids.scheduler_config_for(grid, {"shift": 3.0, "use_dynamic_shifting": True}, stochastic=True)
    assert config is not None and config["stochastic_sampling"]
    reference = scheduler(config)
    reference.set_timesteps(steps)
    np.testing.assert_allclose(reference.sigmas, grid, atol=1e-6)
    np.testing.assert_allclose(reference.timesteps, 1000 * grid[:-1], atol=1e-3)


def test_a_default_call_draws_the_release_grid_ending_at_zero():
    grid = grids.authors_grid(4, 3.0)
    assert grids.scheduler_config_for(grid, {}, stochastic=False) is None
    grid[-1] = 0
    config = grids.scheduler_config_for(grid, {}, stochastic=False)
    np.testing.assert_allclose(grids.flow_match_euler_sigmas(config, 4), grid, atol=1e-6)


def test_one_and_two_step_grids_always_exist():
    for middle in (0.95, 0.4, 0.01):
        config = grids.scheduler_config_for([1, middle, 0], {}, stochastic=False)
        np.testing.assert_allclose(grids.flow_match_euler_sigmas(config, 2), [1, middle, 0], atol=1e-6)


@pytest.mark.parametrize("grid", [[1, 0.9, 0.5, 0.4, 0], [0.9, 0.5, 0], [1, 0.5, 0.5, 0], [1, 0.99, 0.5, 0]])
def test_other_grids_need_explicit_sigmas(grid):
    assert grids.scheduler_config_for(grid, {}, stochastic=False) is None
    if np.all(np.diff(grid) < 0):
        reference = scheduler(grids.explicit_config({}, stochastic=False, shift_factor=3.0))
        reference.set_timesteps(sigmas=grids.explicit_sigmas(grid, 3.0))
        np.testing.assert_allclose(reference.sigmas, grid, atol=1e-6)


def test_other_settings_of_the_folder_are_kept():
    config = grids.scheduler_config_for([1, 0.5, 0], {"_diffusers_version": "0.30", "max_shift": 1.2}, stochastic=False)
    assert config["_diffusers_version"] == "0.30" and config["max_shift"] == 1.2
    assert not config["use_dynamic_shifting"] and not config["stochastic_sampling"]


@pytest.mark.parametrize(
    "config, options, words",
    [
        ({"_class_name": "LCMScheduler"}, {"steps": 4}, "LCMScheduler"),
        ({"invert_sigmas": True}, {"steps": 4}, "invert_sigmas"),
        ({"use_dynamic_shifting": True}, {"steps": 4}, "image size"),
        ({"shift_terminal": 0.1}, {"steps": 1}, "single step"),
        ({}, {"steps": 0}, "at least 1 step"),
        ({}, {"steps": 3, "sigmas": [1.0, 0.5]}, "as many steps"),
    ],
)
def test_errors(config, options, words):
    with pytest.raises(UserError, match=words):
        grids.flow_match_euler_sigmas(config, **options)
