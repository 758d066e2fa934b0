"""Trains the embedded world's teachers: flow matching (Esser et al. 2024, eq. 12) or denoising (Ho et al. 2020).

The denoiser and its two CLIP text encoders are trained together on rendered scenes and their
captions, with the caption dropped now and then so that guidance works.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmdr_jax.diffusers_io.components import denoiser_of
from dmdr_jax.diffusers_io.text import encode, encode_uncond
from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.process import Flow, Process, VariancePreserving
from dmdr_jax.models.conditioning import where
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

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Endless batches; the i-th depends on (seed, i) alone, so a run resumes where it stopped."""
        i = start
        while True:
            rows = np.random.default_rng((seed, i)).integers(0, len(self.latents), batch)
            yield self.latents[rows], {name: ids[rows] for name, ids in self.ids.items()}
            i += 1


def make_loss(
    denoiser: Denoiser,
    modules: Mapping[str, nn.Module],
    size: tuple[int, int],
    empty_ids: Ids,
    zero_uncond: bool,
    uncond_probability: float,
) -> Callable[[Tree, Array, Ids, Array], Array]:
    """The teacher's loss ``(params, latents, ids, key) -> scalar``: how far the output is off, as a velocity.

    Args:
      modules: denoiser and text encoders, whose parameters ``params`` holds by component.
      size: of the images, in pixels.
      empty_ids: the empty prompt, ``[1, n]`` by text encoder.
      zero_uncond: the absent prompt is zeros (SDXL) in place of the encoded empty prompt.
      uncond_probability: how often a caption is dropped.
    """
    name = denoiser_of(modules)

    def loss_fn(params: Tree, latents: Array, ids: Ids, key: Array) -> Array:
        b = latents.shape[0]
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        t, weight = training_times(denoiser.process, key_t, b)
        noise = jax.random.normal(key_noise, latents.shape)
        drop = jax.random.uniform(key_drop, (b,)) < uncond_probability
        cond = encode(modules, params, ids, size)
        cond = where(drop, encode_uncond(modules, params, empty_ids, size, zero_uncond), cond)
        x_t = denoiser.process.add_noise(latents, noise, t)
        error = denoiser.output(Weights(params[name]), x_t, t, cond) - denoiser.process.target(latents, noise, t)
        return jnp.mean(weight * jnp.mean(error**2, axis=(1, 2, 3)))

    return loss_fn


def training_times(process: Process, key: Array, batch: int) -> tuple[Array, Array]:
    """Times ``[batch]`` and the weight of the squared error there.

    Flow: SD3's logit-normal density, weight 1 on the velocity (Esser et al. 2024, section 3.1). Variance preserving:
    uniform training steps and, where the network predicts noise, the weight ``1 / alpha^2`` that makes its error that
    of the velocity ``alpha e - sigma x0`` (Salimans & Ho 2022, arXiv 2202.00512, section 4): a few-step student starts
    from the noisiest steps, where an unweighted noise error hardly asks for x0 at all.
    """
    if isinstance(process, Flow):
        return jax.nn.sigmoid(jax.random.normal(key, (batch,))), jnp.ones(batch)
    t = process.snap(jax.random.uniform(key, (batch,)))
    if isinstance(process, VariancePreserving) and process.prediction == "epsilon":
        return t, 1.0 / process.coefficients(t)[0] ** 2
    return t, jnp.ones(batch)


def make_optimiser(lr: float, warmup: int, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; the position table is a buffer and stays as it is."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(warmup, steps // 2), steps, lr * 0.02)
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
