"""The adversarial branch of DMD2 (arXiv 2405.14867, section 4.3): is this noisy latent a real image's or the student's?

A small head on the features of the fake score's own network at the renoised latents. With D its logit::

    L_head = mean softplus(D(fake_t)) + mean softplus(-D(real_t))     trains head and fake score          (1)
    L_gen  = mean softplus(-D(x_t)),  x the student's x0              trains the student                  (2)

Real images come with their captions. The head is ours (DMD2's is a stack of convolutions made for SDXL): features are
normalised, each token or pixel is judged by a two-layer network, and the judgements are averaged.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dmdr_jax.distill.features import Features

Array = jax.Array
Head = dict[str, dict[str, Array]]

_EPS = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class GanSpec:
    """Settings of the discriminator; compared by identity.

    Attributes:
      layers: of the fake score's network.
      weight: of (1) in the fake score's loss.
      tx: the head's optimiser.
      width: of the head's hidden layer.
    """

    layers: tuple[str, ...]
    weight: float
    tx: optax.GradientTransformation
    width: int = 64


def init_head(key: Array, widths: dict[str, int], hidden: int) -> Head:
    """A head that answers 0 for everything, for features of the given widths."""
    head: Head = {}
    for i, (name, width) in enumerate(sorted(widths.items())):
        first = jax.random.normal(jax.random.fold_in(key, i), (width, hidden), jnp.float32) * width**-0.5
        head[name] = {
            "hidden": first,
            "hidden_bias": jnp.zeros(hidden),
            "out": jnp.zeros(hidden),
            "out_bias": jnp.zeros(()),
        }
    return head


def logits(head: Head, features: Features) -> Array:
    """One logit per row ``[b]``, positive for real; features are ``[b, ..., d]``."""
    return sum((_judge(head[name], x) for name, x in features.items()), jnp.float32(0.0)) / len(features)


def discriminator_loss(fake: Array, real: Array) -> Array:
    """(1) of logits ``[b]``."""
    return jax.nn.softplus(fake).mean() + jax.nn.softplus(-real).mean()


def generator_loss(fake: Array) -> Array:
    """(2) of logits ``[b]``."""
    return jax.nn.softplus(-fake).mean()


def _judge(layer: dict[str, Array], x: Array) -> Array:
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + _EPS)
    x = jax.nn.silu(x @ layer["hidden"] + layer["hidden_bias"])
    return (x @ layer["out"] + layer["out_bias"]).mean(-1)
