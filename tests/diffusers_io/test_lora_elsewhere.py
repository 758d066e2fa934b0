"""LoRA files that others trained: PEFT's, diffusers' and kohya's names, and what diffusers makes of the same files."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from diffusers.loaders.lora_conversion_utils import (  # noqa: E402
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from dmdr_jax import lora  # noqa: E402
from dmdr_jax.diffusers_io import components, keymap, lora_file, lora_names  # noqa: E402
from dmdr_jax.errors import UserError  # noqa: E402
from tests import tiny_pipelines  # noqa: E402
from tests.diffusers_io import checkpoint_manifests as published  # noqa: E402

JOINT = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
CLASSES = {"transformer": "SD3Transformer2DModel", "unet": "UNet2DConditionModel"}


@functools.cache
def network(kind):
    """(pipeline, name of its denoiser, our abstract parameters); the pipeline is not to be changed."""
    pipe = tiny_pipelines.build(kind)
    component = "unet" if kind == "sdxl" else "transformer"
    config = dict(getattr(pipe, component).config)
    config["_class_name"] = CLASSES[component]
    module = components.build_module(CLASSES[component], config)
    return pipe, component, components.abstract_params(CLASSES[component], module)


def weights(denoiser):
    """Every kernel of a torch denoiser by module name, adapters merged into it."""
    merged = {}
    for name, module in denoiser.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            merged[name] = (module.base_layer.weight + delta).detach().numpy()
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "lora" not in name and "base_layer" not in name:
            merged[name] = module.weight.detach().numpy()
    return merged


def changes(delta, scale):
    """What a delta of ours adds to each module, in PyTorch's layout."""
    found = {}
    for path, pair in lora_file.delta_leaves(delta):
        for module, index in keymap.module_names(path[:-1]):
            product = scale * (pair["a"][index] @ pair["b"][index])
            found[module] = product.transpose(keymap.TO_TORCH[product.ndim])
    return found


def assert_same_change(file, kind, denoiser, scale, **options):
    """Our reading of the file changes the weights as diffusers (which has it loaded) or PEFT does."""
    pipe, component, abstract = network(kind)
    delta, found = lora_file.read_lora(file, abstract, component, **options)
    assert found == pytest.approx(scale)
    base, theirs, ours = weights(getattr(pipe, component)), weights(denoiser), changes(delta, found)
    assert set(theirs) == set(base)
    changed = {name for name in base if not np.array_equal(base[name], theirs[name])}
    assert changed and changed == {name for name, change in ours.items() if change.any()}
    for name in changed:
        np.testing.assert_allclose(ours[name], theirs[name] - base[name], rtol=1e-4, atol=1e-5)


def adapted(kind, config, seed=0):
    """A copy of the pipeline's denoiser with a random adapter."""
    _, component, _ = network(kind)
    denoiser = getattr(tiny_pipelines.build(kind), component)
    denoiser.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return denoiser


def factors(denoiser):
    return peft.utils.get_peft_model_state_dict(denoiser)


def contiguous(tensors):
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


# --- PEFT and diffusers, SD3 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dmdr():
    """A miniature of DMDR's released adapter of SD3.5-Large: the eight joint-attention projections, alpha = 2 rank."""
    targets = [f"attn.{name}" for name in JOINT]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian")
    return config, adapted("sd35_large", config)


