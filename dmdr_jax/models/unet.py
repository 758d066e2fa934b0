"""The U-Net of SDXL (Podell et al. 2023, arXiv 2307.01952): diffusers' ``UNet2DConditionModel`` with text-time input.

Residual convolutions at falling and rising resolutions, some followed by spatial transformers that read the text, with
a skip connection from every layer of the way down to its mirror image on the way up. The transformer blocks inside one
spatial transformer are one scanned module with stacked parameters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import PLAIN, AttentionKernel, attention, merge_heads, split_heads
from dmdr_jax.models.layers import Array, Conv, Dense, GroupNorm, LayerNorm, LoraScale, gelu_exact, timestep_embedding
from dmdr_jax.models.remat import remat
from dmdr_jax.models.unet_config import Level, UNetConfig

_SPATIAL_NORM_EPS = 1e-6
_TOKEN_NORM_EPS = 1e-5


class UNet2DCondition(nn.Module):
    """The denoiser: noisy latents, time and text to the predicted noise ``eps``.

    Attributes:
      config: the shape.
      dtype: of activations, convolutions and matrix products.
      remat: what the backward pass recomputes of resnets and transformer blocks: see `dmdr_jax.models.remat.remat`.
      attention: what long sequences are attended to with.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = PLAIN

    @nn.compact
    def __call__(
        self,
        latents: Array,
        timestep: Array,
        prompt_embeds: Array,
        pooled: Array,
        time_ids: Array,
        lora_scale: LoraScale = None,
    ) -> Array:
        """Predicts the noise.

        Args:
          latents: ``[b, h, w, in_channels]``, of any size.
          timestep: ``[b]``, 0..999 with 999 = noise.
          prompt_embeds: text token features ``[b, n, cross_attention_dim]``.
          pooled: pooled text ``[b, p]``.
          time_ids: ``[b, 6]``, original size, crop corner and target size in pixels.
          lora_scale: a scalar or ``[b]``; 1 where a delta is given and this is None.

        Returns:
          ``[b, h, w, out_channels]``, at least fp32.

        Raises:
          UserError: the conditioning is not as wide as the config says.
        """
        cfg = self.config
        temb = self._embed(timestep, pooled, time_ids, lora_scale)
        if prompt_embeds.shape[-1] != cfg.cross_attention_dim:
            raise UserError(
                f"prompt_embeds are {prompt_embeds.shape[-1]} wide, the unet takes cross_attention_dim"
                f" {cfg.cross_attention_dim}."
            )
        shared = (temb, prompt_embeds, lora_scale)

        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(latents, lora_scale)
        skips = [x]
        down, up = cfg.down_levels(), cfg.up_levels()
        for i, level in enumerate(down):
            for j in range(len(level.depths)):
                x = self._layer(f"down_blocks.{i}", j, level, x, *shared)
                skips.append(x)
            if i + 1 < len(down):
                name = f"down_blocks.{i}.downsamplers.0.conv"
                x = Conv(level.features, stride=2, dtype=self.dtype, name=name)(x, lora_scale)
                skips.append(x)

        for j in range(len(cfg.mid_level().depths)):
            x = self._layer("mid_block", j, cfg.mid_level(), x, *shared)

        for i, level in enumerate(up):
            for j in range(len(level.depths)):
                x = self._layer(f"up_blocks.{i}", j, level, jnp.concatenate([x, skips.pop()], axis=-1), *shared)
            if i + 1 < len(up):
                x = upsample(x, skips[-1].shape[1:3])
                name = f"up_blocks.{i}.upsamplers.0.conv"
                x = Conv(level.features, dtype=self.dtype, name=name)(x, lora_scale)

        # Near pure noise x0 magnifies an error of eps some 15 times, so the last rounding is not to a half type.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, wide, name="conv_norm_out")(x))
        zeros = nn.initializers.zeros
        return Conv(cfg.out_channels, dtype=wide, kernel_init=zeros, name="conv_out")(x, lora_scale)

    def _embed(self, timestep: Array, pooled: Array, time_ids: Array, lora_scale: LoraScale) -> Array:
        """Sum of the embedded time and the embedded pooled text and sizes, after SiLU: ``[b, 4 d]``."""
        cfg = self.config
        b = timestep.shape[0]
        waves = timestep_embedding(timestep, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        sizes = timestep_embedding(
            time_ids.reshape(-1), cfg.addition_time_embed_dim, cfg.flip_sin_to_cos, cfg.freq_shift
        )
        added = jnp.concatenate([pooled, sizes.reshape(b, -1)], axis=-1)
        if added.shape[-1] != cfg.projection_class_embeddings_input_dim:
            raise UserError(
                f"pooled text {pooled.shape[-1]} wide and {time_ids.shape[-1]} time ids make {added.shape[-1]} numbers,"
                f" the unet takes projection_class_embeddings_input_dim {cfg.projection_class_embeddings_input_dim}."
            )
        width = 4 * cfg.block_out_channels[0]
        temb = TimeMlp(width, self.dtype, name="time_embedding")(waves, lora_scale)
        # Every resnet reads silu(temb).
        return nn.silu(temb + TimeMlp(width, self.dtype, name="add_embedding")(added, lora_scale))

    def _layer(
        self, block: str, j: int, level: Level, x: Array, temb: Array, prompt_embeds: Array, lora_scale: LoraScale
    ) -> Array:
        """Resnet j of a block and, where there is one, the spatial transformer after it."""
        resnet = remat(ResnetBlock, self.remat, in_scan=False)
        x = resnet(self.config, level.features, self.dtype, name=f"{block}.resnets.{j}")(x, temb, lora_scale)
        depth = level.depths[j]
        if depth is None:
            return x
        name = f"{block}.attentions.{j}"
        settings = self.dtype, self.remat, self.attention
        transformer = SpatialTransformer(self.config, depth, level.heads, *settings, name=name)
        return transformer(x, prompt_embeds, lora_scale)


def upsample(x: Array, size: tuple[int, ...]) -> Array:
    """Nearest-neighbour upsampling of ``[b, h, w, c]`` to ``size``, each side 2 h or 2 h - 1 (an odd skip's)."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : size[0], : size[1]]


class TimeMlp(nn.Module):
    """Two dense layers about a SiLU."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, lora_scale: LoraScale) -> Array:
        x = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x, lora_scale))
        return Dense(self.width, dtype=self.dtype, name="linear_2")(x, lora_scale)


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions, the time added between them, beside a (projected) identity.

    The second convolution starts at zero, as in ADM (Dhariwal and Nichol 2021).
    """

    config: UNetConfig
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, silu_temb: Array, lora_scale: LoraScale) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, features]``."""
        norm = self.config.norm_num_groups, self.config.norm_eps, self.dtype
        y = nn.silu(GroupNorm(*norm, name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y, lora_scale)
        time = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(silu_temb, lora_scale)
        y = nn.silu(GroupNorm(*norm, name="norm2")(y + time[:, None, None]))
        zeros = nn.initializers.zeros
        y = Conv(self.features, dtype=self.dtype, kernel_init=zeros, name="conv2")(y, lora_scale)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x, lora_scale)
        return x + y


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels, with a residual about them that starts as the identity."""

    config: UNetConfig
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: str
    attention: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, x: Array, prompt_embeds: Array, lora_scale: LoraScale) -> Array:
        """Maps ``[b, h, w, c]`` to itself."""
        b, h, w, c = x.shape
        y = GroupNorm(self.config.norm_num_groups, _SPATIAL_NORM_EPS, self.dtype, name="norm")(x)
        y = self._project(y, "proj_in", nn.initializers.lecun_normal(), lora_scale).reshape(b, h * w, c)
        if self.depth:
            scanned = nn.scan(
                remat(TransformerBlock, self.remat, in_scan=True),
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            blocks = scanned(self.heads, self.dtype, self.attention, name=f"transformer_blocks.0:{self.depth}")
            y, _ = blocks(y, prompt_embeds, lora_scale)
        return x + self._project(y.reshape(b, h, w, c), "proj_out", nn.initializers.zeros, lora_scale)

    def _project(self, x: Array, name: str, init: Any, lora_scale: LoraScale) -> Array:
        """A map of each pixel; which of the two layers it is shows in the checkpoint alone."""
        c = x.shape[-1]
        if self.config.use_linear_projection:
            return Dense(c, dtype=self.dtype, kernel_init=init, name=name)(x, lora_scale)
        return Conv(c, kernel_size=1, padding=0, dtype=self.dtype, kernel_init=init, name=name)(x, lora_scale)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and a gated feed-forward layer, each normalised before."""

    heads: int
    dtype: jnp.dtype
    attention: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, x: Array, prompt_embeds: Array, lora_scale: LoraScale) -> tuple[Array, None]:
        """Maps ``[b, n, d]`` to itself; None is for scan."""
        norms = [LayerNorm(_TOKEN_NORM_EPS, dtype=self.dtype, name=f"norm{i}") for i in (1, 2, 3)]
        y = norms[0](x)
        attend = functools.partial(Attention, self.heads, self.dtype, self.attention)
        x = x + attend(name="attn1")(y, y, lora_scale)
        x = x + attend(name="attn2")(norms[1](x), prompt_embeds, lora_scale)

        # GEGLU (Shazeer 2020, arXiv 2002.05202).
        width = x.shape[-1]
        hidden = Dense(8 * width, dtype=self.dtype, name="ff.net.0.proj")(norms[2](x), lora_scale)
        value, gate = jnp.split(hidden, 2, axis=-1)
        return x + Dense(width, dtype=self.dtype, name="ff.net.2")(value * gelu_exact(gate), lora_scale), None


class Attention(nn.Module):
    """Multi-head attention of ``x`` to ``context``."""

    heads: int
    dtype: jnp.dtype
    kernel: AttentionKernel = PLAIN

    @nn.compact
    def __call__(self, x: Array, context: Array, lora_scale: LoraScale) -> Array:
        """Maps ``[b, n, d]`` and ``[b, m, e]`` to ``[b, n, d]``."""
        width = x.shape[-1]
        q, k, v = (
            split_heads(Dense(width, use_bias=False, dtype=self.dtype, name=name)(source, lora_scale), self.heads)
            for name, source in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        y = merge_heads(attention(q, k, v, kernel=self.kernel))
        return Dense(width, dtype=self.dtype, name="to_out.0")(y, lora_scale)
