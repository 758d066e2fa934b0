"""The text side of SRPO (Shen et al. 2025, arXiv 2509.06942): a wish expressed as the difference of two texts.

    t = (1 + k) f(positive word + prompt) - f(negative word + prompt)

takes the place of the prompt's features in a score that is linear in them. What the reward likes in every image,
whatever the text, cancels up to k of it. DMDR's authors used k = 0.1 with one positive and one negative word per batch.
"""

import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import RewardSpec

Array = jax.Array

SEPARATOR = ". "
CHECKED = 500
"""Prompts that `check_words` looks at."""
# The authors' words.
POSITIVE = ("Natural-lighting", "Detailed", "Realistic")
NEGATIVE = ("Painting", "CG Render", "Oil")


def contrast_words(spec: RewardSpec, prompts: Sequence[str]) -> tuple[str, str]:
    """The positive and the negative word of a batch: a function of its prompts alone, so that a resumed run and
    every host draw the same."""
    draw = zlib.crc32("\n".join(prompts).encode("utf-8"))
    positive, negative = spec.positive_words, spec.negative_words
    return positive[draw % len(positive)], negative[draw // len(positive) % len(negative)]


def texts(spec: RewardSpec, prompts: Sequence[str]) -> list[list[str]]:
    """The texts that a reward reads in the place of each prompt: one, or positive and negative."""
    plain = [spec.prompt_prefix + prompt for prompt in prompts]
    if not spec.contrasted:
        return [[text] for text in plain]
    positive, negative = contrast_words(spec, prompts)
    return [[f"{positive}{SEPARATOR}{text}", f"{negative}{SEPARATOR}{text}"] for text in plain]


def contrasted(features: Array, k: float) -> Array:
    """`(1 + k) f(positive) - f(negative)` of features `[b, 2, d]`: `[b, d]`."""
    return (1.0 + k) * features[:, 0] - features[:, 1]


def check_words(spec: RewardSpec, prompts: Sequence[str], ids_of: Callable[[list[str]], np.ndarray]) -> None:
    """UserError where a word of the contrast takes the room of the prompts, which then read alike.

    Args:
      ids_of: texts to the reward's token ids ``[b, n]``.
    """
    plain = [spec.prompt_prefix + prompt for prompt in dict.fromkeys(prompts)][:CHECKED]

    def different(head: str) -> int:
        return len({row.tobytes() for row in ids_of([head + text for text in plain])})

    before = different("")
    for word in (*spec.positive_words, *spec.negative_words):
        if (left := different(word + SEPARATOR)) < 0.9 * before:
            raise UserError(
                f"Reward {spec.name!r}: behind {word!r} only {left} of {before} prompts still differ in what it reads;"
                " the text is cut off. Give config.srpo.positive and config.srpo.negative words that it knows."
            )
