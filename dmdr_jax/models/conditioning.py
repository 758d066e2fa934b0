"""What the text encoders hand to a denoiser."""

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Conditioning:
    """Text conditioning of a batch.

    Attributes:
      prompt_embeds: token features ``[b, n, d]``.
      pooled: pooled projection ``[b, p]``.
      key_bias: ``[n]`` fp32 or None, the logarithm of how many identical tokens each text token stands for.
    """

    prompt_embeds: Array
    pooled: Array
    key_bias: Array | None = None

    @property
    def batch(self) -> int:
        return self.prompt_embeds.shape[0]


def concatenate(parts: list[Conditioning]) -> Conditioning:
    """Stacks batches of the same prompt format along the batch axis."""
    return Conditioning(
        jnp.concatenate([p.prompt_embeds for p in parts]),
        jnp.concatenate([p.pooled for p in parts]),
        parts[0].key_bias,
    )


def broadcast_to(cond: Conditioning, batch: int) -> Conditioning:
    """Repeats a single-row conditioning (the unconditional prompt) to ``batch`` rows."""
    return Conditioning(
        jnp.broadcast_to(cond.prompt_embeds, (batch, *cond.prompt_embeds.shape[1:])),
        jnp.broadcast_to(cond.pooled, (batch, *cond.pooled.shape[1:])),
        cond.key_bias,
    )
