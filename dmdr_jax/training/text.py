"""Prompts to what the networks are told of them: batch by batch as the run goes, or all of them before it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from dmdr_jax.data.prompts import load_prompts
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import Encoded, Text, encode, encode_text, read_text, text_params
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.rewards.base import Reward
from dmdr_jax.rewards.feature_cache import BatchFeatures
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import Progress
from dmdr_jax.training.plan import Batch

EncodeText = Callable[..., Conditioning]


def make_encoder(
    config: Any, pipeline: Pipeline, size: tuple[int, int], rewards: Sequence[Reward], layout: Layout
) -> Callable[..., Batch]:
    """Prompts (and their `read_text`, where it is there already) to a `Batch` on the devices; nothing waits for it.

    Args:
      size: height and width of the images in pixels.
    """
    conditioning = conditioning_of(config, pipeline, layout, partial(encode, size=size))
    reward_features = {reward.spec.name: BatchFeatures(reward, layout.put_batch) for reward in rewards}

    def encode_batch(prompts: Sequence[str], text: Text | None = None) -> Batch:
        features = {name: of(prompts) for name, of in reward_features.items()}
        return Batch(conditioning(prompts, text), features)

    return encode_batch


def conditioning_of(
    config: Any, pipeline: Pipeline, layout: Layout, encoder: Callable[..., Conditioning]
) -> EncodeText:
    """``config.batch`` prompts to conditioning on the devices, by one compiled program.

    Args:
      encoder: `encode` with its size, or `encode_text`.
    """
    params, length = text_params(pipeline), pipeline.t5_length

    @layout.on_mesh
    def encode_rows(params: Any, text: Text) -> Conditioning:
        return encoder(pipeline.modules, params, text, max_sequence_length=length)

    empty = read_text(pipeline, [""] * config.batch)
    program = jax.jit(encode_rows, out_shardings=layout.batch_shardings(jax.eval_shape(encode_rows, params, empty)))

    def of(prompts: Sequence[str], text: Text | None = None) -> Conditioning:
        return program(params, layout.put_rows(read_text(pipeline, prompts) if text is None else text))

    return of


def encode_all(config: Any, layout: Layout, prompts: Sequence[str], pipeline: Pipeline) -> Encoded:
    """What the text encoders make of all prompts that a run may ask for, the empty one too, in the host's memory."""
    watched = load_prompts(config.watch.prompts) if config.watch.prompts else []
    texts = list(dict.fromkeys(["", *prompts, *watched]))
    with Progress(len(texts), unit="prompt", stage=lambda _: "text encoders") as progress:
        encode_batch = conditioning_of(config, pipeline, layout, encode_text)
        encoded = Encoded.make(texts, config.batch, encode_batch, progress.update)
        progress.note(f"{encoded}; the text encoders leave")
    return encoded
