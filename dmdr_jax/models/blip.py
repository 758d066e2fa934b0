"""ImageReward's network (Xu et al. 2023, arXiv 2304.05977): BLIP (Li et al. 2022) with a head that scores.

An image transformer in timm's layout, a BERT whose every layer attends to the image's tokens, and five linear
layers without activation on the state of the first text token. Parameter names are those of `ImageReward.pt`;
`blip.vision_proj` and `blip.text_proj`, which that file holds too, have no part in the score.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import attention, merge_heads, split_heads
from dmdr_jax.models.layers import Conv, Dense, Embed, LayerNorm, gelu_exact

Array = jax.Array

# What a masked token's logit loses, as BERT has it.
_MASKED = -10000.0


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Sizes of the image tower, of the text tower and of the head; the defaults are ImageReward's.

    Attributes:
      head_widths: outputs of the head's layers.
      head_names: their numbers in the file, where dropouts lie between them.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_hidden: int = 4096
    vision_eps: float = 1e-6
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    text_eps: float = 1e-12
    vocab_size: int = 30524
    max_positions: int = 512
    head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1)
    head_names: tuple[int, ...] = (0, 2, 4, 6, 7)

    def __post_init__(self) -> None:
        for name, width, heads in (
            ("image", self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise UserError(f"BLIP: the {name} tower's width {width} is not divisible by its {heads} heads.")


class VisionBlock(nn.Module):
    """A pre-norm transformer layer with joint q, k, v, as the body of a scan."""

    config: BlipConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        """Maps tokens ``[b, n, d]`` to tokens."""
        cfg = self.config
        x = x + self._attend(self._norm("norm1")(x))
        y = gelu_exact(Dense(cfg.vision_hidden, dtype=self.dtype, name="mlp.fc1")(self._norm("norm2")(x)))
        return x + Dense(cfg.vision_width, dtype=self.dtype, name="mlp.fc2")(y), None

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.vision_eps, dtype=self.dtype, name=name)

    def _attend(self, x: Array) -> Array:
        width, heads = self.config.vision_width, self.config.vision_heads
        joint = Dense(3 * width, dtype=self.dtype, name="attn.qkv")(x)
        q, k, v = (split_heads(part, heads) for part in jnp.split(joint, 3, axis=-1))
        return Dense(width, dtype=self.dtype, name="attn.proj")(merge_heads(attention(q, k, v)))


class VisionTransformer(nn.Module):
    """Pixels to tokens."""

    config: BlipConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Maps normalised pixels ``[b, size, size, 3]`` to tokens ``[b, 1 + patches, d]``, class token first."""
        cfg = self.config
        b, side, width = pixels.shape[0], cfg.image_size, cfg.vision_width
        if pixels.shape[1:3] != (side, side):
            raise UserError(f"BLIP: images are {pixels.shape[1]} x {pixels.shape[2]}, resize them to {side} x {side}.")
        patches = Conv(
            width, cfg.patch_size, stride=cfg.patch_size, padding=0, dtype=self.dtype, name="patch_embed.proj"
        )(pixels).reshape(b, -1, width)
        init = nn.initializers.normal(0.02)
        token = self.param("cls_token", init, (1, 1, width), jnp.float32).astype(self.dtype)
        positions = self.param("pos_embed", init, (1, patches.shape[1] + 1, width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, width)), patches], axis=1) + positions.astype(self.dtype)
        x = _scan(VisionBlock, cfg.vision_layers, self.remat)(cfg, self.dtype, name=f"blocks.0:{cfg.vision_layers}")(x)[
            0
        ]
        return LayerNorm(cfg.vision_eps, dtype=self.dtype, name="norm")(x)


