"""The tiny codec against diffusers' AutoencoderTiny on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as TorchAutoencoderTiny

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.generate import decode_images
from dmdr_jax.models.autoencoder import raw_from_latents
from dmdr_jax.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig
from tests.torch_weights import abstract_params, from_torch, randomise

THREE_LEVELS = {
    "encoder_block_out_channels": [6, 6, 6],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 0, 2],
    "num_decoder_blocks": [2, 1, 0],
}
ONE_LEVEL = {
    "encoder_block_out_channels": [5],
    "decoder_block_out_channels": [7],
    "num_encoder_blocks": [1],
    "num_decoder_blocks": [1],
    "latent_channels": 16,
}


@functools.cache
def _pair(levels: int):
    """The torch codec with every weight random, ours, and our copy of the weights."""
    config = {1: ONE_LEVEL, 3: THREE_LEVELS}[levels]
    theirs = randomise(TorchAutoencoderTiny(**config), seed=2)
    ours = AutoencoderTiny(AutoencoderTinyConfig.from_diffusers(config))
    return theirs, ours, from_torch(abstract_params(ours, jnp.zeros((1, 4, 4, 3))), theirs.state_dict())


def _error(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted))


def _channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def _theirs(function, x: np.ndarray, cotangent: np.ndarray):
    leaf = torch.tensor(x, requires_grad=True)
    y = function(leaf.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y.backward(torch.tensor(cotangent))
    return y.detach().numpy(), leaf.grad.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _ours(function, params, x, cotangent):
    y, pull = jax.vjp(functools.partial(function, params), x)
    return y, *pull(cotangent)


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("levels", "latents", "images"),
    [(3, (2, 3, 5, 4), (2, 12, 20, 3)), (1, (1, 2, 7, 16), (1, 2, 7, 3))],
)
def test_decode_and_its_gradient_equal_diffusers(levels, latents, images):
    theirs, ours, params = _pair(levels)
    # Beyond 3, where the bound on the latents shows.
    z, cotangent = 3 * _noise(0, *latents), _noise(1, *images)
    got = _ours(lambda p, x: ours.apply({"params": p}, x, method="decode"), params, z, cotangent)
    assert got[0].shape == images
    for a, b in zip(got, _theirs(lambda x: theirs.decode(x).sample, z, cotangent)):
        assert _error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("levels", "images", "latents"),
    [(3, (2, 12, 6, 3), (2, 3, 2, 4)), (1, (1, 5, 4, 3), (1, 5, 4, 16))],
)
def test_encode_and_its_gradient_equal_diffusers(levels, images, latents):
    theirs, ours, params = _pair(levels)
    x, cotangent = _noise(3, *images), _noise(4, *latents)
    got = _ours(lambda p, x: ours.apply({"params": p}, x, method="encode")[0], params, x, cotangent)
    assert got[0].shape == latents
    for a, b in zip(got, _theirs(lambda x: theirs.encode(x).latents, x, cotangent)):
        assert _error(a, b) < 1e-5


def test_stands_in_for_the_full_codec():
    theirs, ours, params = _pair(3)
    z = _noise(5, 1, 2, 3, 4)
    np.testing.assert_array_equal(raw_from_latents(z, ours.config), z)
    pixels = jax.jit(functools.partial(decode_images, ours))(params, z)
    wanted = theirs.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample / 2 + 0.5
    assert _error(pixels, _channels_last(wanted)) < 1e-5
    half = jax.jit(functools.partial(decode_images, ours.clone(dtype=jnp.bfloat16)))(params, z)
    assert half.dtype == jnp.float32 and 1e-5 < _error(half, _channels_last(wanted)) < 0.05

    # Sampling its posterior is no different from its mean.
    mean, logvar = jax.jit(functools.partial(ours.apply, method="encode"))({"params": params}, _noise(6, 1, 8, 8, 3))
    assert mean.shape == logvar.shape == (1, 2, 2, 4)
    assert np.all(np.exp(0.5 * np.asarray(logvar)) < 1e-6)


def test_taesdxl_has_the_published_keys_and_shapes():
    ours = AutoencoderTiny(AutoencoderTinyConfig.from_diffusers({"_class_name": "AutoencoderTiny"}))
    assert ours.config.downsampling == 8
    params = keymap.abstract(ours, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    with torch.device("meta"):
        theirs = TorchAutoencoderTiny()
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {entry.key: entry.shape for entry in keymap.entries(params)} == wanted
    assert "decoder.layers.3.conv.2.weight" in wanted


def test_config_round_trip():
    for values in ({}, THREE_LEVELS, ONE_LEVEL | {"scaling_factor": 0.5, "shift_factor": 0.1}):
        ours = AutoencoderTinyConfig.from_diffusers(values)
        theirs = TorchAutoencoderTiny.from_config(ours.to_diffusers())
        assert AutoencoderTinyConfig.from_diffusers(dict(theirs.config)) == ours


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "found a AutoencoderKL"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported, only 'relu' is"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4 is not supported"),
        ({"depth": 2}, r"unknown keys \['depth'\]"),
        ({"num_decoder_blocks": [1, 1]}, "one entry per level"),
        ({"encoder_block_out_channels": [6, 6, 8]}, r"must be the same on all levels, not \[6, 6, 8\]"),
    ],
)
def test_bad_configs_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        AutoencoderTinyConfig.from_diffusers(THREE_LEVELS | changes)
