"""The mesh and the placements, on eight devices that one CPU plays."""

import os
import pathlib
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dmdr_jax.errors import UserError
from dmdr_jax.generate import decode_images
from dmdr_jax.models import placement
from dmdr_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.mmdit import MMDiT, MMDiTConfig
from dmdr_jax.models.placement import batch_parts, unsplit
from dmdr_jax.rewards.memory import in_microbatches
from dmdr_jax.training import mesh_choice, rules, sharding
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.scoring import decode_together

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
        (("a", "kernel"), (256, 512), P("fsdp")),  # the first whose parts are long
        (("a", "kernel"), (64, 512), P(None, "fsdp")),
        (("pos_embed", "pos_embed"), (1, 4096, 64), P(None, "fsdp")),
        (("a", "kernel"), (64, 128), P(None, "fsdp")),
        (("a", "kernel"), (128, 64), P("fsdp")),
        (("a", "kernel"), (64, 64), P(None, "fsdp")),  # the later of equals
        (("a", "kernel"), (130, 64), P(None, "fsdp")),  # the largest that divides
        (("a", "kernel"), (3, 3, 64, 32), P(None, None, "fsdp")),
        (("transformer_blocks.0:24", "kernel"), (24, 64, 64), P(None, None, "fsdp")),  # never the stack
        (("transformer_blocks.0:24", "kernel"), (24, 128, 64), P(None, "fsdp")),
        (("transformer_blocks.0:24", "kernel"), (24, 16, 16), P()),  # each block's is small
        (("transformer_blocks.0:64", "bias"), (64, 33), P()),
        (("a", "kernel"), (33, 77), P()),  # nothing divides
        (("a", "bias"), (64,), P()),  # small
        (("step",), (), P()),
    ],
)
def test_rule(path, shape, spec):
    assert sharding.parameter_spec(path, shape, fsdp=4, min_size=1000) == spec


def test_frozen_weights_have_rules_of_their_own():
    path, shape = ("pos_embed", "pos_embed"), (1, 4096, 64)
    assert sharding.parameter_spec(path, shape, 4, rules=rules.FROZEN) == P()
    kernel = ("transformer_blocks.0:24", "ff.net.2", "kernel"), (24, 1024, 256)
    assert sharding.parameter_spec(*kernel, 4, rules=rules.FROZEN) == P(None, "fsdp")
    assert sharding.parameter_spec(*kernel, 4, rules=rules.WHOLE) == P()


# --- the mesh that is chosen ---


GB = 10**9
SD3_FULL = mesh_choice.Residents(base=4 * GB, trained=33 * GB, text=10 * GB, whole=2 * GB, full=True)
SD3_LORA = mesh_choice.Residents(base=4 * GB, trained=1 * GB, text=10 * GB, whole=2 * GB, full=False)


@pytest.mark.parametrize(
    "slice_size, limit, held, found",
    [
        (1, 16, SD3_LORA, (1, False)),  # there is nothing to choose
        (8, 95, SD3_LORA, (1, False)),  # all of it fits, several times
        (16, 16, SD3_LORA, (8, False)),  # T5 must be split, the base need not be
        (8, 16, SD3_FULL, (8, True)),  # a small slice may be spanned whole
        (64, 95, SD3_FULL, (8, False)),
        (64, 16, SD3_FULL, (32, False)),
        (16, 16, SD3_FULL, (8, True)),  # never all of it
        (256, 4, SD3_FULL, (128, True)),  # nothing leaves room
    ],
)
def test_the_mesh_that_is_chosen(slice_size, limit, held, found):
    assert mesh_choice.choose(slice_size, limit * GB, held) == found


def test_the_memory_asked_for_is_that_of_a_device_of_ones_own():
    """Another process's device, which is the first of all, answers with an error."""

    def device(process, stats):
        return types.SimpleNamespace(process_index=process, platform="tpu", memory_stats=stats)

    def refused():
        raise RuntimeError("INVALID_ARGUMENT: MemoryStats is only supported for addressable devices")

    devices = [device(1, refused), device(0, lambda: {"bytes_limit": 16e9})]
    assert mesh_choice.memory_limit(devices) == 16e9


