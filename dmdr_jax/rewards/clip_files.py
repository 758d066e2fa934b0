"""Published CLIP weights: their names, and the architecture they are of.

Two families of names are in use: transformers' `CLIPModel`, which are this project's own, and open_clip's (which
are OpenAI's), which DFN, LAION and HPSv2 publish. What no file says is the number of heads and the activation: the
first follows from the width, the second from the config beside the weights or from who published them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmdr_jax.diffusers_io.components import read_json
from dmdr_jax.errors import UserError
from dmdr_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from dmdr_jax.rewards.lazy_tensor import LazyTensor
from dmdr_jax.rewards.weights import Tensors, open_weights

HF_CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR = "config.json", "open_clip_config.json", "preprocessor_config.json"

HEAD_WIDTH = 64
# Image towers whose heads are wider: 80 (H/14), 88 (g/14), 104 (bigG/14), 112 (e/14), sixteen heads each.
_VISION_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}
# open_clip pools the largest token id, which transformers writes so.
_ARGMAX_EOS = 2

_OPEN_CLIP_MARKS = ("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding")
_OTHER_TOWERS = ("visual.trunk.", "visual.attn_pool", "visual.layer1.", "text.transformer.embeddings.")
# Buffers and settings that lie between the weights.
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_OPENAI_MARK = "input_resolution"

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a name such as open_clip's ViT-H-14 stands for: widths to check, heads to use."""

    vision_width: int
    vision_heads: int
    text_width: int
    text_heads: int


ARCHITECTURES = {
    "ViT-B-32": Architecture(768, 12, 512, 8),
    "ViT-B-16": Architecture(768, 12, 512, 8),
    "ViT-L-14": Architecture(1024, 16, 768, 12),
    "ViT-L-14-336": Architecture(1024, 16, 768, 12),
    "ViT-H-14": Architecture(1280, 16, 1024, 16),
    "ViT-H-14-378": Architecture(1280, 16, 1024, 16),
    "ViT-g-14": Architecture(1408, 16, 1024, 16),
    "ViT-bigG-14": Architecture(1664, 16, 1280, 20),
}
QUICK_GELU_SUFFIX = "-quickgelu"


@dataclasses.dataclass(frozen=True)
class ClipFile:
    """Published CLIP weights, not read yet.

    Attributes:
      source: where they lie, for messages.
      tensors: under transformers' names.
      config: of the network.
      preprocessing: `image_mean`, `image_std` and what else a config says of it.
      open_clip: whether they have open_clip's names.
    """

    source: Path
    tensors: Tensors
    config: ClipConfig
    preprocessing: Mapping[str, Any]
    open_clip: bool


