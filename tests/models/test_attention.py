"""The attention function against PyTorch's, its key bias as a multiplicity, and its kernels against fp32.

Splash attention runs in the Pallas interpreter here; for TPU it is compiled, where libtpu is. Of cuDNN's attention it
is our part that is tested: what becomes of its arguments.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from dmdr_jax.accelerators import has_libtpu
from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import PLAIN, AttentionKernel, attention, fitting_block, kernel_for

SPLASH = AttentionKernel("splash", min_tokens=1, block=256, interpret=True)


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


def _heads(b, n, m, k=1, d=64, dtype=jnp.float32):
    return [jnp.asarray(x, dtype) for x in _draw((b, n, k, d), (b, m, k, d), (b, m, k, d))]


def _value_and_gradient(kernel, arrays, key_bias, dtype=None):
    """Output and gradient of a random functional of it, both fp32; ``dtype`` is computed in, where given."""
    weights = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def loss(*arrays):
        arrays = [x if dtype is None else x.astype(dtype) for x in arrays]
        y = attention(*arrays, key_bias=key_bias, kernel=kernel).astype(jnp.float32)
        return (y * weights).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]


def _distances(got, wanted):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, wanted, strict=True)]


@pytest.mark.parametrize(
    ("b", "n", "m", "k", "biased"),
    [(2, 200, 300, 2, False), (2, 256, 77, 1, False), (1, 130, 140, 1, True), (1, 4429, 4429, 1, False)],
    ids=["padding", "cross", "key_bias", "sd3_at_1024_px"],
)
def test_splash_is_attention_forward_and_backward(b, n, m, k, biased):
    arrays = _heads(b, n, m, k)
    key_bias = jnp.zeros(m).at[3].set(np.log(256.0)).at[5].set(-jnp.inf) if biased else None
    splash = dataclasses.replace(SPLASH, block=1024) if n > 4000 else SPLASH
    got = _value_and_gradient(splash, arrays, key_bias)
    assert max(_distances(got, _value_and_gradient(PLAIN, arrays, key_bias))) < 2e-6


def test_splash_in_bfloat16_keeps_the_key_bias_exact():
    # log 256 rounded to bfloat16 would be wrong by 1.4 % in the weight of the key that carries it.
    arrays = _heads(2, 130, 140, dtype=jnp.bfloat16)
    key_bias = jnp.zeros((2, 140)).at[0, 3].set(np.log(256.0)).at[1, 7].set(np.log(256.0))
    exact = _value_and_gradient(PLAIN, arrays, key_bias, jnp.float32)
    plain = _distances(_value_and_gradient(PLAIN, arrays, key_bias), exact)
    splash = _distances(_value_and_gradient(SPLASH, arrays, key_bias), exact)
    assert splash[0] < plain[0]
    assert all(s < 2.0 * p for s, p in zip(splash, plain, strict=True)), (splash, plain)


def test_cudnn_gets_the_key_bias_as_columns(monkeypatch):
    calls, call = [], jax.nn.dot_product_attention

    def on_cpu(*arrays, implementation, **settings):
        calls.append((implementation, arrays[0].shape[-1], arrays[2].shape[-1]))
        return call(*arrays, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    kernel = AttentionKernel("cudnn", min_tokens=1)
    arrays = _heads(2, 24, 31, 2, dtype=jnp.bfloat16)
    key_bias = jnp.zeros(31).at[3].set(np.log(256.0)).at[5].set(-jnp.inf)
    for bias in (None, key_bias):
        exact = _value_and_gradient(PLAIN, arrays, bias, jnp.float32)
        assert max(_distances(_value_and_gradient(kernel, arrays, bias), exact)) < 1e-2
    assert calls == [("cudnn", 64, 64), ("cudnn", 72, 72)]


@pytest.mark.parametrize(("block", "padded"), [(1024, 4480), (512, 4608), (1536, 4480)])
def test_blocks_pad_little(block, padded):
    fitted = fitting_block(4429, block)
    assert -(-4429 // fitted) * fitted == padded
    assert fitting_block(4096, block) in (512, 1024)
    assert fitting_block(77, block) == 128


def test_short_wide_or_biased_attention_is_plain():
    long, short = _heads(1, 1024, 1024, dtype=jnp.bfloat16)[:2], _heads(1, 1024, 77, dtype=jnp.bfloat16)[:2]
    for kind in ("splash", "cudnn"):
        assert AttentionKernel(kind).takes(*long)
        assert not AttentionKernel(kind).takes(*short)
    wide = _heads(1, 1024, 1024, d=512, dtype=jnp.bfloat16)[:2]
    assert not AttentionKernel("cudnn").takes(*wide)
    assert not AttentionKernel("cudnn").takes(*_heads(1, 1024, 1024)[:2])
    assert not AttentionKernel("splash").takes(*_heads(1, 1024, 1024, dtype=jnp.float16)[:2])
    q, k, v = _heads(1, 130, 130)
    for settings in ({"causal": True}, {"bias": jnp.ones((130, 130))}):
        text = str(jax.make_jaxpr(functools.partial(attention, kernel=SPLASH, **settings))(q, k, v))
        assert "pallas_call" not in text
    assert "pallas_call" in str(jax.make_jaxpr(functools.partial(attention, kernel=SPLASH))(q, k, v))


def test_plain_attention_has_forward_mode_and_second_derivatives():
    q, k, v = _heads(1, 5, 7, 2, 8)
    energy = lambda q: (attention(q, k, v) ** 2).sum()
    _, forward = jax.jvp(energy, (q,), (q,))
    np.testing.assert_allclose(forward, (jax.grad(energy)(q) * q).sum(), rtol=1e-5)
    curvature = jax.grad(lambda q: (jax.grad(energy)(q) ** 2).sum())(q)
    assert np.isfinite(curvature).all() and np.abs(curvature).max() > 0


def _device(platform, kind, capability=None):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


def test_the_device_chooses():
    cases = [
        (_device("tpu", "TPU v5 lite"), "splash", 1024),
        (_device("tpu", "TPU v5"), "splash", 1024),
        (_device("tpu", "TPU v6 lite"), "splash", 1536),
        (_device("gpu", "NVIDIA H200", "9.0"), "cudnn", 1024),
        (_device("gpu", "Tesla V100", "7.0"), "plain", 1024),
        (_device("cpu", "cpu"), "plain", 1024),
    ]
    for device, kind, block in cases:
        kernel = kernel_for("auto", device=device)
        assert (kernel.kind, kernel.block) == (kind, block)
        assert kernel_for("plain", device=device).kind == "plain"
    assert not kernel_for("splash", device=cases[0][0]).interpret
    assert kernel_for("splash").interpret
    with pytest.raises(UserError, match="'flash' is unknown; choose one of auto, plain, splash, cudnn"):
        kernel_for("flash")
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        kernel_for("cudnn")


def _program(*arguments, **environment):
    """What a program of `tests.models.attention_programs` prints."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.attention_programs", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_device_attends_to_its_rows_or_queries():
    errors = _program("mesh", JAX_NUM_CPU_DEVICES="8")
    assert len(errors) == 8
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu's compiler")
@pytest.mark.parametrize(
    "topology",
    ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2"))],
)
def test_splash_compiles_for_tpus(topology):
    described = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    found = _program("compile", topology, **described)
    assert found["self"] < 0.7, found  # GB; the fp32 logits of SD3 at 1024 px alone would be 1.9
    assert found["pixels"] < 0.1
    # What "names" keeps spares the backward pass the kernel's forward run.
    assert found["kernels"] == {"none": 3, "names": 3, "full": 4}
