"""GDMD: the gradient identity, and distribution matching where rewards say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.base import TargetGain, total_loss
from dmdr_jax.objectives.dm import DistributionMatching
from dmdr_jax.objectives.target import TargetPreference, nft_loss
from dmdr_jax.training.step import update_spread
from tests.objectives.contexts import context, draw, normal, spec


@pytest.mark.parametrize("r, beta", [(0.5, 1.0), (0.9, 0.1), (0.2, 0.7)])
def test_the_gradient_of_the_negative_aware_loss(r, beta):
    """Against automatic differentiation of the published loss, and 2 beta [(2r - 1)(old - target) + beta (x - old)]."""
    with jax.enable_x64(True):
        x, old, target = (jnp.asarray(normal(i), jnp.float64) for i in range(3))
        rows = jnp.full(4, r, jnp.float64)
        got = jax.grad(lambda x: nft_loss(x, old, target, rows, beta))(x)
        expected = 2 * beta * ((2 * r - 1) * (old - target) + beta * (x - old)) / x.size
        assert np.allclose(got, expected, rtol=1e-9, atol=1e-12)

        def published(x):
            positive, negative = (1 - beta) * old + beta * x, (1 + beta) * old - beta * x
            return (r * (positive - target) ** 2 + (1 - r) * (negative - target) ** 2).mean()

        value, slope = jax.value_and_grad(published)(x)
        assert np.allclose(got, slope, rtol=1e-9, atol=1e-12)
        assert float(nft_loss(x, old, target, rows, beta)) == pytest.approx(float(value), rel=1e-12)


def gain(sample, target, spread=1.0):
    return TargetGain({"r": sample}, {"r": target}, {"r": jnp.float32(spread)})


def slope(terms, x, matching, target_gain):
    def loss(y):
        ctx = context(y, draw=matching, sampled_x0=x, old_x0=x, target_gain=target_gain)
        return total_loss(terms, ctx)[0]

    return jax.jit(jax.grad(loss))(x)


def test_without_a_reward_difference_it_is_distribution_matching_bit_for_bit():
    x, same = normal(5), normal(6, (4,))
    matching = draw(x)
    plain = (DistributionMatching(),)
    both = (*plain, TargetPreference((spec(),)))
    assert np.array_equal(slope(plain, x, matching, None), slope(both, x, matching, gain(same, same)))


def test_on_policy_it_is_distribution_matching_with_a_weight():
    """lambda + 2 beta gamma (2r - 1) per sample: 0 for the worst, 2 for the best, with the defaults."""
    x, matching = normal(7), draw(normal(7))
    sample, target = jnp.zeros(4), jnp.array([5.0, -5.0, 0.5, -0.25])
    plain = slope((DistributionMatching(),), x, matching, None)
    both = slope((DistributionMatching(), TargetPreference((spec(),))), x, matching, gain(sample, target))
    weight = np.array([2.0, 0.0, 1.5, 0.75])[:, None, None, None]
    assert np.allclose(both, weight * plain, rtol=1e-4, atol=1e-7)


def test_each_reward_is_measured_in_its_own_spread():
    term = TargetPreference((spec("a", weight=1.0), spec("b", weight=3.0)))
    zero = jnp.zeros(4)
    measured = TargetGain(
        {"a": zero, "b": zero}, {"a": zero + 0.1, "b": zero - 20.0}, {"a": jnp.float32(1.0), "b": jnp.float32(100.0)}
    )
    r = term.optimality(context(normal(0), target_gain=measured))
    assert np.allclose(r, 0.5 + 0.5 * (0.1 * 1.0 - 0.2 * 3.0) / 4.0, atol=1e-6)


def test_the_running_spread_is_the_root_of_the_mean_variance():
    gains = [normal(i, (5, 4)) * (i + 1) for i in range(3)]
    running = {}
    for g in gains:
        running, spread = update_spread(running, {"r": g}, 0.9)
    weights = np.array([0.81, 0.9, 1.0])
    expected = np.sqrt((weights * [float(g.var()) for g in gains]).sum() / weights.sum())
    assert float(spread["r"]) == pytest.approx(expected, rel=1e-5)
    assert float(update_spread(running, {"r": gains[0]}, 0.0)[1]["r"]) == pytest.approx(float(gains[0].std()), rel=1e-5)
