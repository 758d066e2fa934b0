"""The networks of a pipeline folder: from a ``config.json`` to a Linen module and its parameter shapes.

A family is an entry in `FAMILIES` and the builders of its classes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError

Config = dict[str, Any]


MAX_SEQUENCE_LENGTH = 256
"""Tokens of SD3's T5, as diffusers' pipeline has it by default."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a kind of pipeline consists of.

    Attributes:
      name: how this project calls it.
      pipeline_class: ``_class_name`` in diffusers' ``model_index.json``.
      classes: component, its library and its class, in the order in which they are loaded.
      tokenizers: the tokenizer of each text encoder.
      denoiser: the component that is distilled.
      scheduler: class of the scheduler in a folder written from scratch.
      steps, guidance: what diffusers' pipeline draws with by default.
      settings: other keys of ``model_index.json`` in a folder written from scratch.
      optional: components that a pipeline may lack.
    """

    name: str
    pipeline_class: str
    classes: Mapping[str, tuple[str, str]]
    tokenizers: Mapping[str, str]
    denoiser: str
    scheduler: str
    steps: int
    guidance: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()


SD3 = Family(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    classes={
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel"),
    },
    tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"},
    denoiser="transformer",
    scheduler="FlowMatchEulerDiscreteScheduler",
    steps=28,
    guidance=7.0,
    optional=("text_encoder_3",),
)

SDXL = Family(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    classes={
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    },
    tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    denoiser="unet",
    scheduler="EulerDiscreteScheduler",
    steps=50,
    guidance=5.0,
    settings={"force_zeros_for_empty_prompt": True, "image_encoder": [None, None], "feature_extractor": [None, None]},
)

FAMILIES = {family.pipeline_class: family for family in (SD3, SDXL)}


def denoiser_of(components: Mapping[str, Any]) -> str:
    """Which of a pipeline's components (by name) is the denoiser."""
    return next(family.denoiser for family in FAMILIES.values() if family.denoiser in components)


def read_json(file: str | Path) -> Config:
    """A JSON object; UserError if the file is absent, damaged or something else."""
    file = Path(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(value).__name__}.")
    return value


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a ``config.json`` of diffusers or transformers was written by."""
    architectures = config.get("architectures") or [None]
    return config.get("_class_name") or architectures[0]


def build_module(class_name: str, config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The Linen module of a diffusers or transformers class, computing in ``dtype``.

    Raises:
      UserError: no such class here, or a setting that its network does not have.
    """
    if class_name not in _BUILDERS:
        raise UserError(f"the network {class_name} is not known here; known are {', '.join(_BUILDERS)}.")
    return _BUILDERS[class_name][0](config, dtype)


def abstract_params(class_name: str, module: nn.Module) -> Any:
    """The parameter tree of such a module as ``jax.ShapeDtypeStruct``; costs no memory."""
    return jax.tree.map(lambda leaf: leaf, _traced_params(class_name, module))


@functools.lru_cache(maxsize=16)
def _traced_params(class_name: str, module: nn.Module) -> Any:
    """Kept, as tracing a network takes about a second; its callers get copies."""
    return keymap.abstract(module, *_BUILDERS[class_name][1](module.config))


def buffers(class_name: str, module: nn.Module) -> dict[str, Callable[[], Any]]:
    """What a checkpoint of such a network may lack, as it follows from the config: tensors by key, to be computed."""
    if class_name != "SD3Transformer2DModel":
        return {}
    from dmdr_jax.models.mmdit import position_table

    c = module.config
    return {"pos_embed.pos_embed": lambda: position_table(c.pos_embed_max_size, c.width, c.sample_size // c.patch_size)}


def init_params(class_name: str, module: nn.Module, key: jax.Array) -> Any:
    """A freshly initialised parameter tree, for networks that are trained from scratch."""
    inputs = [jnp.zeros(a.shape, a.dtype) for a in _BUILDERS[class_name][1](module.config)]
    return module.init(key, *inputs)["params"]


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _mmdit(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.mmdit import MMDiT, MMDiTConfig

    return MMDiT(MMDiTConfig.from_diffusers(config), dtype)


def _mmdit_inputs(c: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    latents = _array(1, c.patch_size, c.patch_size, c.in_channels)
    return latents, _array(1), _array(1, 1, c.joint_attention_dim), _array(1, c.pooled_projection_dim)


def _unet(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.unet import UNet2DCondition
    from dmdr_jax.models.unet_config import UNetConfig

    return UNet2DCondition(UNetConfig.from_diffusers(config), dtype)


def _unet_inputs(c: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    from dmdr_jax.models.unet_config import TIME_IDS

    side = 2 ** (len(c.block_out_channels) - 1)
    latents = _array(1, side, side, c.in_channels)
    return latents, _array(1), _array(1, 1, c.cross_attention_dim), _array(1, c.pooled_dim), _array(1, TIME_IDS)


def _vae(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig

    shape = AutoencoderKLConfig.from_diffusers(config)
    return AutoencoderKL(shape, jnp.float32 if shape.force_upcast and dtype == jnp.float16 else dtype)


def _vae_inputs(c: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (_array(1, c.downsampling, c.downsampling, 3),)


def _tiny_vae(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig

    return AutoencoderTiny(AutoencoderTinyConfig.from_diffusers(config), dtype)


def _clip(class_name: str, config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.clip import ClipTextConfig, ClipTextModel

    # The place in the pipeline says whether there is a projection, also where the file does not.
    return ClipTextModel(ClipTextConfig.from_diffusers({**config, "architectures": [class_name]}), dtype)


def _t5(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    from dmdr_jax.models.t5 import T5Config, T5Encoder

    return T5Encoder(T5Config.from_diffusers(config), dtype)


def _token_inputs(_: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (_array(1, 2, dtype=jnp.int32),)


# Class name to (module from config, shapes of its inputs from its config).
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]]] = {
    "SD3Transformer2DModel": (_mmdit, _mmdit_inputs),
    "UNet2DConditionModel": (_unet, _unet_inputs),
    "AutoencoderKL": (_vae, _vae_inputs),
    "AutoencoderTiny": (_tiny_vae, _vae_inputs),
    "CLIPTextModel": (functools.partial(_clip, "CLIPTextModel"), _token_inputs),
    "CLIPTextModelWithProjection": (functools.partial(_clip, "CLIPTextModelWithProjection"), _token_inputs),
    "T5EncoderModel": (_t5, _token_inputs),
}
