"""ImageReward (Xu et al. 2023): `ImageReward.pt` as published, on BERT's word pieces.

The score is (r - mean) / std of the network's r, with the constants of its program; on the pictures it was trained
on that is about standard normal. A prompt has 35 tokens at most.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.diffusers_io.components import read_json
from dmdr_jax.errors import UserError
from dmdr_jax.models.blip import BlipConfig, ImageRewardModel, patches_of
from dmdr_jax.rewards.base import Params, RewardSpec, refuse_contrast
from dmdr_jax.rewards.kinds import KINDS
from dmdr_jax.rewards.lazy_tensor import LazyTensor
from dmdr_jax.rewards.linear_head import head_layers
from dmdr_jax.rewards.preprocess import Preprocessing
from dmdr_jax.rewards.scoring import TowerScorer
from dmdr_jax.rewards.tokenizers import bert_tokenizer, token_ids
from dmdr_jax.rewards.weights import fill_tree, open_weights

Array = jax.Array

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
MED_CONFIG = "med_config.json"

_HEAD_WIDTH = 64
_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageReward(TowerScorer):
    """A `dmdr_jax.rewards.base.Reward`; made by `load_image_reward`.

    Image and text meet in every layer, so the text features are the token ids themselves, and `params` is the
    whole network.
    """

    spec: RewardSpec
    params: Params
    network: ImageRewardModel
    preprocess: Preprocessing
    tokenizer: Any

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids `[b, 35]` of the prompts behind `spec.prompt_prefix`, cut and padded."""
        return token_ids(self.tokenizer, [self.spec.prompt_prefix + prompt for prompt in prompts], MAX_TOKENS)

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """The ids `[b, 35]`."""
        return jnp.asarray(ids)

    def prompt_features(self, prompts: Sequence[str], place: Callable[[np.ndarray], Array] = jnp.asarray) -> np.ndarray:
        """The ids `[b, 35]` of prompts, on the host."""
        return self.tokenize(prompts)

    def score_pixels(self, params: Params, pixels: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of preprocessed pixels `[b, size, size, 3]`, which alone receive a gradient."""
        mask = text_features != self.tokenizer.pad_token_id
        raw: Any = self.network.apply({"params": jax.lax.stop_gradient(params)}, pixels, text_features, mask)
        return (raw.astype(jnp.float32) - SCORE_MEAN) / SCORE_STD


def load_image_reward(spec: RewardSpec, dtype: Any = jnp.float32, remat: bool = False) -> ImageReward:
    """Reads `ImageReward.pt` (or the same tensors in safetensors, or a folder with either).

    Args:
      dtype: of the stored towers and of their products; the head and BERT's states are fp32.
      remat: recompute the towers' layers in the backward pass.

    Raises:
      UserError: the file is not there, not ImageReward's, or there is no BERT tokenizer.
    """
    who = f"Reward {spec.name!r}"
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise UserError(f"{who}: there is no file {path}; `hf download THUDM/ImageReward` fetches ImageReward.pt.")
    refuse_contrast(spec)
    folder = path if path.is_dir() else path.parent
    tensors = open_weights(path)
    settings = read_json(folder / MED_CONFIG) if (folder / MED_CONFIG).is_file() else {}
    network = ImageRewardModel(infer_config(tensors, path, settings), dtype, remat)

    def leaf_dtype(leaf: tuple[str, ...]) -> Any:
        is_head = leaf[0] == "mlp"
        return jnp.promote_types(dtype, jnp.float32) if is_head else dtype

    params = fill_tree(abstract_params(network), tensors, path, leaf_dtype, lambda name: name.startswith(_UNUSED))
    kind = KINDS["imagereward"]
    preprocess = Preprocessing(network.config.image_size, resize=spec.resize or kind.resize, crop=kind.crop)
    places = [Path(spec.tokenizer).expanduser()] if spec.tokenizer else [folder]
    return ImageReward(spec, params, network, preprocess, bert_tokenizer(places, who))


def abstract_params(network: ImageRewardModel) -> Params:
    """The network's parameters as shapes."""
    side = network.config.image_size
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return keymap.abstract(network, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), ids, ids)


def infer_config(tensors: Mapping[str, LazyTensor], source: Path, settings: Mapping[str, Any]) -> BlipConfig:
    """The network from the shapes of its tensors.

    Args:
      settings: BERT's, from a `med_config.json`: the number of heads and the epsilon, which the shapes do not show.

    Raises:
      UserError: these are no weights of ImageReward.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{source} is no ImageReward: the tensor {name!r} is not there.")
        return tensors[name].shape

    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in tensors)
        return len({match[1] for match in found if match})

    width, _, patch, _ = shape(f"{_VISION}patch_embed.proj.weight")
    side = patches_of(shape(f"{_VISION}pos_embed")[1])
    words, text_width = shape(f"{_TEXT}embeddings.word_embeddings.weight")
    if not side:
        raise UserError(f"{source}: its positions of patches are no square; only square images are supported.")
    head_widths, head_names = head_layers(tensors, "mlp.", source)
    return BlipConfig(
        image_size=side * patch,
        patch_size=patch,
        vision_width=width,
        vision_layers=count(f"{_VISION}blocks."),
        vision_heads=max(1, width // _HEAD_WIDTH),
        vision_hidden=shape(f"{_VISION}blocks.0.mlp.fc1.weight")[0],
        text_width=text_width,
        text_layers=count(f"{_TEXT}encoder.layer."),
        text_heads=settings.get("num_attention_heads", max(1, text_width // _HEAD_WIDTH)),
        text_hidden=shape(f"{_TEXT}encoder.layer.0.intermediate.dense.weight")[0],
        text_eps=settings.get("layer_norm_eps", BlipConfig.text_eps),
        vocab_size=words,
        max_positions=shape(f"{_TEXT}embeddings.position_embeddings.weight")[0],
        head_widths=head_widths,
        head_names=head_names,
    )
