"""The attention function against PyTorch's, and its key bias as a multiplicity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from dmdr_jax.models.attention import attention


def _draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def _torch(x):
    return torch.tensor(x).transpose(1, 2)


@pytest.mark.parametrize(("n", "m", "causal"), [(5, 5, False), (3, 7, False), (6, 6, True), (1, 4, False)])
def test_equals_torch_with_all_biases(n, m, causal):
    q, k, v, bias, key_bias = _draw((2, n, 3, 4), (2, m, 3, 4), (2, m, 3, 4), (3, n, m), (2, m))
    mask = torch.tensor(bias)[None] + torch.tensor(key_bias)[:, None, None]
    if causal:
        mask = mask.masked_fill(~torch.ones(n, m).tril().bool(), -torch.inf)
    wanted = functional.scaled_dot_product_attention(_torch(q), _torch(k), _torch(v), attn_mask=mask, scale=0.3)
    got = attention(q, k, v, bias=jnp.asarray(bias), key_bias=jnp.asarray(key_bias), scale=0.3, causal=causal)
    np.testing.assert_allclose(got, wanted.transpose(1, 2).numpy(), rtol=2e-5, atol=1e-6)


def test_log_multiplicity_counts_keys():
    q, k, v = _draw((2, 5, 3, 4), (2, 3, 3, 4), (2, 3, 3, 4))
    repeats = np.array([1, 4, 2])
    many = attention(q, np.repeat(k, repeats, 1), np.repeat(v, repeats, 1))
    few = attention(q, k, v, key_bias=jnp.log(jnp.asarray(repeats, jnp.float32)))
    np.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-6)


def test_minus_infinity_hides_a_key():
    q, k, v = _draw((1, 5, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4))
    hidden = attention(q, k, v, key_bias=jnp.array([0.0, 0.0, -jnp.inf]))
    np.testing.assert_allclose(hidden, attention(q, k[:, :2], v[:, :2]), rtol=1e-6, atol=1e-6)


def test_bfloat16_keeps_its_type_and_softmaxes_wide():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _draw((1, 4, 2, 8), (1, 300, 2, 8), (1, 300, 2, 8)))
    got = attention(q, k, v)
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert got.dtype == jnp.bfloat16
    assert float(jnp.abs(got - exact).max()) < 4e-3


def test_float64_stays_float64():
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in _draw((1, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)))
        got = attention(q, k, v)
        logits = np.einsum("bnkd,bmkd->bknm", q, k) / np.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, np.einsum("bknm,bmkd->bnkd", weights, v), rtol=1e-12)
