"""LoRA files: what diffusers makes of ours, what we make of theirs, and bad ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file  # noqa: E402

from dmdr_jax.diffusers_io import components, keymap, lora_file, safetensors_io  # noqa: E402
from dmdr_jax.errors import UserError  # noqa: E402
from tests import tiny_pipelines  # noqa: E402

RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipelines.save(tmp_path_factory.mktemp("lora") / "sd35", "sd35_medium")


@pytest.fixture(scope="module")
def network(folder):
    """(module, abstract parameters, parameters) of the folder's transformer."""
    module = components.build_module("SD3Transformer2DModel", components.read_json(folder / "transformer/config.json"))
    abstract = components.abstract_params("SD3Transformer2DModel", module)
    return module, abstract, safetensors_io.read_tree(folder / "transformer", abstract)


def make_delta(abstract, rank=RANK):
    """A random delta on every dense layer and convolution."""
    rng = np.random.default_rng(1)
    flat = {}
    for path, leaf in keymap.leaves(abstract):
        if path[-1] == "kernel":
            depth = keymap.stack_rank(path)
            stack, kernel = leaf.shape[:depth], leaf.shape[depth:]
            ones = (1,) * (len(kernel) - 2)
            a = rng.normal(size=(*stack, *kernel[:-1], rank)) / np.sqrt(np.prod(kernel[:-1]))
            b = rng.normal(size=(*stack, *ones, rank, kernel[-1])) / rank
            flat[path] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return keymap.unflatten(flat)


def inputs():
    rng = np.random.default_rng(2)
    shapes = {"latents": (2, 8, 6, 4), "prompt_embeds": (2, 5, 48), "pooled": (2, 40)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"timestep": np.array([900.0, 250.0], np.float32)}


def ours(module, params, delta=None, scale=None):
    def apply(variables, scale, latents, timestep, prompt_embeds, pooled):
        return module.apply(variables, latents, timestep, prompt_embeds, pooled, lora_scale=scale)

    variables = {"params": params} | ({"lora": delta} if delta else {})
    return jax.jit(apply)(variables, scale, **inputs())


def diffusers_output(pipe):
    x = {name: torch.from_numpy(value) for name, value in inputs().items()}
    with torch.no_grad():
        out = pipe.transformer(x["latents"].permute(0, 3, 1, 2), x["prompt_embeds"], x["pooled"], x["timestep"])
    return out.sample.permute(0, 2, 3, 1).numpy()


