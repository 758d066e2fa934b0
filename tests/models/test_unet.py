"""The U-Net against diffusers' UNet2DConditionModel on random weights, and the exactness of its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dmdr_jax import lora
from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.models.unet import UNet2DCondition
from dmdr_jax.models.unet_config import UNetConfig
from tests.torch_weights import abstract_params, from_torch, randomise

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SHAPE = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 5,
    "down_block_types": ["DownBlock2D", CROSS_DOWN],
    "up_block_types": [CROSS_UP, "UpBlock2D"],
    "block_out_channels": [8, 24],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 10,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 3,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 43,
}
KINDS = {
    "two_levels": {},
    "sdxl": {
        "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
        "block_out_channels": [8, 16, 32],
        "transformer_layers_per_block": [1, 0, 2],
        "attention_head_dim": [1, 2, 4],
    },
    "uneven": {
        "down_block_types": [CROSS_DOWN, "DownBlock2D"],
        "up_block_types": [CROSS_UP, CROSS_UP],
        "block_out_channels": [16, 8],
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [[2], 1],
        "reverse_transformer_layers_per_block": [[0, 1, 2], [1, 1]],
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": [2, 8],
        "use_linear_projection": False,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
    },
    "no_middle": {"mid_block_type": None, "transformer_layers_per_block": 1, "attention_head_dim": [1, 6]},
    "one_level": {
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "block_out_channels": [12],
        "use_linear_projection": False,
    },
}
CASES = [
    ("sdxl", (2, 7, 10), 3),
    ("uneven", (3, 5, 9), 4),
    ("no_middle", (1, 1, 3), 1),
]
TIMESTEPS = np.array([3.0, 512.5, 999.0], np.float32)


@functools.cache
def _pair(kind):
    """The torch network in fp64 with every weight random, our network, and our copy of the weights in fp64."""
    config = SHAPE | KINDS[kind]
    theirs = randomise(UNet2DConditionModel(**config), seed=1).double()
    ours = UNet2DCondition(UNetConfig.from_diffusers(config), dtype=jnp.float64)
    with jax.enable_x64(True):
        shapes = abstract_params(ours, *_inputs((1, 2, 2), 1))
    return theirs, ours, from_torch(shapes, theirs.state_dict(), np.float64)


def _inputs(shape, tokens, seed=0):
    rng = np.random.default_rng(seed)
    b = shape[0]
    latents = rng.normal(size=(*shape, SHAPE["in_channels"]))
    prompt_embeds = rng.normal(size=(b, tokens, SHAPE["cross_attention_dim"]))
    pooled = rng.normal(size=(b, 7))
    time_ids = rng.integers(0, 1500, size=(b, 6)).astype(np.float32)
    return latents, TIMESTEPS[:b], prompt_embeds, pooled, time_ids


def _error(got, wanted):
    wanted = np.asarray(wanted)
    return np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)


def _theirs(network, latents, timestep, prompt_embeds, pooled, time_ids, cotangent):
    """Output and gradients of the torch network, in our layout."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (latents, prompt_embeds, pooled)]
    added = {"text_embeds": leaves[2], "time_ids": torch.tensor(time_ids)}
    x = leaves[0].permute(0, 3, 1, 2)
    out = network(x, torch.tensor(timestep), leaves[1], added_cond_kwargs=added).sample
    out = out.permute(0, 2, 3, 1)
    out.backward(torch.tensor(cotangent))
    return [x.detach().numpy() for x in (out, *(leaf.grad for leaf in leaves))]


def _ours(network, params, latents, timestep, prompt_embeds, pooled, time_ids, cotangent):
    @jax.jit
    def run(x, text, pooled):
        def apply(x, text, pooled):
            return network.apply({"params": params}, x, timestep, text, pooled, time_ids=time_ids)

        out, pull = jax.vjp(apply, x, text, pooled)
        return out, *pull(jnp.asarray(cotangent, out.dtype))

    return run(latents, prompt_embeds, pooled)


