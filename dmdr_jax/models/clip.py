"""CLIP's text and image towers (Radford et al. 2021) as transformers publishes them.

`ClipTextModel` conditions SD3 and SDXL, `Clip` scores images (PickScore, HPSv2.1, DFN-CLIP), `ClipVisionModel` is an
image tower alone. open_clip's towers are the same networks under other names (`dmdr_jax.rewards.clip_files`).
Layers repeat, so each tower scans one layer over stacked parameters. Towers compute in ``dtype``; last norms and
projections, small and read by scores, are in at least fp32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import attention, merge_heads, split_heads
from dmdr_jax.models.layers import Conv, Dense, Embed, LayerNorm, gelu_exact, gelu_tanh, quick_gelu

Array = jax.Array
TowerT = TypeVar("TowerT", bound="ClipTowerConfig")

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu_exact, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
# The eos_token_id of configs written before transformers fixed it; the end of text is then the largest id.
_LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipTowerConfig:
    """What both towers have; names and defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    with_projection: bool = True

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"CLIP config: hidden_act {self.hidden_act!r} is not supported; known are {known}.")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"CLIP config: hidden_size {self.hidden_size} is not divisible by"
                f" num_attention_heads {self.num_attention_heads}."
            )

    @classmethod
    def from_diffusers(cls: type[TowerT], config: Mapping[str, Any]) -> TowerT:
        """Reads the ``config.json`` of a text encoder or image encoder folder.

        A key that is absent takes transformers' default. The tower has a projection if ``architectures`` says so.

        Raises:
          UserError: a setting is not supported.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        architectures = config.get("architectures") or []
        values["with_projection"] = any("WithProjection" in name for name in architectures)
        return cls(**values)

    def _to_json(self, name: str, model_type: str) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        suffix = "WithProjection" if values.pop("with_projection") else ""
        return {"architectures": [name + suffix], "model_type": model_type, **values}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(ClipTowerConfig):
    """The text tower; transformers' ``CLIPTextConfig``."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads back as the same network."""
        return self._to_json("CLIPTextModel", "clip_text_model")


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(ClipTowerConfig):
    """The image tower; transformers' ``CLIPVisionConfig``."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.num_channels != 3:
            raise UserError(
                f"CLIP config: num_channels is {self.num_channels}; only images of 3 channels are supported."
            )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads back as the same network."""
        return self._to_json("CLIPVisionModel", "clip_vision_model")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers and their common space; transformers' ``CLIPConfig``."""

    text: ClipTextConfig = ClipTextConfig()
    vision: ClipVisionConfig = ClipVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """Reads a ``config.json`` of model type ``clip``; raises UserError on a setting that is not supported."""
        return cls(
            # Older files repeat a tower under "<tower>_config_dict", which transformers lets win.
            text=ClipTextConfig.from_diffusers(config.get("text_config_dict") or config.get("text_config") or {}),
            vision=ClipVisionConfig.from_diffusers(
                config.get("vision_config_dict") or config.get("vision_config") or {}
            ),
            projection_dim=config.get("projection_dim", cls.projection_dim),
            logit_scale_init_value=config.get("logit_scale_init_value", cls.logit_scale_init_value),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads back as the same network."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": self.text.to_diffusers(),
            "vision_config": self.vision.to_diffusers(),
        }


@flax.struct.dataclass
class ClipTextOutput:
    """What a text tower says of ``[b, n]`` ids.

    Attributes:
      penultimate: input of the last layer, ``[b, n, d]``; what SD3 and SDXL condition on.
      last: output of the last layer after the final norm, ``[b, n, d]``.
      pooled: ``last`` at the end of text, ``[b, d]``.
      projected: ``pooled`` in the space shared with images, ``[b, p]``, or None for a tower without projection.
    """

    penultimate: Array
    last: Array
    pooled: Array
    projected: Array | None


@flax.struct.dataclass
class ClipVisionOutput:
    """What an image tower says of a batch of images.

    Attributes:
      last: output of the last layer, class token first, ``[b, 1 + patches, d]``.
      pooled: the class token after the last norm, ``[b, d]``.
      projected: ``pooled`` in the space shared with texts, ``[b, p]``, or None for a tower without projection.
    """

    last: Array
    pooled: Array
    projected: Array | None


