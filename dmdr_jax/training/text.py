"""Prompts to what the networks are told of them: batch by batch as the run goes, or all of them before it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from dmdr_jax.data.prompts import load_prompts
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import Encoded, encode, tokenize
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.rewards.base import Reward
from dmdr_jax.rewards.feature_cache import BatchFeatures, on_host
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import Progress
from dmdr_jax.training.plan import Batch

Array = jax.Array
Tree = Any
Ids = dict[str, np.ndarray] | None
Encode = Callable[[Sequence[str], Ids], Conditioning]


def is_text_encoder(component: str) -> bool:
    return component.startswith("text_encoder")


def text_params(pipeline: Pipeline) -> dict[str, Tree]:
    """The text encoders' parameters; none where they have left."""
    return {name: tree for name, tree in pipeline.params.items() if is_text_encoder(name)}


def make_encoder(
    config: Any, pipeline: Pipeline, size: tuple[int, int], rewards: Sequence[Reward], layout: Layout
) -> Callable[..., Batch]:
    """Prompts (and their token ids, where they are there already) to a `Batch` on the devices; nothing waits for it.

    Args:
      size: height and width of the images in pixels.
    """
    conditioning = conditioning_of(config, pipeline, size, layout)
    reward_features = {reward.spec.name: BatchFeatures(reward, layout.put_batch) for reward in rewards}

    def encode_batch(prompts: Sequence[str], ids: Ids = None) -> Batch:
        features = {name: of(prompts) for name, of in reward_features.items()}
        return Batch(conditioning(prompts, ids), features)

    return encode_batch


def conditioning_of(config: Any, pipeline: Pipeline, size: tuple[int, int], layout: Layout) -> Encode:
    """The same without the rewards' part: by the text encoders, or from what they made before they left."""
    if (encoded := pipeline.encoded) is not None:
        return lambda prompts, ids: layout.put_rows(encoded.of(prompts))
    params, fixed = text_params(pipeline), dict(size=size, max_sequence_length=config.t5_length)

    def encode_rows(params: Any, ids: dict[str, Array]) -> Conditioning:
        with layout.scope():
            return encode(pipeline.modules, params, ids, **fixed)

    shapes = {
        name: jax.ShapeDtypeStruct(ids.shape, ids.dtype)
        for name, ids in tokenize(pipeline, [""] * config.batch, config.t5_length).items()
    }
    where = layout.batch_shardings(jax.eval_shape(encode_rows, params, shapes))
    encode_text = jax.jit(encode_rows, out_shardings=where)

    def by_encoders(prompts: Sequence[str], ids: Ids) -> Conditioning:
        ids = layout.put_batch(tokenize(pipeline, prompts, config.t5_length) if ids is None else ids)
        return encode_text(params, ids)

    return by_encoders


def encode_all(
    config: Any, pipeline: Pipeline, size: tuple[int, int], prompts: Sequence[str], layout: Layout
) -> Encoded:
    """What the text encoders make of all prompts that a run may ask for, the empty one too, in the host's memory."""
    watched = load_prompts(config.watch.prompts) if config.watch.prompts else []
    texts = list(dict.fromkeys(["", *prompts, *watched]))
    conditioning = conditioning_of(config, pipeline, size, layout)
    table: Conditioning | None = None
    with Progress(len(texts), unit="prompt", stage=lambda _: "text encoders") as progress:
        for start in range(0, len(texts), config.batch):
            rows = texts[start : start + config.batch]
            part = jax.tree.map(on_host, conditioning([*rows, *[""] * (config.batch - len(rows))], None))
            table = jax.tree.map(partial(_like, len(texts)), part) if table is None else table
            jax.tree.map(partial(_fill, start, len(rows)), table, part)
            progress.update(start + len(rows))
        assert table is not None
        size_of_all = sum(leaf.nbytes for leaf in jax.tree.leaves(table))
        progress.note(f"{len(texts)} prompts encoded, {size_of_all / 1e9:.2f} GB on the host; the text encoders leave")
    return Encoded({text: row for row, text in enumerate(texts)}, table)


def _like(count: int, part: np.ndarray) -> np.ndarray:
    """Room for all rows; what has one axis is for all rows."""
    return part if part.ndim == 1 else np.empty((count, *part.shape[1:]), part.dtype)


def _fill(start: int, count: int, table: np.ndarray, part: np.ndarray) -> None:
    if part.ndim > 1:
        table[start : start + count] = part[:count]
