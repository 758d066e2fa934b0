"""Rewards that are the cosine of an image and its prompt in a CLIP's common space.

CLIPScore, DFN-CLIP, HPSv2 and HPSv2.1 (Wu et al. 2023), PickScore (Kirstain et al. 2023) and a CLIP of one's own:
one network, told apart by weights, preprocessing and cleaning of the text (`dmdr_jax.rewards.kinds`). The score is
the plain cosine, as DMDR has it (arXiv 2511.13649, section 4.1); PickScore's is multiplied by exp(logit_scale).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.models.clip import Clip, ClipConfig, ClipTextModel, ClipVisionModel
from dmdr_jax.rewards import contrast
from dmdr_jax.rewards.base import Params, RewardSpec
from dmdr_jax.rewards.clip_files import ClipFile, open_clip_file
from dmdr_jax.rewards.feature_cache import FeatureCache
from dmdr_jax.rewards.kinds import CLIP, KINDS, Kind, find_kind
from dmdr_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocessing, stated_resize
from dmdr_jax.rewards.scoring import TowerScorer
from dmdr_jax.rewards.tokenizers import clean_text, clip_tokenizer, token_ids
from dmdr_jax.rewards.weights import fill_tree

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipReward", "Preprocessing", "load_clip_reward"]

Array = jax.Array

_VISION_SIDE = ("vision_model", "visual_projection")
_TEXT_SIDE = ("text_model", "text_projection")
_HEADS = ("visual_projection", "text_projection", "post_layernorm", "final_layer_norm", "logit_scale")
"""What is stored in fp32 whatever the towers are: scores of neighbouring images differ in the third digit."""
_NORM_FLOOR = 1e-12


def unit(x: Array) -> Array:
    """Rows of unit length, fp32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), _NORM_FLOOR))


def embed_images(tower: ClipVisionModel, preprocess: Preprocessing, params: Params, images: Array) -> Array:
    """Unit image features `[b, d]`, fp32, of images `[b, h, w, 3]` in [0, 1]."""
    return embed_pixels(tower, params, preprocess(images))


def embed_pixels(tower: ClipVisionModel, params: Params, pixels: Array) -> Array:
    """Unit image features `[b, d]`, fp32, of preprocessed pixels `[b, size, size, 3]`."""
    out: Any = tower.apply({"params": params}, pixels)
    return unit(out.projected)


def embed_texts(tower: ClipTextModel, params: Params, ids: Array) -> Array:
    """Unit text features `[b, d]`, fp32, of ids `[b, n]`."""
    out: Any = tower.apply({"params": params}, ids)
    return unit(out.projected)


def towers(config: ClipConfig, dtype: Any, remat: bool = False) -> tuple[ClipVisionModel, ClipTextModel]:
    """The two towers of a CLIP with the projections of the whole; their parameters are subtrees of `Clip`'s."""
    own: dict[str, Any] = {"projection_dim": config.projection_dim, "with_projection": True}
    vision = ClipVisionModel(dataclasses.replace(config.vision, **own), dtype, remat)
    return vision, ClipTextModel(dataclasses.replace(config.text, **own), dtype)


def split_params(params: Params) -> tuple[Params, Params]:
    """The image side and the text side of `Clip`'s parameters."""
    return {name: params[name] for name in _VISION_SIDE}, {name: params[name] for name in _TEXT_SIDE}


