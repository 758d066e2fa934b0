"""Whole folders: read, written back for diffusers, and what is said about a bad one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextModelWithProjection, T5EncoderModel  # noqa: E402

from dmdr_jax.diffusers_io import keymap, safetensors_io  # noqa: E402
from dmdr_jax.diffusers_io import pipeline as pipelines  # noqa: E402
from dmdr_jax.errors import UserError  # noqa: E402
from tests import tiny_pipelines  # noqa: E402

TORCH_CLASSES = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, by kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(root / kind, kind) for kind in tiny_pipelines.KINDS}


@pytest.fixture
def copy(folders, tmp_path):
    """A folder to damage."""
    return shutil.copytree(folders["sd3"], tmp_path / "sd3")


def perturbed(tree):
    """Another tree of the same shapes, exact in bfloat16, so that every stored type keeps it."""
    return jax.tree.map(lambda x: 2 * np.asarray(x).astype(jnp.bfloat16).astype(x.dtype), tree)


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_clean_load(folder, component):
    """diffusers or transformers finds every key it wants and no other."""
    _, info = TORCH_CLASSES[component].from_pretrained(folder / component, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), (component, problem, info[problem])


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_round_trip_through_diffusers(kind, folders, tmp_path):
    pipeline = pipelines.load_pipeline(folders[kind])
    components = [c for c in TORCH_CLASSES if kind != "sd3_no_t5" or c != "text_encoder_3"]
    assert list(pipeline.params) == components and list(pipeline.modules) == components
    assert list(pipeline.tokenizers) == components[2:]

    changed = {c: perturbed(pipeline.params[c]) for c in components}
    scheduler = {**pipeline.scheduler, "shift": 5.0}
    out = pipelines.save_pipeline(pipeline, tmp_path / "out", changed, scheduler, {"steps": 4})
    pipe = tiny_pipelines.load(out)
    assert pipe.scheduler.config.shift == 5.0
    for component in components:
        assert_clean_load(out, component)
        held = getattr(pipe, component).state_dict()
        for entry in keymap.entries(changed[component]):
            leaf = dict(keymap.leaves(changed[component]))[entry.path]
            key = next(key for key in keymap.spellings(entry.key) if key in held)
            np.testing.assert_array_equal(held[key].numpy(), entry.to_torch(np.asarray(leaf)[entry.index]), key)

    again = pipelines.load_pipeline(out)
    assert_same_trees(again.params, changed)
    assert again.student == {"steps": 4} and pipeline.student is None


def test_what_is_not_changed_is_copied(folders, tmp_path):
    source = folders["sd3"]
    pipeline = pipelines.load_pipeline(source, components=["transformer"])
    assert list(pipeline.params) == ["transformer"] and not pipeline.tokenizers
    changed = {"transformer": perturbed(pipeline.params["transformer"])}
    out = pipelines.save_pipeline(pipeline, tmp_path / "out", changed)
    files = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files
    for name in files - {"transformer/diffusion_pytorch_model.safetensors"}:
        if name.endswith(".json"):
            assert json.loads((out / name).read_text()) == json.loads((source / name).read_text()), name
        else:
            assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_variant_folder_is_written_without_variant(tmp_path):
    source = tiny_pipelines.save(tmp_path / "source", dtype=torch.float16, variant="fp16", max_shard_size="30KB")
    assert len(list((source / "transformer").glob("*.fp16-*.safetensors"))) > 1
    with pytest.raises(UserError, match="variant fp16"):
        pipelines.load_pipeline(source)
    pipeline = pipelines.load_pipeline(source, variant="fp16")
    assert pipeline.params["transformer"]["proj_out"]["kernel"].dtype == jnp.float32

    out = pipelines.save_pipeline(pipeline, tmp_path / "out", {"vae": perturbed(pipeline.params["vae"])})
    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert weights["decoder.conv_in.weight"].dtype == torch.float16
    for component in TORCH_CLASSES:
        assert_clean_load(out, component)
    assert_same_trees(pipelines.load_pipeline(out).params["transformer"], pipeline.params["transformer"])
    tiny_pipelines.load(out)


def test_types_by_component(tmp_path):
    source = tiny_pipelines.save(tmp_path / "source", "sd3_no_t5", dtype=torch.bfloat16)
    plain = pipelines.load_pipeline(source, dtype=jnp.bfloat16)
    assert plain.params["transformer"]["proj_out"]["kernel"].dtype == jnp.bfloat16
    assert plain.modules["transformer"].dtype == jnp.bfloat16
    assert plain.params["vae"]["decoder"]["conv_in"]["kernel"].dtype == jnp.float32

    mixed = pipelines.load_pipeline(
        source, ["transformer", "vae"], dtype={"transformer": jnp.float16, "vae": None}, compute_dtype=jnp.bfloat16
    )
    assert mixed.params["transformer"]["proj_out"]["kernel"].dtype == jnp.float16
    assert mixed.params["vae"]["decoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert mixed.modules["transformer"].dtype == jnp.bfloat16 and mixed.modules["vae"].dtype == jnp.float32
    out = pipelines.save_pipeline(plain, tmp_path / "out", {"transformer": plain.params["transformer"]})
    assert safetensors_io.stored_dtype(out / "transformer") == "bfloat16"


def test_arrays_are_placed_as_asked(folders):
    mesh = jax.make_mesh((1,), ("fsdp",))
    seen = []

    def sharding(component, abstract):
        seen.append((component, len(jax.tree.leaves(abstract))))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    pipeline = pipelines.load_pipeline(folders["sd3"], ["transformer"], sharding=sharding)
    leaves = jax.tree.leaves(pipeline.params)
    assert seen == [("transformer", len(leaves))]
    assert all(x.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) for x in leaves)


@pytest.mark.parametrize("t5", [True, False])
def test_a_folder_from_scratch(t5, folders, tmp_path):
    source = pipelines.load_pipeline(folders["sd3" if t5 else "sd3_no_t5"])
    configs = {
        "transformer": source.modules["transformer"].config.to_diffusers(),
        "vae": {k: v for k, v in source.configs["vae"].items() if not k.startswith("_")},
        "text_encoder": source.modules["text_encoder"].config.to_diffusers(),
        "text_encoder_2": source.modules["text_encoder_2"].config.to_diffusers(),
        **({"text_encoder_3": source.modules["text_encoder_3"].config.to_diffusers()} if t5 else {}),
    }
    out = pipelines.new_pipeline_folder(
        tmp_path / "new", configs, source.params, source.tokenizers, {"shift": 2.0}, dtype=jnp.float32
    )
    pipe = tiny_pipelines.load(out)
    assert pipe.scheduler.config.shift == 2.0 and (pipe.text_encoder_3 is not None) == t5
    for component in source.params:
        assert_clean_load(out, component)
    assert_same_trees(pipelines.load_pipeline(out).params, source.params)
    old, new = (p.encode_prompt(tiny_pipelines.PROMPTS, None, None) for p in (tiny_pipelines.load(source.folder), pipe))
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())


def test_a_t5_that_is_not_there_is_allowed(copy, tmp_path):
    shutil.rmtree(copy / "text_encoder_3")
    pipeline = pipelines.load_pipeline(copy, ["text_encoder"])
    assert "text_encoder_3" not in pipeline.modules
    out = pipelines.save_pipeline(pipeline, tmp_path / "out")
    assert tiny_pipelines.load(out).text_encoder_3 is None


def test_old_key_spellings(copy):
    before = pipelines.load_pipeline(copy).params
    renames = {
        "text_encoder": lambda k: k.removeprefix("text_model."),
        "text_encoder_3": lambda k: k.replace("shared.", "encoder.embed_tokens."),
        "vae": lambda k: k.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn."),
    }
    for component, rename in renames.items():
        file = next((copy / component).glob("*.safetensors"))
        tensors = {rename(key): value for key, value in load_file(file).items()}
        if component == "text_encoder":
            tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        assert set(tensors) != set(load_file(file))
        save_file(tensors, file)
    assert_same_trees(pipelines.load_pipeline(copy).params, before)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def drop_component(folder):
    shutil.rmtree(folder / "vae")


def other_pipeline(folder):
    edit(folder / "model_index.json", _class_name="FluxPipeline")


def unet_in_place(folder):
    edit(folder / "transformer/config.json", _class_name="UNet2DConditionModel")


def other_width(folder):
    edit(folder / "transformer/config.json", joint_attention_dim=64)


def bad_json(folder):
    (folder / "vae/config.json").write_text("{")


def no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer_2")


def bad_tokenizer(folder):
    (folder / "tokenizer/tokenizer.json").write_text("[]")


def cut_weights(folder):
    file = folder / "text_encoder_3/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_index(folder):
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (drop_component, "has no vae/ folder"),
        (other_pipeline, "FluxPipeline; supported are StableDiffusion3Pipeline"),
        (unet_in_place, "holds a UNet2DConditionModel, but a StableDiffusion3Pipeline has a SD3Transformer2DModel"),
        (other_width, r"tensor 'context_embedder.weight' has shape \[16, 48\].*\[16, 64\]"),
        (bad_json, "config.json cannot be read as JSON"),
        (no_tokenizer, "no tokenizer_2/"),
        (bad_tokenizer, "tokenizer cannot be read as a CLIPTokenizer"),
        (cut_weights, "model.safetensors is truncated"),
        (no_index, "not a diffusers pipeline: it has no model_index.json"),
    ],
)
def test_bad_folders(copy, damage, words):
    damage(copy)
    with pytest.raises(UserError, match=words):
        pipelines.load_pipeline(copy)


def test_bad_requests(folders, tmp_path):
    source = folders["sd3_no_t5"]
    with pytest.raises(UserError, match="single SD3Transformer2DModel"):
        pipelines.load_pipeline(source / "transformer")
    with pytest.raises(UserError, match="no component 'unet'"):
        pipelines.load_pipeline(source, ["unet"])
    with pytest.raises(UserError, match="has no text_encoder_3"):
        pipelines.load_pipeline(source, ["text_encoder_3"])
    with pytest.raises(UserError, match="no weights of the variant 'fp16'"):
        pipelines.load_pipeline(source, variant="fp16")

    pipeline = pipelines.load_pipeline(source, ["transformer"])
    params = dict(pipeline.params["transformer"])
    params["proj_out"] = {"kernel": jnp.zeros((16, 3)), "bias": params["proj_out"]["bias"]}
    with pytest.raises(UserError, match=r"not of the transformer .*proj_out/kernel is \(16, 3\) here and \(16, 16\)"):
        pipelines.save_pipeline(pipeline, tmp_path / "out", {"transformer": params})
    del params["proj_out"]
    with pytest.raises(UserError, match="proj_out/bias is absent here"):
        pipelines.save_pipeline(pipeline, tmp_path / "out", {"transformer": params})
    with pytest.raises(UserError, match="needs transformer, vae"):
        pipelines.new_pipeline_folder(tmp_path / "out", {}, {}, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_kept_unless_asked(folders, tmp_path):
    pipeline = pipelines.load_pipeline(folders["sd3_no_t5"], ["transformer"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists: give another name or --overwrite"):
        pipelines.save_pipeline(pipeline, tmp_path / "out")
    with pytest.raises(UserError, match="no pipeline's folder"):  # what is not ours is not replaced either
        pipelines.save_pipeline(pipeline, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    (tmp_path / "out/model_index.json").write_text("{}")
    pipelines.save_pipeline(pipeline, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/notes.txt").exists() and (tmp_path / "out/model_index.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(folders, tmp_path, monkeypatch):
    pipeline = pipelines.load_pipeline(folders["sd3_no_t5"], ["transformer"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        pipelines.save_pipeline(pipeline, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
