"""Trains the embedded world's autoencoder: pixel error plus a small KL term (Kingma & Welling 2014)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dmdr_jax.models.autoencoder import AutoencoderKL
from dmdr_jax.shapes import prompts, render
from dmdr_jax.shapes.world import World

Array = jax.Array
Tree = Any


def vae_loss(vae: AutoencoderKL, params: Tree, images: Array, key: Array, kl_weight: float) -> tuple[Array, dict]:
    """``mean |x - dec(z)| + mean (x - dec(z))^2 + kl_weight * KL(q(z|x) || N(0, I))`` per latent element."""
    posterior: Any = vae.apply({"params": params}, images, method="encode")
    mean, logvar = posterior
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    decoded: Any = vae.apply({"params": params}, z, method="decode")
    error = decoded - images
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).mean()
    loss = jnp.abs(error).mean() + (error**2).mean() + kl_weight * kl
    return loss, {"l1": jnp.abs(error).mean(), "mse": (error**2).mean(), "kl": kl}


def train_vae(
    vae: AutoencoderKL,
    world: World,
    *,
    steps: int,
    batch: int,
    lr: float,
    kl_weight: float,
    seed: int,
    start: Tree | None = None,
) -> tuple[Tree, tuple[float, float]]:
    """Returns the trained parameters and (scaling_factor, shift_factor) that standardise the latents.

    Args:
      start: parameters to begin with; None: fresh ones.
    """
    rng = np.random.default_rng(seed)
    side = world.size
    params = start or vae.init(jax.random.key(seed), jnp.zeros((1, side, side, 3)))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, steps // 2), steps, lr * 0.01)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    @jax.jit
    def step(params, opt_state, images, key):
        grads, metrics = jax.grad(vae_loss, argnums=1, has_aux=True)(vae, params, images, key, kl_weight)
        updates, opt_state = optimiser.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics

    opt_state = optimiser.init(params)
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for i in bar:
        scenes, _ = prompts.sample_batch(world, batch, rng)
        images = jnp.asarray(render.render(world, scenes)) * 2.0 - 1.0
        params, opt_state, metrics = step(params, opt_state, images, jax.random.fold_in(jax.random.key(seed + 1), i))
        if i % 100 == 99:
            bar.set_postfix({k: f"{float(v):.4f}" for k, v in metrics.items()})
    return params, latent_statistics(vae, params, world, rng)


def finetune_decoder(
    vae: AutoencoderKL, params: Tree, world: World, *, steps: int, batch: int, lr: float, noise: float, seed: int
) -> Tree:
    """Goes on with the decoder alone, the latents staying what they are, on means disturbed by ``noise``.

    A denoiser's latents are never quite an encoder's; a decoder that has seen some noise forgives that.
    ``noise`` is the largest standard deviation, in units of the latents' own.
    """
    rng = np.random.default_rng(seed)
    schedule = optax.cosine_decay_schedule(lr, steps, 0.01)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def loss_fn(decoder: Tree, encoder: Tree, images: Array, key: Array) -> Array:
        tree = encoder | {"decoder": decoder}
        mean, _ = vae.apply({"params": tree}, images, method="encode")
        mean = jax.lax.stop_gradient(mean)
        key_level, key_noise = jax.random.split(key)
        level = noise * mean.std() * jax.random.uniform(key_level, (len(images), 1, 1, 1))
        z = mean + level * jax.random.normal(key_noise, mean.shape)
        decoded: Any = vae.apply({"params": tree}, z, method="decode")
        error = decoded - images
        return jnp.abs(error).mean() + (error**2).mean()

    @jax.jit
    def step(decoder, opt_state, encoder, images, key):
        loss, grads = jax.value_and_grad(loss_fn)(decoder, encoder, images, key)
        updates, opt_state = optimiser.update(grads, opt_state)
        return optax.apply_updates(decoder, updates), opt_state, loss

    encoder = {name: tree for name, tree in params.items() if name != "decoder"}
    decoder, opt_state = params["decoder"], optimiser.init(params["decoder"])
    bar = tqdm(range(steps), desc="decoder", mininterval=5)
    for i in bar:
        scenes, _ = prompts.sample_batch(world, batch, rng)
        images = jnp.asarray(render.render(world, scenes)) * 2.0 - 1.0
        key = jax.random.fold_in(jax.random.key(seed + 1), i)
        decoder, opt_state, loss = step(decoder, opt_state, encoder, images, key)
        if i % 100 == 99:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return encoder | {"decoder": decoder}


def latent_statistics(vae: AutoencoderKL, params: Tree, world: World, rng: np.random.Generator) -> tuple[float, float]:
    """(1 / standard deviation, mean) of the raw latents over 2048 fresh scenes."""
    scenes, _ = prompts.sample_batch(world, 2048, rng)
    raw = encode_images(vae, params, render.render(world, scenes))
    return float(1.0 / raw.std()), float(raw.mean())


def centre_latents(vae: AutoencoderKL, params: Tree, world: World, seed: int = 0) -> tuple[Tree, float]:
    """The same codec with zero-mean latents, by 1 x 1 convolutions, and ``1 / standard deviation`` of those.

    ``quant_conv`` subtracts each channel's mean over 2048 scenes behind the encoder, ``post_quant_conv`` adds it again
    before the decoder; the shapes are SDXL's.
    """
    scenes, _ = prompts.sample_batch(world, 2048, np.random.default_rng(seed))
    raw = encode_images(vae, params, render.render(world, scenes))
    means = raw.mean((0, 1, 2))

    def convolution(bias: np.ndarray) -> Tree:
        return {"kernel": np.eye(len(bias), dtype=np.float32)[None, None], "bias": bias.astype(np.float32)}

    into, back = np.concatenate([-means, np.zeros_like(means)]), means
    tree = {**params, "quant_conv": convolution(into), "post_quant_conv": convolution(back)}
    return tree, float(1.0 / (raw - means).std())


def encode_images(vae: AutoencoderKL, params: Tree, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """Raw latent means ``[n, h, w, c]`` of images ``[n, H, W, 3]`` in [0, 1]."""
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x * 2.0 - 1.0, method="encode")[0])
    return np.concatenate([np.asarray(encode(params, images[i : i + batch])) for i in range(0, len(images), batch)])
