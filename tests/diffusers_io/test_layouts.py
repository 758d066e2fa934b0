"""Every way in which published folders lay out the same weights, written by diffusers, transformers and safetensors."""

import copy
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dmdr_jax import cli  # noqa: E402
from dmdr_jax.diffusers_io import keymap, pipeline, safetensors_io  # noqa: E402
from dmdr_jax.errors import UserError  # noqa: E402
from tests import tiny_pipelines  # noqa: E402
from tests.torch_weights import from_torch  # noqa: E402

CLIP = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=["sd3", "sdxl"])
def pipe(request):
    return request.param, tiny_pipelines.build(request.param)


@pytest.fixture(scope="module")
def plain(pipe, tmp_path_factory):
    """A folder as diffusers writes it, and what it means."""
    folder = tmp_path_factory.mktemp("plain") / pipe[0]
    pipe[1].save_pretrained(folder)
    return folder, pipeline.load_pipeline(folder).params


@pytest.fixture
def folder(plain, tmp_path):
    """A copy to change."""
    return shutil.copytree(plain[0], tmp_path / "folder")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(component, rename, **more):
    """A component's one weight file with other keys, and more tensors."""
    file = next(component.glob("*.safetensors"))
    before = load_file(file)
    tensors = {rename(key): value for key, value in before.items()} | more
    save_file(tensors, file)
    return set(tensors) - set(before)


def weights_of(folder, component, **options):
    return pipeline.load_pipeline(folder, [component], **options).params[component]


