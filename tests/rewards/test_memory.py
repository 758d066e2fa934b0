"""Micro-batches give the results and gradients of the whole batch, and keep less for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.rewards.memory import in_microbatches


def score(weights, x, y):
    hidden = jnp.tanh(x @ weights)
    return {"a": (hidden * y).sum(-1), "b": hidden}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 4), (6, 5), (6, 4)))


@pytest.mark.parametrize("size", [0, 1, 2, 4, 6, 9])
@pytest.mark.parametrize("remat", [True, False])
def test_results_and_gradients_are_the_same(inputs, size, remat):
    def loss(fn, weights, x, y):
        out = fn(lambda x, y: score(weights, x, y))(x, y)
        return (out["a"] ** 2).sum() + jnp.sin(out["b"]).sum(), out

    whole = jax.value_and_grad(lambda *a: loss(lambda f: f, *a), argnums=(0, 1, 2), has_aux=True)
    parts = jax.value_and_grad(
        lambda *a: loss(lambda f: in_microbatches(f, size, remat=remat), *a), argnums=(0, 1, 2), has_aux=True
    )
    (value, out), grads = whole(*inputs)
    (found, out_found), grads_found = jax.jit(parts)(*inputs)
    for a, b in zip(
        jax.tree.leaves((value, out, grads)), jax.tree.leaves((found, out_found, grads_found)), strict=True
    ):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


def test_one_lot_of_pixels_is_kept():
    """Temporary memory of the compiled gradient: with lots of one it is a fraction of the whole batch's."""
    grow = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4096)), jnp.float32)

    def decode(z):
        return jnp.sin(jnp.sin(z @ grow))

    def decode_and_score(z, t):
        images = decode(z)
        return images, {"r": jnp.tanh(images * t[:, None]).sum(-1)}

    def loss(z, size):
        images, scores = in_microbatches(decode_and_score, size)(z, z[:, 0])
        return scores["r"].sum() + 0.0 * images.shape[0]

    z = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    memory = [
        jax.jit(jax.grad(loss), static_argnums=1).lower(z, size).compile().memory_analysis().temp_size_in_bytes
        for size in (0, 1)
    ]
    assert memory[1] < memory[0] / 2


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="negative"):
        in_microbatches(lambda x: x, -1)