class TextLayer(nn.Module):
    """A post-norm BERT layer with attention to the image between self-attention and feed-forward, as a scan's body.

    What flows from layer to layer stays in at least fp32; products are in ``dtype``.
    """

    config: BlipConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, image: Array, key_bias: Array) -> tuple[Array, None]:
        """Maps text tokens ``[b, n, d]`` to text tokens, given image tokens ``[b, m, c]`` and a bias ``[b, n]``."""
        cfg = self.config
        x = self._attend("attention", x, x, key_bias)
        x = self._attend("crossattention", x, image, None)
        y = gelu_exact(Dense(cfg.text_hidden, dtype=self.dtype, name="intermediate.dense")(x))
        return self._add_and_norm("output", x, y), None

    def _attend(self, name: str, x: Array, seen: Array, key_bias: Array | None) -> Array:
        def project(part: str, of: Array) -> Array:
            dense = Dense(self.config.text_width, dtype=self.dtype, name=f"{name}.self.{part}")
            return split_heads(dense(of), self.config.text_heads)

        y = attention(project("query", x), project("key", seen), project("value", seen), key_bias=key_bias)
        return self._add_and_norm(f"{name}.output", x, merge_heads(y))

    def _add_and_norm(self, name: str, x: Array, y: Array) -> Array:
        y = Dense(self.config.text_width, dtype=self.dtype, name=f"{name}.dense")(y)
        return LayerNorm(self.config.text_eps, dtype=_wide(self.dtype), name=f"{name}.LayerNorm")(x + y)


class TextEncoder(nn.Module):
    """BERT without token types, which reads an image along with its text."""

    config: BlipConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, ids: Array, mask: Array, image: Array) -> Array:
        """Maps ids ``[b, n]``, their mask (1 for a token, 0 for padding) and image tokens to states ``[b, n, d]``."""
        cfg, n, wide = self.config, ids.shape[1], _wide(self.dtype)
        if n > cfg.max_positions:
            raise UserError(
                f"BLIP: prompts of {n} tokens were given, but the encoder has {cfg.max_positions} positions."
            )
        words = Embed(cfg.vocab_size, cfg.text_width, wide, name="embeddings.word_embeddings")(ids)
        positions = Embed(cfg.max_positions, cfg.text_width, wide, name="embeddings.position_embeddings")(jnp.arange(n))
        x = LayerNorm(cfg.text_eps, dtype=wide, name="embeddings.LayerNorm")(words + positions)
        key_bias = (1.0 - mask.astype(jnp.float32)) * _MASKED
        layers = _scan(TextLayer, cfg.text_layers, self.remat, inputs=2)
        return layers(cfg, self.dtype, name=f"encoder.layer.0:{cfg.text_layers}")(x, image, key_bias)[0]


class ImageRewardModel(nn.Module):
    """The whole scorer up to its published mean and standard deviation.

    ``remat`` recomputes the layers of both towers in the backward pass.
    """

    config: BlipConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Array, ids: Array, mask: Array) -> Array:
        """Scores ``[b]``, at least fp32, of pixels ``[b, size, size, 3]`` with token ids ``[b, n]`` and their mask."""
        image = VisionTransformer(self.config, self.dtype, self.remat, name="blip.visual_encoder")(pixels)
        text = TextEncoder(self.config, self.dtype, self.remat, name="blip.text_encoder")(ids, mask, image)
        return LinearHead(self.config.head_widths, self.config.head_names, _wide(self.dtype), name="mlp")(text[:, 0])


class LinearHead(nn.Module):
    """Linear layers one after the other, without activation between them: LAION's and ImageReward's head.

    Attributes:
      widths: outputs of the layers; the last is 1.
      names: their numbers in the published file, ``layers.N``.
    """

    widths: tuple[int, ...] = (1024, 128, 64, 16, 1)
    names: tuple[int, ...] = (0, 2, 4, 6, 7)
    dtype: jnp.dtype = jnp.float32
    relu: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps features ``[b, d]`` to numbers ``[b]``; products are exact on accelerators too."""
        with jax.default_matmul_precision("highest"):
            for i, (width, name) in enumerate(zip(self.widths, self.names, strict=True)):
                x = nn.relu(x) if self.relu and i else x
                x = Dense(width, dtype=self.dtype, name=f"layers.{name}")(x)
        return x[:, 0]


def patches_of(tokens: int) -> int:
    """The side of the square of patches that ``tokens`` positions (class token included) stand for, or 0."""
    side = math.isqrt(max(tokens - 1, 0))
    return side if side * side == tokens - 1 else 0


def _scan(layer: type[nn.Module], count: int, remat: bool, inputs: int = 0) -> type[nn.Module]:
    """``count`` layers with stacked parameters; ``inputs`` arguments are the same for all."""
    layer = nn.remat(layer, prevent_cse=False) if remat else layer
    broadcast = (nn.broadcast,) * inputs
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=broadcast, length=count)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