def open_clip_file(path: str | Path, *, arch: str = "", activation: str = "", usual: str = "gelu") -> ClipFile:
    """Opens CLIP weights and works out the network they belong to.

    Args:
      path: a folder of transformers (`config.json`) or of open_clip (`open_clip_config.json`), or a weight file alone.
      arch: a name of `ARCHITECTURES`, also with open_clip's "-quickgelu"; "" infers it from config and shapes.
      activation: "gelu" or "quick_gelu", whatever the files say; "" believes them.
      usual: the activation where no file says it.

    Raises:
      UserError: nothing readable there, or a network that is no CLIP of two plain transformers.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    settings = _hf_settings(folder) if path.is_dir() else None
    tensors = open_weights(path)
    from_open_clip = any(mark in tensors for mark in _OPEN_CLIP_MARKS)
    if from_open_clip:
        described = path.is_dir() or path.name.startswith("open_clip")
        config_file = folder / OPEN_CLIP_CONFIG
        open_clip = read_json(config_file) if described and config_file.is_file() else {}
        usual = _usual_activation(path, tensors, usual)
        tensors = transformers_names(tensors, path)
        config = _open_clip_config(tensors, open_clip.get("model_cfg", {}), path, arch, usual)
        preprocessing = _open_clip_preprocessing(open_clip.get("preprocess_cfg", {}), config_file)
    else:
        if settings is None:
            settings = _hf_settings(folder)
        config = _infer(tensors, path, arch, usual) if settings is None else ClipConfig.from_diffusers(settings)
        preprocessing = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    if arch.endswith(QUICK_GELU_SUFFIX):
        activation = activation or "quick_gelu"
    return ClipFile(path, tensors, with_activation(config, activation), preprocessing, from_open_clip)


def with_activation(config: ClipConfig, activation: str) -> ClipConfig:
    """The config with another activation in both towers; unchanged for ""."""
    if not activation:
        return config
    vision = dataclasses.replace(config.vision, hidden_act=activation)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, hidden_act=activation), vision=vision)


def transformers_names(tensors: Mapping[str, LazyTensor], source: Any = "the file") -> Tensors:
    """open_clip's tensors under transformers' names, in transformers' layout.

    Joint q, k, v projections are parted, the two final projections transposed. A name that is not known stays.

    Raises:
      UserError: a tower that is no plain transformer (timm's, a ResNet, attention pooling, a text tower of others).
    """
    strange = [name for name in tensors if name.startswith(_OTHER_TOWERS)]
    if strange:
        raise UserError(
            f"{source} holds {strange[0]!r}: its towers are not the plain transformers of CLIP (ViT-B, L, H, g, bigG); "
            "use a CLIP with such towers."
        )
    found: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")  # of open_clip's CustomTextCLIP
        block = _BLOCK.fullmatch(name)
        if name in _NO_WEIGHTS:
            continue
        if block:
            tower = "vision_model" if block[1] else "text_model"
            found |= _block_tensors(f"{tower}.encoder.layers.{block[2]}", block[3], tensor)
        elif name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = tensor.transposed()
        else:
            found[_OUTSIDE.get(name, name)] = tensor
    return found


def _block_tensors(layer: str, name: str, tensor: LazyTensor) -> Tensors:
    module, _, leaf = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = name.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{part}_proj.{leaf}": tensor.third(i) for i, part in enumerate("qkv")}
    return {f"{layer}.{_IN_BLOCK.get(module, module)}.{leaf}": tensor}


def _hf_settings(folder: Path) -> dict[str, Any] | None:
    """The folder's `config.json`, or None; UserError if it is another model's."""
    file = folder / HF_CONFIG
    if not file.is_file():
        return None
    settings = read_json(file)
    if "model_type" in settings and settings["model_type"] != "clip":
        raise UserError(f"{folder} holds a {settings['model_type']}, not a CLIPModel.")
    return settings if "model_type" in settings else None


def _usual_activation(path: Path, tensors: Mapping[str, Any], usual: str) -> str:
    """QuickGELU where the file or its name shows that OpenAI or Apple (DFN) made it, or that it is so called."""
    name = f"{path.parent.name}/{path.name}".lower()
    quick = _OPENAI_MARK in tensors or any(word in name for word in ("dfn", "openai", "quickgelu"))
    return "quick_gelu" if quick else usual


def _open_clip_config(
    tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], path: Path, arch: str, usual: str
) -> ClipConfig:
    """What the shapes say, and heads, activation and epsilon where an `open_clip_config.json` gives them."""
    vision, text = settings.get("vision_cfg", {}), settings.get("text_cfg", {})
    heads: list[int | None] = [None, text.get("heads")]
    if vision.get("width"):
        heads[0] = vision["width"] // vision.get("head_width", HEAD_WIDTH)
    if "quick_gelu" in settings:
        usual = "quick_gelu" if settings["quick_gelu"] else "gelu"
    config = _infer(tensors, path, arch, usual, *heads)
    for name, tower in (("vision", vision), ("text", text)):
        changes: dict[str, Any] = {}
        if "eps" in tower.get("norm_kwargs", {}):
            changes["layer_norm_eps"] = tower["norm_kwargs"]["eps"]
        if tower.get("act_kwargs", {}).get("approximate") == "tanh":
            changes["hidden_act"] = "gelu_pytorch_tanh"
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})
    return config


def _open_clip_preprocessing(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if settings.get("interpolation", "bicubic") != "bicubic":
        raise UserError(
            f"{file}: images are to be resized by {settings['interpolation']!r}; only bicubic is supported."
        )
    found = {f"image_{name}": settings[name] for name in ("mean", "std") if name in settings}
    return found | {name: settings[name] for name in ("resize_mode",) if name in settings}


def _infer(
    tensors: Mapping[str, LazyTensor],
    source: Path,
    arch: str,
    activation: str,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> ClipConfig:
    """The network from the shapes of its tensors, under transformers' names."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(
                f"{source} holds no CLIP: the tensor {name!r} is not there, under this or open_clip's name."
            )
        return tensors[name].shape

    def tower(name: str, width: int, heads: int) -> dict[str, Any]:
        layers = {int(m[1]) for m in (re.match(rf"{name}\.encoder\.layers\.(\d+)\.", key) for key in tensors) if m}
        return dict(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=len(layers),
            intermediate_size=shape(f"{name}.encoder.layers.0.mlp.fc1.weight")[0],
            hidden_act=activation,
        )

    positions, text_width = shape("text_model.embeddings.position_embedding.weight")
    tokens, vision_width = shape("vision_model.embeddings.position_embedding.weight")
    patch = shape("vision_model.embeddings.patch_embedding.weight")[-1]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise UserError(f"{source}: {tokens - 1} positions of patches are no square; only square images are supported.")
    named = _named_heads(arch, source, vision_width, text_width)
    projected = shape("text_projection.weight")[0]
    text_heads = named[1] or text_heads or _heads(text_width, source, "text")
    vision_heads = named[0] or vision_heads or _VISION_HEADS.get(vision_width) or _heads(vision_width, source, "image")
    text = ClipTextConfig(
        **tower("text_model", text_width, text_heads),
        vocab_size=shape("text_model.embeddings.token_embedding.weight")[0],
        max_position_embeddings=positions,
        eos_token_id=_ARGMAX_EOS,
    )
    vision = ClipVisionConfig(
        **tower("vision_model", vision_width, vision_heads), image_size=side * patch, patch_size=patch
    )
    return ClipConfig(text, vision, projected)


def _named_heads(arch: str, source: Path, vision_width: int, text_width: int) -> tuple[int | None, int | None]:
    """Heads of the image and the text tower of a named architecture; UserError if the weights are not of it."""
    if not arch:
        return None, None
    known = ARCHITECTURES.get(arch.removesuffix(QUICK_GELU_SUFFIX))
    if known is None:
        raise UserError(f"the architecture {arch!r} is not known; known are {', '.join(ARCHITECTURES)}.")
    if (known.vision_width, known.text_width) != (vision_width, text_width):
        raise UserError(
            f"{source} is no {arch}: its towers are {vision_width} and {text_width} wide, "
            f"that has {known.vision_width} and {known.text_width}."
        )
    return known.vision_heads, known.text_heads


def _heads(width: int, source: Path, tower: str) -> int:
    if width % HEAD_WIDTH:
        raise UserError(
            f"{source}: the heads of a {tower} tower {width} wide cannot be told from its weights; put the "
            f"{OPEN_CLIP_CONFIG} or transformers' {HF_CONFIG} beside it."
        )
    return width // HEAD_WIDTH
