"""AutoencoderKL, the image codec of latent diffusion (Rombach et al. 2021, section 3.1).

The network of diffusers' ``AutoencoderKL`` in every shape SD3 (16 latent channels, no quant
convolutions) and SDXL (4 channels, both quant convolutions) publish. It speaks *raw* latents; the
denoiser's latents are an affine map away, `latents_from_raw` and `raw_from_latents`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import PLAIN, AttentionKernel, attention
from dmdr_jax.models.layers import Conv, Dense, GroupNorm, parameter

Array = jax.Array

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
# Settings under which diffusers builds another network, with the one value that is built here.
_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None, "in_channels": 3, "out_channels": 3}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Which of three kernel taps fall on the same input pixel after 2x upsampling: [output parity][input pixel][tap].
_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of the codec and the affine map of its latents; diffusers' names and meanings.

    ``force_upcast`` says that the weights' activations overflow fp16: where fp16 is asked for, such a codec computes
    in fp32. The fp16-safe variant of SDXL's codec has it False; bf16 is safe for both.
    """

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Reads ``vae/config.json``; raises UserError on a setting this codec does not have."""
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise UserError(f"vae config: expected an AutoencoderKL, found a {kind}.")
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise UserError(f"vae config: {key}={config[key]!r} is not supported, only {value!r} is.")
        channels = tuple(config.get("block_out_channels", (64,)))
        for key, block in _BLOCK_TYPES.items():
            # diffusers' default is a single block, so the key may only be absent from a one-block codec.
            if list(config.get(key, [block])) != [block] * len(channels):
                raise UserError(f"vae config: {key} must be {len(channels)} times {block!r}, not {config.get(key)!r}.")
        groups = config.get("norm_num_groups", 32)
        if any(c % groups for c in channels):
            raise UserError(f"vae config: norm_num_groups={groups} does not divide block_out_channels={channels}.")
        return cls(
            latent_channels=config.get("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=config.get("layers_per_block", 1),
            norm_num_groups=groups,
            scaling_factor=config.get("scaling_factor", 0.18215),
            shift_factor=config.get("shift_factor") or 0.0,
            use_quant_conv=config.get("use_quant_conv", True),
            use_post_quant_conv=config.get("use_post_quant_conv", True),
            mid_block_add_attention=config.get("mid_block_add_attention", True),
            force_upcast=config.get("force_upcast", True),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads back as the same codec."""
        blocks = {key: [block] * len(self.block_out_channels) for key, block in _BLOCK_TYPES.items()}
        values = dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}
        return {"_class_name": "AutoencoderKL", **_FIXED, **blocks, **values}


def latents_from_raw(raw: Array, config: AutoencoderKLConfig) -> Array:
    """The denoiser's latents ``(raw - shift_factor) * scaling_factor``."""
    return (raw - config.shift_factor) * config.scaling_factor


