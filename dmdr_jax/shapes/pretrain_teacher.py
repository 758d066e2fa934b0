"""Trains the embedded world's teacher by flow matching (Lipman et al. 2023; Esser et al. 2024, eq. 12).

The transformer and its two CLIP text encoders are trained together on rendered scenes and their
captions, with the caption dropped now and then so that guidance works.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.mmdit import BUFFERS

Array = jax.Array
Tree = Any
Ids = dict[str, Array]


class TeacherState(NamedTuple):
    step: Array
    params: Tree
    opt_state: Tree
    ema: Tree


class SceneSet(NamedTuple):
    """Scenes encoded once: standardised latents ``[n, h, w, c]`` and token ids by tokenizer ``[n, length]``."""

    latents: np.ndarray
    ids: dict[str, np.ndarray]

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, Ids]]:
        """Endless batches; the i-th depends on (seed, i) alone, so a run resumes where it stopped."""
        i = start
        while True:
            rows = np.random.default_rng((seed, i)).integers(0, len(self.latents), batch)
            yield self.latents[rows], {name: ids[rows] for name, ids in self.ids.items()}
            i += 1


def flow_matching_loss(
    denoiser: Denoiser,
    encode: Callable[[Tree, Ids], Conditioning],
    params: Tree,
    latents: Array,
    ids: Ids,
    empty_ids: Ids,
    key: Array,
    uncond_probability: float,
) -> Array:
    """``mean |v(x_t, t, c) - (e - x0)|^2`` with t from the logit-normal density of SD3."""
    b = latents.shape[0]
    key_t, key_noise, key_drop = jax.random.split(key, 3)
    drop = jax.random.uniform(key_drop, (b, 1)) < uncond_probability
    ids = {name: jnp.where(drop, empty_ids[name], row) for name, row in ids.items()}
    t = jax.nn.sigmoid(jax.random.normal(key_t, (b,)))
    noise = jax.random.normal(key_noise, latents.shape)
    x_t = denoiser.process.add_noise(latents, noise, t)
    velocity = denoiser.output(Weights(params["transformer"]), x_t, t, encode(params, ids))
    return jnp.mean((velocity - denoiser.process.target(latents, noise)) ** 2)


def make_optimiser(lr: float, warmup: int, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; the position table is a buffer and stays as it is."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, lr * 0.02)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.01))
    return optax.partition({"train": adamw, "buffer": optax.set_to_zero()}, _labels)


def _labels(params: Tree) -> Tree:
    """By leaf of ``{component: parameters}``: "buffer" for the fixed tables, else "train"."""

    def label(path, _):
        return "buffer" if ".".join(key.key for key in path[1:]) in BUFFERS else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def make_step(loss_fn: Callable, optimiser: optax.GradientTransformation, ema: float, seed: int) -> Callable:
    """A jitted ``(state, latents, ids) -> (state, loss)``; randomness is a function of the step."""

    def step(state: TeacherState, latents: Array, ids: Ids) -> tuple[TeacherState, Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, latents, ids, key)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        averaged = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.ema, params)
        return TeacherState(state.step + 1, params, opt_state, averaged), loss

    return jax.jit(step, donate_argnums=0)
