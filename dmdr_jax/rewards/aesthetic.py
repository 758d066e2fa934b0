"""LAION's aesthetic predictor, version 2: a linear head on the unit image features of OpenAI's CLIP ViT-L/14.

The head's file (`sac+logos+ava1-l14-linearMSE.pth`) and CLIP's weights come from different places. The score does
not see the prompt; pictures people take have about 4 to 7.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.models.blip import LinearHead
from dmdr_jax.models.clip import ClipVisionModel
from dmdr_jax.rewards.base import Params, RewardSpec, refuse_contrast
from dmdr_jax.rewards.clip_files import open_clip_file
from dmdr_jax.rewards.clip_reward import embed_pixels, preprocessing_of, read_params, towers
from dmdr_jax.rewards.kinds import KINDS
from dmdr_jax.rewards.linear_head import head_layers
from dmdr_jax.rewards.preprocess import Preprocessing
from dmdr_jax.rewards.scoring import TowerScorer
from dmdr_jax.rewards.weights import fill_tree, open_weights

Array = jax.Array

HEAD_FILES = ("*linearMSE*", "*reluMSE*", "*aesthetic*.safetensors", "*.pth")
_HEAD, _CLIP = "head", "clip"
# The layers' numbers where ReLUs are counted between them.
_WITH_RELU = (0, 3, 6, 9, 11)


@dataclasses.dataclass(frozen=True, eq=False)
class AestheticReward(TowerScorer):
    """A `dmdr_jax.rewards.base.Reward`; made by `load_aesthetic_reward`.

    Its `params` are CLIP's image side and the head.
    """

    spec: RewardSpec
    params: Params
    vision: ClipVisionModel
    head: LinearHead
    preprocess: Preprocessing

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Zeros `[b, 1]`: the prompts are not read."""
        return np.zeros((len(prompts), 1), np.int32)

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """The zeros `[b, 1]`."""
        return jnp.asarray(ids)

    def prompt_features(self, prompts: Sequence[str], place: Callable[[np.ndarray], Array] = jnp.asarray) -> np.ndarray:
        """Zeros `[b, 1]`, on the host."""
        return self.tokenize(prompts)

    def score_pixels(self, params: Params, pixels: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of preprocessed pixels `[b, size, size, 3]`, which alone receive a gradient."""
        params = jax.lax.stop_gradient(params)
        features = embed_pixels(self.vision, params[_CLIP], pixels)
        scores: Any = self.head.apply({"params": params[_HEAD]}, features)
        return scores


def load_aesthetic_reward(spec: RewardSpec, dtype: Any = jnp.float32, remat: bool = False) -> AestheticReward:
    """Reads the head at `spec.path` and CLIP ViT-L/14 at `spec.backbone`.

    Without a backbone the head lies in CLIP's folder: `spec.path` is that folder, or the head's file in it. The
    published head has no activation between its layers; one whose file or numbering says so has ReLU.

    Raises:
      UserError: one of the two is missing, damaged, or does not fit the other.
    """
    who = f"Reward {spec.name!r}"
    refuse_contrast(spec)
    head_file = find_head(Path(spec.path).expanduser(), who)
    backbone = Path(spec.backbone).expanduser() if spec.backbone else head_file.parent
    kind = KINDS["aesthetic"]
    tensors = open_weights(head_file)
    widths, names = head_layers(tensors, "", head_file)
    try:
        file = open_clip_file(backbone, arch=spec.arch, activation=spec.activation, usual=kind.activation)
    except UserError as error:
        raise UserError(
            f"{who}: {error} Its head needs CLIP ViT-L/14 (`hf download openai/clip-vit-large-patch14`): "
            "say backbone=FOLDER, or put the head's file there."
        ) from error
    vision, _ = towers(file.config, dtype, remat)
    head = LinearHead(widths, names, relu="relu" in head_file.name.lower() or names == _WITH_RELU)
    features = jax.ShapeDtypeStruct((1, file.config.projection_dim), jnp.float32)
    params = {
        _CLIP: read_params(file, dtype, image_side_only=True),
        _HEAD: fill_tree(keymap.abstract(head, features), tensors, head_file, lambda leaf: jnp.float32),
    }
    return AestheticReward(spec, params, vision, head, preprocessing_of(spec, kind, file))


def find_head(path: Path, who: str) -> Path:
    """The head's file: the path itself, or the one in that folder."""
    if path.is_file():
        return path
    for pattern in HEAD_FILES:
        found = sorted(path.glob(pattern)) if path.is_dir() else []
        if len(found) == 1:
            return found[0]
    raise UserError(f"{who}: there is no aesthetic head {path}; give the file sac+logos+ava1-l14-linearMSE.pth.")