def test_no_axis_spans_a_torus_of_three_axes():
    def slice_of(*shape):
        return [types.SimpleNamespace(coords=place) for place in np.ndindex(shape)]

    assert [mesh_choice.has_three_axes(slice_of(*shape)) for shape in ((2, 2, 2), (2, 2, 1), (2, 4, 1))] == [1, 0, 0]
    assert not mesh_choice.has_three_axes(jax.devices())
    assert mesh_choice.choose(8, 95 * GB, SD3_FULL, deep=True) == (4, False)
    assert mesh_choice.choose(64, 95 * GB, SD3_FULL, deep=True) == (8, False)


def asked(data=-1, fsdp=0, base="auto"):
    return types.SimpleNamespace(data=data, fsdp=fsdp, base=base)


def test_what_is_asked_for_is_taken():
    devices = slices(1, 16)
    sizes = lambda mesh, limit=95e9: mesh_choice.sizes(mesh, lambda: SD3_LORA, devices, limit)
    assert sizes(asked()) == (-1, 1, False)
    assert sizes(asked(base="split")) == (-1, 1, True)
    assert sizes(asked(fsdp=4)) == (-1, 4, False)
    assert sizes(asked(fsdp=4), limit=8e9) == (-1, 4, True)
    assert sizes(asked(data=2, fsdp=8, base="whole"), limit=8e9) == (2, 8, False)
    assert sizes(asked(data=4)) == (4, 4, False) and sizes(asked(data=16)) == (16, 1, True)  # what data leaves
    # Of a memory that nobody knows: nothing is split, unless it is asked for.
    assert sizes(asked(), limit=float("inf"))[1] == 1
    assert sizes(asked(fsdp=4), limit=float("inf")) == (-1, 4, True)
    assert mesh_choice.sizes(asked(), lambda: SD3_FULL, slices(2, 8), 16e9) == (-1, 8, True)  # a slice, not all


def test_a_layout_without_choice():
    layout = mesh_choice.make_layout(asked(), held=None, devices=jax.devices()[:1])
    assert layout.mesh.size == 1 and layout.mesh.shape["fsdp"] == 1


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


def test_a_batch_may_be_smaller_than_its_texts_are_long():
    """A bias of the text's tokens is one for all rows."""
    cond = Conditioning(jnp.zeros((2, 13, 4)), jnp.zeros((2, 3)), jnp.zeros(13))
    where = Layout.make(1, 1, devices=jax.devices()[:1]).batch_shardings(cond)
    assert where.prompt_embeds.spec == where.pooled.spec == P(("data", "fsdp")) and where.key_bias.spec == P()


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


NETWORK = MMDiTConfig(
    num_layers=2,
    attention_head_dim=64,
    num_attention_heads=4,
    caption_projection_dim=256,
    joint_attention_dim=256,
    pooled_projection_dim=256,
    sample_size=8,
    pos_embed_max_size=8,
)


