"""The published folders of SDXL-base 1.0, SD3-Medium, SD3.5-Medium and SD3.5-Large against the loader.

Nothing is allocated: the manifests say what the folders hold, ``jax.eval_shape`` what the networks want, and
`read_plan.make_plan`, which the reader itself follows, which tensor fills which leaf.
"""

import hashlib
import json
import math

import jax
import pytest

from dmdr_jax.diffusers_io import components, keymap, pipeline
from dmdr_jax.diffusers_io.read_plan import Stored, make_plan
from dmdr_jax.errors import UserError
from tests.diffusers_io import checkpoint_manifests as published

DENOISERS = {
    ("sdxl_base", "unet"): 2_567_463_684,
    ("sd3_medium", "transformer"): 2_028_328_000,
    ("sd35_medium", "transformer"): 2_243_171_520,
    ("sd35_large", "transformer"): 8_056_627_520,
}
# One of each network, as models share encoders and decoders.
NETWORKS = list({published.component(*place)["tensors"]: place for place in reversed(published.COMPONENTS)}.values())


def ids(place):
    return "-".join(place)


def build(model, component):
    """(class, module, abstract parameters) by the published configuration."""
    class_name = published.class_of(model, component)
    module = components.build_module(class_name, published.component(model, component)["config"])
    return class_name, module, components.abstract_params(class_name, module)


def manifest(model, component):
    return published.manifest(published.component(model, component)["tensors"])


def check_plan(model, component, stored):
    """Every tensor is read once, or is one of two names of the same, and every leaf is filled whole."""
    class_name, module, abstract = build(model, component)
    plan = make_plan(abstract, stored, f"{model}/{component}", components.buffers(class_name, module))
    leaves = dict(keymap.leaves(abstract))
    filled = {path: sum(math.prod(read.entry.shape) for read in reads) for path, reads in plan.reads.items()}
    filled |= {entry.path: math.prod(entry.shape) for entry in plan.absent}
    assert filled == {path: leaf.size for path, leaf in leaves.items()}
    for path, reads in plan.reads.items():
        assert len({read.entry.index for read in reads}) == len(reads), path
    keys = [read.key for reads in plan.reads.values() for read in reads]
    assert len(keys) == len(set(keys))
    return plan, set(keys)


@pytest.mark.parametrize("place", published.COMPONENTS, ids=ids)
def test_every_key_is_read_and_every_leaf_filled(place):
    held, before = manifest(*place), len(jax.live_arrays())
    plan, keys = check_plan(*place, held.stored("BF16"))
    assert keys == set(held.shapes) and not plan.absent
    abstract = build(*place)[2]
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert held.parameters == published.component(*place)["parameters"]
    assert count == held.parameters + sum(math.prod(held.shapes[key]) for key in held.buffers)
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("place", DENOISERS, ids=ids)
def test_parameter_counts(place):
    assert manifest(*place).parameters == DENOISERS[place]


@pytest.mark.parametrize("model", published.MODELS)
def test_the_folder_is_understood(model, tmp_path):
    record = published.MODELS[model]
    for name, config in [("scheduler", record["scheduler"])] + [
        (name, component["config"]) for name, component in record["components"].items()
    ]:
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(record["model_index"]))
    loaded = pipeline.load_pipeline(tmp_path, components=[])
    assert set(loaded.modules) == set(record["components"]) and not loaded.params
    assert loaded.modules["vae"].config.downsampling == 8
    assert loaded.modules[loaded.denoiser].config.sample_size == 128


# --- other spellings of the same folders ---------------------------------------------------------------------------


def renamed(stored, rename):
    return {rename(key): tensor for key, tensor in stored.items()}


@pytest.mark.parametrize("place", [p for p in NETWORKS if p[1] in ("text_encoder", "text_encoder_2")], ids=ids)
@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoders_with_and_without_prefix(place, prefix):
    stored = renamed(manifest(*place).stored(), lambda key: prefix + key.removeprefix("text_model."))
    _, keys = check_plan(*place, stored)
    assert keys == set(stored)
    stored[f"{prefix}embeddings.position_ids"] = Stored(stored[next(iter(stored))].file, "I64", (1, 77))
    _, keys = check_plan(*place, stored)
    assert set(stored) - keys == {f"{prefix}embeddings.position_ids"}


