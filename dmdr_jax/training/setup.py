"""From a configuration to everything a run needs: networks, plan, terms, first state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmdr_jax import lora
from dmdr_jax.diffusers_io.pipeline import Pipeline, load_pipeline
from dmdr_jax.diffusion.denoiser import Denoiser
from dmdr_jax.diffusion.grids import authors_grid, student_grid
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.distill.schedules import RenoiseTimes
from dmdr_jax.distill.simulate import Simulation
from dmdr_jax.errors import UserError
from dmdr_jax.objectives.base import Term
from dmdr_jax.objectives.dm import DistributionMatching
from dmdr_jax.objectives.refl import ReFL
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import ClipReward, load_clip_reward
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.state import TrainState, new_state, without_buffers
from dmdr_jax.training.step import FAKE_DATA, Plan

Tree = Any
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float16": jnp.float16}
GRIDS = {"uniform": student_grid, "authors": authors_grid}
LORA_TARGETS = {"attention": lora.SD3_TARGETS, "wide": lora.SD3_WIDE_TARGETS}


def choice(what: str, value: str, known: Any) -> Any:
    """``known[value]``, or the value itself where ``known`` is a sequence; UserError names the choices."""
    if value not in known:
        raise UserError(f"{what} is {value!r}; choose one of: {', '.join(known)}.")
    return known[value] if isinstance(known, dict) else value


COUNTS = (
    "steps",
    "batch",
    "student.steps",
    "fake.updates",
    "fake.lora.rank",
    "generator.lora.rank",
    "preview.every",
    "preview.images",
    "preview.teacher_steps",
    "checkpoint.every",
    "checkpoint.keep",
)
"""Keys that must be at least 1."""


def check(config: Any) -> None:
    """Refuses numbers that mean nothing, before anything is loaded."""
    for key in COUNTS:
        node = config
        for name in key.split("."):
            node = node[name]
        if node < 1:
            raise UserError(f"config.{key} must be at least 1, not {node}.")
    if config.seed < 0:
        raise UserError(f"config.seed must not be negative, and is {config.seed}.")


def load_teacher(config: Any, layout: Layout) -> Pipeline:
    """The frozen networks, in the configured types, each tensor placed as it arrives."""
    base = choice("config.base_dtype", config.base_dtype, DTYPES)
    compute = choice("config.compute_dtype", config.compute_dtype, DTYPES)
    if not config.model:
        raise UserError("config.model is empty: give a diffusers folder, a hub id, or shapes:sd3.")
    pipeline = load_pipeline(
        resolve(config.model),
        dtype=base,
        compute_dtype=compute,
        sharding=layout.component_shardings,
        variant=config.variant or None,
    )
    if config.remat != "none":
        pipeline.modules["transformer"] = pipeline.modules["transformer"].clone(remat=config.remat)
    return pipeline


def load_rewards(config: Any) -> tuple[ClipReward, ...]:
    """The rewards of the run, in the order of their names."""
    specs = [RewardSpec(name=name, **config.rewards[name].to_dict()) for name in sorted(config.rewards)]
    specs = [dataclasses.replace(spec, path=resolve(spec.path)) for spec in specs if spec.weight]
    dtype = choice("config.base_dtype", config.base_dtype, DTYPES)
    return tuple(load_clip_reward(spec, dtype, remat=config.remat != "none") for spec in specs)


def make_terms(config: Any, rewards: tuple[ClipReward, ...]) -> tuple[Term, ...]:
    """The generator's objective: DMDR's two terms, eq. 2 of the paper."""
    terms: list[Term] = []
    if config.dm.weight:
        terms.append(DistributionMatching(config.dm.weight))
    if rewards:
        terms.append(ReFL(tuple(reward.spec for reward in rewards)))
    if not terms:
        raise UserError("nothing to train: config.dm.weight is 0 and no reward has a weight.")
    if not any(term.active(0) for term in terms):
        raise UserError("no term is active at step 0: give a reward start=0, or config.dm.weight a positive value.")
    return tuple(terms)


def make_plan(config: Any, pipeline: Pipeline, rewards: tuple[ClipReward, ...]) -> Plan:
    """The static part of the updates."""
    student, dynamics = config.student, config.dynamics
    grid = choice("config.student.grid", student.grid, GRIDS)(student.steps, student.shift)
    simulation = Simulation(student.simulation, tuple(map(float, grid)), student.shared_index)
    simulation.kernel  # noqa: B018  an unknown kernel is an error before anything is compiled
    choice("config.dynamics.rs", dynamics.rs, ("dynamic", "uniform", "hold"))
    renoise = RenoiseTimes(
        dynamics.steps if dynamics.rs == "dynamic" else 0, dynamics.tau_low, dynamics.tau_high, dynamics.rs == "hold"
    )
    fake_alpha = lora_config(config.fake.lora).scale
    is_lora = choice("config.generator.kind", config.generator.kind, ("lora", "full")) == "lora"
    return Plan(
        denoiser=Denoiser(pipeline.modules["transformer"], Flow()),
        vae=pipeline.modules["vae"],
        rewards=rewards,
        simulation=simulation,
        renoise=renoise,
        generator_lora_scale=lora_config(config.generator.lora).scale if is_lora else None,
        fake_scale=config.fake.scale * fake_alpha,
        dg_initial=dynamics.dg * fake_alpha,
        dynamic_steps=dynamics.steps,
        guidance=config.guidance.scale,
        guidance_jitter=config.guidance.jitter,
        fake_data=choice("config.fake.data", config.fake.data, FAKE_DATA),
        latent_shape=latent_shape(config, pipeline),
        generator_tx=make_optimiser(config.optim, config.optim.generator),
        fake_tx=make_optimiser(config.optim, config.optim.fake),
        ema_decay=config.ema,
        normaliser_floor=config.dm.normaliser_floor,
    )


def latent_shape(config: Any, pipeline: Pipeline) -> tuple[int, int, int]:
    """``(h, w, c)`` of the run's latents; UserError where the image size does not fit the networks."""
    transformer, factor = pipeline.modules["transformer"].config, pipeline.modules["vae"].config.downsampling
    height = config.height or transformer.sample_size * factor
    width = config.width or transformer.sample_size * factor
    unit = factor * transformer.patch_size
    if height % unit or width % unit:
        raise UserError(f"config.height and config.width must be multiples of {unit}, not {height} and {width}.")
    return height // factor, width // factor, transformer.in_channels


def make_optimiser(common: Any, own: Any) -> optax.GradientTransformation:
    """AdamW with fp32 moments behind a clip of the global norm; constant rate after an optional warm-up."""
    rate = optax.linear_schedule(0.0, own.lr, own.warmup) if own.warmup else own.lr
    adamw = optax.adamw(rate, b1=common.b1, b2=common.b2, weight_decay=own.weight_decay)
    return optax.chain(optax.clip_by_global_norm(common.clip), adamw)


def lora_config(settings: Any) -> lora.LoraConfig:
    return lora.LoraConfig(settings.rank, settings.alpha, choice("lora.targets", settings.targets, LORA_TARGETS))


def make_state(config: Any, plan: Plan, base: Tree) -> TrainState:
    """The state before the first update: the student is the teacher, both deltas are zero."""
    key_generator, key_fake = jax.random.split(jax.random.key(config.seed))
    if plan.generator_lora_scale is None:
        generator = without_buffers(base)
    else:
        generator = lora.init(key_generator, base, lora_config(config.generator.lora))
    fake = lora.init(key_fake, base, lora_config(config.fake.lora))
    return new_state(config.seed, generator, fake, plan.generator_tx, plan.fake_tx)
