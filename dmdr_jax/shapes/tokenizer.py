"""The shapes world's CLIP tokenizers, built by hand from its caption words.

The byte-level BPE of CLIP with a small vocabulary, laid out as CLIP's own: the 256 bytes ("!" is
id 0), the 256 bytes that end a word, one entry per merge, then the start and the end token, so
that the end token has the largest id. Each caption word is one token; any other text falls back
on its bytes, so nothing fails to tokenise.
"""

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT = 16
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for the bytes in GPT-2's and CLIP's BPE, in vocabulary order.

    The printable bytes stand for themselves and come first; the others take the code points from
    256 upwards.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def split_word(word: str, merges: list[Merge]) -> list[str]:
    """The pieces of a word under byte-pair merges, the earliest merge first (Sennrich et al. 2016)."""
    rank = {merge: i for i, merge in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + WORD_END]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
        if pairs[best] not in rank:
            break
        pieces[best : best + 2] = ["".join(pairs[best])]
    return pieces


def build_merges(words: Iterable[str]) -> list[Merge]:
    """Merges that make every word a single token.

    A word gets merges for what is left of it under the merges before, appended at the end. Later
    merges come into play only once the earlier ones are used up, when an earlier word is whole
    already: no word undoes another.

    Raises:
      ValueError: a word is not made of lower-case ASCII letters (CLIP splits on anything else).
    """
    merges: list[Merge] = []
    for word in sorted(set(words)):
        if not (word.isascii() and word.isalpha() and word.islower()):
            raise ValueError(f"caption word {word!r} must be lower-case ASCII letters only.")
        pieces = split_word(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
    return merges


def make_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary (token to id) and merges for the caption words; see the module's text for the layout."""
    characters = byte_characters()
    merges = build_merges(words)
    tokens = [*characters, *(c + WORD_END for c in characters), *("".join(merge) for merge in merges)]
    # Two merges may spell the same string from different halves; the model then needs one entry.
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def make_tokenizers(words: Iterable[str], context: int = CONTEXT) -> "tuple[CLIPTokenizer, CLIPTokenizer]":
    """The two tokenizers of an SD3 pipeline for the caption words, as `transformers.CLIPTokenizer`.

    Args:
      words: caption words, lower case, in any order; the same set gives the same vocabulary.
      context: `model_max_length`, start and end tokens included.

    Returns:
      (tokenizer, tokenizer_2): the first pads with the end token, the second with "!" (id 0), as
      Stable Diffusion 3's do. Both have `save_pretrained`.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = make_vocabulary(words)

    def build(pad: str) -> "CLIPTokenizer":
        pairs: Any = list(merges)  # which the class takes, whatever its annotation says
        return CLIPTokenizer(
            vocab=dict(vocabulary), merges=pairs, pad_token=pad, model_max_length=context, errors="replace"
        )

    return build(END), build("!")


def save_tokenizer(tokenizer: "CLIPTokenizer", folder: str | os.PathLike) -> None:
    """Writes `tokenizer.save_pretrained`, plus the `vocab.json` and `merges.txt` that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (Path(folder) / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