def raw_from_latents(latents: Array, config: AutoencoderKLConfig) -> Array:
    """Inverse of `latents_from_raw`: what the decoder takes."""
    return latents / config.scaling_factor + config.shift_factor


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a (projected) identity."""

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, features]``."""
        y = nn.silu(GroupNorm(self.groups, NORM_EPS, self.dtype, name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        y = nn.silu(GroupNorm(self.groups, NORM_EPS, self.dtype, name="norm2")(y))
        y = Conv(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class UpsampleConv(nn.Module):
    """Nearest-neighbour upsampling by 2 followed by a 3 x 3 convolution, without making the large image.

    An output pixel of given parity sees only 2 x 2 different inputs, so four 2 x 2 convolutions, one
    per parity, do the work with 4/9 of the multiplications.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, 2 h, 2 w, features]``."""
        b, h, w, c = x.shape
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (3, 3, c, self.features))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype)
        rows = [jnp.stack([self._phase(x, kernel, p, q) for q in (0, 1)], axis=3) for p in (0, 1)]
        y = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, self.features)
        return y + bias.astype(self.dtype)

    def _phase(self, x: Array, kernel: Array, p: int, q: int) -> Array:
        """Output pixels of row parity ``p`` and column parity ``q``: ``[b, h, w, features]``."""
        taps = jnp.array(_TAPS, kernel.dtype)
        return jax.lax.conv_general_dilated(
            x,
            jnp.einsum("ai,bj,ijcf->abcf", taps[p], taps[q], kernel).astype(self.dtype),
            window_strides=(1, 1),
            padding=((1 - p, p), (1 - q, q)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class PixelAttention(nn.Module):
    """Single-head self-attention among all pixels, with a residual."""

    groups: int
    dtype: jnp.dtype
    kernel: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[b, h, w, c]`` to itself."""
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, NORM_EPS, self.dtype, name="group_norm")(x).reshape(b, h * w, 1, c)
        q, k, v = (Dense(c, dtype=self.dtype, name=name)(y) for name in ("to_q", "to_k", "to_v"))
        y = attention(q, k, v, kernel=self.kernel).reshape(b, h, w, c)
        return x + Dense(c, dtype=self.dtype, name="to_out.0")(y)


class Encoder(nn.Module):
    """Images to latent moments."""

    config: AutoencoderKLConfig
    dtype: jnp.dtype
    attention: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[b, H, W, 3]`` to ``[b, h, w, 2 c]``, means before log variances."""
        cfg = self.config
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(images)
        for i, features in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                x = ResnetBlock(features, cfg.norm_num_groups, self.dtype, name=f"down_blocks.{i}.resnets.{j}")(x)
            if i + 1 < len(cfg.block_out_channels):
                x = Conv(
                    features,
                    stride=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"down_blocks.{i}.downsamplers.0.conv",
                )(x)
        x = _mid_block(x, cfg, self.dtype, self.attention)
        return _head(x, 2 * cfg.latent_channels, cfg, self.dtype)


class Decoder(nn.Module):
    """Raw latents to images. A backward pass computes each block again: kept, some of 1024 px would be gigabytes."""

    config: AutoencoderKLConfig
    dtype: jnp.dtype
    attention: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, raw: Array) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, H, W, 3]``."""
        cfg = self.config
        widths = cfg.block_out_channels[::-1]
        x = _mid_block(Conv(widths[0], dtype=self.dtype, name="conv_in")(raw), cfg, self.dtype, self.attention)
        for i, features in enumerate(widths):
            for j in range(cfg.layers_per_block + 1):
                name = f"up_blocks.{i}.resnets.{j}"
                x = nn.remat(ResnetBlock)(features, cfg.norm_num_groups, self.dtype, name=name)(x)
            if i + 1 < len(widths):
                x = UpsampleConv(features, self.dtype, name=f"up_blocks.{i}.upsamplers.0.conv")(x)
        return _head(x, 3, cfg, self.dtype)


def _mid_block(x: Array, config: AutoencoderKLConfig, dtype: jnp.dtype, kernel: AttentionKernel) -> Array:
    """The block at the lowest resolution, the same in both networks (called inside a compact method)."""
    features, groups = config.block_out_channels[-1], config.norm_num_groups
    x = ResnetBlock(features, groups, dtype, name="mid_block.resnets.0")(x)
    if config.mid_block_add_attention:
        x = PixelAttention(groups, dtype, kernel, name="mid_block.attentions.0")(x)
    return ResnetBlock(features, groups, dtype, name="mid_block.resnets.1")(x)


def _head(x: Array, features: int, config: AutoencoderKLConfig, dtype: jnp.dtype) -> Array:
    """Normalisation and last convolution of both networks (called inside a compact method)."""
    x = nn.silu(GroupNorm(config.norm_num_groups, NORM_EPS, dtype, name="conv_norm_out")(x))
    return Conv(features, dtype=dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The codec. ``init`` through ``__call__``; use through ``method="encode"`` and ``method="decode"``."""

    config: AutoencoderKLConfig
    dtype: jnp.dtype = jnp.float32
    attention: AttentionKernel = PLAIN

    def setup(self) -> None:
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype, self.attention)
        self.decoder = Decoder(cfg, self.dtype, self.attention)
        if cfg.use_quant_conv:
            self.quant_conv = Conv(2 * cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = Conv(cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Moments of the raw latents.

        Args:
          images: ``[b, H, W, 3]`` in [-1, 1].

        Returns:
          Mean and log variance (clipped as diffusers clips it), each ``[b, h, w, c]`` fp32.
        """
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(_widen(moments), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, raw: Array) -> Array:
        """Draws raw latents ``[b, h, w, c]`` as images ``[b, H, W, 3]``, in [-1, 1] but not clipped, fp32."""
        if self.config.use_post_quant_conv:
            raw = self.post_quant_conv(raw)
        return _widen(self.decoder(raw))

    def __call__(self, images: Array) -> Array:
        """Reconstructs images through the mean of their latents."""
        return self.decode(self.encode(images)[0])


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