class ClipLayer(nn.Module):
    """A pre-norm transformer layer, as the body of a scan that also carries the previous hidden state."""

    config: ClipTowerConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        """Maps ``(x, _)`` to ``(y, x)``, each ``[b, n, d]``."""
        before, _ = carry
        x = before + self._attend(self._norm("layer_norm1", before))
        y = Dense(self.config.intermediate_size, dtype=self.dtype, name="mlp.fc1")(self._norm("layer_norm2", x))
        y = ACTIVATIONS[self.config.hidden_act](y)
        x = x + Dense(self.config.hidden_size, dtype=self.dtype, name="mlp.fc2")(y)
        return (x, before), None

    def _norm(self, name: str, x: Array) -> Array:
        return LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name=name)(x)

    def _attend(self, x: Array) -> Array:
        def project(name: str, x: Array) -> Array:
            return Dense(self.config.hidden_size, dtype=self.dtype, name=f"self_attn.{name}")(x)

        heads = self.config.num_attention_heads
        q, k, v = (split_heads(project(name, x), heads) for name in ("q_proj", "k_proj", "v_proj"))
        return project("out_proj", merge_heads(attention(q, k, v, causal=self.causal)))


def _run_layers(x: Array, config: ClipTowerConfig, causal: bool, dtype: jnp.dtype, remat: bool) -> tuple[Array, Array]:
    """All layers of a tower (called inside a compact method): the output and the input of the last one."""
    layer = nn.remat(ClipLayer, prevent_cse=False) if remat else ClipLayer
    depth = config.num_hidden_layers
    scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
    carry, _ = scan(config, causal, dtype, name=f"encoder.layers.0:{depth}")((x, x))
    return carry


class TextTower(nn.Module):
    """Tokens to hidden states, without projection."""

    config: ClipTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids: Array) -> tuple[Array, Array, Array]:
        """Maps ids ``[b, n]`` to the penultimate and last hidden states ``[b, n, d]`` and the pooled one ``[b, d]``."""
        cfg = self.config
        n, longest = ids.shape[-1], cfg.max_position_embeddings
        if n > longest:
            raise UserError(f"CLIP text: prompts of {n} tokens were given, but the encoder has {longest} positions.")
        x = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype, name="embeddings.token_embedding")(ids)
        positions = Embed(longest, cfg.hidden_size, self.dtype, name="embeddings.position_embedding")(jnp.arange(n))
        x, penultimate = _run_layers(x + positions, cfg, causal=True, dtype=self.dtype, remat=False)
        last = LayerNorm(cfg.layer_norm_eps, dtype=_wide(self.dtype), name="final_layer_norm")(x)
        return penultimate, last, last[jnp.arange(ids.shape[0]), end_of_text(ids, cfg.eos_token_id)]


