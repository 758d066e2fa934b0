"""Rewards that are the cosine of an image and its prompt in a CLIP's common space.

Read from a folder as transformers saves a `CLIPModel` with its tokenizer and image processor: CLIPScore,
PickScore, and HPSv2.1 or DFN-CLIP once converted to that form. The score is the plain cosine (DMDR,
arXiv 2511.13649, section 4.1), without the logit scale.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap, safetensors_io
from dmdr_jax.diffusers_io.components import read_json
from dmdr_jax.errors import UserError
from dmdr_jax.models.clip import Clip, ClipConfig, ClipTextModel, ClipVisionModel
from dmdr_jax.rewards.base import Params, RewardSpec, clamp_images

Array = jax.Array

# OpenAI's, which open_clip and transformers share.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_VISION_SIDE = ("vision_model", "visual_projection")
_TEXT_SIDE = ("text_model", "text_projection")
_NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From pixels in [0, 1] to the image tower's input.

    Attributes:
      size: side of the tower's square input, pixels.
      mean, std: of each channel.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int) -> "Preprocessing":
        """Reads mean and std of a `preprocessor_config.json`; `size` is the tower's."""
        return cls(size, tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD)))

    def __call__(self, images: Array) -> Array:
        """Clamps, squashes to `size` x `size` and normalises images `[b, h, w, 3]`, in fp32.

        As DMDR has it, an image that is not square is squashed, not cropped. The resize is bicubic with
        antialiasing and Keys' a = -0.5: Pillow's, and PyTorch's with `antialias=True`.
        """
        images = clamp_images(images.astype(jnp.float32))
        shape = (images.shape[0], self.size, self.size, images.shape[3])
        if images.shape != shape:
            images = jax.image.resize(images, shape, "cubic", antialias=True)
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def unit(x: Array) -> Array:
    """Rows of unit length, fp32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), _NORM_FLOOR))


def embed_images(tower: ClipVisionModel, preprocess: Preprocessing, params: Params, images: Array) -> Array:
    """Unit image features `[b, d]`, fp32, of images `[b, h, w, 3]` in [0, 1]."""
    return unit(tower.apply({"params": params}, preprocess(images)).projected)


def embed_texts(tower: ClipTextModel, params: Params, ids: Array) -> Array:
    """Unit text features `[b, d]`, fp32, of ids `[b, n]`."""
    return unit(tower.apply({"params": params}, ids).projected)


def towers(config: ClipConfig, dtype: Any, remat: bool = False) -> tuple[ClipVisionModel, ClipTextModel]:
    """The two towers of a CLIP with the projections of the whole; their parameters are subtrees of `Clip`'s."""
    own = {"projection_dim": config.projection_dim, "with_projection": True}
    vision = ClipVisionModel(dataclasses.replace(config.vision, **own), dtype, remat)
    return vision, ClipTextModel(dataclasses.replace(config.text, **own), dtype)


def split_params(params: Params) -> tuple[Params, Params]:
    """The image side and the text side of `Clip`'s parameters."""
    return {name: params[name] for name in _VISION_SIDE}, {name: params[name] for name in _TEXT_SIDE}


@dataclasses.dataclass(frozen=True, eq=False)
class ClipReward:
    """A `dmdr_jax.rewards.base.Reward` by a CLIP; made by `load_clip_reward`.

    Attributes:
      spec: name, weight and the rest.
      params: the image side, an argument of `score`.
      text_params: the text side, used by `text_features` alone.
    """

    spec: RewardSpec
    params: Params
    text_params: Params
    vision: ClipVisionModel
    text: ClipTextModel
    preprocess: Preprocessing
    tokenizer: Any

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids `[b, n]` of the prompts behind `spec.prompt_prefix`, cut and padded to the text tower's n positions."""
        texts = [self.spec.prompt_prefix + prompt for prompt in prompts]
        length = self.text.config.max_position_embeddings
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length).input_ids
        return np.asarray(ids, np.int32)

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """Unit features `[b, d]`, fp32, of ids `[b, n]`."""
        return self._embed_texts(self.text_params, jnp.asarray(ids))

    def score(self, params: Params, images: Array, text_features: Array) -> Array:
        """Cosines `[b]`, fp32, of images `[b, h, w, 3]` in [0, 1] (clamped) with `text_features` `[b, d]`.

        Neither the parameters nor the text features receive a gradient.
        """
        params, text_features = jax.lax.stop_gradient((params, text_features))
        features = embed_images(self.vision, self.preprocess, params, images)
        return (features * text_features.astype(jnp.float32)).sum(-1)

    def score_prompts(self, images: np.ndarray, prompts: Sequence[str], batch: int = 256) -> np.ndarray:
        """Cosines `[n]` of images `[n, h, w, 3]` with their prompts, batch by batch; for evaluation."""
        features = self.text_features(self.tokenize(prompts))
        pieces = [
            self._score(self.params, jnp.asarray(images[i : i + batch]), features[i : i + batch])
            for i in range(0, len(images), batch)
        ]
        return np.concatenate([np.asarray(piece) for piece in pieces]) if pieces else np.zeros(0, np.float32)

    @functools.cached_property
    def _embed_texts(self) -> Any:
        return jax.jit(functools.partial(embed_texts, self.text))

    @functools.cached_property
    def _score(self) -> Any:
        return jax.jit(self.score)


def load_clip_reward(spec: RewardSpec, dtype: Any = jnp.float32, remat: bool = False) -> ClipReward:
    """Reads the reward in the folder `spec.path`.

    Args:
      dtype: of the stored parameters and of the towers; projections, norms and cosines are fp32 in any case.
      remat: recompute the image tower's layers in the backward pass.

    Raises:
      UserError: the folder is no CLIPModel folder, or something in it is missing or damaged.
    """
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"Reward {spec.name!r}: there is no folder {folder}; give a CLIPModel's with its tokenizer.")
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "clip":
        raise UserError(f"Reward {spec.name!r}: {folder} holds a {raw.get('model_type')}, not a CLIPModel.")
    config = ClipConfig.from_diffusers(raw)
    params = safetensors_io.read_tree(folder, abstract_clip(config), dtype)
    image_params, text_params = split_params(params)
    vision, text = towers(config, dtype, remat)
    preprocess = Preprocessing.from_config(_preprocessor(folder), config.vision.image_size)
    return ClipReward(spec, image_params, text_params, vision, text, preprocess, _tokenizer(spec, folder))


def abstract_clip(config: ClipConfig) -> Params:
    """`Clip`'s parameters as shapes."""
    side = config.vision.image_size
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return keymap.abstract(Clip(config), ids, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def _preprocessor(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    return read_json(file) if file.exists() else {}


def _tokenizer(spec: RewardSpec, folder: Path) -> Any:
    # Without these files transformers silently makes an empty tokenizer.
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"Reward {spec.name!r}: {folder} holds no tokenizer; put CLIP's tokenizer files there.")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
