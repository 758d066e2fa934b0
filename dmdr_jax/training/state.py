"""What training changes, and nothing else: plain trees, checkpointed whole."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dmdr_jax.models.mmdit import BUFFERS

Array = jax.Array
Tree = Any


class TrainState(NamedTuple):
    """The state of one run.

    Attributes:
      step: generator updates done.
      inner: fake score updates done.
      key: raw data of the run's root key; it never changes, randomness is folded from it.
      generator: the trained tree, a LoRA delta or a full tree without its buffers, fp32.
      fake: the guidance LoRA, fp32.
      generator_opt, fake_opt: optimiser states.
      ema: exponential moving average of ``generator``.
      extra: what only some methods keep, by name: "reference" (a student of before), "spread" (running statistics of
        rewards), "gan" (a discriminator's head and its optimiser state).
    """

    step: Array
    inner: Array
    key: Array
    generator: Tree
    fake: Tree
    generator_opt: Tree
    fake_opt: Tree
    ema: Tree
    extra: Tree


def new_state(
    seed: int,
    generator: Tree,
    fake: Tree,
    generator_tx: optax.GradientTransformation,
    fake_tx: optax.GradientTransformation,
    extra: Tree | None = None,
) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        inner=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        generator=generator,
        fake=fake,
        generator_opt=generator_tx.init(generator),
        fake_opt=fake_tx.init(fake),
        ema=jax.tree.map(jnp.copy, generator),
        extra=extra or {},
    )


def purpose_key(state: TrainState, counter: Array, purpose: str) -> Array:
    """The key for one purpose at one update: a function of (seed, counter, purpose) alone."""
    root = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(root, counter), zlib.crc32(purpose.encode()) & 0x7FFFFFFF)


def without_buffers(params: Tree, path: str = "") -> Tree:
    """The trainable part of a full parameter tree, as fp32: all but its fixed tables."""
    if not isinstance(params, dict):
        return params.astype(jnp.float32)
    trimmed = {k: without_buffers(v, f"{path}{k}.") for k, v in params.items() if f"{path}{k}" not in BUFFERS}
    return {k: v for k, v in trimmed.items() if not isinstance(v, dict) or v}


def with_buffers(trained: Tree, base: Tree) -> Tree:
    """A full parameter tree: trained leaves, and the base's where there are none."""
    if not isinstance(base, dict):
        return trained
    return {k: with_buffers(trained[k], v) if k in trained else v for k, v in base.items()}


def ema_update(ema: Tree, params: Tree, decay: float) -> Tree:
    """``decay ema + (1 - decay) params``."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)