@pytest.mark.parametrize(("kind", "shape", "tokens"), CASES)
def test_forward_and_input_gradients_equal_diffusers(kind, shape, tokens):
    theirs, ours, params = _pair(kind)
    inputs = _inputs(shape, tokens)
    cotangent = np.random.default_rng(1).normal(size=(*shape, SHAPE["out_channels"]))
    with jax.enable_x64(True):
        got = _ours(ours, params, *inputs, cotangent)
        assert all(x.dtype == jnp.float64 for x in got)
    for name, a, b in zip(("eps", "latents", "prompt_embeds", "pooled"), got, _theirs(theirs, *inputs, cotangent)):
        assert _error(a, b) < 1e-5, name


def _float32(kind):
    _, ours, params = _pair(kind)
    return ours.clone(dtype=jnp.float32), jax.tree.map(lambda x: x.astype(np.float32), params)


def _inputs32(shape, tokens):
    return [jnp.asarray(x, jnp.float32) for x in _inputs(shape, tokens)]


def test_float32_and_bfloat16():
    theirs, _, _ = _pair("two_levels")
    ours, params = _float32("two_levels")
    cotangent = np.random.default_rng(1).normal(size=(2, 4, 6, 5))
    wanted = _theirs(theirs, *_inputs((2, 4, 6), 5), cotangent)
    inputs = _inputs32((2, 4, 6), 5)
    for a, b in zip(_ours(ours, params, *inputs, cotangent), wanted):
        assert a.dtype == jnp.float32
        assert _error(a, b) < 1e-5
    half = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert half.dtype == jnp.float32
    assert 1e-5 < _error(half, wanted[0]) < 0.05


def test_remat_changes_memory_alone():
    ours, params = _float32("one_level")
    latents, *others = _inputs32((1, 2, 3), 2)

    def trace(remat):
        network = ours.clone(remat=remat)
        return jax.jit(jax.grad(lambda x: jnp.sum(network.apply({"params": params}, x, *others) ** 2))).trace(latents)

    programs = {remat: str(trace(remat).jaxpr) for remat in ("none", "full", "dots", "names")}
    assert programs["none"].count("remat") == 0
    # Five resnets and one stack of transformer blocks.
    assert min(programs[remat].count("remat2[") for remat in ("full", "dots", "names")) >= 6
    assert len(set(programs.values())) == 4
    plain, names = (trace(remat).lower().compile()(latents) for remat in ("none", "names"))
    assert _error(names, plain) < 1e-5
    with pytest.raises(UserError, match="choose one of none, full, dots, names"):
        trace("some")


def test_lora_on_every_layer_with_a_scale_per_row_is_the_merged_network():
    ours, params = _float32("no_middle")
    config = lora.LoraConfig(rank=2, alpha=2.0, targets=(".*",))
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    assert len(jax.tree.leaves(shapes)) == 2 * sum(path[-1] == "kernel" for path, _ in keymap.leaves(params))
    rng = np.random.default_rng(2)
    delta = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    inputs = _inputs32((2, 3, 2), 3)

    scales = np.array([0.7, -0.4], np.float32)
    got = jax.jit(ours.apply)({"params": params, "lora": delta}, *inputs, lora_scale=scales)
    merged = jax.jit(lambda scale: ours.apply({"params": lora.merge(params, delta, scale)}, *inputs))
    assert _error(got, jnp.stack([merged(scale)[i] for i, scale in enumerate(scales)])) < 1e-5
    assert _error(got, merged(0.0)) > 0.1


def test_a_new_network_predicts_zero_and_learns():
    ours = UNet2DCondition(UNetConfig.from_diffusers(SHAPE | KINDS["one_level"]))
    inputs = _inputs32((1, 2, 2), 1)
    eps, variables = jax.jit(ours.init_with_output)(jax.random.key(0, impl="rbg"), *inputs)
    params = variables["params"]
    assert not np.any(eps)
    assert not np.any(params["mid_block.resnets.0"]["conv2"]["kernel"])
    assert not np.any(params["mid_block.attentions.0"]["proj_out"]["kernel"])
    gradient = jax.jit(jax.grad(lambda k: jnp.sum((_with_head(ours, params, k, inputs) - 1) ** 2)))
    assert np.any(gradient(params["conv_out"]["kernel"]))


