"""The codec against diffusers' AutoencoderKL on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.diffusers_io.components import build_module
from dmdr_jax.errors import UserError
from dmdr_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, latents_from_raw, raw_from_latents
from tests.torch_weights import abstract_params, from_torch, randomise

TOLERANCE = 1e-5


def diffusers_config(**changes) -> dict:
    config = {
        "latent_channels": 16,
        "block_out_channels": [4, 8, 12],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }
    config.update(changes)
    blocks = len(config["block_out_channels"])
    config["down_block_types"] = ["DownEncoderBlock2D"] * blocks
    config["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    return config


def build(config: dict):
    """The codec here, its parameters and the same one in diffusers."""
    from diffusers import AutoencoderKL as TorchAutoencoderKL

    theirs = randomise(TorchAutoencoderKL(**config))
    ours = AutoencoderKL(AutoencoderKLConfig.from_diffusers(config))
    params = from_torch(abstract_params(ours, jnp.zeros((1, 16, 16, 3))), theirs.state_dict())
    return ours, params, theirs


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def from_channels_first(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def relative_error(value, expected) -> float:
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


def torch_value_and_grad(function, x: np.ndarray, cotangent: np.ndarray):
    x = to_torch(x).requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad((y * to_torch(cotangent)).sum(), x)
    return from_channels_first(y), from_channels_first(grad)


@functools.partial(jax.jit, static_argnums=0)
def jax_value_and_grad(function, params, x: np.ndarray, cotangent: np.ndarray):
    y, pullback = jax.vjp(functools.partial(function, params), x)
    return y, pullback(cotangent)[0]


VARIANTS = {
    "sd3": (diffusers_config(), 12, 20),
    "sdxl": (
        diffusers_config(
            latent_channels=4,
            block_out_channels=[6, 9],
            layers_per_block=2,
            norm_num_groups=3,
            use_quant_conv=True,
            use_post_quant_conv=True,
            shift_factor=None,
        ),
        9,
        15,
    ),
    "one_level": (diffusers_config(block_out_channels=[8], mid_block_add_attention=False), 5, 7),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_diffusers(variant):
    config, height, width = VARIANTS[variant]
    ours, params, theirs = build(config)
    channels, factor = config["latent_channels"], ours.config.downsampling

    def encode(params, x):
        return jnp.concatenate(ours.apply({"params": params}, x, method="encode"), axis=-1)

    def torch_encode(x):
        moments = theirs.encode(x).latent_dist
        return torch.cat([moments.mean, moments.logvar], dim=1)

    def decode(params, z):
        return ours.apply({"params": params}, z, method="decode")

    images = noise(0, 2, height, width, 3)
    latent_shape = (2, height // factor, width // factor)
    cotangent = noise(1, *latent_shape, 2 * channels)
    value, grad = jax_value_and_grad(encode, params, images, cotangent)
    expected, expected_grad = torch_value_and_grad(torch_encode, images, cotangent)
    assert relative_error(value, expected) < TOLERANCE
    assert relative_error(grad, expected_grad) < TOLERANCE

    raw = noise(2, *latent_shape, channels)
    cotangent = noise(3, 2, latent_shape[1] * factor, latent_shape[2] * factor, 3)
    value, grad = jax_value_and_grad(decode, params, raw, cotangent)
    expected, expected_grad = torch_value_and_grad(lambda z: theirs.decode(z).sample, raw, cotangent)
    assert relative_error(value, expected) < TOLERANCE
    assert relative_error(grad, expected_grad) < TOLERANCE


def test_log_variance_is_clipped_as_in_diffusers():
    config = diffusers_config(block_out_channels=[4, 4])
    ours, params, theirs = build(config)
    channels = config["latent_channels"]
    # Biases that push half of the log variances over the upper and half under the lower limit.
    bias = np.concatenate([np.zeros(channels), np.tile([100.0, -100.0], channels // 2)]).astype(np.float32)
    params["encoder"]["conv_out"]["bias"] = bias
    theirs.encoder.conv_out.bias.data = torch.from_numpy(bias)
    images = noise(0, 1, 8, 8, 3)
    _, logvar = jax.jit(functools.partial(ours.apply, method="encode"))({"params": params}, images)
    expected = from_channels_first(theirs.encode(to_torch(images)).latent_dist.logvar)
    np.testing.assert_array_equal(logvar, expected)
    assert logvar.max() == 20 and logvar.min() == -30


def test_latents_and_raw_are_inverse_affine_maps():
    config = AutoencoderKLConfig(scaling_factor=1.5305, shift_factor=0.0609)
    raw = noise(0, 2, 3, 3, 4)
    latents = latents_from_raw(raw, config)
    np.testing.assert_allclose(latents, (raw - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(raw_from_latents(latents, config), raw, atol=1e-6)


def test_parameters_stay_fp32_and_outputs_too_in_bf16():
    config = AutoencoderKLConfig.from_diffusers(diffusers_config(block_out_channels=[8]))
    images = noise(0, 2, 8, 8, 3)
    half, full = AutoencoderKL(config, jnp.bfloat16), AutoencoderKL(config)
    abstract = abstract_params(half, images)
    assert {p.dtype for p in jax.tree.leaves(abstract)} == {jnp.dtype(jnp.float32)}
    rng = np.random.default_rng(1)
    variables = {"params": jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), abstract)}
    value = jax.jit(half.apply)(variables, images)
    assert value.dtype == jnp.float32
    assert 0 < relative_error(value, np.asarray(jax.jit(full.apply)(variables, images))) < 0.05


def test_config_round_trip():
    config = AutoencoderKLConfig.from_diffusers(diffusers_config(mid_block_add_attention=False))
    assert AutoencoderKLConfig.from_diffusers(config.to_diffusers()) == config
    assert config.downsampling == 4


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_codec_that_overflows_fp16_is_not_run_in_it(force_upcast):
    """SDXL's codec, and its fp16-safe variant whose config says so and keeps saying so."""
    config = diffusers_config(block_out_channels=[8], force_upcast=force_upcast)
    ours, params, _ = build(config)
    # Activations of some 1e5, which the norm at the end brings back: beyond fp16 (65504), harmless in fp32.
    params["decoder"]["mid_block.resnets.1"]["conv2"]["bias"] += 1e5
    half = build_module("AutoencoderKL", config, jnp.float16)
    raw = {"params": params}, noise(0, 1, 8, 8, 16)
    decoded = jax.jit(functools.partial(half.apply, method="decode"))(*raw)
    assert bool(jnp.isfinite(decoded).all()) == force_upcast
    expected = jax.jit(functools.partial(ours.apply, method="decode"))(*raw)
    assert not force_upcast or relative_error(decoded, np.asarray(expected)) == 0
    assert build_module("AutoencoderKL", config, jnp.bfloat16).dtype == jnp.bfloat16
    assert AutoencoderKLConfig.from_diffusers(config).to_diffusers()["force_upcast"] == force_upcast


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"latents_mean": [0.0] * 16}, "latents_mean"),
        ({"in_channels": 1}, "in_channels"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ],
)
def test_unsupported_settings_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        AutoencoderKLConfig.from_diffusers(diffusers_config(**changes))


def test_unsupported_blocks_are_named():
    config = diffusers_config() | {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
    with pytest.raises(UserError, match="down_block_types"):
        AutoencoderKLConfig.from_diffusers(config)
