"""Prompts to conditioning, as diffusers' ``StableDiffusion3Pipeline.encode_prompt`` does it.

Each CLIP tower gives its last-but-one hidden states and a pooled projection; the two are joined along
the features, padded with zeros to the width of T5, and followed by T5's tokens (Esser et al. 2024,
figure 2a). A pipeline without T5 puts `MAX_SEQUENCE_LENGTH` zero tokens in their place. These are all alike
and, as the text stream has no positions, stay alike in every block, so one such token whose key carries
the bias ``log(MAX_SEQUENCE_LENGTH)`` in every attention is exactly the same and saves the rest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.errors import UserError
from dmdr_jax.models.conditioning import Conditioning

Array = jax.Array
Tree = Any

CLIP_TOWERS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
MAX_SEQUENCE_LENGTH = 256
"""Tokens of the T5 part, as diffusers' pipeline has it by default."""


def tokenize(
    pipeline: Pipeline, prompts: Sequence[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> dict[str, np.ndarray]:
    """Token ids of prompts, padded and cut to each tokenizer's fixed length.

    Args:
      pipeline: loaded with its text encoders.
      prompts: b texts; the unconditional prompt is ``""``.
      max_sequence_length: length for T5.

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
    lengths[T5] = max_sequence_length
    return {name: _ids(tokenizer, prompts, lengths[name]) for name, tokenizer in pipeline.tokenizers.items()}


def encode(
    modules: Mapping[str, nn.Module],
    params: Mapping[str, Tree],
    ids: Mapping[str, Array],
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> Conditioning:
    """Encodes token ids; pure, and jittable with ``modules`` and ``max_sequence_length`` bound.

    Args:
      modules: of the pipeline; the transformer's config gives the width of the tokens.
      params: parameter trees of the text encoders (more does no harm).
      ids: from `tokenize`: ``[b, n]`` by text encoder.
      max_sequence_length: number of T5 tokens that are stood for where ids has none for T5.

    Returns:
      Conditioning with ``prompt_embeds [b, n + m, d]`` and ``pooled [b, p]``, in the encoders' dtype;
      m is T5's length, or 1 with a ``key_bias`` where there is no T5.
    """
    towers = [modules[name].apply({"params": params[name]}, ids[name]) for name in CLIP_TOWERS]
    tokens = jnp.concatenate([tower.penultimate for tower in towers], axis=-1)
    pooled = jnp.concatenate([tower.projected for tower in towers], axis=-1)
    width = modules["transformer"].config.joint_attention_dim
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])))
    b, n, _ = tokens.shape
    if T5 in ids:
        more, key_bias = modules[T5].apply({"params": params[T5]}, ids[T5]), None
    else:
        more = jnp.zeros((b, 1, width), tokens.dtype)
        key_bias = jnp.zeros(n + 1, jnp.float32).at[n].set(math.log(max_sequence_length))
    return Conditioning(jnp.concatenate([tokens, more.astype(tokens.dtype)], axis=1), pooled, key_bias)


def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return batch.input_ids.astype(np.int32)