@eight_devices
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((256, 128), 0),
        ((3, 3, 24, 10), 2),
        ((3, 3, 10, 64), 3),
        ((40,), 0),
        ((128, 100), 0),
        ((8, 256), 1),
        ((1, 1, 256, 128), 2),
    ],
)
@pytest.mark.parametrize("sizes", [(2, 4), (1, 8)])
def test_eight_way_sums_of_parts(shape, axis, sizes):
    """Parts that are whole tiles, that are not, along any axis: of the sum over all devices."""
    mesh = sharding.make_mesh(*sizes)
    arrays = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    rows = P(placement.BATCH_AXES)

    def own(array):
        return placement.sum_of_parts(array[0], axis)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        split = P(*[None] * axis, placement.FSDP)
        found = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=split, check_vma=False))(arrays)
    assert {shard.data.shape[axis] for shard in found.addressable_shards} == {shape[axis] // sizes[1]}
    np.testing.assert_allclose(found, arrays.sum(0), rtol=1e-5, atol=1e-5)


@eight_devices
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_eight_way_gathers_and_split_gradients(sizes):
    """A network whose layers gather their weights has the output and the gradients of one whose weights are whole."""
    network = MMDiT(NETWORK, remat="full")
    rng = np.random.default_rng(0)
    shapes = (8, 8, 8, 16), (8,), (8, 8, 256), (8, 256)
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    abstract = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.normal(size=x.shape), jnp.float32), abstract)

    def update(params, *inputs):
        return jax.value_and_grad(lambda p: (network.apply({"params": p}, *inputs) ** 2).mean())(params)

    expected = jax.jit(update)(params, *inputs)
    layout = Layout.make(*sizes)

    def on_mesh(params, *inputs):
        with layout.scope():
            return update(params, *inputs)

    where = jax.tree.map(lambda x: x.sharding, layout.abstract_state(params))
    loss, gradients = jax.jit(on_mesh)(jax.device_put(params, where), *layout.put_batch(inputs))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for a, b, s in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(gradients), jax.tree.leaves(where)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()) + 1e-8)
        if jnp.any(a):  # the last block's text queries act on nothing
            assert s.is_fully_replicated or b.sharding.is_equivalent_to(s, b.ndim)


@eight_devices
def test_eight_way_microbatches_give_equal_rewards():
    """Three rows at a time on each of eight devices, and all at once."""
    layout = Layout.make(2, 4)
    x = np.random.default_rng(0).normal(size=(32, 4, 4, 3)).astype(np.float32)
    score = lambda x: (jnp.tanh(x) ** 2).sum((1, 2, 3))

    def update(x, size):
        with layout.scope():
            scores = in_microbatches(score, size * batch_parts(), remat=False)
            return jax.value_and_grad(lambda x: (scores(x) * jnp.arange(32)).sum())(x)

    whole, parts = (jax.jit(update, static_argnums=1)(layout.put_batch(x), size) for size in (0, 3))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-4)


@eight_devices
@pytest.mark.parametrize("sizes", [(2, 4), (1, 8), (8, 1)])
def test_eight_devices_decode_an_image_together(sizes):
    """Images and gradients of one device that decodes all, and a fraction of its memory on each."""
    shape = AutoencoderKLConfig(4, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4)
    codec = AutoencoderKL(shape)
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: codec.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), abstract)
    latents, weights = (rng.normal(size=(8, *rest)).astype(np.float32) for rest in ((32, 24, 4), (64, 48, 3)))
    layout = Layout.make(*sizes)

    def decoded(x):
        with unsplit():
            return jax.checkpoint(lambda z: decode_images(codec, params, z))(x)

    def update(x, decode):
        with layout.scope():
            return jax.value_and_grad(lambda x: (decode(x) * weights).sum())(x)

    expected = jax.jit(partial(update, decode=decoded))(latents)
    program = jax.jit(partial(update, decode=partial(decode_together, decoded)))
    program = program.lower(layout.put_batch(latents)).compile()
    found = program(layout.put_batch(latents))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-4 * np.abs(expected[1]).max())
    if sizes[1] > 1:
        alone = jax.jit(partial(update, decode=decoded)).lower(layout.put_batch(latents)).compile()
        memory = [p.memory_analysis().temp_size_in_bytes for p in (program, alone)]
        assert memory[0] < 0.5 * memory[1]


@eight_devices
def test_eight_devices_need_rows_to_share():
    layout = Layout.make(1, 8)
    with layout.scope(), pytest.raises(UserError, match="12 rows of latents do not divide over 8 devices"):
        decode_together(lambda x: x, jnp.zeros((8, 12, 8, 4)))


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
