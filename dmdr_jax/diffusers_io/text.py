"""Prompts to conditioning, as diffusers' pipelines do it.

SDXL: each CLIP tower gives its last-but-one hidden states, joined along the features; the second one's
pooled projection and the image size go with them (Podell et al. 2023, section 2).

SD3: each CLIP tower gives its last-but-one hidden states and a pooled projection; the two are joined along
the features, padded with zeros to the width of T5, and followed by T5's tokens (Esser et al. 2024,
figure 2a). A pipeline without T5 puts `MAX_SEQUENCE_LENGTH` zero tokens in their place. These are all alike
and, as the text stream has no positions, stay alike in every block, so one such token whose key carries
the bias ``log(MAX_SEQUENCE_LENGTH)`` in every attention is exactly the same and saves the rest.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax import arrays
from dmdr_jax.arrays import on_host
from dmdr_jax.diffusers_io.components import MAX_SEQUENCE_LENGTH, SD3, SDXL, denoiser_of
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.errors import UserError
from dmdr_jax.models.conditioning import Conditioning, map_rows

Array = jax.Array
Tree = Any

Text = Mapping[str, Any] | Conditioning
"""Prompts as token ids ``[b, n]`` by text encoder, or what the text encoders made of them (`encode_text`)."""

CLIP_TOWERS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
_TOKENIZING = threading.Lock()  # a tokenizer that is at work in one thread must not be told another length in a second


def tokenize(pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids of prompts, padded and cut to each tokenizer's fixed length.

    Args:
      pipeline: loaded with its text encoders.
      prompts: b texts; the unconditional prompt is ``""``.

    Returns:
      ``[b, n]`` int32 by text encoder name; no entry for T5 where the pipeline has none.

    Raises:
      UserError: a text encoder was not loaded.
    """
    absent = [name for name in CLIP_TOWERS if name not in pipeline.tokenizers]
    if absent:
        raise UserError(f"the prompts need {' and '.join(absent)} of {pipeline.folder}, which are not loaded.")
    # diffusers cuts both towers at the first tokenizer's length.
    positions = min(pipeline.modules[name].config.max_position_embeddings for name in CLIP_TOWERS)
    lengths = dict.fromkeys(CLIP_TOWERS, min(pipeline.tokenizers[CLIP_TOWERS[0]].model_max_length, positions))
    lengths[T5] = pipeline.t5_length
    return {name: _ids(tokenizer, prompts, lengths[name]) for name, tokenizer in pipeline.tokenizers.items()}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the text encoders made of some prompts, in the host's memory: they themselves need not stay.

    Attributes:
      rows: of each prompt, its row.
      cond: of all rows, NumPy arrays.
    """

    rows: Mapping[str, int]
    cond: Conditioning

    @classmethod
    def make(
        cls,
        prompts: Sequence[str],
        batch: int,
        encode_batch: Callable[[Sequence[str]], Conditioning],
        progress: Callable[[int], Any] = lambda encoded: None,
    ) -> "Encoded":
        """Encodes each prompt once.

        Args:
          batch: prompts that ``encode_batch`` is given at a time, always so many.
          encode_batch: prompts to what `encode_text` gives, on the devices.
          progress: called with the number of prompts encoded so far, batch by batch.
        """
        texts = list(dict.fromkeys(prompts))
        table: Conditioning | None = None
        for start in range(0, len(texts), batch):
            rows = texts[start : start + batch]
            part = jax.tree.map(on_host, encode_batch([*rows, *[""] * (batch - len(rows))]))
            table = _room(len(texts), part) if table is None else table
            jax.tree.map(partial(_fill, start, len(rows)), table, part)
            progress(start + len(rows))
        assert table is not None, "no prompt"
        return cls({text: row for row, text in enumerate(texts)}, table)

    def of(self, prompts: Sequence[str]) -> Conditioning:
        """Rows of the prompts, on the host; UserError where one is not there."""
        unknown = [prompt for prompt in prompts if prompt not in self.rows]
        if unknown:
            first = repr(unknown[0])
            raise UserError(f"the prompt {first} was not encoded before the text encoders left; leave encode_once off.")
        index = np.asarray([self.rows[prompt] for prompt in prompts])
        return map_rows(lambda x: x[index], self.cond)

    def __str__(self) -> str:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.cond))
        return f"{len(self.rows)} prompts encoded, {size / 1e9:.2f} GB on the host"


def _room(count: int, part: Conditioning) -> Conditioning:
    """Arrays for ``count`` prompts like those of one batch; UserError where the host has no memory for them."""
    size = sum(leaf.nbytes // len(leaf) * count for leaf in jax.tree.leaves(part) if leaf.ndim > 1)
    if size > (free := arrays.free_memory()):
        told = f"what is kept of {count} prompts takes {size / 1e9:.0f} GB, and the host has {free / 1e9:.0f} GB left"
        raise UserError(f"{told}; take fewer prompts, or leave encode_once off.")
    return jax.tree.map(partial(_like, count), part)


def _like(count: int, part: np.ndarray) -> np.ndarray:
    """Room for all rows; what has one axis is for all rows."""
    return part if part.ndim == 1 else np.empty((count, *part.shape[1:]), part.dtype)


def _fill(start: int, count: int, table: np.ndarray, part: np.ndarray) -> None:
    if part.ndim > 1:
        table[start : start + count] = part[:count]


def read_text(pipeline: Pipeline, prompts: Sequence[str]) -> Text:
    """Prompts as `encode` takes them, on the host: encoded where the text encoders have left, else token ids."""
    if pipeline.encoded is not None:
        return pipeline.encoded.of(prompts)
    return tokenize(pipeline, prompts)


def load_text_first(
    load: Callable[[list[str]], Pipeline], components: Sequence[str], encode_all: Callable[[Pipeline], Encoded]
) -> Pipeline:
    """A pipeline whose text encoders were loaded first and alone, read all prompts, and left.

    Args:
      load: of components, the pipeline with these.
      components: all that are wanted.
      encode_all: what the text encoders, which alone are loaded, make of the prompts.
    """
    towers = load([name for name in components if is_text_encoder(name)])
    encoded = encode_all(towers)
    towers.params.clear()
    pipeline = load([name for name in components if not is_text_encoder(name)])
    pipeline.tokenizers, pipeline.encoded = towers.tokenizers, encoded
    return pipeline


def is_text_encoder(component: str) -> bool:
    return component.startswith("text_encoder")


def text_params(pipeline: Pipeline) -> dict[str, Tree]:
    """The text encoders' parameters; none where they have left."""
    return {name: tree for name, tree in pipeline.params.items() if is_text_encoder(name)}


