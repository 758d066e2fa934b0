"""The T5 v1.1 encoder against transformers on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.torch_weights import abstract_params, from_torch, randomise

TOLERANCE = 1e-5
SMALL = {
    "vocab_size": 40,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}


def relative_error(value, expected: torch.Tensor) -> float:
    expected = expected.detach().numpy()
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("changes", "batch", "n"), [({}, 2, 27), ({"num_layers": 1, "layer_norm_epsilon": 1e-3}, 3, 5)]
)
def test_matches_transformers(changes, batch, n):
    import transformers

    settings = SMALL | changes
    theirs = randomise(transformers.T5EncoderModel(transformers.T5Config(**settings)))
    weights = {k: v for k, v in theirs.state_dict().items() if k != "encoder.embed_tokens.weight"}
    # Biases of the size of the logits, so that a wrong bucket shows.
    theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(4.0)
    ours = T5Encoder(T5Config.from_diffusers(settings))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SMALL["vocab_size"], (batch, n))
    params = from_torch(abstract_params(ours, ids), weights)
    cotangent = rng.standard_normal((batch, n, SMALL["d_model"])).astype(np.float32)

    embedding = theirs.shared.weight.requires_grad_()
    expected = theirs(torch.from_numpy(ids)).last_hidden_state
    (expected_grad,) = torch.autograd.grad((expected * torch.from_numpy(cotangent)).sum(), embedding)

    @jax.jit
    def run(params):
        value, pullback = jax.vjp(lambda p: ours.apply({"params": p}, ids), params)
        return value, pullback(cotangent)[0]["shared"]["embedding"]

    value, grad = run(params)
    assert relative_error(value, expected) < TOLERANCE
    assert relative_error(grad, expected_grad) < TOLERANCE


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_buckets_match_transformers_at_every_distance(buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    n = 512
    position = torch.arange(n)
    expected = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], bidirectional=True, num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_buckets(n, buckets, max_distance), expected.numpy())


def test_bf16_output_is_fp32_and_close():
    config = T5Config.from_diffusers(SMALL)
    ids = np.arange(12).reshape(2, 6)
    rng = np.random.default_rng(0)
    abstract = abstract_params(T5Encoder(config), ids)
    variables = {"params": jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), abstract)}
    half = jax.jit(T5Encoder(config, jnp.bfloat16).apply)(variables, ids)
    full = jax.jit(T5Encoder(config).apply)(variables, ids)
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


def test_config_round_trip():
    config = T5Config.from_diffusers(SMALL)
    assert T5Config.from_diffusers(config.to_diffusers()) == config


def test_first_t5_is_refused():
    with pytest.raises(UserError, match="feed_forward_proj 'relu'"):
        T5Config.from_diffusers(SMALL | {"feed_forward_proj": "relu"})