def abstract_clip(config: ClipConfig) -> Params:
    """`Clip`'s parameters as shapes."""
    side = config.vision.image_size
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return keymap.abstract(Clip(config), ids, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def read_params(file: ClipFile, dtype: Any, image_side_only: bool = False) -> Params:
    """The parameters of a CLIP file, towers in ``dtype``, heads in at least fp32.

    Raises:
      UserError: the file and its architecture do not match.
    """
    abstract = abstract_clip(file.config)
    if image_side_only:
        abstract = split_params(abstract)[0]

    def leaf_dtype(path: tuple[str, ...]) -> Any:
        is_head = any(name in _HEADS for name in path)
        return jnp.promote_types(dtype, jnp.float32) if is_head else dtype

    def ignored(name: str) -> bool:
        return image_side_only and name.startswith((*_TEXT_SIDE, "logit_scale"))

    return fill_tree(abstract, file.tensors, file.source, leaf_dtype, ignored)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipReward(TowerScorer):
    """A `dmdr_jax.rewards.base.Reward` by a CLIP; made by `load_clip_reward`.

    Attributes:
      spec: name, weight and the rest.
      params: the image side, an argument of `score`.
      text_params: the text side, used by `text_features` alone.
      scale: factor of the cosine.
      clean: whether prompts are cleaned as open_clip cleans them.
      cache: features of the texts seen so far.
    """

    spec: RewardSpec
    params: Params
    text_params: Params
    vision: ClipVisionModel
    text: ClipTextModel
    preprocess: Preprocessing
    tokenizer: Any
    scale: float = 1.0
    clean: bool = False
    cache: FeatureCache = dataclasses.field(default_factory=FeatureCache)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids `[b, n]` of the prompts behind `spec.prompt_prefix`, cut and padded to the text tower's n positions.

        A contrast has two texts per prompt and ids `[b, 2, n]`.
        """
        rows = contrast.texts(self.spec, prompts)
        ids = self._ids([text for row in rows for text in row])
        return ids.reshape(len(rows), 2, -1) if self.spec.contrasted else ids

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """UserError where the texts of a contrast leave no room for the prompts."""
        if self.spec.contrasted:
            contrast.check_words(self.spec, prompts, self._ids)

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """Features `[b, d]`, fp32, of ids `[b, n]` (unit rows) or of a contrast's `[b, 2, n]`."""
        features = self._embed_texts(self.text_params, jnp.asarray(ids).reshape(-1, ids.shape[-1]))
        return self._contrasted(features)

    def prompt_features(self, prompts: Sequence[str], place: Callable[[np.ndarray], Array] = jnp.asarray) -> np.ndarray:
        """The same `[b, d]` on the host, each text computed once; `place` puts ids `[m, n]` on the devices."""
        texts = [text for row in contrast.texts(self.spec, prompts) for text in row]
        return self._contrasted(
            self.cache(texts, lambda new: self._embed_texts(self.text_params, place(self._ids(new))))
        )

    def score_pixels(self, params: Params, pixels: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of preprocessed pixels `[b, size, size, 3]`, which alone receive a gradient."""
        params, text_features = jax.lax.stop_gradient((params, text_features))
        features = embed_pixels(self.vision, params, pixels)
        return self.scale * (features * text_features.astype(jnp.float32)).sum(-1)

    def _ids(self, texts: Sequence[str]) -> np.ndarray:
        texts = [clean_text(text) for text in texts] if self.clean else texts
        return token_ids(self.tokenizer, texts, self.text.config.max_position_embeddings)

    def _contrasted(self, features: Any) -> Any:
        if not self.spec.contrasted:
            return features
        return contrast.contrasted(features.reshape(-1, 2, features.shape[-1]), self.spec.contrast)

    def image_features(self, images: Array) -> Array:
        """Unit features `[b, d]`, fp32, of images `[b, h, w, 3]` in [0, 1]; compiled once."""
        return self._embed_images(self.params, images)

    @functools.cached_property
    def _embed_texts(self) -> Callable:
        return jax.jit(functools.partial(embed_texts, self.text))

    @functools.cached_property
    def _embed_images(self) -> Callable:
        return jax.jit(lambda params, images: embed_pixels(self.vision, params, self.preprocess(images)))


def load_clip_reward(spec: RewardSpec, dtype: Any = jnp.float32, remat: bool = False) -> ClipReward:
    """Reads the reward at `spec.path`: a folder of transformers or open_clip, or a weight file of either.

    Args:
      dtype: of the stored towers and of what they compute; norms, projections and cosines are fp32 in any case.
      remat: recompute the image tower's layers in the backward pass.

    Raises:
      UserError: there is no CLIP at that place, or something in it is missing or damaged.
    """
    kind = KINDS[find_kind(spec.name, spec.kind, spec.path)]
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise UserError(
            f"Reward {spec.name!r}: there is no folder {path}, nor a file; give a CLIP's with its tokenizer."
        )
    try:
        file = _open(spec, kind)
        params = read_params(file, dtype)
    except UserError as error:
        raise UserError(f"Reward {spec.name!r}: {error}") from error
    image_params, text_params = split_params(params)
    vision, text = towers(file.config, dtype, remat)
    return ClipReward(
        spec,
        image_params,
        text_params,
        vision,
        text,
        preprocessing_of(spec, kind, file),
        clip_tokenizer(tokenizer_places(spec, path), f"Reward {spec.name!r}"),
        scale=float(jnp.exp(params["logit_scale"])) if kind.logit_scale else 1.0,
        clean=kind.clean or (file.open_clip and kind.network == "clip"),
    )


def _open(spec: RewardSpec, kind: Kind) -> ClipFile:
    path = Path(spec.path).expanduser()
    return open_clip_file(path, arch=spec.arch, activation=spec.activation, usual=kind.activation)


def shape_of(spec: RewardSpec) -> tuple[ClipConfig, Preprocessing] | None:
    """What the CLIP at `spec.path` is and how it sees images, without its weights; None where none lies there.

    Raises:
      UserError: something is there, and is no CLIP of ours.
    """
    if not spec.path or not Path(spec.path).expanduser().exists():
        return None
    kind = KINDS[find_kind(spec.name, spec.kind, spec.path)]
    if kind.network != CLIP:
        return None
    file = _open(spec, kind)
    return file.config, preprocessing_of(spec, kind, file)


def preprocessing_of(spec: RewardSpec, kind: Kind, file: ClipFile) -> Preprocessing:
    """The kind's way to a square (or the spec's), with the mean and standard deviation of the file's folder."""
    crop = "round" if file.open_clip else kind.crop
    how = {"resize": spec.resize or kind.resize or stated_resize(file.preprocessing), "crop": crop}
    return Preprocessing.from_config(file.preprocessing, file.config.vision.image_size, **how)


def tokenizer_places(spec: RewardSpec, path: Path) -> list[Path]:
    """Where to look for the tokenizer: where the spec says, else beside the weights."""
    if spec.tokenizer:
        return [Path(spec.tokenizer).expanduser()]
    return [path if path.is_dir() else path.parent]
