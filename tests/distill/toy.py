"""A small SD3-shaped transformer with random weights, for tests of everything that calls a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax import lora
from dmdr_jax.diffusion.denoiser import Denoiser
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig.from_diffusers(
    {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 6,
        "pos_embed_max_size": 4,
    }
)
LATENT = (4, 4, 3)
TARGETS = lora.SD3_WIDE_TARGETS


def noisy(tree, key, scale=0.3):
    """Random leaves everywhere, zero-initialised ones included; ``tree`` may be shapes."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([x.size for x in leaves])
    drawn = jnp.split(scale * jax.random.normal(key, (ends[-1],)), ends[:-1])
    return structure.unflatten([part.reshape(x.shape).astype(x.dtype) for part, x in zip(drawn, leaves)])


@functools.cache
def networks():
    """(denoiser, base parameters, a non-zero LoRA delta)."""
    module = MMDiT(CONFIG)
    c = cond(1, 0)
    first = jnp.zeros((1, *LATENT)), jnp.zeros(1), c.prompt_embeds, c.pooled
    params = noisy(jax.eval_shape(module.init, jax.random.key(0), *first)["params"], jax.random.key(1))
    config = lora.LoraConfig(2, 2.0, TARGETS)
    delta = noisy(jax.eval_shape(lambda p: lora.init(jax.random.key(2), p, config), params), jax.random.key(3))
    return Denoiser(module, Flow()), params, delta


def cond(b, seed):
    k = jax.random.split(jax.random.key(100 + seed))
    return Conditioning(jax.random.normal(k[0], (b, 5, 12)), jax.random.normal(k[1], (b, 6)))
