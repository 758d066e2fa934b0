"""Tokenizers of the rewards' text towers, from files alone: nothing is fetched.

CLIP's byte-pair encoding is the same for OpenAI, open_clip, HPSv2 and PickScore; ImageReward has BERT's word pieces.
"""

import gzip
import html
import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError

CLIP_FILES = ("tokenizer.json", "vocab.json")
BERT_FILES = ("tokenizer.json", "vocab.txt")
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
"""OpenAI's own form of the vocabulary, which open_clip, HPSv2 and clip ship."""

_PACKAGES = {"open_clip": "", "clip": "", "hpsv2": "src/open_clip"}
_VOCABULARY = 49408
_START, _END = "<|startoftext|>", "<|endoftext|>"

_CLIP_MEND = (
    "put CLIP's tokenizer files (tokenizer.json, or vocab.json and merges.txt) there or say tokenizer=FOLDER; the "
    "tokenizer/ of any Stable Diffusion folder will do, and so will `hf download openai/clip-vit-large-patch14 "
    "vocab.json merges.txt tokenizer.json tokenizer_config.json --local-dir FOLDER`"
)
_BERT_MEND = (
    "put BERT's vocab.txt there or say tokenizer=FOLDER; `hf download google-bert/bert-base-uncased vocab.txt "
    "tokenizer_config.json --local-dir FOLDER` fetches it"
)

_QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "ʼ": "'"})
_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij"}
)


def clip_tokenizer(places: Sequence[Path], who: str) -> Any:
    """CLIP's tokenizer from the first of some folders (or their `tokenizer/`) that holds one.

    Args:
      places: folders, or a `bpe_simple_vocab_16e6.txt.gz`; last, an installed open_clip or clip is looked into.
      who: begins the error message.

    Raises:
      UserError: none of them holds a tokenizer.
    """
    folder = _find(places, CLIP_FILES)
    if folder is not None:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(folder)
    merges = [place if place.is_file() else place / MERGES_FILE for place in places]
    for file in (*merges, *_installed_merges()):
        if file.name == MERGES_FILE and file.is_file():
            return _from_merges(file)
    raise UserError(f"{who}: {places[0]} holds no tokenizer; {_CLIP_MEND}.")


def bert_tokenizer(places: Sequence[Path], who: str) -> Any:
    """The tokenizer of bert-base-uncased, which lower-cases, from the first folder that holds one.

    Raises:
      UserError: none of them holds one.
    """
    folder = _find(places, BERT_FILES)
    if folder is None:
        raise UserError(f"{who}: {places[0]} holds no tokenizer; {_BERT_MEND}.")
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(folder)


def token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Ids `[b, length]` of texts, cut (the end token stays) and padded."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length).input_ids
    return np.asarray(ids, np.int32).reshape(len(texts), length)


def clean_text(text: str) -> str:
    """The text as open_clip's tokenizer sees it: entities unescaped, typographic characters made plain.

    What open_clip leaves to ftfy is done here for HTML entities, quotes, ligatures, full-width forms, control
    characters and composition; text that was decoded wrongly is not repaired. Lower case is the tokenizer's task.
    """
    text = html.unescape(html.unescape(text))
    text = text.translate(_LIGATURES).translate(_QUOTES)
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uffef" or c == "\u3000" else c for c in text)
    text = unicodedata.normalize("NFC", text)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return re.sub(r"\s+", " ", text).strip()


def _find(places: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first folder with one of the files; without them transformers silently makes an empty tokenizer."""
    for place in places:
        for folder in (place, place / "tokenizer"):
            if any((folder / name).is_file() for name in names):
                return folder
    return None


def _installed_merges() -> list[Path]:
    found = []
    for package, folder in _PACKAGES.items():
        spec = importlib.util.find_spec(package)  # found, not imported
        if spec is not None and spec.origin:
            found.append(Path(spec.origin).parent / folder / MERGES_FILE)
    return found


def _from_merges(file: Path) -> Any:
    """The tokenizer that OpenAI's list of merges stands for."""
    from transformers import CLIPTokenizer

    from dmdr_jax.shapes.tokenizer import WORD_END, byte_characters

    characters = byte_characters()
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch it again.") from error
    room = _VOCABULARY - 2 * len(characters) - 2
    merges: list[Any] = [tuple(line.split()) for line in lines[1 : 1 + room]]
    tokens = [*characters, *(c + WORD_END for c in characters), *("".join(merge) for merge in merges), _START, _END]
    if len(tokens) != _VOCABULARY:
        raise UserError(f"{file} makes {len(tokens)} tokens and not CLIP's {_VOCABULARY}; fetch it again.")
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)