def test_dmdrs_adapter_saved_by_diffusers(dmdr, tmp_path):
    config, denoiser = dmdr
    pipe = tiny_pipelines.build("sd35_large")
    pipe.save_lora_weights(tmp_path, factors(denoiser), transformer_lora_adapter_metadata=config.to_dict())
    pipe.load_lora_weights(tmp_path)
    assert_same_change(tmp_path, "sd35_large", pipe.transformer, 2.0)
    delta, _ = lora_file.read_lora(tmp_path, network("sd35_large")[2])
    wanted = lora.init(jax.random.key(0), network("sd35_large")[2], lora.LoraConfig(4, 8.0))
    assert jax.tree.map(jnp.shape, delta) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_dmdrs_adapter_saved_by_peft(dmdr, tmp_path, prefix, adapter):
    config, denoiser = dmdr
    tensors = {
        prefix + re.sub(r"\.weight$", f"{adapter}.weight", key): tensor for key, tensor in factors(denoiser).items()
    }
    save_file(contiguous(tensors), tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert_same_change(tmp_path, "sd35_large", denoiser, 2.0)


def test_a_file_that_does_not_say_alpha(dmdr, tmp_path):
    tensors = {f"transformer.{key}": tensor for key, tensor in factors(dmdr[1]).items()}
    save_file(contiguous(tensors), tmp_path / "x.safetensors")
    pipe = tiny_pipelines.build("sd35_large")
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert_same_change(tmp_path / "x.safetensors", "sd35_large", pipe.transformer, 1.0)
    assert_same_change(tmp_path / "x.safetensors", "sd35_large", dmdr[1], 2.0, alpha=8.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern(tmp_path, rslora):
    """Different ranks and alphas per layer, a convolution, and PEFT's rank-stabilised scale."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "ff.net.2", "pos_embed.proj"],
        rank_pattern={"transformer_blocks.1.attn.to_q": 5, "pos_embed.proj": 4},
        alpha_pattern={"transformer_blocks.1.attn.to_q": 7, r"transformer_blocks\.[23]\.ff\.net\.2": 1},
        use_rslora=rslora,
    )
    denoiser = adapted("sd3", config)
    save_file(contiguous(factors(denoiser)), tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert_same_change(tmp_path, "sd3", denoiser, 1.0)


# --- former names, SDXL ----------------------------------------------------------------------------------------------


def load_in_diffusers(tensors, kind="sdxl"):
    """The U-Net of a pipeline that has loaded these tensors."""
    pipe = tiny_pipelines.build(kind)
    pipe.load_lora_weights(contiguous(tensors))
    return pipe.unet


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1"]
UNET_TARGETS += ["conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]


@pytest.fixture(scope="module")
def sdxl_factors():
    """(A and B by module, module names) of a LoRA on every kind of SDXL's layers."""
    tensors = factors(adapted("sdxl", peft.LoraConfig(r=3, lora_alpha=3, target_modules=UNET_TARGETS)))
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    return {m: (tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}


def former_names(module):
    """diffusers' names before 0.22 of the factors of a module: (down, up)."""
    attention = re.fullmatch(r"(.*\.attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?", module)
    stem = f"{attention[1]}.processor.{attention[2]}_lora" if attention else f"{module}.lora"
    return f"unet.{stem}.down.weight", f"unet.{stem}.up.weight"


def test_diffusers_former_names(sdxl_factors, tmp_path):
    tensors = {name: x for m, ab in sdxl_factors.items() for name, x in zip(former_names(m), ab, strict=True)}
    save_file(contiguous(tensors), tmp_path / "x.safetensors")
    assert any("processor" in key for key in tensors)
    assert_same_change(tmp_path / "x.safetensors", "sdxl", load_in_diffusers(tensors), 1.0)


@pytest.mark.parametrize("names", ["diffusers", "stability"])
def test_kohyas_names_and_alphas(sdxl_factors, tmp_path, names):
    abstract = network("sdxl")[2]
    modules = [e.key.removesuffix(".weight") for e in keymap.entries(abstract)]
    tensors, alphas = {}, {}
    for i, (module, (a, b)) in enumerate(sdxl_factors.items()):
        spelled = module if names == "diffusers" else lora_names.stability_name(module, modules)
        flat = f"lora_unet_{spelled.replace('.', '_')}"
        alphas[module] = 1 + i % 2
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        tensors[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(contiguous(tensors), tmp_path / "x.safetensors")
    assert_same_change(tmp_path / "x.safetensors", "sdxl", load_in_diffusers(tensors), 2.0)

    # Alphas that differ: diffusers 0.42 forgets those of attention layers, so the formula is the measure.
    mixed = dict(zip((key for key in tensors if key.endswith(".alpha")), alphas.values(), strict=True))
    save_file(contiguous(tensors | {k: torch.tensor(float(v)) for k, v in mixed.items()}), tmp_path / "y.safetensors")
    delta, scale = lora_file.read_lora(tmp_path / "y.safetensors", abstract, "unet")
    assert scale == 1.0
    for module, change in changes(delta, scale).items():
        a, b = (x.numpy() for x in sdxl_factors[module])
        wanted = alphas[module] / 3 * np.einsum("or,r...->o...", b.reshape(b.shape[:2]), a)
        np.testing.assert_allclose(change, wanted, rtol=1e-4, atol=1e-5)


def test_factors_of_dense_layers_as_convolutions(sdxl_factors, tmp_path):
    dense = {m: ab for m, ab in sdxl_factors.items() if ab[0].ndim == 2}
    plain = {f"unet.{m}.lora_{x}.weight": t for m, ab in dense.items() for x, t in zip("AB", ab, strict=True)}
    windowed = {key: tensor[..., None, None] for key, tensor in plain.items()}
    save_file(contiguous(windowed), tmp_path / "x.safetensors")
    assert_same_change(tmp_path / "x.safetensors", "sdxl", load_in_diffusers(plain), 1.0)


def test_stabilitys_names_of_all_of_sdxl():
    """diffusers' own translation leads back to each module of the real U-Net."""
    manifest = published.manifest("sdxl_unet")
    modules = [k.removesuffix(".weight") for k, shape in manifest.shapes.items() if len(shape) > 1]
    flat = {m: f"lora_unet_{lora_names.stability_name(m, modules).replace('.', '_')}" for m in modules}
    assert len(set(flat.values())) == len(modules) == 794
    names = [(i, f"{name}.lora_{x}.weight") for i, name in enumerate(flat.values()) for x in ("down", "up")]
    tensors = {name: torch.tensor(float(i)) for i, name in names}

    class Config:
        layers_per_block = 2

    translated, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, Config))
    translated = convert_unet_state_dict_to_peft(translated)
    assert {f"unet.{m}.lora_A.weight": float(i) for i, m in enumerate(modules)} == {
        key: tensor.item() for key, tensor in translated.items() if "lora_A" in key
    }
    for module in modules:
        assert lora_names.split(f"{flat[module]}.alpha", modules, "unet", "x") == (module, lora_names.ALPHA)
        own = f"lora_unet_{module.replace('.', '_')}.lora_up.weight"
        assert lora_names.split(own, modules, "unet", "x") == (module, lora_names.B)


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, words",
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "trains a text encoder"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "names no LoRA factor of this model; closest"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "is DoRA"),
        ("lora_unet_transformer_blocks_0_attn_to_q.lokr_w1", "is LoKr"),
        ("transformer.transformer_blocks.9.attn.to_q.lora_A.weight", r"closest modules: transformer_blocks\.\d\.attn"),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "of the unet of another model"),
        ("transformer_blocks.0.attn.to_q.weight", "names no LoRA factor .* closest modules: transformer_blocks.0"),
    ],
)
def test_keys_that_do_not_fit(key, words, tmp_path):
    save_file({key: torch.zeros(4, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words) as error:
        lora_file.read_lora(tmp_path / "x.safetensors", network("sd3")[2])
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "LOHA"}, "is LOHA by its configuration"),
        ({"use_dora": True}, "is DoRA"),
        ({"lora_bias": True}, "is LoRA with biases"),
        ("[", "configuration of .* cannot be read"),
    ],
)
def test_configurations_that_are_not_lora(dmdr, tmp_path, config, words):
    save_file(contiguous(factors(dmdr[1])), tmp_path / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / lora_file.CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match=words):
        lora_file.read_lora(tmp_path, network("sd35_large")[2])


