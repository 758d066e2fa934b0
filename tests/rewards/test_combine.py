"""The reward loss against its closed form: hinge, linear, z-units, start and ramp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import RewardSpec, calibrated, clamp_images, saturated_fraction
from dmdr_jax.rewards.combine import (
    combined_reward,
    group_z_scores,
    refl_loss,
    reward_weight,
)

SCORES = {"clip": jnp.array([0.1, 0.9, 0.4]), "hps": jnp.array([0.2, 0.3, 0.1])}


def test_hinge_sum_is_equation_2():
    specs = [RewardSpec("clip", weight=0.3, margin=0.7), RewardSpec("hps", weight=0.1, margin=0.25)]
    loss, metrics = refl_loss(specs, SCORES, step=0)
    expected = 0.3 * (0.6 + 0.0 + 0.3) / 3 + 0.1 * (0.05 + 0.0 + 0.15) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/clip"], 1.4 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/clip/beyond_margin"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/loss"], loss)


def test_gradient_is_zero_beyond_the_margin_and_minus_weight_over_batch_below():
    spec = RewardSpec("clip", weight=0.3, margin=0.7)
    grad = jax.grad(lambda s: refl_loss([spec], {"clip": s}, 0)[0])(SCORES["clip"])
    np.testing.assert_allclose(grad, [-0.1, 0.0, -0.1], rtol=1e-6)


def test_without_a_margin_the_term_is_linear():
    spec = RewardSpec("clip", weight=2.0, margin=None)
    loss, metrics = refl_loss([spec], SCORES, 0)
    np.testing.assert_allclose(loss, -2.0 * 1.4 / 3, rtol=1e-6)
    assert "reward/clip/beyond_margin" not in metrics


def test_z_units_hinge_in_standard_deviations_of_the_teacher():
    teacher = np.array([0.2, 0.4, 0.6])
    spec = calibrated(RewardSpec("clip", units="z", margin=2.0), teacher)
    assert spec.mean == pytest.approx(0.4) and spec.std == pytest.approx(0.2)
    loss, _ = refl_loss([spec], SCORES, 0)
    np.testing.assert_allclose(loss, (3.5 + 0.0 + 2.0) / 3, rtol=1e-5)


def test_start_and_ramp():
    ramped = RewardSpec("clip", weight=0.5, start=100, ramp=50)
    weights = [float(reward_weight(ramped, step)) for step in (0, 99, 100, 109, 124, 149, 1000)]
    np.testing.assert_allclose(weights, [0, 0, 0.01, 0.1, 0.25, 0.5, 0.5], rtol=1e-6)
    switched = RewardSpec("clip", weight=0.5, start=100)
    assert [float(reward_weight(switched, step)) for step in (99, 100)] == [0.0, 0.5]


def test_step_may_be_traced():
    spec = RewardSpec("clip", weight=0.5, start=2, ramp=4)
    loss = jax.jit(lambda step: refl_loss([spec], SCORES, step)[0])
    np.testing.assert_allclose(loss(3), 0.25 * (0.6 + 0.0 + 0.3) / 3, rtol=1e-6)


def test_combined_reward_is_a_weighted_sum_per_sample():
    specs = [RewardSpec("clip", weight=2.0), RewardSpec("hps", weight=1.0, units="z", mean=0.2, std=0.1)]
    np.testing.assert_allclose(combined_reward(specs, SCORES, 0), [0.2, 2.8, -0.2], atol=1e-6)


def test_clamp_passes_gradient_on_the_borders_and_not_beyond():
    pixels = jnp.array([-0.1, 0.0, 0.5, 1.0, 1.1])
    np.testing.assert_array_equal(clamp_images(pixels), jnp.clip(pixels, 0, 1))
    np.testing.assert_array_equal(jax.grad(lambda p: clamp_images(p).sum())(pixels), [0, 1, 1, 1, 0])


def test_saturated_fraction_is_per_image():
    images = jnp.zeros((2, 2, 2, 3)).at[1, 0].set(1.5)
    np.testing.assert_allclose(saturated_fraction(images), [0.0, 0.5])


def test_group_z_scores_are_the_population_z_scores():
    scores = np.random.default_rng(0).normal(3.0, 2.0, (4, 6)).astype(np.float32)
    expected = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_z_scores(jnp.asarray(scores)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 7])
def test_equal_scores_and_groups_of_one_have_no_advantage_and_no_gradient_trouble(group):
    scores = jnp.full((2, group), 0.3)
    np.testing.assert_array_equal(group_z_scores(scores), 0.0)


@pytest.mark.parametrize(
    "fields", [{"units": "percent"}, {"std": -1.0}, {"start": -1}, {"activation": "relu"}, {"positive_words": ("a",)}]
)
def test_bad_specs_are_refused_by_name(fields):
    with pytest.raises(UserError, match="'mine'"):
        RewardSpec("mine", **fields)


def test_calibration_needs_scores_that_differ():
    with pytest.raises(UserError, match="calibrated"):
        calibrated(RewardSpec("mine"), np.ones(4))


def test_z_units_that_were_not_measured_are_refused():
    with pytest.raises(UserError, match="'mine': units 'z' need"):
        refl_loss([RewardSpec("mine", units="z", std=0.0)], {"mine": SCORES["clip"]}, 0)
