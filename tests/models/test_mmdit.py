"""MM-DiT against diffusers' SD3Transformer2DModel on random weights, and the exactness of its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from dmdr_jax.errors import UserError
from dmdr_jax.models.mmdit import BUFFERS, MMDiT, MMDiTConfig, block_runs
from tests.torch_weights import abstract_params, from_torch, randomise

SHAPE = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 6,
    "out_channels": 5,
    "pos_embed_max_size": 9,
}
KINDS = {
    "sd3_medium": {},
    "sd35_medium": {"dual_attention_layers": [0], "qk_norm": "rms_norm"},
    "sd35_large": {"qk_norm": "rms_norm", "num_attention_heads": 2, "caption_projection_dim": 16},
    "dual_last": {"dual_attention_layers": [1, 2], "patch_size": 1},
}
CASES = [
    ("sd3_medium", (2, 6, 10), 5),
    ("sd3_medium", (1, 18, 2), 1),
    ("sd35_medium", (2, 8, 6), 7),
    ("sd35_large", (3, 4, 14), 3),
    ("dual_last", (2, 5, 3), 4),
]
TIMESTEPS = np.array([3.0, 512.5, 987.3], np.float32)


@functools.cache
def _pair(kind):
    """The torch network in fp64 with every weight random, our network, and our copy of the weights in fp64."""
    config = SHAPE | KINDS[kind]
    theirs = randomise(SD3Transformer2DModel(**config), seed=1).double()
    ours = MMDiT(MMDiTConfig.from_diffusers(config), dtype=jnp.float64)
    with jax.enable_x64(True):
        shapes = abstract_params(ours, *_inputs(kind, (1, 4, 4), 2))
    return theirs, ours, from_torch(shapes, theirs.state_dict(), np.float64)


def _inputs(kind, shape, tokens, seed=0):
    config = SHAPE | KINDS[kind]
    rng = np.random.default_rng(seed)
    b = shape[0]
    latents = rng.normal(size=(*shape, config["in_channels"]))
    prompt_embeds = rng.normal(size=(b, tokens, config["joint_attention_dim"]))
    pooled = rng.normal(size=(b, config["pooled_projection_dim"]))
    return latents, TIMESTEPS[:b], prompt_embeds, pooled


def _error(got, wanted):
    wanted = np.asarray(wanted)
    return np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)


def _theirs(network, latents, timestep, prompt_embeds, pooled, cotangent):
    """Output and gradients of the torch network, in our layout."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (latents, prompt_embeds, pooled)]
    out = network(leaves[0].permute(0, 3, 1, 2), leaves[1], leaves[2], torch.tensor(timestep)).sample
    out = out.permute(0, 2, 3, 1)
    out.backward(torch.tensor(cotangent))
    return [x.detach().numpy() for x in (out, *(leaf.grad for leaf in leaves))]


def _ours(network, params, latents, timestep, prompt_embeds, pooled, cotangent):
    @jax.jit
    def run(x, text, pooled):
        out, pull = jax.vjp(lambda *a: network.apply({"params": params}, a[0], timestep, *a[1:]), x, text, pooled)
        return out, *pull(jnp.asarray(cotangent, out.dtype))

    return run(latents, prompt_embeds, pooled)


@pytest.mark.parametrize(("kind", "shape", "tokens"), CASES)
def test_forward_and_input_gradients_equal_diffusers(kind, shape, tokens):
    theirs, ours, params = _pair(kind)
    inputs = _inputs(kind, shape, tokens)
    cotangent = np.random.default_rng(1).normal(size=(*shape, SHAPE["out_channels"]))
    with jax.enable_x64(True):
        got = _ours(ours, params, *inputs, cotangent)
        assert all(x.dtype == jnp.float64 for x in got)
    for name, a, b in zip(("velocity", "latents", "prompt_embeds", "pooled"), got, _theirs(theirs, *inputs, cotangent)):
        assert _error(a, b) < 1e-5, name


def _float32(kind):
    _, ours, params = _pair(kind)
    return ours.clone(dtype=jnp.float32), jax.tree.map(lambda x: x.astype(np.float32), params)


def test_float32_and_bfloat16():
    theirs, _, _ = _pair("sd3_medium")
    ours, params = _float32("sd3_medium")
    inputs = _inputs("sd3_medium", (2, 6, 10), 5)
    wanted = _theirs(theirs, *inputs, np.zeros((2, 6, 10, 5)))[0]
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    assert _error(jax.jit(ours.apply)({"params": params}, *inputs), wanted) < 1e-5
    half = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert half.dtype == jnp.float32
    assert 1e-5 < _error(half, wanted) < 0.05