def test_places_without_one_file(tmp_path):
    with pytest.raises(UserError, match="but has none"):
        lora_file.read_lora(tmp_path, network("sd3")[2])
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"has a.safetensors, b.safetensors; name the file"):
        lora_file.read_lora(tmp_path, network("sd3")[2])
    with pytest.raises(UserError, match="does not exist"):
        lora_file.read_lora(tmp_path / "c.safetensors", network("sd3")[2])
    with pytest.raises(UserError, match="is pickled"):
        lora_file.read_lora(tmp_path / "c.pt", network("sd3")[2])


# --- to train on -----------------------------------------------------------------------------------------------------


def test_training_starts_from_a_file_and_all_of_it_can_learn(tmp_path):
    """The read change is kept exactly; free directions and absent blocks get the initialisation of a new delta."""
    _, component, abstract = network("sdxl")
    only = r".*mid_block.*\.transformer_blocks\.0\.attn1\.to_q|mid_block\.resnets\.0\.conv1"
    targets = (r"mid_block\..*\.attn1\.to_[qk]", r"mid_block\.resnets\.\d\.conv1")
    save_file(
        contiguous(factors(adapted("sdxl", peft.LoraConfig(r=2, lora_alpha=5, target_modules=only)))),
        tmp_path / "x.safetensors",
    )
    read, scale = lora_file.read_lora(tmp_path / "x.safetensors", abstract, component, alpha=5.0)
    initial = lora.init(jax.random.key(1), abstract, lora.LoraConfig(4, 2.0, targets))
    delta = lora_file.start_from(initial, read, scale / 0.5)
    assert jax.tree.map(jnp.shape, delta) == jax.tree.map(jnp.shape, initial)
    wanted, got = changes(read, scale), changes(delta, 0.5)
    assert set(wanted) < set(got)
    for module, change in got.items():
        np.testing.assert_allclose(change, wanted.get(module, 0), rtol=1e-5, atol=1e-5)
    for _, pair in lora_file.delta_leaves(delta):
        assert np.asarray((pair["a"] != 0).any(-2)).all()

    with pytest.raises(UserError, match=r"rank 2, more than config.generator.lora.rank = 1"):
        small = lora.init(jax.random.key(1), abstract, lora.LoraConfig(1, 2.0, targets))
        lora_file.start_from(small, read, 1.0)
    with pytest.raises(UserError, match=r"changes .*conv1, which config.generator.lora.targets leaves out"):
        attention = lora.init(jax.random.key(1), abstract, lora.LoraConfig(4, 2.0, targets[:1]))
        lora_file.start_from(attention, read, 1.0)
