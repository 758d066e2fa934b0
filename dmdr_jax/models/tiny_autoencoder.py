"""AutoencoderTiny (TAESD, github.com/madebyollin/taesd): a codec a few layers deep for another codec's latents.

The network of diffusers' ``AutoencoderTiny``. It is distilled from a full autoencoder and speaks the *denoiser's*
latents, so that its affine map of latents is the identity, and it has the methods of `AutoencoderKL`: rewards can be
computed, and differentiated, through it at a small part of the cost.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.models.autoencoder import LOGVAR_RANGE
from dmdr_jax.models.layers import Conv

Array = jax.Array

# Latents pass through 3 tanh(z / 3) on their way into the decoder.
_LATENT_BOUND = 3.0
_FACTOR = 2
# Settings under which diffusers builds another network, with the one value that is built here.
_FIXED = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": _FACTOR,
    "in_channels": 3,
    "out_channels": 3,
}
# Settings that act on neither encoding nor decoding.
_UNUSED = ("latent_magnitude", "latent_shift", "force_upcast", "block_out_channels")
_LISTS = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig:
    """Shape of the codec and the affine map of its latents; diffusers' names and defaults."""

    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        counts = {name: len(getattr(self, name)) for name in _LISTS}
        if len(set(counts.values())) > 1 or not self.num_decoder_blocks:
            raise UserError(f"vae config: the lists must have one entry per level each, but have {counts}.")
        for name in _LISTS[:2]:
            widths = getattr(self, name)
            # diffusers' layers between two levels have the width of one of them on both sides.
            if len(set(widths)) > 1:
                raise UserError(f"vae config: {name} must be the same on all levels, not {list(widths)}.")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return _FACTOR ** (len(self.num_encoder_blocks) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "AutoencoderTinyConfig":
        """Reads ``vae/config.json``; raises UserError on a setting this codec does not have."""
        kind = config.get("_class_name", "AutoencoderTiny")
        if kind != "AutoencoderTiny":
            raise UserError(f"vae config: expected an AutoencoderTiny, found a {kind}.")
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise UserError(f"vae config: {key}={config[key]!r} is not supported, only {value!r} is.")
        values = {k: v for k, v in config.items() if not k.startswith("_") and k not in (*_FIXED, *_UNUSED)}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"vae config: unknown keys {unknown}; known are {sorted({*known, *_FIXED, *_UNUSED})}.")
        own: dict[str, Any] = {k: tuple(v) if k in _LISTS else v for k, v in values.items()}
        return cls(**own)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads back as the same codec."""
        values = {k: list(v) if k in _LISTS else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": "AutoencoderTiny", **_FIXED, **values}


class TinyBlock(nn.Module):
    """Three 3 x 3 convolutions with a residual, rectified."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to itself."""
        y = x
        # PyTorch counts the activations between them.
        for i in (0, 2, 4):
            y = Conv(x.shape[-1], dtype=self.dtype, name=f"conv.{i}")(nn.relu(y) if i else y)
        return nn.relu(y + x)


class TinyEncoder(nn.Module):
    """Images to latents; ``layers.i`` counts as PyTorch's sequence does."""

    config: AutoencoderTinyConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[b, H, W, 3]`` in [-1, 1] to ``[b, h, w, c]``."""
        cfg = self.config
        x, count = (images + 1) / 2, 0
        for level, (features, blocks) in enumerate(zip(cfg.encoder_block_out_channels, cfg.num_encoder_blocks)):
            stride = _FACTOR if level else 1
            name = f"layers.{count}"
            x = Conv(features, stride=stride, use_bias=not level, dtype=self.dtype, name=name)(x)
            for i in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{count + 1 + i}")(x)
            count += 1 + blocks
        return Conv(cfg.latent_channels, dtype=self.dtype, name=f"layers.{count}")(x)


class TinyDecoder(nn.Module):
    """Latents to images; ``layers.i`` counts as PyTorch's sequence does, activations and upsamplings included."""

    config: AutoencoderTinyConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, H, W, 3]`` fp32, nominally in [-1, 1]."""
        cfg = self.config
        x = jnp.tanh(latents / _LATENT_BOUND) * _LATENT_BOUND
        x = nn.relu(Conv(cfg.decoder_block_out_channels[0], dtype=self.dtype, name="layers.0")(x))
        count, last = 2, len(cfg.num_decoder_blocks) - 1
        for level, (features, blocks) in enumerate(zip(cfg.decoder_block_out_channels, cfg.num_decoder_blocks)):
            for i in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{count + i}")(x)
            count += blocks
            if level < last:
                x = jnp.repeat(jnp.repeat(x, _FACTOR, axis=1), _FACTOR, axis=2)
                x = Conv(features, use_bias=False, dtype=self.dtype, name=f"layers.{count + 1}")(x)
                count += 2
        return _widen(Conv(3, dtype=self.dtype, name=f"layers.{count}")(x)) * 2 - 1


class AutoencoderTiny(nn.Module):
    """The codec. ``init`` through ``__call__``; use through ``method="encode"`` and ``method="decode"``."""

    config: AutoencoderTinyConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = TinyEncoder(self.config, self.dtype)
        self.decoder = TinyDecoder(self.config, self.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Moments of the latents, as `AutoencoderKL` gives them; these have no spread.

        Args:
          images: ``[b, H, W, 3]`` in [-1, 1].

        Returns:
          The latents and the least log variance, each ``[b, h, w, c]`` fp32.
        """
        mean = _widen(self.encoder(images))
        return mean, jnp.full_like(mean, LOGVAR_RANGE[0])

    def decode(self, raw: Array) -> Array:
        """Draws latents ``[b, h, w, c]`` as images ``[b, H, W, 3]``, in [-1, 1] but not clipped, fp32."""
        return self.decoder(raw)

    def __call__(self, images: Array) -> Array:
        """Reconstructs images."""
        return self.decode(self.encode(images)[0])


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
