"""The text side of SRPO (Shen et al. 2025, arXiv 2509.06942): a wish expressed as the difference of two texts.

    t = (1 + k) f(positive word + prompt) - f(negative word + prompt)

takes the place of the prompt's features in a score that is linear in them. What the reward likes in every image,
whatever the text, cancels. DMDR's authors used k = 0.1 with one positive and one negative word per batch.
"""

import zlib
from collections.abc import Sequence

import jax

from dmdr_jax.rewards.base import RewardSpec

Array = jax.Array

SEPARATOR = ". "
AUTHORS_POSITIVE = ("Natural-lighting", "Detailed", "Realistic")
AUTHORS_NEGATIVE = ("Painting", "CG Render", "Oil")


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
