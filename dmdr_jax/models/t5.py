"""The T5 v1.1 encoder (Raffel et al. 2020; Shazeer 2020 for the gated units) as transformers publishes it.

SD3 gives it padded prompts without an attention mask, so there is none here. Attention logits are not
scaled; positions enter through one table of relative biases that the first block owns and all blocks use.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import attention, merge_heads, split_heads
from dmdr_jax.models.layers import Dense, Embed, RMSNorm, gelu_tanh

Array = jax.Array

_FEED_FORWARD = "gated-gelu"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of the encoder; names and defaults are transformers'."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads ``text_encoder_3/config.json``; raises UserError if it is not T5 v1.1."""
        feed_forward = config.get("feed_forward_proj", "relu")
        if feed_forward != _FEED_FORWARD:
            raise UserError(
                f"T5 config: feed_forward_proj {feed_forward!r} is not supported, only {_FEED_FORWARD!r} is."
            )
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads back as the same network."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": _FEED_FORWARD,
            "tie_word_embeddings": False,
            **dataclasses.asdict(self),
        }


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, ``[n, n]`` integers.

    Half of the buckets are for keys after the query. In each half the first half is one bucket per
    distance, the rest grow geometrically to ``max_distance``, beyond which all distances share the last.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # In fp32 as in transformers: at bucket edges the rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)


class T5Block(nn.Module):
    """Self-attention and a gated feed-forward layer, each pre-normed with a residual, as the body of a scan."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> tuple[Array, None]:
        """Maps ``[b, n, d]`` to itself; ``bias`` ``[1, k, n, n]`` is added to the attention logits."""
        x = x + self._attend(self._norm("layer.0.layer_norm", x), bias)
        return x + self._feed_forward(self._norm("layer.1.layer_norm", x)), None

    def _norm(self, name: str, x: Array) -> Array:
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, name=name)(x)

    def _linear(self, name: str, features: int, x: Array) -> Array:
        return Dense(features, use_bias=False, dtype=self.dtype, name=name)(x)

    def _attend(self, x: Array, bias: Array) -> Array:
        heads = self.config.num_heads
        inner = heads * self.config.d_kv
        q, k, v = (split_heads(self._linear(f"layer.0.SelfAttention.{name}", inner, x), heads) for name in "qkv")
        y = merge_heads(attention(q, k, v, bias=bias, scale=1.0))
        return self._linear("layer.0.SelfAttention.o", self.config.d_model, y)

    def _feed_forward(self, x: Array) -> Array:
        gate = gelu_tanh(self._linear("layer.1.DenseReluDense.wi_0", self.config.d_ff, x))
        y = gate * self._linear("layer.1.DenseReluDense.wi_1", self.config.d_ff, x)
        return self._linear("layer.1.DenseReluDense.wo", self.config.d_model, y)


class T5Encoder(nn.Module):
    """transformers' ``T5EncoderModel``; checkpoints may repeat ``shared`` as ``encoder.embed_tokens``."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Encodes ids ``[b, n]`` as ``[b, n, d]``, in at least fp32."""
        cfg = self.config
        x = Embed(cfg.vocab_size, cfg.d_model, self.dtype, name="shared")(ids)
        buckets = relative_buckets(
            ids.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        )
        wide = jnp.promote_types(self.dtype, jnp.float32)
        bias = Embed(
            cfg.relative_attention_num_buckets,
            cfg.num_heads,
            wide,
            name="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        )(buckets)
        scan = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )
        blocks = scan(cfg, self.dtype, name=f"encoder.block.0:{cfg.num_layers}")
        x, _ = blocks(x, bias.transpose(2, 0, 1)[None])
        return RMSNorm(cfg.layer_norm_epsilon, wide, name="encoder.final_layer_norm")(x)