def encode(
    modules: Mapping[str, nn.Module],
    params: Mapping[str, Tree],
    text: Text,
    size: tuple[int, int],
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> Conditioning:
    """What the denoiser is told; pure, and jittable with ``modules``, ``size`` and ``max_sequence_length`` bound.

    Args:
      modules: of the pipeline; the denoiser's config gives the width of the tokens.
      params: parameter trees of the text encoders (more does no harm); not read for text that is encoded.
      text: from `read_text`.
      size: height and width of the images in pixels, which SDXL is told.
      max_sequence_length: number of T5 tokens that are stood for where there are ids, and none for T5.

    Returns:
      What `encode_text` gives, and for SDXL ``time_ids``.
    """
    cond = text if isinstance(text, Conditioning) else encode_text(modules, params, text, max_sequence_length)
    if denoiser_of(modules) == SDXL.denoiser:
        return dataclasses.replace(cond, time_ids=time_ids(size, cond.batch))
    return cond


def encode_text(
    modules: Mapping[str, nn.Module],
    params: Mapping[str, Tree],
    ids: Mapping[str, Array],
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> Conditioning:
    """What the text encoders make of token ids (`tokenize`), whatever the images' size.

    Returns:
      Conditioning with ``prompt_embeds [b, n + m, d]`` and ``pooled [b, p]``, in the encoders' dtype; for SD3
      m is T5's length, or 1 with a ``key_bias`` where there is no T5; for SDXL m = 0.
    """
    towers: list[Any] = [modules[name].apply({"params": params[name]}, ids[name]) for name in CLIP_TOWERS]
    tokens = jnp.concatenate([tower.penultimate for tower in towers], axis=-1)
    if denoiser_of(modules) == SDXL.denoiser:
        return Conditioning(tokens, towers[1].projected)
    pooled = jnp.concatenate([tower.projected for tower in towers], axis=-1)
    width = modules[SD3.denoiser].config.joint_attention_dim
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])))
    b, n, _ = tokens.shape
    more: Any
    key_bias: Array | None = None
    if T5 in ids:
        more = modules[T5].apply({"params": params[T5]}, ids[T5])
    else:
        more = jnp.zeros((b, 1, width), tokens.dtype)
        key_bias = jnp.zeros(n + 1, jnp.float32).at[n].set(math.log(max_sequence_length))
    return Conditioning(jnp.concatenate([tokens, more.astype(tokens.dtype)], axis=1), pooled, key_bias)


def time_ids(size: tuple[int, int], batch: int) -> Array:
    """SDXL's micro-conditioning of uncropped images drawn at their own ``size``: ``[b, 6]`` fp32."""
    height, width = size
    return jnp.tile(jnp.asarray([height, width, 0, 0, height, width], jnp.float32), (batch, 1))


def zeroed(cond: Conditioning) -> Conditioning:
    """The absent prompt of SDXL: zeros for the text, the size as it is."""
    empty = {"prompt_embeds": jnp.zeros_like(cond.prompt_embeds), "pooled": jnp.zeros_like(cond.pooled)}
    return dataclasses.replace(cond, **empty)


def encode_uncond(
    modules: Mapping[str, nn.Module],
    params: Mapping[str, Tree],
    text: Text,
    size: tuple[int, int],
    zeros: bool,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> Conditioning:
    """What guidance leads away from, one row: ``text`` (of one row too) encoded, or zeros (`zeroed`)."""
    cond = encode(modules, params, text, size, max_sequence_length)
    return zeroed(cond) if zeros else cond


def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    with _TOKENIZING:
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return batch.input_ids.astype(np.int32)
