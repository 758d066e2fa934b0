"""Group statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.advantages import Advantages
from tests.objectives.contexts import spec

R = np.array([1.0, 2.0, 4.0, 1.0, 0.0, 0.5, -0.5, 0.0], np.float32)


def test_the_three_ways_of_normalising():
    groups = R.reshape(2, 4)
    centred = groups - groups.mean(1, keepdims=True)
    expected = {
        "group": centred / (groups.std(1, keepdims=True) + 1e-4),
        "batch": centred / (groups.std() + 1e-4),
        "none": centred,
    }
    for how, values in expected.items():
        got = Advantages((spec(),), how)({"r": jnp.asarray(R)}, 0, 4)
        assert np.allclose(got, values.reshape(-1), rtol=1e-5, atol=1e-6)


def test_rewards_are_normalised_each_or_added_first():
    specs = spec("a", weight=1.0), spec("b", weight=3.0)
    rewards = {"a": jnp.asarray(R), "b": jnp.asarray(100.0 * R[::-1])}
    each = Advantages(specs, limit=100.0)
    one, other = (Advantages((s,))(rewards, 0, 4) for s in specs)
    assert np.allclose(each(rewards, 0, 4), (one + 3.0 * other) / 4.0, atol=1e-5)
    added = Advantages(specs, "none", "sum", limit=1e6)(rewards, 0, 4)
    total = (R + 300.0 * R[::-1]).reshape(2, 4)
    assert np.allclose(added, (total - total.mean(1, keepdims=True)).reshape(-1), rtol=1e-5, atol=1e-3)


def test_equal_rewards_give_none_and_large_ones_are_limited():
    assert not np.any(Advantages((spec(),))({"r": jnp.full(8, 0.3)}, 0, 4))
    one_of_many = jnp.zeros(64).at[0].set(1.0)
    assert float(Advantages((spec(),))({"r": one_of_many}, 0, 64).max()) == 5.0


def test_the_ramp_is_a_strength_and_no_gradient_flows():
    advantages = Advantages((spec(start=10, ramp=4),))
    assert [float(advantages.strength(jnp.int32(s))) for s in (9, 10, 13, 20)] == [0.0, 0.25, 1.0, 1.0]
    assert advantages.start == 10
    assert not np.any(jax.grad(lambda r: advantages({"r": r}, 12, 4)[0])(jnp.asarray(R)))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_statistics_stay_in_their_group(group):
    """Changing one group's rewards leaves the others' advantages as they are."""
    advantages = Advantages((spec(),))
    before = advantages({"r": jnp.asarray(R)}, 0, group)
    after = advantages({"r": jnp.asarray(R).at[:group].multiply(-3.0)}, 0, group)
    assert np.array_equal(before[group:], after[group:])
