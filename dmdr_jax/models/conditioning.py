"""What the text encoders hand to a denoiser."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Conditioning:
    """Conditioning of a batch.

    Attributes:
      prompt_embeds: token features ``[b, n, d]``.
      pooled: pooled projection ``[b, p]``.
      key_bias: ``[n]`` fp32 or None, the logarithm of how many identical tokens each text token stands for (SD3).
      time_ids: ``[b, 6]`` fp32 or None: original height and width, top and left of the crop, target height and width,
        in pixels (SDXL's micro-conditioning, Podell et al. 2023, section 2.2).
    """

    prompt_embeds: Array
    pooled: Array
    key_bias: Array | None = None
    time_ids: Array | None = None

    @property
    def batch(self) -> int:
        return self.prompt_embeds.shape[0]

    @property
    def extras(self) -> dict[str, Any]:
        """What only some networks take, by the name of its argument."""
        named = {"key_bias": self.key_bias, "time_ids": self.time_ids}
        return {name: value for name, value in named.items() if value is not None}


def _per_row(cond: Conditioning) -> dict[str, Array]:
    """The fields with a batch axis."""
    fields = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond) if f.name != "key_bias"}
    return {name: value for name, value in fields.items() if value is not None}


def map_rows(function: Callable[[Array], Array], cond: Conditioning) -> Conditioning:
    """``function`` of every field with a batch axis; the key bias, which has none, as it is."""
    return dataclasses.replace(cond, **{name: function(x) for name, x in _per_row(cond).items()})


def concatenate(parts: list[Conditioning]) -> Conditioning:
    """Stacks batches of the same prompt format along the batch axis."""
    rows = [_per_row(part) for part in parts]
    return dataclasses.replace(parts[0], **{name: jnp.concatenate([row[name] for row in rows]) for name in rows[0]})


def interleave(parts: Sequence[Array]) -> Array:
    """n batches ``[b, ...]`` as one of n b rows, a sample's rows one after the other.

    So each device keeps the rows of its samples: put end to end, a batch that is split over devices would be gathered.
    """
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def interleave_rows(parts: Sequence[Conditioning]) -> Conditioning:
    """`interleave` of every field with a batch axis."""
    rows = [_per_row(part) for part in parts]
    return dataclasses.replace(parts[0], **{name: interleave([row[name] for row in rows]) for name in rows[0]})


def parted(x: Array, count: int) -> tuple[Array, ...]:
    """The ``count`` batches that were interleaved."""
    rows = x.reshape(-1, count, *x.shape[1:])
    return tuple(rows[:, i] for i in range(count))


def broadcast_to(cond: Conditioning, batch: int) -> Conditioning:
    """Repeats a single-row conditioning (the unconditional prompt) to ``batch`` rows."""
    return map_rows(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), cond)


def where(rows: Array, yes: Conditioning, no: Conditioning) -> Conditioning:
    """Row by row, ``yes`` where ``rows`` ``[b]`` is true, else ``no``; a single row of either serves all."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    other = _per_row(no)
    return dataclasses.replace(no, **{name: choose(x, other[name]) for name, x in _per_row(yes).items()})
