"""MM-DiT, the denoiser of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206).

Covers diffusers' ``SD3Transformer2DModel`` in its three published shapes: SD3-Medium, SD3.5-Medium (a second,
image-only attention in some blocks) and SD3.5-Large (RMS-normalised queries and keys). Consecutive blocks of one
kind are one scanned module with stacked parameters; the last block, which drops the text stream, stands alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import PLAIN, AttentionKernel, attention, merge_heads, split_heads
from dmdr_jax.models.layers import Array, Conv, Dense, LayerNorm, LoraScale, RMSNorm, gelu_tanh, timestep_embedding
from dmdr_jax.models.remat import remat

# Leaves of the parameter tree that are stored and exported but never trained.
BUFFERS = ("pos_embed.pos_embed",)

_TIME_FEATURES = 256
_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the network, in the names and defaults of diffusers' ``SD3Transformer2DModel``."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        if self.caption_projection_dim != self.width:
            raise UserError(
                f"transformer config: caption_projection_dim is {self.caption_projection_dim}, but it must equal"
                f" num_attention_heads x attention_head_dim = {self.width}."
            )
        if self.width % 4:
            raise UserError(f"transformer config: the width {self.width} must be divisible by 4.")
        if self.qk_norm not in (None, "rms_norm"):
            raise UserError(f"transformer config: qk_norm {self.qk_norm!r} is not supported; use null or 'rms_norm'.")
        strange = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if strange:
            raise UserError(
                f"transformer config: dual_attention_layers {strange} lie outside the {self.num_layers} layers."
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
        """Reads a ``transformer/config.json``.

        Raises:
          UserError: the file is another model's, or has a key or a value that this network does not know.
        """
        kind = config.get("_class_name", "SD3Transformer2DModel")
        if kind != "SD3Transformer2DModel":
            raise UserError(f"transformer config: expected a SD3Transformer2DModel, found a {kind}.")
        values = {k: v for k, v in config.items() if not k.startswith("_")}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"transformer config: unknown keys {unknown}; known are {sorted(known)}.")
        defaults = {"out_channels": values.get("in_channels", cls.in_channels), "dual_attention_layers": ()}
        values |= {k: d for k, d in defaults.items() if k in values and values[k] is None}
        if "dual_attention_layers" in values:
            values["dual_attention_layers"] = tuple(values["dual_attention_layers"])
        wrong = [f.name for f in dataclasses.fields(cls) if f.type is int and not _positive(values.get(f.name, 1))]
        if wrong:
            raise UserError(f"transformer config: {wrong[0]} is {values[wrong[0]]!r}, expected a positive integer.")
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads back as the same network."""
        values = dataclasses.asdict(self) | {"dual_attention_layers": list(self.dual_attention_layers)}
        return {"_class_name": "SD3Transformer2DModel", **values}


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def block_runs(num_layers: int, dual_layers: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Cuts blocks 0..num_layers-2 into runs ``(first, end, dual)`` of one kind; the last block stands apart."""
    runs: list[tuple[int, int, bool]] = []
    for i in range(num_layers - 1):
        dual = i in dual_layers
        if runs and runs[-1][2] == dual:
            runs[-1] = (runs[-1][0], i + 1, dual)
        else:
            runs.append((i, i + 1, dual))
    return runs


class MMDiT(nn.Module):
    """The denoiser: noisy latents, time and text to velocity ``eps - x0``.

    Attributes:
      config: the shape.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes of each block: see `dmdr_jax.models.remat.remat`.
      attention: what long sequences are attended to with.
    """

    config: MMDiTConfig
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
        lora_scale: LoraScale = None,
        key_bias: Array | None = None,
    ) -> Array:
        """Predicts the velocity.

        Args:
          latents: ``[b, h, w, c]``; h and w divisible by the patch size.
          timestep: ``[b]``, 0..1000 with 1000 = noise.
          prompt_embeds: text token features ``[b, n, joint_attention_dim]``.
          pooled: ``[b, pooled_projection_dim]``.
          lora_scale: a scalar or ``[b]``; 1 where a delta is given and this is None.
          key_bias: ``[n]``, added to the attention logits of the text tokens. The text stream has no positions, so m
            identical tokens are exactly one token with bias log m.

        Returns:
          ``[b, h, w, out_channels]``, at least fp32.

        Raises:
          UserError: the latents do not divide into patches or exceed the position table.
        """
        cfg = self.config
        _, h, w, _ = latents.shape
        x = PatchEmbed(cfg, self.dtype, name="pos_embed")(latents, lora_scale)
        temb = TimeTextEmbed(cfg.width, self.dtype, name="time_text_embed")(timestep, pooled, lora_scale)
        context = Dense(cfg.width, dtype=self.dtype, name="context_embedder")(prompt_embeds, lora_scale)
        # Every modulation in the network reads silu(temb).
        temb = nn.silu(temb)
        if key_bias is not None:
            key_bias = jnp.concatenate([jnp.zeros(x.shape[1], key_bias.dtype), key_bias])

        shared = (temb, lora_scale, key_bias)
        for first, end, dual in block_runs(cfg.num_layers, cfg.dual_attention_layers):
            scanned = nn.scan(
                remat(Block, self.remat, in_scan=True),
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=end - first,
            )
            name = f"transformer_blocks.{first}:{end}"
            (x, context), _ = scanned(cfg, self.dtype, self.attention, dual, name=name)((x, context), *shared)
        last = cfg.num_layers - 1
        block = remat(Block, self.remat, in_scan=False)
        name, dual = f"transformer_blocks.{last}", last in cfg.dual_attention_layers
        (x, _), _ = block(cfg, self.dtype, self.attention, dual, True, name=name)((x, context), *shared)

        x = AdaNorm(2, self.dtype, name="norm_out")(x, temb, lora_scale)[0]
        features = cfg.patch_size**2 * cfg.out_channels
        x = Dense(features, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out")(x, lora_scale)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        return unpatchify(x, h, w, cfg.patch_size)


class PatchEmbed(nn.Module):
    """Patches to tokens, plus the centre crop of a stored table of sine-cosine positions."""

    config: MMDiTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Array, lora_scale: LoraScale) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h w / p^2, d]``."""
        cfg = self.config
        p, size = cfg.patch_size, cfg.pos_embed_max_size
        b, h, w, _ = latents.shape
        if h % p or w % p:
            raise UserError(f"latents of {h} x {w} do not divide into patches of {p} x {p}; choose multiples of {p}.")
        h, w = h // p, w // p
        if max(h, w) > size:
            raise UserError(f"latents of {h * p} x {w * p} exceed the position table's {size * p} x {size * p}.")
        x = Conv(cfg.width, p, p, 0, dtype=self.dtype, name="proj")(latents, lora_scale)
        init = functools.partial(position_table, base=cfg.sample_size // p)
        table = self.param("pos_embed", lambda _, shape: init(size, shape[-1]), (1, size * size, cfg.width))
        top, left = (size - h) // 2, (size - w) // 2
        crop = jax.lax.stop_gradient(table.reshape(size, size, -1)[top : top + h, left : left + w])
        return (x + crop.astype(self.dtype)).reshape(b, h * w, cfg.width)


def position_table(size: int, width: int, base: int) -> Array:
    """Sine-cosine positions ``[1, size^2, width]`` fp32: half for the column, half for the row, in ``base`` cells."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    cells = (np.arange(size, dtype=np.float32) / np.float32(size / base)).astype(np.float64)
    angles = np.outer(cells, omega)
    line = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)
    shape = (size, size, width // 2)
    columns, rows = jnp.broadcast_to(line[None], shape), jnp.broadcast_to(line[:, None], shape)
    return jnp.concatenate([columns, rows], -1).reshape(1, size * size, width)


def unpatchify(x: Array, h: int, w: int, patch: int) -> Array:
    """Tokens ``[b, h w / p^2, p p c]`` to ``[b, h, w, c]``."""
    b = x.shape[0]
    x = x.reshape(b, h // patch, w // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


class TimeTextEmbed(nn.Module):
    """Sum of an embedded time and an embedded pooled text: ``[b, d]``."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, timestep: Array, pooled: Array, lora_scale: LoraScale) -> Array:
        time = timestep_embedding(timestep, _TIME_FEATURES)
        mlp = functools.partial(Mlp, self.width, self.dtype, ("linear_1", "linear_2"), nn.silu)
        return mlp(name="timestep_embedder")(time, lora_scale) + mlp(name="text_embedder")(pooled, lora_scale)


class Mlp(nn.Module):
    """Two dense layers; ``hidden`` is the output width where not given."""

    width: int
    dtype: jnp.dtype
    names: tuple[str, str]
    activation: Any
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: Array, lora_scale: LoraScale) -> Array:
        x = _dense(self.hidden or self.width, self.dtype, self.names[0])(x, lora_scale)
        return _dense(self.width, self.dtype, self.names[1])(self.activation(x), lora_scale)


class AdaNorm(nn.Module):
    """Layer norm whose shifts, scales and gates are linear in the conditioning (DiT's adaLN-Zero).

    Returns the modulated tokens followed by the remaining chunks ``[b, 1, d]`` in diffusers' order: with 2 chunks
    (scale, shift) nothing remains; with 6 (gate, shift_mlp, scale_mlp, gate_mlp); with 9 (the same four, the tokens
    modulated for the second attention, and its gate).
    """

    chunks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, silu_temb: Array, lora_scale: LoraScale) -> tuple[Array, ...]:
        init = nn.initializers.zeros
        linear = Dense(self.chunks * x.shape[-1], dtype=self.dtype, kernel_init=init, name="linear")
        parts = jnp.split(linear(silu_temb, lora_scale)[:, None], self.chunks, axis=-1)
        y = LayerNorm(_NORM_EPS, affine=False, dtype=self.dtype)(x)
        if self.chunks == 2:
            scale, shift = parts
            return (modulate(y, shift, scale),)
        attended = (modulate(y, parts[0], parts[1]), *parts[2:6])
        if self.chunks == 6:
            return attended
        return (*attended, modulate(y, parts[6], parts[7]), parts[8])


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """``x (1 + scale) + shift``."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """One joint transformer block over the image and the text stream (Esser et al. 2024, figure 2b).

    Attributes:
      dual: the image stream has a second attention over itself (SD3.5-Medium's MMDiT-X).
      last: the text stream ends here.
    """

    config: MMDiTConfig
    dtype: jnp.dtype
    attention: AttentionKernel = PLAIN
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], temb: Array, lora_scale: LoraScale, key_bias: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        """Maps (image tokens ``[b, n, d]``, text tokens ``[b, m, d]``) to the same; None is for scan."""
        x, context = streams
        width = self.config.width
        norm = functools.partial(AdaNorm, dtype=self.dtype)
        attend = functools.partial(Attention, self.config, self.dtype, self.attention)
        feed_forward = functools.partial(Mlp, width, self.dtype, ("net.0.proj", "net.2"), gelu_tanh, 4 * width)
        plain = LayerNorm(_NORM_EPS, affine=False, dtype=self.dtype)

        y, gate, shift, scale, mlp_gate, *second = norm(9 if self.dual else 6, name="norm1")(x, temb, lora_scale)
        z, *context_parts = norm(2 if self.last else 6, name="norm1_context")(context, temb, lora_scale)
        y, text_update = attend(last=self.last, name="attn")(y, z, lora_scale, key_bias)

        x = x + gate * y
        if self.dual:
            y, gate = second
            x = x + gate * attend(name="attn2")(y, None, lora_scale, None)[0]
        y = modulate(plain(x), shift, scale)
        x = x + mlp_gate * feed_forward(name="ff")(y, lora_scale)
        if text_update is None:
            return (x, context), None

        gate, shift, scale, mlp_gate = context_parts
        context = context + gate * text_update
        z = modulate(plain(context), shift, scale)
        return (x, context + mlp_gate * feed_forward(name="ff_context")(z, lora_scale)), None


class Attention(nn.Module):
    """Attention over the image tokens, or over image and text tokens together with projections of their own.

    Attributes:
      last: the text tokens are keys only; their queries' parameters exist in the checkpoint but act on nothing.
    """

    config: MMDiTConfig
    dtype: jnp.dtype
    kernel: AttentionKernel = PLAIN
    last: bool = False

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None, lora_scale: LoraScale, key_bias: Array | None
    ) -> tuple[Array, Array | None]:
        """Maps ``[b, n, d]`` and ``[b, m, d]`` to their updates, the second None without text or in the last block."""
        q, k, v = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), lora_scale)
        if context is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            text_q, text_k, text_v = self._project(context, *names, lora_scale)
            q = q if self.last else jnp.concatenate([q, text_q], axis=1)
            k, v = jnp.concatenate([k, text_k], axis=1), jnp.concatenate([v, text_v], axis=1)
        y = merge_heads(attention(q, k, v, key_bias=key_bias, kernel=self.kernel))

        n = x.shape[1]
        out = _dense(self.config.width, self.dtype, "to_out.0")(y[:, :n], lora_scale)
        if context is None or self.last:
            return out, None
        return out, _dense(self.config.width, self.dtype, "to_add_out")(y[:, n:], lora_scale)

    def _project(self, x: Array, names: tuple[str, ...], norms: tuple[str, ...], lora_scale: LoraScale) -> list[Array]:
        """Queries, keys and values ``[b, n, k, d]``, the first two normalised where the network does so."""
        cfg = self.config
        qkv = [split_heads(_dense(cfg.width, self.dtype, n)(x, lora_scale), cfg.num_attention_heads) for n in names]
        if cfg.qk_norm == "rms_norm":
            for i, name in enumerate(norms):
                qkv[i] = RMSNorm(_NORM_EPS, dtype=self.dtype, name=name)(qkv[i])
        return qkv


def _dense(features: int, dtype: jnp.dtype, name: str) -> Dense:
    """A dense layer initialised as DiT's (Peebles & Xie 2023). Made inside the module that calls it."""
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)
