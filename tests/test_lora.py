"""LoRA deltas: side path against merged weights, scales, gradients and targets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax import lora
from dmdr_jax.errors import UserError
from dmdr_jax.models.layers import Conv
from dmdr_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=10,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    pos_embed_max_size=6,
    qk_norm="rms_norm",
)
MODEL = MMDiT(CONFIG)


def _noise_like(tree, seed, scale=0.3):
    """The tree plus noise, so that nothing that starts at zero hides a term."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [(np.asarray(leaf) + scale * rng.normal(size=leaf.shape)).astype(np.float32) for leaf in leaves]
    return structure.unflatten(noisy)


def _zeros(shapes):
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def _init(params, config):
    return jax.jit(lambda key: lora.init(key, params, config))(jax.random.key(1))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((3, 4, 6, 3), (3, 5, 10), (3, 6))]
    latents, prompt_embeds, pooled = (jnp.asarray(a, jnp.float32) for a in arrays)
    return latents, jnp.array([10.0, 400.0, 990.0]), prompt_embeds, pooled


@pytest.fixture(scope="module")
def params(inputs):
    return _noise_like(_zeros(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), *inputs))["params"]), 1)


@pytest.fixture(scope="module")
def new_delta(params):
    return _init(params, lora.LoraConfig(3, 6.0, lora.SD3_WIDE_TARGETS))


@pytest.fixture(scope="module")
def delta(new_delta):
    return _noise_like(new_delta, 2)


@pytest.fixture(scope="module")
def forward(inputs):
    @jax.jit
    def run(params, delta, scale):
        return MODEL.apply(lora.variables(params, delta), *inputs, lora_scale=scale)

    return run


def _error(got, wanted):
    return np.linalg.norm(np.asarray(got) - np.asarray(wanted)) / np.linalg.norm(wanted)


ZERO, ONE = jnp.float32(0), jnp.float32(1)


def test_a_new_delta_changes_nothing_and_has_the_stated_spread(params, new_delta, delta, forward):
    np.testing.assert_array_equal(forward(params, new_delta, ONE), forward(params, delta, ZERO))
    kernel = new_delta["transformer_blocks.0:2"]["ff"]["net.0.proj"]["kernel"]
    assert kernel["a"].shape == (2, 16, 3) and kernel["b"].shape == (2, 3, 64) and not np.any(kernel["b"])
    a = [x for x in jax.tree.leaves(new_delta) if np.any(x)]
    assert all(x.dtype == jnp.float32 for x in a)
    assert np.std(np.concatenate([np.ravel(x) for x in a])) == pytest.approx(1 / 3, rel=0.05)
    assert not np.allclose(kernel["a"][0], kernel["a"][1])


def test_scale_zero_is_the_base_bit_for_bit(params, delta, inputs, forward):
    # Operation by operation: two compiled programs may round differently where their fusions differ.
    with jax.disable_jit():
        base = MODEL.apply(lora.variables(params), *inputs)
        np.testing.assert_array_equal(MODEL.apply(lora.variables(params, delta), *inputs, ZERO), base)
    assert _error(forward(params, delta, ZERO), base) < 1e-6
    assert _error(forward(params, delta, ONE), base) > 0.1


def test_each_row_has_its_own_scale(params, delta, forward):
    scales = [0.0, 0.7, -1.3]
    together = forward(params, delta, jnp.asarray(scales))
    for row, scale in enumerate(scales):
        alone = forward(params, delta, jnp.full(3, scale))
        np.testing.assert_array_equal(together[row], alone[row])
        assert _error(together[row], forward(params, delta, jnp.float32(scale))[row]) < 1e-6


@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_side_path_equals_merged_weights(params, delta, forward, scale):
    lazy = forward(params, delta, jnp.float32(scale))
    merged = forward(jax.jit(lora.merge)(params, delta, scale), None, ONE)
    assert _error(merged, lazy) < 1e-6
    assert _error(merged, forward(params, None, ONE)) > 0.1


def test_merge_keeps_the_other_leaves_and_the_type(params, delta):
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = jax.jit(lora.merge)(stored, delta, 0.5)
    assert jax.tree.structure(merged) == jax.tree.structure(stored)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged))
    np.testing.assert_array_equal(merged["proj_out"]["kernel"], stored["proj_out"]["kernel"])


