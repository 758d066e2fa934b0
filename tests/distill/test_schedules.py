"""DynaDG and DynaRS against their closed forms (checks 3 of the method)."""

import jax
import numpy as np
import pytest

from dmdr_jax.distill.schedules import RenoiseTimes, cosine_decay, dyna_dg_scale, dyna_rs_beta, jittered_guidance


@pytest.mark.parametrize("step, expected", [(0, 0.5), (1000, 0.25), (2000, 0.0), (5000, 0.0)])
def test_dyna_dg_follows_the_cosine(step, expected):
    assert dyna_dg_scale(step, 0.5, 2000) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "step, expected", [(0, (4.0, 1.5)), (1000, (2.5, 1.25)), (2000, (1.0, 1.0)), (9999, (1.0, 1.0))]
)
def test_dyna_rs_beta_parameters(step, expected):
    assert np.allclose(dyna_rs_beta(step, 2000), expected, atol=1e-5)


def test_no_dynamics_means_no_decay_left():
    assert cosine_decay(0, 0) == 0.0


def test_renoise_times_start_as_beta_and_end_uniform():
    times, key = RenoiseTimes(dynamic_steps=100, low=0.0, high=1.0), jax.random.key(0)
    start, end = (np.asarray(times.sample(key, 200_000, step)) for step in (0, 100))
    # Beta(4, 1.5): mean 4 / 5.5, P(tau > .8) = .405, P(tau < .2) = .004
    assert start.mean() == pytest.approx(4 / 5.5, abs=2e-3)
    assert (start > 0.8).mean() == pytest.approx(0.405, abs=6e-3)
    assert (start < 0.2).mean() == pytest.approx(0.004, abs=1e-3)
    assert end.mean() == pytest.approx(0.5, abs=2e-3)
    assert end.var() == pytest.approx(1 / 12, abs=1e-3)


def test_renoise_times_can_hold_the_start_and_are_clipped():
    held = RenoiseTimes(dynamic_steps=0, hold=True).sample(jax.random.key(1), 50_000, 10**6)
    assert np.mean(held) == pytest.approx(4 / 5.5, abs=5e-3)
    assert float(held.max()) <= 0.9801 and float(held.min()) >= 0.0199
    uniform = RenoiseTimes(dynamic_steps=0).sample(jax.random.key(1), 50_000, 0)
    assert float(uniform.max()) == pytest.approx(0.98) and float(uniform.min()) == pytest.approx(0.02)


def test_guidance_jitter_stays_in_its_range():
    draws = np.array([jittered_guidance(jax.random.key(i), 7.0, 0.5) for i in range(200)])
    assert draws.min() >= 6.5 and draws.max() <= 7.5 and draws.std() == pytest.approx(0.5 / 3**0.5, rel=0.15)
