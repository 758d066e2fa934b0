"""A network and its noise process: the one thing that scores, simulations and samplers call."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax import lora
from dmdr_jax.diffusion.process import Process
from dmdr_jax.models.conditioning import Conditioning, broadcast_to, interleave, interleave_rows, parted

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of one role: a full tree, and optionally a LoRA delta on it with its scale."""

    params: Tree
    lora: Tree | None = None
    lora_scale: Array | float | None = None


jax.tree_util.register_dataclass(Weights, data_fields=["params", "lora", "lora_scale"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A backbone used statelessly."""

    module: nn.Module
    process: Process

    def output(self, weights: Weights, z: Array, t: Array, cond: Conditioning) -> Array:
        """The network's raw output at ``z`` ``[b, h, w, c]`` and ``t`` (scalar or ``[b]``), fp32."""
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z.shape[:1])
        out: Any = self.module.apply(
            lora.variables(weights.params, weights.lora),
            z,
            self.process.model_time(t),
            cond.prompt_embeds,
            cond.pooled,
            lora_scale=weights.lora_scale,
            **cond.extras,
        )
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))

    def x0(self, weights: Weights, z: Array, t: Array, cond: Conditioning) -> Array:
        """The data estimate at ``z``, fp32 ``[b, h, w, c]``."""
        return self.process.to_x0(z, self.output(weights, z, t, cond), t)

    def guided_output(
        self, weights: Weights, z: Array, t: Array, cond: Conditioning, uncond: Conditioning | None, scale: Array
    ) -> Array:
        """Classifier-free guidance ``u + w (c - u)`` in one doubled batch; plain ``c`` where ``uncond`` is None."""
        if uncond is None:
            return self.output(weights, z, t, cond)
        both = interleave_rows([cond, broadcast_to(uncond, cond.batch)])
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z.shape[:1])
        conditional, unconditional = parted(self.output(weights, interleave([z, z]), interleave([t, t]), both), 2)
        return unconditional + scale * (conditional - unconditional)
