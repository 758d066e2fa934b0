"""The mesh and the placements, on eight devices that one CPU plays."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dmdr_jax.errors import UserError
from dmdr_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]
INSIDE = "DMDR_JAX_TEST_EIGHT_DEVICES"

eight_devices = pytest.mark.skipif(INSIDE not in os.environ, reason="runs inside test_on_eight_devices")


@pytest.mark.skipif(INSIDE in os.environ, reason="is running")
def test_on_eight_devices():
    """Runs this file again where JAX, which fixes its devices when it starts, sees eight."""
    environment = {
        **os.environ,
        INSIDE: "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-k", "test_eight", __file__]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout and " skipped" not in result.stdout


# --- the rule ---


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        (("a", "kernel"), (64, 128), P(None, "fsdp")),
        (("a", "kernel"), (128, 64), P("fsdp")),
        (("a", "kernel"), (64, 64), P(None, "fsdp")),  # the later of equals
        (("a", "kernel"), (130, 64), P(None, "fsdp")),  # the largest that divides
        (("a", "kernel"), (3, 3, 64, 32), P(None, None, "fsdp")),
        (("transformer_blocks.0:24", "kernel"), (24, 16, 16), P(None, None, "fsdp")),  # never the stack
        (("transformer_blocks.0:64", "bias"), (64, 33), P()),
        (("a", "kernel"), (33, 77), P()),  # nothing divides
        (("a", "bias"), (64,), P()),  # small
        (("step",), (), P()),
    ],
)
def test_rule(path, shape, spec):
    assert sharding.parameter_spec(path, shape, fsdp=4, min_size=1000) == spec


def test_nothing_is_split_without_an_fsdp_axis():
    assert sharding.parameter_spec(("kernel",), (4096, 4096), fsdp=1) == P()


def test_one_device():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert sharding.batch_sharding(mesh, 3).is_fully_replicated


@pytest.mark.parametrize("sizes", [(0, 1), (-1, -1), (-2, 1)])
def test_meaningless_meshes(sizes):
    with pytest.raises(UserError, match="has no meaning"):
        sharding.make_mesh(*sizes)


def test_more_parts_than_devices():
    with pytest.raises(UserError, match=r"data 3, fsdp 1, tensor 1 does not fit 1 device"):
        sharding.make_mesh(3, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="does not fit 1 device"):
        sharding.make_mesh(-1, 2, devices=jax.devices()[:1])


# --- several slices ---


class FakeDevice:
    """As much of a device as the making of a mesh looks at."""

    platform = device_kind = "cpu"

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, number // 4

    def __repr__(self):
        return f"{self.id}@{self.slice_index}"


def slices(count, each):
    """Devices of several slices, in an order in which nobody would like them."""
    devices = [FakeDevice(number, number // each) for number in range(count * each)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("sizes", [(16, 1, 1), (4, 4, 1), (2, 8, 1), (4, 2, 2)])
def test_only_data_crosses_between_slices(sizes):
    grid = sharding.slice_grid(sizes, slices(2, 8))
    assert grid.shape == sizes and {device.id for device in grid.flat} == set(range(16))
    where = np.vectorize(lambda device: device.slice_index)(grid)
    half = sizes[0] // 2
    assert (where[:half] == 0).all() and (where[half:] == 1).all()  # the outermost part of data


@pytest.mark.parametrize("sizes, count", [((1, 16, 1), 2), ((4, 4, 1), 8), ((6, 2, 1), 4)])
def test_a_slice_that_does_not_hold_whole_parts_of_data(sizes, count):
    each = int(np.prod(sizes)) // count
    with pytest.raises(UserError, match=rf"data {sizes[0]} does not divide over {count} slices"):
        sharding.slice_grid(sizes, slices(count, each))
    with pytest.raises(UserError, match="does not divide over"):
        sharding.make_mesh(*sizes, devices=slices(count, each))


def test_devices_without_slices_are_one():
    assert sharding.count_slices(jax.devices()) == 1
    assert sharding.count_slices(slices(3, 4)) == 3


# --- on eight devices ---


def parameters():
    rng = np.random.default_rng(0)
    return {
        "transformer_blocks.0:8": {"to_q": {"kernel": jnp.asarray(rng.normal(size=(8, 32, 64)), jnp.float32)}},
        "proj_out": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32), "bias": jnp.zeros(32)},
    }


@eight_devices
@pytest.mark.parametrize("sizes, shape", [((-1, 1), (8, 1, 1)), ((2, 4), (2, 4, 1)), ((-1, 2, 2), (2, 2, 2))])
def test_eight_mesh(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape and tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert {device.id for device in mesh.devices.flat} == set(range(8))


@eight_devices
def test_eight_way_batch():
    mesh = sharding.make_mesh(2, 4)
    batch = jax.device_put(np.arange(48).reshape(16, 3), sharding.batch_sharding(mesh, 16))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    with pytest.raises(UserError, match=r"batch of 12 does not divide over 8 devices \(data 2, fsdp 4\); take 8 or 16"):
        sharding.batch_sharding(mesh, 12)
    with pytest.raises(UserError, match=r"take 8$"):
        sharding.batch_sharding(mesh, 3)


@eight_devices
def test_eight_way_optimiser_follows_its_parameters():
    mesh = sharding.make_mesh(2, 4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    where = sharding.parameter_shardings(mesh, parameters(), min_size=64)
    where_moments = sharding.parameter_shardings(mesh, jax.eval_shape(tx.init, parameters()), min_size=64)
    adam = where_moments[1][0]
    assert adam.mu == where and adam.nu == where and adam.count.is_fully_replicated
    assert where["transformer_blocks.0:8"]["to_q"]["kernel"].spec == P(None, None, "fsdp")
    assert where["proj_out"]["bias"].is_fully_replicated


@eight_devices
def test_eight_way_report():
    mesh = sharding.make_mesh(2, 4)
    tree = parameters()
    report = sharding.report(tree, sharding.parameter_shardings(mesh, tree, min_size=64))
    split, whole = 4 * (8 * 32 * 64 + 64 * 32), 4 * 32
    assert report == (split + whole, split // 4 + whole, whole, ("proj_out.bias", whole))
    placed = jax.device_put(tree, sharding.parameter_shardings(mesh, tree, min_size=64))
    on_first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)]
    assert report.per_device == sum(on_first)
    assert "largest: proj_out.bias" in str(report)
    assert "largest" not in str(sharding.report({}, {}))


@eight_devices
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_eight_devices_train_as_one(sizes):
    """One step of data- and fsdp-parallel Adam equals the step on a single device."""
    tx = optax.adamw(1e-2)

    def loss(params, x):
        stack = params["transformer_blocks.0:8"]["to_q"]["kernel"]
        y = jnp.einsum("bi,lij->bj", x, stack) @ params["proj_out"]["kernel"] + params["proj_out"]["bias"]
        return jnp.mean(y**2)

    def step(params, opt_state, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    x = np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)
    expected = jax.jit(step)(parameters(), tx.init(parameters()), x)
    mesh = sharding.make_mesh(*sizes)
    params = jax.device_put(parameters(), sharding.parameter_shardings(mesh, parameters(), min_size=64))
    state = tx.init(parameters())
    state = jax.device_put(state, sharding.parameter_shardings(mesh, state, min_size=64))
    batch = jax.device_put(x, sharding.batch_sharding(mesh, len(x)))
    result = jax.jit(step)(params, state, batch)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(result)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@eight_devices
def test_eight_way_checkpoint_restores_on_another_mesh(tmp_path):
    """What was saved on data 2 x fsdp 4 comes back bit for bit on other meshes and on one device."""
    from dmdr_jax.training.checkpoints import Checkpoints, load_trained

    tree = {"generator": parameters()}
    mesh = sharding.make_mesh(2, 4)
    with Checkpoints(tmp_path) as ckpt:
        ckpt.save(1, jax.device_put(tree, sharding.parameter_shardings(mesh, tree, min_size=64)))
    for sizes, count in (((1, 8), 8), ((2, 2), 4), ((1, 1), 1)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
        where = sharding.parameter_shardings(mesh, tree, min_size=64)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
        with Checkpoints(tmp_path) as ckpt:
            restored = ckpt.restore(abstract)
        for a, b, s in zip(jax.tree.leaves(tree), jax.tree.leaves(restored), jax.tree.leaves(where)):
            np.testing.assert_array_equal(a, b)
            assert b.sharding == s
    trees, _ = load_trained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, trees["generator"], jax.tree.map(np.asarray, tree["generator"]))