def test_a_plain_folder_is_what_diffusers_holds(pipe, plain):
    """Against a filling of our trees that does not use the reader."""
    for component, params in plain[1].items():
        state = dict(getattr(pipe[1], component).state_dict())
        if component == "text_encoder_3":
            state.pop("encoder.embed_tokens.weight")
        if pipe[0] == "sdxl" and component == "text_encoder":  # transformers 5 has no prefix there
            state = {f"text_model.{key}": value for key, value in state.items()}
        assert_same(params, from_torch(params, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [None, "40KB"])
def test_types_variants_and_shards(pipe, plain, tmp_path, dtype, variant, shards):
    if (dtype, variant, shards) == (torch.float32, None, None):
        pytest.skip("the plain folder")
    source = shutil.copytree(plain[0], tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"variant": variant} | ({"max_shard_size": shards} if shards else {})
    expected = {}
    for component, params in plain[1].items():
        copy.deepcopy(getattr(pipe[1], component)).to(dtype).save_pretrained(source / component, **options)
        stored = jnp.dtype(str(dtype).removeprefix("torch."))
        expected[component] = jax.tree.map(lambda x, stored=stored: np.asarray(x).astype(stored), params)
    index = "model.safetensors.index.fp16.json" if variant else "model.safetensors.index.json"
    assert bool(list(source.rglob(f"*{index}"))) == bool(shards)
    stems = [p.name.split("-00001")[0] for p in source.rglob("*-00001-of-*")]
    assert not shards or all(stem.endswith(".fp16") == bool(variant) for stem in stems)
    read = pipeline.load_pipeline(source, dtype=dict.fromkeys(expected), variant=variant)
    assert_same(read.params, expected)


@pytest.mark.parametrize("component", CLIP)
@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_with_and_without_its_prefix_and_position_ids(plain, folder, component, prefix):
    ids = {f"{prefix}embeddings.position_ids": torch.arange(16)[None]}
    new = rewrite(folder / component, lambda key: prefix + key.removeprefix("text_model."), **ids)
    assert new > set(ids) or prefix or component == "text_encoder"
    assert_same(weights_of(folder, component), plain[1][component])


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_vae_attention(plain, folder, convolutions):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    assert len(rewrite(folder / "vae", rename)) == 16
    if convolutions:
        file = next((folder / "vae").glob("*.safetensors"))
        tensors = load_file(file)
        wide = {k: v[..., None, None] for k, v in tensors.items() if ".attentions." in k and v.ndim == 2}
        assert len(wide) == 8
        save_file(tensors | wide, file)
    assert_same(weights_of(folder, "vae"), plain[1]["vae"])


def other_shards(folder, file_name, index_name):
    """Renames a component's shards and their index."""
    index = next(folder.glob("*.index.json"))
    weight_map = {key: file_name(name) for key, name in json.loads(index.read_text())["weight_map"].items()}
    for file in folder.glob("*.safetensors"):
        file.rename(folder / file_name(file.name))
    index.unlink()
    (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "file_name, index_name",
    [
        ("{0}.fp16-{1}.safetensors", "{0}.safetensors.index.fp16.json"),
        ("{0}.fp16-{1}.safetensors", "{0}.fp16.safetensors.index.json"),
        ("{0}-{1}.fp16.safetensors", "{0}.safetensors.fp16.index.json"),
        ("{0}-{1}.fp16.safetensors", "{0}.safetensors.index.fp16.json"),
    ],
)
def test_names_of_sharded_variants_through_the_years(pipe, plain, folder, file_name, index_name):
    vae = folder / "vae"
    next(vae.glob("*.safetensors")).unlink()
    pipe[1].vae.save_pretrained(vae, max_shard_size="10KB")

    def rename(name):
        stem, number = name.removesuffix(".safetensors").split("-", 1)
        return file_name.format(stem, number)

    other_shards(vae, rename, index_name.format("diffusion_pytorch_model"))
    assert safetensors_io.has_variant(vae, "fp16") and len(list(vae.glob("*.safetensors"))) > 2
    assert_same(weights_of(folder, "vae", variant="fp16"), plain[1]["vae"])
    # Copied under today's plain names, so that it loads without asking.
    source = pipeline.load_pipeline(folder, ["vae"], variant="fp16")
    copied = pipeline.save_pipeline(source, folder.with_name("copied"))
    assert_same(weights_of(copied, "vae"), plain[1]["vae"])
    with pytest.raises(UserError, match=r"variant fp16|shards such as"):
        weights_of(folder, "vae")


def test_a_variant_beside_the_plain_weights(pipe, plain, folder):
    """As in the SD3.5 repositories: each reader gets its own."""
    network = pipe[1].text_encoder_2
    half = copy.deepcopy(network)
    half.load_state_dict({key: 2 * value for key, value in network.state_dict().items()})
    half.to(torch.float16).save_pretrained(folder / "text_encoder_2", variant="fp16", max_shard_size="20KB")
    assert_same(weights_of(folder, "text_encoder_2"), plain[1]["text_encoder_2"])
    read = weights_of(folder, "text_encoder_2", variant="fp16")
    assert_same(
        read, jax.tree.map(lambda x: (2 * np.asarray(x)).astype(np.float16).astype(x.dtype), plain[1]["text_encoder_2"])
    )


# --- SD3 alone -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tiny_pipelines.save(tmp_path_factory.mktemp("sd3") / "sd3", "sd3")
    return folder, pipeline.load_pipeline(folder).params


@pytest.fixture
def sd3_folder(sd3, tmp_path):
    return shutil.copytree(sd3[0], tmp_path / "folder")


ONE, TWO = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize("names", [(ONE,), (TWO,), (ONE, TWO)])
def test_t5_tables(sd3, sd3_folder, names):
    file = sd3_folder / "text_encoder_3/model.safetensors"
    tensors = load_file(file)
    table = tensors.pop(ONE)
    save_file(tensors | {name: table.clone() for name in names}, file)
    assert_same(weights_of(sd3_folder, "text_encoder_3"), sd3[1]["text_encoder_3"])


def test_the_position_table_is_computed_where_it_is_absent(sd3, sd3_folder):
    file = sd3_folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["pos_embed.pos_embed"]
    save_file(tensors, file)
    read = weights_of(sd3_folder, "transformer")
    assert jax.tree.structure(read) == jax.tree.structure(sd3[1]["transformer"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), read, sd3[1]["transformer"])
    half = weights_of(sd3_folder, "transformer", dtype=jnp.bfloat16)
    assert half["pos_embed"]["pos_embed"].dtype == jnp.bfloat16


def test_arrays_do_not_change_with_the_file(sd3, sd3_folder):
    """jax keeps host arrays as they are where it can; a file's pages must not be among them."""
    file = sd3_folder / "transformer/diffusion_pytorch_model.safetensors"
    mesh = jax.make_mesh((1,), ("fsdp",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    read = [weights_of(sd3_folder, "transformer", dtype={"transformer": None})]
    read.append(weights_of(sd3_folder, "transformer", dtype={"transformer": None}, sharding=lambda *_: everywhere))
    with open(file, "r+b") as stream:
        size = file.stat().st_size
        stream.seek(size // 2)
        stream.write(b"\x7f" * (size - size // 2))
    for tree in read:
        assert_same(tree, sd3[1]["transformer"])
    changed = weights_of(sd3_folder, "transformer")
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(read[0]), strict=True))


def test_mixed_types_in_one_stack_become_the_widest(sd3, sd3_folder):
    file = sd3_folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(file).items()}
    key = "transformer_blocks.1.attn.to_q.weight"
    tensors[key] = load_file(sd3[0] / "transformer/diffusion_pytorch_model.safetensors")[key]
    save_file(tensors, file)
    read = weights_of(sd3_folder, "transformer", dtype={"transformer": None})
    for path, leaf in keymap.leaves(read):
        wide = path == ("transformer_blocks.0:3", "attn", "to_q", "kernel")
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16)
    exact = dict(keymap.leaves(sd3[1]["transformer"]))["transformer_blocks.0:3", "attn", "to_q", "kernel"][1]
    np.testing.assert_array_equal(read["transformer_blocks.0:3"]["attn"]["to_q"]["kernel"][1], exact)


# --- bad input -------------------------------------------------------------------------------------------------------


def shard(folder, size="30KB"):
    """Splits the transformer's weights."""
    target = folder / "transformer"
    params = weights_of(folder, "transformer")
    next(target.glob("*.safetensors")).unlink()
    limit = int(size.removesuffix("KB")) * 1000
    return [f for f in safetensors_io.write_tree(target, params, max_shard_bytes=limit) if f.suffix != ".json"]


def cut_shard(folder):
    file = shard(folder)[1]
    file.write_bytes(file.read_bytes()[:-7])


def lose_shard(folder):
    shard(folder)[1].unlink()


def lose_index(folder):
    shard(folder)
    next((folder / "transformer").glob("*.index.json")).unlink()


def swap_shard(folder):
    files = shard(folder)
    shutil.copyfile(files[0], files[1])


def escape_index(folder):
    shard(folder)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text(index.read_text().replace("diffusion_pytorch_model-00001", "../../diffusion_pytorch_model-00001"))


def unet_inside(folder):
    """A U-Net's folder under the transformer's name, its config too."""
    config = {**json.loads((folder / "transformer/config.json").read_text()), "_class_name": "UNet2DConditionModel"}
    (folder / "transformer/config.json").write_text(json.dumps(config))


def unet_weights(folder):
    """A U-Net's weights beside the transformer's config."""
    tensors = {f"down_blocks.{i}.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3) for i in range(3)}
    save_file(tensors, folder / "transformer/diffusion_pytorch_model.safetensors")


def retype(dtype):
    def change(folder):
        file = folder / "transformer/diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        key = "transformer_blocks.1.ff.net.2.weight"
        save_file(tensors | {key: (4 * tensors[key]).to(dtype)}, file)

    return change


def quantised(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"proj_out.weight.absmax": torch.zeros(3)}, file)


def reshaped(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"proj_out.weight": tensors["proj_out.weight"][:, :-1].contiguous()}, file)


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut_shard, r"model-00002-of-000\d\d\.safetensors is truncated: it ends within the tensor '"),
        (lose_shard, r"model-00002-of-000\d\d\.safetensors is missing: .* places \d+ tensors there, such as '"),
        (lose_index, "has shards such as diffusion_pytorch_model-00001-of-.* but not their index"),
        (swap_shard, r"model-00002-of-000\d\d\.safetensors lacks the tensor '.*' that .*index.json lists"),
        (escape_index, "names a file outside its folder"),
        (unet_inside, "holds a UNet2DConditionModel, but a StableDiffusion3Pipeline has a SD3Transformer2DModel"),
        (unet_weights, "weights of another network: none of the .*, but 'down_blocks.0.resnets.0.conv1.weight'"),
        (retype(torch.int8), r"'transformer_blocks\.1\.ff\.net\.2\.weight' is stored as I8, but weights must be F64"),
        (retype(torch.float8_e4m3fn), r"is stored as F8_E4M3, but .* use the model's files that are not quantised"),
        (quantised, "no place for: 'proj_out.weight.absmax'; closest in the model to the first: proj_out.weight"),
        (reshaped, r"'proj_out.weight' has shape \[16, 15\], but its config.json asks for \[16, 16\]"),
    ],
)
def test_bad_weights_end_a_program_with_one_sentence(sd3_folder, tmp_path, capsys, damage, words):
    from dmdr_jax import sample

    damage(sd3_folder)
    with pytest.raises(UserError, match=words):
        pipeline.load_pipeline(sd3_folder, ["transformer"])
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["--model", sd3_folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as ending:
        cli.run(sample.main, sample.parser(), list(map(str, arguments)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert ending.value.code == 2 and lines[-1].startswith("error: ") and not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_file_that_could_not_be_written(sd3, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    params = sd3[1]["vae"]
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"cannot write .*vae/diffusion_pytorch_model.safetensors: .*No space left"):
        safetensors_io.write_tree(tmp_path / "vae", params)
    assert list(Path(tmp_path / "vae").iterdir()) == []
