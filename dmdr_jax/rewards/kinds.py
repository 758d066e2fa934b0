"""The kinds of rewards, and in what their published programs differ."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from dmdr_jax.errors import UserError

CLIP, AESTHETIC, IMAGE_REWARD, PYTHON = "clip", "aesthetic", "imagereward", "python"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a published scorer prepares its input and what number it gives.

    Attributes:
      network: `CLIP`, `AESTHETIC`, `IMAGE_REWARD` or `PYTHON`.
      resize, crop: see `dmdr_jax.rewards.preprocess.Preprocessing`; resize "" is what the files say, else "squash".
      activation: of a CLIP whose files do not say it.
      clean: whether prompts pass open_clip's cleaning before the tokenizer.
      logit_scale: whether the score is the cosine times exp(logit_scale), not the plain cosine.
      shown_times: the factor with which tables show the score.
    """

    network: str = CLIP
    resize: str = "squash"
    crop: str = "floor"
    activation: str = "gelu"
    clean: bool = False
    logit_scale: bool = False
    shown_times: float = 1.0


KINDS: Mapping[str, Kind] = {
    # Any CLIP, images prepared as its own files say; squashed where they do not, as DMDR trains.
    "clip": Kind(resize="", shown_times=100.0),
    # open_clip's transform of DFN weights.
    "dfn": Kind(activation="quick_gelu", clean=True, shown_times=100.0),
    # HPSv2 and HPSv2.1: hpsv2/img_score.py.
    "hps": Kind(resize="pad", clean=True, shown_times=100.0),
    # The recipe of PickScore's README, with transformers' processor.
    "pickscore": Kind(resize="crop", logit_scale=True),
    # Cosine with OpenAI's transform; without the factor 2.5 and the "A photo depicts" of Hessel et al. 2021.
    "clipscore": Kind(resize="crop", shown_times=100.0),
    # improved-aesthetic-predictor: simple_inference.py.
    "aesthetic": Kind(AESTHETIC, "crop", "round", activation="quick_gelu"),
    # ImageReward.py.
    "imagereward": Kind(IMAGE_REWARD, "crop", "round"),
    # The embedded world's CLIPs: square images of their towers' own size.
    "shapes": Kind(shown_times=100.0),
    # A function of one's own.
    "python": Kind(PYTHON),
}

_ALIASES = {
    "dfnclip": "dfn",
    "dfn5b": "dfn",
    "dfn5bclip": "dfn",
    "hpsv2": "hps",
    "hpsv20": "hps",
    "hpsv21": "hps",
    "hps2": "hps",
    "hps21": "hps",
    "pick": "pickscore",
    "pickscorev1": "pickscore",
    "laionaesthetic": "aesthetic",
    "aes": "aesthetic",
    "ir": "imagereward",
    "imagerewardv10": "imagereward",
}

_FUNCTION = re.compile(r"(?P<module>[^:]+):(?P<function>[A-Za-z_]\w*)")


def kind_name(name: str) -> str | None:
    """The kind that a word means, spelling aside ("HPSv2.1", "hps"), or None."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain if plain in KINDS else _ALIASES.get(plain)


def kind_in_name(name: str) -> str | None:
    """The kind that a reward's name says, as a whole or with its first word ("clip_g14"), or None."""
    return kind_name(name) or kind_name(re.split(r"[^A-Za-z0-9]", name, maxsplit=1)[0])


def find_kind(name: str, kind: str, path: str) -> str:
    """The kind of a reward called ``name``.

    Args:
      kind: what the user says it is; "" infers it: first from the path ("file.py:function"), then from the name,
        then a folder is a CLIP.

    Raises:
      UserError: there is no such kind, or nothing to infer it from.
    """
    if kind:
        found = kind_name(kind)
        if found is None:
            raise UserError(f"Reward {name!r}: the kind {kind!r} is not known; known are {', '.join(KINDS)}.")
        return found
    if is_function(path):
        return "python"
    found = kind_in_name(name)
    if found is None and not Path(path).expanduser().is_file():
        return "clip"
    if found is None:
        raise UserError(f"Reward {name!r}: name its kind, one of {', '.join(KINDS)}; {path} does not tell it.")
    return found


def is_function(path: str) -> bool:
    """Whether a path means "package.module:function" or "file.py:function"."""
    match = _FUNCTION.fullmatch(path)
    return match is not None and not Path(path).expanduser().exists() and len(match["module"]) > 1
