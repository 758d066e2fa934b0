"""Reading and writing weight files: layouts, types, shards, variants, and what is wrong with a bad one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file as raw_save

from dmdr_jax.diffusers_io import safetensors_io as io
from dmdr_jax.errors import UserError


def make_tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def array(*axes):
        return jnp.asarray(rng.normal(size=axes), dtype)

    return {
        "conv": {"kernel": array(3, 3, 4, 8), "bias": array(8)},
        "blocks.0:3": {"fc": {"kernel": array(3, 5, 6), "bias": array(3, 6)}},
        "logit_scale": array(),
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_torch_layout(file, tree, **replaced):
    """The tree's tensors as they should lie in a file, written without the code under test."""
    tensors = {
        "conv.weight": np.ascontiguousarray(np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1)),
        "conv.bias": np.asarray(tree["conv"]["bias"]),
        "logit_scale": np.asarray(tree["logit_scale"]),
    }
    for i in range(3):
        tensors[f"blocks.{i}.fc.weight"] = np.ascontiguousarray(np.asarray(tree["blocks.0:3"]["fc"]["kernel"])[i].T)
        tensors[f"blocks.{i}.fc.bias"] = np.ascontiguousarray(np.asarray(tree["blocks.0:3"]["fc"]["bias"])[i])
    tensors.update(replaced)
    raw_save({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_read_and_write_keep_every_bit(tmp_path, dtype):
    tree = make_tree(dtype)
    save_torch_layout(tmp_path / "model.safetensors", tree)
    assert_same(io.read_tree(tmp_path, shapes(tree)), tree)
    assert io.stored_dtype(tmp_path) == jnp.dtype(dtype).name

    io.write_tree(tmp_path / "out", tree)
    ours = load_bits(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    theirs = load_bits(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], key)
    assert_same(io.read_tree(tmp_path / "out", shapes(tree)), tree)


def load_bits(file):
    """Tensors compared as raw bytes, whatever their type."""
    from safetensors import safe_open

    with safe_open(file, "np") as reader:
        return {key: np.frombuffer(reader.get_tensor(key).tobytes(), np.uint8) for key in list(reader.keys())}


def test_types_are_converted(tmp_path):
    tree = make_tree()
    io.write_tree(tmp_path, tree, dtype=jnp.float16)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors")["conv.weight"].dtype == np.float16
    wide = io.read_tree(tmp_path, shapes(tree), dtype=jnp.float32)
    assert wide["conv"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(wide["conv"]["kernel"], tree["conv"]["kernel"].astype(jnp.float16))
    assert io.read_tree(tmp_path, shapes(tree))["conv"]["kernel"].dtype == jnp.float16


def test_shards_and_their_index(tmp_path):
    tree = make_tree()
    files = io.write_tree(tmp_path, tree, stem="model", max_shard_bytes=300)
    assert [f.name for f in files[:2]] == [f"model-0000{i}-of-0000{len(files) - 1}.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(tree))
    assert_same(io.read_tree(tmp_path, shapes(tree)), tree)


def test_variants(tmp_path):
    tree = make_tree()
    save_torch_layout(tmp_path / "model.fp16.safetensors", make_tree(jnp.float16))
    assert io.has_variant(tmp_path, "fp16") and not io.has_variant(tmp_path, "bf16")
    assert io.read_tree(tmp_path, shapes(tree), variant="fp16")["conv"]["bias"].dtype == jnp.float16
    with pytest.raises(UserError, match="variant fp16"):
        io.read_tree(tmp_path, shapes(tree))
    save_torch_layout(tmp_path / "model.safetensors", tree)
    assert io.read_tree(tmp_path, shapes(tree))["conv"]["bias"].dtype == jnp.float32
    assert io.read_tree(tmp_path, shapes(tree), variant="bf16")["conv"]["bias"].dtype == jnp.float32


def test_sharded_variant_with_its_odd_index_name(tmp_path):
    tree = make_tree()
    for file in io.write_tree(tmp_path, tree, stem="diffusion_pytorch_model", max_shard_bytes=600):
        if file.suffix == ".json":
            index = json.loads(file.read_text())
            index["weight_map"] = {k: fp16_name(v) for k, v in index["weight_map"].items()}
            (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
            file.unlink()
        else:
            file.rename(tmp_path / fp16_name(file.name))
    assert io.has_variant(tmp_path, "fp16")
    assert_same(io.read_tree(tmp_path, shapes(tree), variant="fp16"), tree)


def fp16_name(name):
    return name.replace("diffusion_pytorch_model-", "diffusion_pytorch_model.fp16-")


def test_arrays_arrive_sharded(tmp_path):
    tree = make_tree()
    io.write_tree(tmp_path, tree)
    mesh = jax.make_mesh((1,), ("fsdp",))
    spec = jax.sharding.PartitionSpec()
    one = jax.sharding.NamedSharding(mesh, spec)
    read = io.read_tree(tmp_path, shapes(tree), sharding=one)
    assert all(x.sharding == one for x in jax.tree.leaves(read))
    each = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, spec), tree)
    assert_same(io.read_tree(tmp_path, shapes(tree), sharding=each), tree)


def test_missing_key_names_the_closest(tmp_path):
    tree = make_tree()
    save_torch_layout(tmp_path / "model.safetensors", tree, **{"conv.weight": None, "conf.weight": np.zeros(3)})
    with pytest.raises(UserError, match=r"lacks the tensor 'conv.weight' .* closest in the file: conf.weight"):
        io.read_tree(tmp_path, shapes(tree))


def test_unexpected_key_names_the_closest(tmp_path):
    tree = make_tree()
    save_torch_layout(tmp_path / "model.safetensors", tree, **{"conv.weight_g": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"model.safetensors holds 1 tensors .*'conv.weight_g'.*first: conv.weight"):
        io.read_tree(tmp_path, shapes(tree))


def test_wrong_shape_names_file_and_key(tmp_path):
    tree = make_tree()
    save_torch_layout(tmp_path / "model.safetensors", tree, **{"blocks.1.fc.bias": np.zeros(7, np.float32)})
    with pytest.raises(UserError, match=r"model.safetensors: the tensor 'blocks.1.fc.bias' has shape \[7\], .* \[6\]"):
        io.read_tree(tmp_path, shapes(tree))


@pytest.mark.parametrize("keep, words", [(-10, "ends within the tensor"), (20, "within its header"), (3, "3 bytes")])
def test_truncated_file(tmp_path, keep, words):
    file = tmp_path / "model.safetensors"
    save_torch_layout(file, make_tree())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"model.safetensors is truncated.*{words}"):
        io.read_tree(tmp_path, shapes(make_tree()))


def test_missing_shard_and_damaged_index(tmp_path):
    tree = make_tree()
    files = io.write_tree(tmp_path, tree, max_shard_bytes=600)
    files[1].unlink()
    with pytest.raises(UserError, match=rf"{files[1].name} is missing: .*such as"):
        io.read_tree(tmp_path, shapes(tree))
    files[-1].write_text("{")
    with pytest.raises(UserError, match="not a checkpoint index"):
        io.read_tree(tmp_path, shapes(tree))


def test_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        io.weight_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        io.weight_files(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled"):
        io.weight_files(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    io.save_file({"x": np.ones(3, np.float32)}, file)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"cannot write .*a.safetensors: .*No space left"):
        io.save_file({"x": np.zeros(3, np.float32)}, file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    np.testing.assert_array_equal(load_file(file)["x"], np.ones(3))


def test_transposed_views_are_written_as_they_read(tmp_path):
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    io.save_file({"x": x.T}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], x.T)
