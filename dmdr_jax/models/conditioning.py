"""What the text encoders hand to a denoiser."""

import dataclasses

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
    def extras(self) -> dict[str, Array]:
        """What only some networks take, by the name of its argument."""
        named = {"key_bias": self.key_bias, "time_ids": self.time_ids}
        return {name: value for name, value in named.items() if value is not None}


def _per_row(cond: Conditioning) -> dict[str, Array]:
    """The fields with a batch axis."""
    fields = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond) if f.name != "key_bias"}
    return {name: value for name, value in fields.items() if value is not None}


def concatenate(parts: list[Conditioning]) -> Conditioning:
    """Stacks batches of the same prompt format along the batch axis."""
    rows = [_per_row(part) for part in parts]
    return parts[0].replace(**{name: jnp.concatenate([row[name] for row in rows]) for name in rows[0]})


def broadcast_to(cond: Conditioning, batch: int) -> Conditioning:
    """Repeats a single-row conditioning (the unconditional prompt) to ``batch`` rows."""
    rows = _per_row(cond)
    return cond.replace(**{name: jnp.broadcast_to(x, (batch, *x.shape[1:])) for name, x in rows.items()})


def where(rows: Array, yes: Conditioning, no: Conditioning) -> Conditioning:
    """Row by row, ``yes`` where ``rows`` ``[b]`` is true, else ``no``; a single row of either serves all."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    other = _per_row(no)
    return no.replace(**{name: choose(x, other[name]) for name, x in _per_row(yes).items()})
