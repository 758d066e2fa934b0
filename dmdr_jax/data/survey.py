"""What is wrong with a list of prompts: counted and said, never silently mended."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Survey:
    """Counts over a source of prompts.

    Attributes:
      prompts: that are used.
      empty: blank lines and empty fields, left out.
      duplicates: prompts that an earlier one already is, spacing and Unicode's composition aside.
      cut: prompts longer than each text encoder reads, by its name; the rest of such a prompt has no effect.
    """

    prompts: int
    empty: int = 0
    duplicates: int = 0
    cut: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.prompts} prompts"]
        parts += [f"{self.empty} empty ones left out"] * bool(self.empty)
        parts += [f"{self.duplicates} duplicates"] * bool(self.duplicates)
        parts += [f"{count} longer than {name} reads" for name, count in self.cut.items() if count]
        return ", ".join(parts)


def survey(prompts: Iterable[str], tokenizers: Mapping[str, tuple[Any, int]] | None = None) -> Survey:
    """Counts the empty, the doubled and the overlong among prompts.

    Args:
      prompts: all of a source, blank ones too.
      tokenizers: by name, transformers' tokenizer and the number of tokens that are read, start and end included.
    """
    texts = list(prompts)
    kept = [text for text in texts if text.strip()]
    distinct = len(set(map(normalised, kept)))
    cut = {name: overlong(tokenizer, length, kept) for name, (tokenizer, length) in (tokenizers or {}).items()}
    return Survey(len(kept), len(texts) - len(kept), len(kept) - distinct, cut)


SAMPLE = 20_000  # prompts of a source that are tokenized to be counted


def survey_large(prompts: Sequence[str], tokenizers: Mapping[str, tuple[Any, int]]) -> Survey:
    """As `survey`, with the overlong ones scaled up from a sample where there are millions of prompts."""
    found, kept = survey(prompts), [text for text in prompts if text.strip()]
    step = -(-len(kept) // SAMPLE) or 1
    cut = {name: step * overlong(*reads, kept[::step]) for name, reads in tokenizers.items()}
    return dataclasses.replace(found, cut=cut)


def normalised(prompt: str) -> str:
    """A prompt in Unicode's composed form (NFC) with single spaces: what makes two prompts the same."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def overlong(tokenizer: Any, length: int, prompts: Sequence[str]) -> int:
    """How many prompts have more than ``length`` tokens."""
    if not prompts:
        return 0
    ids = tokenizer(list(prompts), truncation=False, padding=False, verbose=False)["input_ids"]
    return int(np.sum([len(row) > length for row in ids]))
