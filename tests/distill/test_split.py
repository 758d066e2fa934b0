"""Decoupled DMD: tied it is coupled, its times, its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.distill.dm import dm_draw
from dmdr_jax.distill.scores import Scores
from dmdr_jax.distill.split import SplitTimes, split_draw

SHAPE = (4, 2, 2, 3)


def normal(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def test_tied_it_is_coupled_distribution_matching_normaliser_included():
    x, fake, c, u = (normal(i) for i in range(4))
    tau, scores = jnp.full((4,), 0.5), Scores(fake, c, u)
    coupled, tied = dm_draw(x, tau, scores, 7.0), split_draw(x, tau, scores, c, 7.0)
    assert np.allclose(tied.gradient, coupled.gradient, rtol=1e-5, atol=1e-6)
    assert np.allclose(tied.normaliser, coupled.normaliser, rtol=1e-5)


def test_the_parts_come_from_their_own_points():
    x, fake, c, u, c_ca = (normal(i) for i in range(5))
    draw = split_draw(x, jnp.full((4,), 0.5), Scores(fake, c, u), c_ca, 4.0, normaliser="conditional")
    assert np.allclose(draw.matching, fake - c, atol=1e-6)
    assert np.allclose(draw.augmentation, 3.0 * (c_ca - u), atol=1e-4)
    n = np.abs(np.asarray(x - c)).mean((1, 2, 3), keepdims=True) + 1e-3
    assert np.allclose(draw.gradient, ((fake - c) - 3.0 * (c_ca - u)) / n, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_augmentation_is_drawn_below_the_students_time_uniformly_before_the_shift(shift):
    n, t = 50_000, 0.75
    below = np.asarray(SplitTimes(shift=shift, low=0.0).below(jax.random.key(0), jnp.full((n,), t)))
    assert below.max() <= t and below.min() >= 0.0
    unshifted = below / (shift - (shift - 1) * below)
    top = t / (shift - (shift - 1) * t)
    assert unshifted.mean() == pytest.approx(top / 2, rel=2e-2) and unshifted.max() == pytest.approx(top, rel=1e-2)


def test_schedules():
    tau, free, t = jnp.array([0.9, 0.8]), jnp.array([0.7, 0.6]), jnp.array([0.5, 1.0])
    times = {
        name: SplitTimes(name).times(jax.random.key(0), tau, t, free) for name in ("hybrid", "independent", "tied")
    }
    assert np.array_equal(times["tied"], (tau, tau)) and np.array_equal(times["independent"], (tau, free))
    assert np.array_equal(times["hybrid"][0], tau) and np.all(times["hybrid"][1] <= t)
    cleaner = SplitTimes("cleaner").times(jax.random.key(0), tau, t, free)
    assert not np.array_equal(*cleaner) and all(np.all(times <= t) for times in cleaner)
    shifted = SplitTimes("independent", shift=3.0, uniform=True).times(jax.random.key(0), tau, t, free)
    assert np.allclose(shifted, ((2.7 / 2.8, 2.4 / 2.6), (2.1 / 2.4, 1.8 / 2.2)))