def _with_head(network, params, kernel, inputs):
    head = params["conv_out"] | {"kernel": kernel}
    return network.apply({"params": params | {"conv_out": head}}, *inputs)


# The keys of the file that stabilityai/stable-diffusion-xl-base-1.0 publishes.
SDXL_BASE = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def test_sdxl_has_the_published_keys_shapes_and_size():
    config = UNetConfig.from_diffusers(SDXL_BASE)
    assert config.pooled_dim == 1280
    shapes = ((1, 1, 1, 4), (1,), (1, 1, 2048), (1, 1280), (1, 6))
    params = keymap.abstract(UNet2DCondition(config), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_567_463_684
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(SDXL_BASE)
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {entry.key: entry.shape for entry in keymap.entries(params)} == wanted


def test_config_round_trip():
    for values in (SDXL_BASE, *(SHAPE | kind for kind in KINDS.values())):
        ours = UNetConfig.from_diffusers(values)
        with torch.device("meta"):
            theirs = UNet2DConditionModel.from_config(ours.to_diffusers())
        assert UNetConfig.from_diffusers(dict(theirs.config)) == ours
        assert hash(ours) == hash(UNetConfig.from_diffusers(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "found a SD3Transformer2DModel"),
        ({"depth": 3}, r"unknown keys \['depth'\]"),
        ({"addition_embed_type": None}, "addition_embed_type=None is not supported, only 'text_time' is"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported, only None is"),
        ({"resnet_time_scale_shift": "scale_shift"}, "only 'default' is"),
        ({"num_attention_heads": 4}, "num_attention_heads=4 is not supported"),
        ({"only_cross_attention": [False, True]}, "only_cross_attention=.* is not supported"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types .* only DownBlock2D and Cross"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type .* only UNetMidBlock2DCrossAttn"),
        ({"up_block_types": [CROSS_UP]}, "up_block_types has 1 entries for 2"),
        ({"layers_per_block": [1, 1, 1]}, "layers_per_block has 3 entries for 2"),
        ({"layers_per_block": [[1], [1]]}, "expected one positive integer, or one per level"),
        ({"transformer_layers_per_block": [[], 1]}, "transformer_layers_per_block is"),
        ({"transformer_layers_per_block": [[1], 1]}, "need reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": [1, [1]], "reverse_transformer_layers_per_block": [[1], 1]},
            "too few for 2 resnets",
        ),
        ({"norm_num_groups": 5}, r"norm_num_groups=5 does not divide \(8, 24\)"),
        ({"attention_head_dim": 5}, r"number of heads\) 5 does not divide the width 24"),
        ({"cross_attention_dim": None}, "cross_attention_dim is None"),
        ({"addition_time_embed_dim": 7}, "must be even"),
        ({"addition_time_embed_dim": 8}, "leaves no room for a pooled text"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(UserError, match=words):
        UNetConfig.from_diffusers(SHAPE | change)


def test_a_missing_width_is_named():
    config = {key: value for key, value in SHAPE.items() if key != "addition_time_embed_dim"}
    with pytest.raises(UserError, match="addition_time_embed_dim is missing"):
        UNetConfig.from_diffusers(config)


def test_conditioning_of_another_width_is_named():
    ours = UNet2DCondition(UNetConfig.from_diffusers(SHAPE))
    latents, timestep, prompt_embeds, pooled, time_ids = _inputs((1, 2, 2), 1)
    with pytest.raises(UserError, match="pooled text 6 wide and 6 time ids make 42 numbers"):
        abstract_params(ours, latents, timestep, prompt_embeds, pooled[:, :6], time_ids)
    with pytest.raises(UserError, match="prompt_embeds are 9 wide"):
        abstract_params(ours, latents, timestep, prompt_embeds[..., :9], pooled, time_ids)
