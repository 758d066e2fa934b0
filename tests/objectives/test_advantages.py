"""Group statistics."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.advantages import Advantages
from tests.objectives.contexts import spec

ROOT = Path(__file__).parents[2]
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
    for combine in ("each", "sum"):  # the ramp counts once, whichever way
        ramped = Advantages((spec(start=10, ramp=4),), "none", combine)
        whole = Advantages((spec(),), "none", combine)({"r": jnp.asarray(R)}, 10, 4)
        step = jnp.int32(10)
        assert np.allclose(ramped.strength(step) * ramped({"r": jnp.asarray(R)}, step, 4), 0.25 * whole)
    assert not np.any(jax.grad(lambda r: advantages({"r": r}, 12, 4)[0])(jnp.asarray(R)))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_statistics_stay_in_their_group(group):
    """Changing one group's rewards leaves the others' advantages as they are."""
    advantages = Advantages((spec(),))
    before = advantages({"r": jnp.asarray(R)}, 0, group)
    after = advantages({"r": jnp.asarray(R).at[:group].multiply(-3.0)}, 0, group)
    assert np.array_equal(before[group:], after[group:])


LOCAL = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import as_groups
from dmdr_jax.objectives.dpo import best_and_worst
from dmdr_jax.training.rollouts import take_pairs
from tests.objectives.contexts import spec

mesh = jax.make_mesh((2,), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))
states = NamedSharding(mesh, PartitionSpec(None, "data"))

def judge(normalise):
    def run(r, z):
        a = Advantages((spec(),), normalise)({"r": r}, 0, 4)
        return a, take_pairs(z, best_and_worst(as_groups(a, 4)), 4)
    shapes = jax.ShapeDtypeStruct((16,), jnp.float32), jax.ShapeDtypeStruct((3, 16, 2, 2, 1), jnp.float32)
    text = jax.jit(run, in_shardings=(rows, states)).lower(*shapes).compile().as_text()
    return [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]

print(judge("group"), judge("batch"))
"""


def test_a_groups_statistics_and_pairs_need_no_other_device():
    """Compiled for two devices, nothing is exchanged; the batch's deviation is one number that is."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] ['all-reduce']"