class VisionTower(nn.Module):
    """Pixels to hidden states, without projection."""

    config: ClipVisionConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Array) -> tuple[Array, Array]:
        """Maps pixels ``[b, h, w, 3]`` to hidden states ``[b, 1 + patches, d]`` and the pooled one ``[b, d]``."""
        cfg = self.config
        b, width, side = pixels.shape[0], cfg.hidden_size, cfg.image_size
        if pixels.shape[1:3] != (side, side):
            raise UserError(
                f"CLIP vision: images are {pixels.shape[1]} x {pixels.shape[2]}, resize them to {side} x {side}."
            )
        patches = Conv(
            width,
            kernel_size=cfg.patch_size,
            stride=cfg.patch_size,
            padding=0,
            use_bias=False,
            dtype=self.dtype,
            name="embeddings.patch_embedding",
        )(pixels).reshape(b, -1, width)
        token = self.param("embeddings.class_embedding", nn.initializers.normal(width**-0.5), (width,), jnp.float32)
        token = jnp.broadcast_to(token.astype(self.dtype), (b, 1, width))
        x = jnp.concatenate([token, patches], axis=1)
        n = x.shape[1]
        x = x + Embed(n, width, self.dtype, name="embeddings.position_embedding")(jnp.arange(n))
        # The missing letter is the published name.
        x = LayerNorm(cfg.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(x)
        last, _ = _run_layers(x, cfg, causal=False, dtype=self.dtype, remat=self.remat)
        pooled = LayerNorm(cfg.layer_norm_eps, dtype=_wide(self.dtype), name="post_layernorm")(last[:, 0])
        return last, pooled


class ClipTextModel(nn.Module):
    """transformers' ``CLIPTextModel`` or, if ``config.with_projection``, ``CLIPTextModelWithProjection``."""

    config: ClipTextConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.text_model = TextTower(self.config, self.dtype)
        if self.config.with_projection:
            self.text_projection = _projection(self.config.projection_dim, self.dtype)

    def __call__(self, ids: Array) -> ClipTextOutput:
        """Encodes ids ``[b, n]``, n at most ``max_position_embeddings``."""
        penultimate, last, pooled = self.text_model(ids)
        projected = _exactly(self.text_projection, pooled) if self.config.with_projection else None
        return ClipTextOutput(penultimate, last, pooled, projected)


class ClipVisionModel(nn.Module):
    """transformers' ``CLIPVisionModel`` or, if ``config.with_projection``, ``CLIPVisionModelWithProjection``."""

    config: ClipVisionConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.vision_model = VisionTower(self.config, self.dtype, self.remat)
        if self.config.with_projection:
            self.visual_projection = _projection(self.config.projection_dim, self.dtype)

    def __call__(self, pixels: Array) -> ClipVisionOutput:
        """Encodes pixels ``[b, h, w, 3]``, already of the tower's size and normalised."""
        last, pooled = self.vision_model(pixels)
        projected = _exactly(self.visual_projection, pooled) if self.config.with_projection else None
        return ClipVisionOutput(last, pooled, projected)


class Clip(nn.Module):
    """transformers' ``CLIPModel``: both towers, their projections and the logit scale.

    ``init`` through ``__call__``; one tower through ``method="encode_text"`` or ``method="encode_image"``.
    ``remat`` recomputes the image tower's layers in the backward pass.
    """

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        self.text_model = TextTower(self.config.text, self.dtype)
        self.vision_model = VisionTower(self.config.vision, self.dtype, self.remat)
        self.text_projection = _projection(self.config.projection_dim, self.dtype)
        self.visual_projection = _projection(self.config.projection_dim, self.dtype)
        init = nn.initializers.constant(self.config.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

    def encode_text(self, ids: Array) -> Array:
        """Text embeddings ``[b, p]`` of ids ``[b, n]``, not normalised."""
        return _exactly(self.text_projection, self.text_model(ids)[2])

    def encode_image(self, pixels: Array) -> Array:
        """Image embeddings ``[b, p]`` of pixels ``[b, h, w, 3]`` (resized and normalised), not normalised."""
        return _exactly(self.visual_projection, self.vision_model(pixels)[1])

    def __call__(self, ids: Array, pixels: Array) -> Array:
        """``exp(logit_scale)`` times the cosine of every image with every text, ``[images, texts]``."""
        text, image = normalise(self.encode_text(ids)), normalise(self.encode_image(pixels))
        return jnp.exp(self.logit_scale) * image @ text.T


def normalise(x: Array) -> Array:
    """Rows of unit length."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def end_of_text(ids: Array, eos_token_id: int) -> Array:
    """Position ``[b]`` of the token that is pooled, by transformers' rule for ids ``[b, n]``.

    It is the first ``eos_token_id``, except that a config that says 2 means the first largest id.
    """
    if eos_token_id == _LEGACY_EOS:
        return ids.argmax(axis=-1)
    return (ids == eos_token_id).argmax(axis=-1)


def _projection(features: int, dtype: jnp.dtype) -> Dense:
    return Dense(features, use_bias=False, dtype=_wide(dtype))


def _exactly(projection: Dense, x: Array) -> Array:
    """``projection(x)`` with products in fp32, which accelerators otherwise round to bf16 or tf32."""
    with jax.default_matmul_precision("highest"):
        return projection(x)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
