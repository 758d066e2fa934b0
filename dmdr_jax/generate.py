"""Drawing images: prompts and noise in, pixels out. Shared by sampling, evaluation and training previews."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.arrays import on_host
from dmdr_jax.diffusers_io.components import denoiser_of
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import encode, encode_uncond, read_text
from dmdr_jax.diffusion.ddpm_grids import euler_grid, initial_scale
from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.grids import flow_match_euler_sigmas
from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.diffusion.process import Flow, Process
from dmdr_jax.diffusion.sampler import sample
from dmdr_jax.models.autoencoder import AutoencoderKL, raw_from_latents
from dmdr_jax.models.placement import unsplit
from dmdr_jax.rewards.memory import in_microbatches

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to draw.

    Attributes:
      grid: ``steps + 1`` times.
      kernel: the transition kernel.
      guidance: classifier-free guidance scale; 1 or less: none.
      initial_scale: what standard normal noise is multiplied by to be the first state.
    """

    grid: tuple[float, ...]
    kernel: Kernel
    guidance: float
    initial_scale: float = 1.0

    @property
    def guided(self) -> bool:
        return self.guidance > 1.0

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return (len(self.grid) - 1) * (2 if self.guided else 1)


def teacher_recipe(
    pipeline: Pipeline, steps: int | None, guidance: float | None, size: tuple[int, int], kernel: Kernel | None = None
) -> Recipe:
    """How diffusers draws with a plain folder: on its scheduler's grid, with its pipeline's defaults for None.

    Args:
      size: height and width of the images in pixels, on which some schedulers' grids depend.
    """
    steps = pipeline.kind.steps if steps is None else steps
    guidance = pipeline.kind.guidance if guidance is None else guidance
    if isinstance(pipeline.process, Flow):
        side = pipeline.modules["vae"].config.downsampling * pipeline.modules[pipeline.denoiser].config.patch_size
        grid, scale = flow_match_euler_sigmas(pipeline.scheduler, steps, (size[0] // side) * (size[1] // side)), 1.0
    else:
        grid = euler_grid(pipeline.scheduler, steps)
        scale = initial_scale(pipeline.scheduler, pipeline.process, grid[0])
    return Recipe(tuple(map(float, grid)), kernel or parse_kernel("ode"), guidance, scale)


def decode_images(vae: AutoencoderKL, params: Tree, latents: Array) -> Array:
    """Latents ``[b, h, w, c]`` to pixels ``[b, H, W, 3]``, nominally in [0, 1] and not clipped, fp32."""
    pixels: Any = vae.apply({"params": params}, raw_from_latents(latents, vae.config), method="decode")
    return pixels.astype(jnp.float32) * 0.5 + 0.5


def initial_noise(pipeline: Pipeline, height: int, width: int, seeds: Sequence[int]) -> np.ndarray:
    """Standard normal latents ``[b, h, w, c]``; row i depends on ``seeds[i]`` alone, whatever the batch."""
    factor = pipeline.modules["vae"].config.downsampling
    shape = (height // factor, width // factor, pipeline.modules[pipeline.denoiser].config.in_channels)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return np.asarray(jax.vmap(lambda k: jax.random.normal(k, shape))(keys))


def row_keys(seed: int, rows: Sequence[int]) -> Array:
    """One key per image ``[b]``: a function of (seed, row) alone."""
    root = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(root, row))(jnp.asarray(rows, jnp.uint32))


AT_A_TIME = 2**18
"""Pixels that a device decodes at a time: a decoder's activations are kilobytes a pixel."""


@partial(jax.jit, static_argnames=("networks", "recipe", "devices"))
def _draw(
    networks: "_Networks", recipe: Recipe, devices: int, params: Tree, weights: Weights, text, empty, noise, keys
) -> Array:
    modules = dict(networks.modules)
    denoiser = Denoiser(modules[denoiser_of(modules)], networks.process)
    factor = modules["vae"].config.downsampling
    size = noise.shape[1] * factor, noise.shape[2] * factor
    cond = encode(modules, params, text, size, networks.t5_length)
    uncond = None
    if recipe.guided:
        uncond = encode_uncond(modules, params, empty, size, networks.zero_uncond, networks.t5_length)

    def output_fn(z, t):
        return denoiser.guided_output(weights, z, t, cond, uncond, recipe.guidance)

    first = noise * recipe.initial_scale
    latents = sample(output_fn, denoiser.process, recipe.kernel, first, recipe.grid, keys)
    decode = in_microbatches(
        partial(decode_images, modules["vae"], params["vae"]),
        devices * max(AT_A_TIME // (size[0] * size[1]), 1),
        remat=False,
    )
    with unsplit():
        return jnp.clip(decode(latents), 0.0, 1.0)


def _put(tree: Tree, sharding: jax.sharding.NamedSharding | None) -> Tree:
    """Arrays ``[b, ...]`` split over devices; what has one axis is for all rows, whole."""
    if sharding is None:
        return jax.device_put(tree)
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, jax.tree.map(lambda x: sharding if x.ndim > 1 else whole, tree))


@dataclasses.dataclass(frozen=True)
class _Networks:
    """What is static of a pipeline, hashable, so that one compiled program serves every call with the same."""

    modules: tuple[tuple[str, Any], ...]
    process: Process
    zero_uncond: bool
    t5_length: int


def draw_images(
    pipeline: Pipeline,
    weights: Weights,
    recipe: Recipe,
    prompts: Sequence[str],
    noise: np.ndarray,
    *,
    batch: int = 32,
    negative_prompt: str | None = None,
    seed: int = 0,
    places: Sequence[int] | None = None,
    params: Mapping[str, Tree] | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int], Any] = lambda drawn: None,
) -> np.ndarray:
    """Images ``[n, H, W, 3]`` float32 in [0, 1], in the prompts' order.

    Args:
      pipeline: loaded with VAE and text encoders, or what these made of the prompts.
      weights: the denoiser to draw with (the teacher's parameters, or a student's).
      noise: initial latents ``[n, h, w, c]``.
      negative_prompt: what guidance leads away from; None for the pipeline's own, the empty prompt or zeros.
      batch: images per compiled call; the last one is padded, so that one program serves all.
      seed: randomness of stochastic kernels; an image depends on it and on its own place, not on its batch.
      places: of the images, where these prompts are some of a longer list; 0, 1, 2, ... by default.
      params: text encoders (where they are loaded) and VAE; the pipeline's own by default.
      sharding: how a batch is split over devices that hold ``weights`` and ``params``; None: one device.
      progress: called with the number of images drawn, batch by batch.
    """
    program, params = _program(pipeline, params, recipe, negative_prompt, sharding)
    empty = read_text(pipeline, [negative_prompt or ""])
    batch = batch if sharding else min(batch, len(prompts))
    places = range(len(prompts)) if places is None else places
    images = []
    for start in range(0, len(prompts), batch):
        rows = [min(start + i, len(prompts) - 1) for i in range(batch)]
        text, keys = read_text(pipeline, [prompts[i] for i in rows]), row_keys(seed, [places[i] for i in rows])
        text, first = _put((text, noise[rows]), sharding)  # over several hosts jax takes no keys here
        drawn = program(_draw, params, weights, text, empty, first, keys)
        images.append(on_host(drawn)[: len(prompts) - start])
        progress(len(images[-1]))
    return np.concatenate(images)


