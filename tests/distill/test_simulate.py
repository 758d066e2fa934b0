"""Backward simulation: the student's training inputs are the states its own sampler visits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.grids import student_grid
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.diffusion.sampler import rollout, sample
from dmdr_jax.distill.simulate import Simulation

GRID = tuple(map(float, student_grid(4, 3.0)))
SHAPE = (64, 4, 4, 2)
FLOW = Flow()


def output_fn(z, t):
    """A velocity that depends on state and time."""
    t = jnp.reshape(t, (-1, 1, 1, 1))
    return jnp.sin(z * (1.0 + t)) + 0.3 * z


def student_input(mode, shared=False, seed=0, noise_seed=1):
    noise = jax.random.normal(jax.random.key(noise_seed), SHAPE)
    given = Simulation(mode, GRID, shared).student_input(output_fn, FLOW, noise, jax.random.key(seed))
    return noise, given


@pytest.mark.parametrize("mode", ["renoise", "ode", "cps(0.9)", "ode_final"])
def test_the_top_level_input_is_the_noise_itself(mode):
    noise, given = student_input(mode)
    top = np.asarray(given.index) == 0
    assert 5 < top.sum() < 30
    assert np.array_equal(given.z[top], noise[top])
    assert np.allclose(given.t, np.asarray(GRID)[np.asarray(given.index)])


@pytest.mark.parametrize("mode", ["renoise", "ode", "cps(0.5)"])
@pytest.mark.parametrize("shared", [False, True])
def test_inputs_are_states_of_the_inference_sampler(mode, shared):
    noise, given = student_input(mode, shared)
    key_kernel = jax.random.split(jax.random.key(0), 3)[1]
    simulation = Simulation(mode, GRID, shared)
    trajectory = rollout(output_fn, FLOW, simulation.kernel, noise, GRID, key_kernel)
    rows, index = np.arange(SHAPE[0]), np.asarray(given.index)
    assert (len(set(index)) == 1) == shared
    assert np.allclose(given.z, np.asarray(trajectory.states)[index, rows], atol=1e-6)
    assert np.allclose(given.simulated, np.asarray(trajectory.x0)[index, rows], atol=1e-5)
    lean = simulation.student_input(output_fn, FLOW, noise, jax.random.key(0), with_sample=False)
    assert np.allclose(lean.z, given.z, atol=1e-6) and lean.simulated is None


def test_renoise_uses_the_estimate_of_the_step_before():
    """The input at level i is made from the x0 of level i - 1 (the released code took its own level's)."""
    noise, given = student_input("renoise")
    one = np.asarray(given.index) == 1
    x0_before = noise[one] - output_fn(noise[one], jnp.ones(()))
    t = GRID[1]
    implied_noise = (given.z[one] - (1 - t) * x0_before) / t
    assert abs(float(implied_noise.mean())) < 0.1 and float(implied_noise.std()) == pytest.approx(1.0, abs=0.1)
    assert np.abs(np.corrcoef(implied_noise.ravel(), noise[one].ravel())[0, 1]) < 0.15


def test_ode_final_renoises_the_final_sample():
    noise, given = student_input("ode_final")
    final = sample(output_fn, FLOW, Simulation("ode", GRID).kernel, noise, GRID, jax.random.key(0))
    assert np.allclose(given.simulated, final, atol=1e-5)
    last = np.asarray(given.index) == 3
    implied = (given.z[last] - (1 - GRID[3]) * final[last]) / GRID[3]
    assert float(implied.std()) == pytest.approx(1.0, abs=0.1)


def test_sampler_is_the_rollouts_last_estimate():
    noise = jax.random.normal(jax.random.key(3), SHAPE)
    for mode in ("ode", "renoise", "cps(0.9)"):
        kernel = Simulation(mode, GRID).kernel
        trajectory = rollout(output_fn, FLOW, kernel, noise, GRID, jax.random.key(4))
        drawn = sample(output_fn, FLOW, kernel, noise, GRID, jax.random.key(4))
        assert np.allclose(drawn, trajectory.x0[-1], atol=1e-6)
        assert np.allclose(drawn, trajectory.states[-1], atol=1e-6)


def test_no_gradient_flows_through_the_simulation():
    noise = jax.random.normal(jax.random.key(1), SHAPE)

    def total(w):
        given = Simulation("renoise", GRID).student_input(lambda z, t: w * z, FLOW, noise, jax.random.key(0))
        return given.z.sum() + given.simulated.sum()

    assert jax.grad(total)(0.7) == 0.0