@pytest.mark.parametrize("kind", ["sd3_medium", "sd35_medium"])
def test_one_token_with_key_bias_log_m_is_m_tokens(kind):
    _, ours, params = _pair(kind)
    latents, timestep, prompt_embeds, pooled = _inputs(kind, (2, 4, 6), 3)
    zeros = np.zeros((2, 11, prompt_embeds.shape[-1]))
    with jax.enable_x64(True):
        apply = jax.jit(functools.partial(ours.apply, {"params": params}))
        many = apply(latents, timestep, np.concatenate([prompt_embeds, zeros], 1), pooled)
        short = np.concatenate([prompt_embeds, zeros[:, :1]], 1)
        one = apply(latents, timestep, short, pooled, key_bias=jnp.log(jnp.array([1.0, 1, 1, 11])))
        plain = apply(latents, timestep, short, pooled)
    assert _error(one, many) < 1e-12
    assert _error(plain, many) > 1e-3


def test_remat_changes_memory_alone():
    ours, params = _float32("sd3_medium")
    inputs = [jnp.asarray(x, jnp.float32) for x in _inputs("sd3_medium", (1, 4, 4), 2)]

    def trace(remat):
        network = ours.clone(remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(network.apply({"params": p}, *inputs) ** 2))).trace(params)

    programs = {remat: str(trace(remat).jaxpr) for remat in ("none", "full", "dots", "names")}
    assert programs["none"].count("remat") == 0
    assert min(programs[remat].count("remat") for remat in ("full", "dots", "names")) >= 2
    assert len(set(programs.values())) == 4
    plain, names = (trace(remat).lower().compile()(params) for remat in ("none", "names"))
    for a, b in zip(jax.tree.leaves(names), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(b).max() + 1e-6))
    with pytest.raises(UserError, match="choose one of none, full, dots, names"):
        trace("some")


def test_positions_start_as_diffusers_and_get_no_gradient():
    theirs = SD3Transformer2DModel(**SHAPE)
    ours = MMDiT(MMDiTConfig.from_diffusers(SHAPE))
    inputs = [jnp.asarray(x, jnp.float32) for x in _inputs("sd3_medium", (1, 4, 4), 2)]
    velocity, variables = jax.jit(ours.init_with_output)(jax.random.key(0), *inputs)
    params = variables["params"]
    np.testing.assert_allclose(params["pos_embed"]["pos_embed"], theirs.pos_embed.pos_embed.numpy(), atol=1e-6)
    # A new network starts at zero velocity, with identity blocks.
    assert not np.any(velocity) and np.any(params["transformer_blocks.0:2"]["ff"]["net.2"]["kernel"])
    _, random = _float32("sd3_medium")
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(ours.apply({"params": p}, *inputs) ** 2)))(random)
    assert BUFFERS == ("pos_embed.pos_embed",) and not np.any(gradient["pos_embed"]["pos_embed"])
    assert np.any(gradient["pos_embed"]["proj"]["kernel"])


def test_published_shapes_have_the_published_sizes():
    base = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "sample_size": 128}
    dual = list(range(13))
    published = [
        ({"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}, 2_028_328_000, 56_623_104),
        (
            {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384}
            | {"dual_attention_layers": dual, "qk_norm": "rms_norm"},
            2_243_171_520,
            226_492_416,
        ),
        (
            {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
            8_056_627_520,
            89_653_248,
        ),
    ]
    for values, trained, stored in published:
        width = values["num_attention_heads"] * 64
        config = MMDiTConfig.from_diffusers(base | values | {"caption_projection_dim": width})
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 64, 64, 16), (1,), (1, 77, 4096), (1, 2048))]
        shapes = jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arrays)["params"]
        table = shapes["pos_embed"]["pos_embed"].size
        assert table == stored
        assert sum(x.size for x in jax.tree.leaves(shapes)) == trained + table


def test_runs_of_blocks():
    assert block_runs(24, ()) == [(0, 23, False)]
    assert block_runs(24, tuple(range(13))) == [(0, 13, True), (13, 23, False)]
    assert block_runs(5, (1, 4)) == [(0, 1, False), (1, 2, True), (2, 4, False)]
    assert block_runs(1, ()) == []


def test_config_round_trip():
    for values in KINDS.values():
        config = SHAPE | values
        ours = MMDiTConfig.from_diffusers(config | {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "x"})
        theirs = SD3Transformer2DModel.from_config(ours.to_diffusers())
        assert MMDiTConfig.from_diffusers(dict(theirs.config)) == ours


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "found a UNet2DConditionModel"),
        ({"depth": 3}, r"unknown keys \['depth'\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not supported"),
        ({"caption_projection_dim": 25}, "must equal .* = 24"),
        ({"dual_attention_layers": [3]}, r"dual_attention_layers \[3\] lie outside the 3 layers"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size is None"),
    ],
)
def test_bad_configs_are_named(change, words):
    with pytest.raises(UserError, match=words):
        MMDiTConfig.from_diffusers(SHAPE | change)


@pytest.mark.parametrize(("shape", "words"), [((1, 5, 4), "multiples of 2"), ((1, 20, 4), "position table's 18 x 18")])
def test_bad_latents_are_named(shape, words):
    ours = MMDiT(MMDiTConfig.from_diffusers(SHAPE))
    with pytest.raises(UserError, match=words):
        abstract_params(ours, *_inputs("sd3_medium", shape, 2))