def test_diffusers_applies_our_file_at_our_scale(tmp_path, folder, network):
    pytest.importorskip("peft")
    module, abstract, params = network
    delta = make_delta(abstract)
    lora_file.write_lora(tmp_path / "ours.safetensors", delta, scale=ALPHA / RANK)
    pipe = tiny_pipelines.load(folder)
    base = diffusers_output(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    theirs = diffusers_output(pipe)
    assert np.abs(theirs - base).max() > 0.1 * np.abs(base).max()
    np.testing.assert_allclose(ours(module, params, delta, ALPHA / RANK), theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_file_of_diffusers_with_alpha_is_read_with_its_scale(tmp_path, folder, network):
    peft = pytest.importorskip("peft")
    module, abstract, params = network
    pipe = tiny_pipelines.load(folder)
    targets = ["attn.to_q", "attn.to_out.0", "pos_embed.proj"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights="gaussian")
    pipe.transformer.add_adapter(config)
    with torch.no_grad():
        for name, p in pipe.transformer.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    theirs = diffusers_output(pipe)
    pipe.save_lora_weights(
        tmp_path,
        peft.utils.get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    delta, scale = lora_file.read_lora(tmp_path / "pytorch_lora_weights.safetensors", abstract)
    assert scale == 2.5
    np.testing.assert_allclose(ours(module, params, delta, scale), theirs, atol=2e-5 * np.abs(theirs).max())


def test_round_trip(tmp_path, network):
    _, abstract, _ = network
    delta = make_delta(abstract)
    lora_file.write_lora(tmp_path / "x.safetensors", delta)
    read, scale = lora_file.read_lora(tmp_path / "x.safetensors", abstract)
    assert scale == 1
    assert jax.tree.structure(read) == jax.tree.structure(delta)
    jax.tree.map(np.testing.assert_array_equal, read, delta)


def save(file, tensors, metadata=None):
    save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, file, metadata)
    return file


def pair(module, rank, out=16, inner=16):
    rng = np.random.default_rng(rank)
    return {
        f"transformer.{module}.lora_A.weight": rng.normal(size=(rank, inner)).astype(np.float32),
        f"transformer.{module}.lora_B.weight": rng.normal(size=(out, rank)).astype(np.float32),
    }


def test_unequal_ranks_scales_and_absent_blocks(tmp_path, network):
    _, abstract, _ = network
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "transformer_blocks.3.attn.to_q"]
    tensors = pair(names[0], 2) | pair(names[2], 1)
    meta = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {names[2]: 3}}
    file = save(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(meta)})
    delta, scale = lora_file.read_lora(file, abstract)
    assert scale == 1.0
    products = {}
    for path, factors in lora_file.delta_leaves(delta):
        for name, index in keymap.module_names(path[:-1]):
            products[name] = np.asarray(factors["a"][index] @ factors["b"][index]).T
    for name, s in ((names[0], 2.0), (names[2], 3.0)):
        prefix = f"transformer.{name}.lora_"
        expected = s * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
        np.testing.assert_allclose(products[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(products[names[1]], 0)


def test_alpha_tensors_beside_the_factors(tmp_path, network):
    _, abstract, _ = network
    name = "transformer_blocks.0.attn.to_q"
    tensors = pair(name, 4) | {f"transformer.{name}.alpha": np.array(2.0, np.float32)}
    delta, scale = lora_file.read_lora(save(tmp_path / "x.safetensors", tensors), abstract)
    assert scale == 0.5 and len(list(lora_file.delta_leaves(delta))) == 1


def test_keys_and_layout_are_pefts(tmp_path, network):
    _, abstract, _ = network
    lora_file.write_lora(tmp_path / "x.safetensors", make_delta(abstract), dtype=np.float16)
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["transformer.pos_embed.proj.lora_A.weight"].shape == (RANK, 4, 2, 2)
    assert tensors["transformer.pos_embed.proj.lora_B.weight"].shape == (16, RANK, 1, 1)
    assert tensors["transformer.transformer_blocks.2.ff.net.0.proj.lora_B.weight"].shape == (64, RANK)
    assert tensors["transformer.proj_out.lora_A.weight"].dtype == np.float16


@pytest.mark.parametrize(
    "tensors, words",
    [
        (pair("transformer_blocks.0.attn.to_qq", 2), "closest modules: transformer_blocks.0.attn.to_q"),
        (pair("transformer_blocks.0.attn.to_q", 2, out=8), "do not fit its weight"),
        (dict(list(pair("proj_out", 2).items())[:1]), "proj_out has only 'transformer.proj_out.lora_A.weight'"),
        (pair("proj_out", 2) | {"text_encoder.x.lora_A.weight": np.zeros(2, np.float32)}, "trains a text encoder"),
        ({"transformer.proj_out.hada_w1": np.zeros((2, 2), np.float32)}, "is LoHa, not LoRA"),
        ({"transformer.proj_out.scale": np.zeros((2, 2), np.float32)}, "names no LoRA factor"),
        ({"unet.proj_out.lora_A.weight": np.zeros((2, 2), np.float32)}, "is of the unet of another model"),
        (pair("proj_out", 2) | {"proj_out.lora_A.weight": np.zeros((2, 16), np.float32)}, "are the same factor"),
        ({"transformer.proj_out.lora_B.bias": np.zeros(16, np.float32)}, "is a trained bias"),
        (pair("proj_out", 2) | {"transformer.proj_out.lora_A.weight": np.zeros((2, 16), np.int8)}, "is stored as I8"),
        ({}, "holds no tensors"),
    ],
)
def test_errors(tmp_path, network, tensors, words):
    with pytest.raises(UserError, match=words):
        lora_file.read_lora(save(tmp_path / "x.safetensors", tensors), network[1])


def test_an_empty_delta_is_not_written(tmp_path):
    with pytest.raises(UserError, match="no LoRA delta"):
        lora_file.write_lora(tmp_path / "x.safetensors", {})