def trace_drawing(
    pipeline: Pipeline,
    recipe: Recipe,
    sharding: jax.sharding.NamedSharding | None,
    params: Mapping[str, Tree],
    weights: Weights,
    text: Tree,
    empty: Tree,
    noise: Any,
) -> tuple[Any, Tree]:
    """The program of `draw_images`, traced for one batch of shapes with shardings, and all that it is given."""
    program, params = _program(pipeline, params, recipe, None, sharding)
    keys = jax.eval_shape(partial(row_keys, 0, range(noise.shape[0])))
    inputs = params, weights, text, empty, noise, keys
    return program(_draw.trace, *inputs), inputs


def _program(
    pipeline: Pipeline,
    params: Mapping[str, Tree] | None,
    recipe: Recipe,
    negative_prompt: str | None,
    sharding: jax.sharding.NamedSharding | None,
) -> tuple[Callable[..., Any], dict[str, Tree]]:
    """How `_draw`, or its tracing, is called on the devices of ``sharding``, and the parameters that it reads."""
    params = {name: tree for name, tree in (params or pipeline.params).items() if name != pipeline.denoiser}
    zeros = negative_prompt is None and pipeline.zero_uncond
    networks = _Networks(tuple(sorted(pipeline.modules.items())), pipeline.process, zeros, pipeline.t5_length)
    devices = sharding.num_devices if sharding else 1

    def call(draw: Callable[..., Any], *inputs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh) if sharding else contextlib.nullcontext():
            return draw(networks, recipe, devices, *inputs)

    return call, params