def test_t5_tables():
    place = ("sd35_large", "text_encoder_3")
    stored = manifest(*place).stored()
    one, two = "shared.weight", "encoder.embed_tokens.weight"
    other = renamed(stored, lambda key: two if key == one else key)
    assert check_plan(*place, other)[1] == set(other)
    both = {**stored, two: stored[one]}
    assert set(both) - check_plan(*place, both)[1] == {two}


@pytest.mark.parametrize("place", [("sdxl_base", "vae"), ("sd3_medium", "vae")], ids=ids)
def test_old_vae_attention(place):
    stored = manifest(*place).stored()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names = {key: key for key in stored}
    for new, name in old.items():
        names |= {key: key.replace(f".{new}.", f".{name}.") for key in stored if f".attentions.0.{new}." in key}
    other = {names[key]: tensor for key, tensor in stored.items()}
    assert len(set(other) - set(stored)) == 16
    assert check_plan(*place, other)[1] == set(other)
    # As 1 x 1 convolutions.
    other |= {
        key: Stored(tensor.file, "F32", (*tensor.shape, 1, 1))
        for key, tensor in other.items()
        if ".attentions." in key and len(tensor.shape) == 2
    }
    assert check_plan(*place, other)[1] == set(other)


@pytest.mark.parametrize("place", [place for place in DENOISERS if place[1] == "transformer"], ids=ids)
def test_the_position_table_may_be_absent(place):
    stored = manifest(*place).stored()
    del stored["pos_embed.pos_embed"]
    plan, keys = check_plan(*place, stored)
    assert [entry.key for entry in plan.absent] == ["pos_embed.pos_embed"] and keys == set(stored)


def test_a_folder_of_another_model():
    unet = manifest("sdxl_base", "unet").stored()
    medium, large = (manifest(model, "transformer").stored() for model in ("sd3_medium", "sd35_large"))
    abstract = build("sd3_medium", "transformer")[2]
    with pytest.raises(UserError, match=r"another network: none of the 683 tensors .*'context_embed.*', but 'add_emb"):
        make_plan(abstract, unet, "models/transformer")
    with pytest.raises(UserError, match=r"holds 544 tensors that .* has no place for: 'transformer_blocks\.0\.attn\."):
        make_plan(abstract, large, "models/transformer")
    with pytest.raises(UserError, match="asks for"):
        make_plan(build("sd35_large", "transformer")[2], medium, "models/transformer")


# --- the manifests themselves --------------------------------------------------------------------------------------


def recorded(field):
    return [place for place in published.COMPONENTS if field in published.component(*place)]


@pytest.mark.parametrize("place", recorded("config_sha256"), ids=ids)
def test_configs_are_the_published_files(place):
    record = published.component(*place)
    text = json.dumps(record["config"], indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == record["config_sha256"]


@pytest.mark.parametrize("place", recorded("files"), ids=ids)
def test_keys_and_shapes_give_the_published_file_sizes(place):
    """To the byte, header included: a key too many or too few, or a name of another length, would show."""
    for file in published.component(*place)["files"].values():
        assert published.file_size(manifest(*place).stored(file["dtype"])) == file["bytes"]


def torch_network(place):
    """diffusers' or transformers' own module of a component, without memory."""
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    config = {k: v for k, v in published.component(*place)["config"].items() if not k.startswith("_")}
    config.pop("architectures", None)
    class_name = published.class_of(*place)
    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            return getattr(diffusers, class_name)(**config)
        kind = transformers.T5Config if class_name == "T5EncoderModel" else transformers.CLIPTextConfig
        return getattr(transformers, class_name)(kind(**config))


@pytest.mark.parametrize("place", NETWORKS, ids=ids)
def test_manifests_are_diffusers_own(place):
    network, held = torch_network(place), manifest(*place)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    prefix = "text_model." if published.class_of(*place) == "CLIPTextModel" else ""
    shapes = {prefix + key.removeprefix(prefix): shape for key, shape in shapes.items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # T5's second name of shared.weight, not written
    assert shapes == held.shapes
    parameters = {prefix + key.removeprefix(prefix) for key, _ in network.named_parameters()}
    assert held.buffers == set(shapes) - parameters


@pytest.mark.parametrize("place", recorded("index"), ids=ids)
def test_the_published_index_is_reproduced(place):
    record, held = published.component(*place)["index"], manifest(*place).stored("BF16")
    order = [key for key in torch_network(place).state_dict() if key in held]
    stem = record["name"].removesuffix(".safetensors.index.json")
    text = published.index({key: held[key] for key in order}, stem, record["max_shard_bytes"])
    assert hashlib.sha256(text.encode()).hexdigest() == record["sha256"]