def test_gradient_reaches_the_delta_and_equals_the_merged_one(params, delta, inputs):
    def lazy(delta):
        return jnp.sum(MODEL.apply(lora.variables(params, delta), *inputs, lora_scale=0.8) ** 2)

    def merged(delta):
        return jnp.sum(MODEL.apply(lora.variables(lora.merge(params, delta, 0.8)), *inputs) ** 2)

    got, wanted = jax.jit(jax.grad(lazy))(delta), jax.jit(jax.grad(merged))(delta)
    assert jax.tree.structure(got) == jax.tree.structure(delta)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, wanted)]
    assert _error(*flat) < 1e-5
    # In the last block the text queries act on nothing; every other factor must learn.
    idle = [p for p, g in jax.tree_util.tree_leaves_with_path(got) if not np.any(g)]
    assert {tuple(e.key for e in p)[:3] for p in idle} == {("transformer_blocks.2", "attn", "add_q_proj")}


class _Convolutions(nn.Module):
    """A convolution alone, then two in one stack."""

    @nn.compact
    def __call__(self, x, lora_scale=None):
        x = Conv(4, 3, 2, 1, name="down")(x, lora_scale)
        stack = nn.scan(
            _Residual,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        return stack(name="resnets.0:2")(x, lora_scale)[0]


class _Residual(nn.Module):
    @nn.compact
    def __call__(self, x, lora_scale):
        return x + Conv(x.shape[-1], 3, name="conv")(nn.silu(x), lora_scale), None


def test_convolutions():
    model = _Convolutions()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 3)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    delta = _noise_like(_init(params, lora.LoraConfig(2, 2.0, (".*",))), 3)
    pair = delta["resnets.0:2"]["conv"]["kernel"]
    assert pair["a"].shape == (2, 3, 3, 4, 2) and pair["b"].shape == (2, 1, 1, 2, 4)
    apply = lambda s: model.apply(lora.variables(params, delta), x, s)
    with jax.disable_jit():
        np.testing.assert_array_equal(apply(ZERO), model.apply(lora.variables(params), x))
    rows = jax.jit(apply)(jnp.array([0.6, -0.3]))
    merged = jax.jit(lambda s: model.apply(lora.variables(lora.merge(params, delta, s)), x))
    for row, scale in enumerate((0.6, -0.3)):
        assert _error(rows[row], merged(scale)[row]) < 1e-6


def test_targets_by_abstract_tree_and_count(inputs):
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), *inputs))["params"]
    delta = _init(shapes, lora.LoraConfig(2, 2.0, lora.SD3_TARGETS))
    # Two blocks with eight projections 16 x 16, and the last with seven: 2 (16 + 16) numbers each.
    assert lora.count(delta) == (2 * 8 + 7) * 64
    # The draw of one module does not depend on which others are adapted.
    wide = _init(shapes, lora.LoraConfig(2, 2.0, lora.SD3_WIDE_TARGETS))
    np.testing.assert_array_equal(
        wide["transformer_blocks.2"]["attn"]["to_q"]["kernel"]["a"],
        delta["transformer_blocks.2"]["attn"]["to_q"]["kernel"]["a"],
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (r"transformer_blocks\.\d+\.attn\.to_qq", r"matches no module.*attn\.to_q"),
        (r"proj_outs", "nearest are proj_out"),
        (r"transformer_blocks\.1\.attn\.to_q", "not transformer_blocks.0.attn.to_q"),
    ],
)
def test_bad_targets_are_named(params, target, words):
    with pytest.raises(UserError, match=words):
        lora.init(jax.random.key(0), params, lora.LoraConfig(2, 2.0, (target,)))


def test_a_delta_of_another_network_is_refused(params):
    with pytest.raises(UserError, match="'down'"):
        lora.merge(params, {"down": {"kernel": {}}}, 1.0)
    pair = {"a": jnp.zeros((16, 2)), "b": jnp.zeros((2, 9))}
    with pytest.raises(UserError, match="does not fit a kernel of shape"):
        lora.merge(params, {"proj_out": {"kernel": pair}}, 1.0)
