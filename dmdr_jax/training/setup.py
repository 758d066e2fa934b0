"""From a configuration to everything a run needs: networks, plan, terms, first state."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmdr_jax import lora, methods
from dmdr_jax.diffusers_io.hub import locate_lora
from dmdr_jax.diffusers_io.lora_file import read_lora, start_from
from dmdr_jax.diffusers_io.pipeline import Pipeline, components_of, load_network, load_pipeline
from dmdr_jax.diffusers_io.text import load_text_first
from dmdr_jax.diffusion.denoiser import Denoiser
from dmdr_jax.diffusion.grids import authors_grid, grid_at, student_grid
from dmdr_jax.diffusion.process import Flow, Process
from dmdr_jax.distill.regression import LOSSES
from dmdr_jax.distill.schedules import RenoiseTimes
from dmdr_jax.distill.simulate import Simulation
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.canaries import apart
from dmdr_jax.models.attention import kernel_for
from dmdr_jax.objectives.base import Term
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.clip_reward import ClipReward
from dmdr_jax.rewards.registry import open_spec
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training import compose
from dmdr_jax.training.checkpoints import Checkpoints
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.ranges import check_ranges
from dmdr_jax.training.state import TrainState, new_state, without_buffers
from dmdr_jax.training.step import FAKE_DATA, Plan
from dmdr_jax.training.text import encode_all
from dmdr_jax.training.watch import check_held_out

Tree = Any
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float16": jnp.float16}
GRIDS = {"uniform": student_grid, "authors": authors_grid}
LORA_TARGETS = {
    "sd3": {"attention": lora.SD3_TARGETS, "wide": lora.SD3_WIDE_TARGETS},
    "sdxl": {"attention": lora.SDXL_ATTENTION_TARGETS, "wide": lora.SDXL_TARGETS},
}
REWARD_DECODER = "reward_decoder"
UNCOND = ("pipeline", "zeros", "empty")
BASES = ("auto", "split", "whole")


def choice(what: str, value: str, known: Any) -> Any:
    """``known[value]``, or the value itself where ``known`` is a sequence; UserError names the choices."""
    if value not in known:
        raise UserError(f"{what} is {value!r}; choose one of: {', '.join(known)}.")
    return known[value] if isinstance(known, dict) else value


def check(config: Any) -> None:
    """Refuses numbers that mean nothing, before anything is loaded."""
    config = methods.resolve(config)
    check_ranges(config)
    choice("config.mesh.base", config.mesh.base, BASES)
    choice("config.ode.loss", config.ode.loss, LOSSES)
    if not config.ode.steps:
        return
    if config.ode.pairs < config.ode.batch:
        raise UserError(
            f"config.ode.pairs is {config.ode.pairs}, fewer than one batch: take at least config.ode.batch,"
            f" {config.ode.batch}."
        )
    if config.generator.lora.start:
        raise UserError(
            "config.ode.steps and config.generator.lora.start both say how the student starts; leave one out."
        )


def check_batches(config: Any, layout: Layout) -> None:
    """UserError where a batch does not divide over the devices."""
    batches = {"config.batch": config.batch} | ({"config.ode.batch": config.ode.batch} if config.ode.steps else {})
    for key, batch in batches.items():
        try:
            layout.check_batch(batch)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    compose.check_groups(config, layout.mesh.size)


def load_teacher(config: Any, layout: Layout, prompts: Sequence[str] = ()) -> Pipeline:
    """The frozen networks, in the configured types, each tensor placed as it arrives.

    Args:
      prompts: of the run. Where ``config.encode_once`` says so the text encoders come first, read all of them and
        leave before anything else is loaded.
    """
    base = choice("config.base_dtype", config.base_dtype, DTYPES)
    compute = choice("config.compute_dtype", config.compute_dtype, DTYPES)
    if not config.model:
        raise UserError("config.model is empty: give a diffusers folder, a hub id, shapes:sd3 or shapes:sdxl.")
    name = resolve(config.model)
    load = partial(
        load_pipeline,
        name,
        dtype=base,
        compute_dtype=compute,
        sharding=layout.component_shardings,
        variant=config.variant or None,
        t5_length=config.t5_length,
    )
    wanted = components_of(name, optional=config.t5)
    if config.encode_once:
        pipeline = load_text_first(load, wanted, partial(encode_all, config, layout, prompts))
    else:
        pipeline = load(wanted)
    set_remat(config, pipeline)
    set_attention(config, pipeline, layout.mesh)
    if config.reward_decoder:
        add_reward_decoder(config.reward_decoder, pipeline, base)
    return pipeline


def set_remat(config: Any, pipeline: Pipeline) -> None:
    """Has the denoiser recompute in its backward pass what ``config.remat`` says."""
    if config.remat != "none":
        pipeline.modules[pipeline.denoiser] = pipeline.modules[pipeline.denoiser].clone(remat=config.remat)


def set_attention(config: Any, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> None:
    """Has denoiser and codec attend to long sequences with what ``config.attention`` says, on the mesh's devices."""
    pipeline.attend_with(kernel_for(config.attention, mesh))


def add_reward_decoder(name: str, pipeline: Pipeline, dtype: Any) -> None:
    """Puts a small decoder (diffusers' ``AutoencoderTiny``) beside the pipeline's networks, for the rewards' images.

    Raises:
      UserError: it is none, or not one of this model's latents.
    """
    module, params = load_network(name, dtype)
    own = pipeline.modules["vae"].config
    fits = [getattr(c, n) for n in ("downsampling", "latent_channels") for c in (module.config, own)]
    if fits[0] != fits[1] or fits[2] != fits[3]:
        raise UserError(
            f"config.reward_decoder={name} decodes {fits[2]} channels at 1/{fits[0]} of the image; the latents of"
            f" {pipeline.name} have {fits[3]} at 1/{fits[1]}."
        )
    pipeline.modules[REWARD_DECODER], pipeline.params[REWARD_DECODER] = module, params


def reward_decoder(components: Mapping[str, Any]) -> Any:
    """Of a pipeline's modules or parameters, those that decode latents for the rewards."""
    return components.get(REWARD_DECODER, components["vae"])


def reward_specs(config: Any) -> list[RewardSpec]:
    """The rewards that have a weight, in the order of their names; none where the method reads none."""
    config = methods.resolve(config)
    if not methods.uses_rewards(config):
        return []
    specs = [RewardSpec(name=name, **config.rewards[name].to_dict()) for name in sorted(config.rewards)]
    return [dataclasses.replace(spec, path=resolve(spec.path)) for spec in specs if spec.weight]


def held_out_rewards(config: Any, trained: tuple[Reward, ...]) -> tuple[Reward, ...]:
    """The rewards that are watched and never trained on, in the order of their names, in the host's memory.

    Raises:
      UserError: one cannot be read, or is trained on.
    """
    if not config.watch.every:
        return ()
    named = {name: config.watch.rewards[name].to_dict() for name in sorted(config.watch.rewards)}
    specs = [RewardSpec(name=name, **fields) for name, fields in named.items()]
    specs = [dataclasses.replace(spec, path=resolve(spec.path)) for spec in specs if spec.path]
    held_out = tuple(apart(_open([spec], config)[0], to_host=True) for spec in specs)  # one at a time on a device
    check_held_out(trained, held_out)
    return held_out


def load_rewards(config: Any, prompts: Sequence[str] = (), layout: Layout | None = None) -> tuple[Reward, ...]:
    """The rewards of the run, in the order of their names.

    Args:
      prompts: that they are going to read.
      layout: where their networks go, so that no copy stays on the first device.
    """
    rewards = _open(reward_specs(config), config)
    for reward in rewards:
        if isinstance(reward, ClipReward):
            reward.check_prompts(prompts)
    return rewards if layout is None else tuple(_placed(reward, layout) for reward in rewards)


def _placed(reward: Reward, layout: Layout) -> Reward:
    changes = {"params": layout.place_reward(reward)}
    if isinstance(reward, ClipReward):
        changes["text_params"] = layout.replicate(reward.text_params)
    return dataclasses.replace(reward, **changes)  # type: ignore[type-var]


def _open(specs: list[RewardSpec], config: Any) -> tuple[Reward, ...]:
    dtype = choice("config.base_dtype", config.base_dtype, DTYPES)
    return tuple(open_spec(spec, dtype, remat=config.remat != "none") for spec in specs)


def make_terms(config: Any, rewards: tuple[Reward, ...]) -> tuple[Term, ...]:
    """The generator's objective, as the configuration's method has it."""
    return compose.make_terms(config, rewards)


def make_plan(config: Any, pipeline: Pipeline, rewards: tuple[Reward, ...]) -> Plan:
    """The static part of the updates."""
    config = methods.resolve(config)
    student, dynamics = config.student, config.dynamics
    simulation = Simulation(student.simulation, make_grid(student, pipeline.process), student.shared_index)
    simulation.kernel  # noqa: B018  an unknown kernel is an error before anything is compiled
    choice("config.dynamics.rs", dynamics.rs, ("dynamic", "uniform", "hold"))
    renoise = RenoiseTimes(
        dynamics.steps if dynamics.rs == "dynamic" else 0, dynamics.tau_low, dynamics.tau_high, dynamics.rs == "hold"
    )
    fake_alpha = config.fake.lora.alpha / config.fake.lora.rank
    is_lora = choice("config.generator.kind", config.generator.kind, ("lora", "full")) == "lora"
    denoiser = Denoiser(pipeline.modules[pipeline.denoiser], pipeline.process)
    return Plan(
        denoiser=denoiser,
        vae=_decoder(config, pipeline),
        rewards=rewards,
        simulation=simulation,
        renoise=renoise,
        generator_lora_scale=config.generator.lora.alpha / config.generator.lora.rank if is_lora else None,
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
        reward_microbatch=config.reward_microbatch,
        decode_split=config.decode_split,
        method=compose.make_method_plan(config, denoiser, simulation, rewards, partial(make_optimiser, config.optim)),
    )


def _decoder(config: Any, pipeline: Pipeline) -> Any:
    """The module that decodes for the rewards, in the configured type."""
    module = reward_decoder(pipeline.modules)
    return (
        module.clone(dtype=choice("config.reward_dtype", config.reward_dtype, DTYPES))
        if config.reward_dtype
        else module
    )


def make_grid(student: Any, process: Process) -> tuple[float, ...]:
    """The student's times: from its list of timesteps where there is one, else equidistant and shifted.

    Raises:
      UserError: the timesteps are not what the network knows, or not descending.
    """
    if not student.timesteps:
        times = choice("config.student.grid", student.grid, GRIDS)(student.steps, student.shift)
        if isinstance(process, Flow):
            return tuple(map(float, times))
        if student.grid == "authors":
            raise UserError("config.student.grid 'authors' is SD3's; give config.student.timesteps for this model.")
        return (*map(float, process.snap(times[:-1])), 0.0)
    if len(student.timesteps) != student.steps:
        raise UserError(
            f"config.student.timesteps has {len(student.timesteps)} entries for config.student.steps={student.steps}."
        )
    return grid_at(process, student.timesteps)


def zero_uncond(config: Any, pipeline: Pipeline) -> bool:
    """Whether guidance leads away from zeros, in place of the encoded empty prompt."""
    uncond = choice("config.guidance.uncond", config.guidance.uncond, UNCOND)
    return pipeline.zero_uncond if uncond == "pipeline" else uncond == "zeros"


def latent_shape(config: Any, pipeline: Pipeline) -> tuple[int, int, int]:
    """``(h, w, c)`` of the run's latents; UserError where the image size does not fit the networks."""
    denoiser, factor = pipeline.modules[pipeline.denoiser].config, pipeline.modules["vae"].config.downsampling
    height = config.height or denoiser.sample_size * factor
    width = config.width or denoiser.sample_size * factor
    unit = factor * denoiser.patch_size
    if height % unit or width % unit or min(height, width) < unit:
        raise UserError(f"config.height and config.width must be multiples of {unit}, not {height} and {width}.")
    return height // factor, width // factor, denoiser.in_channels


def make_optimiser(common: Any, own: Any) -> optax.GradientTransformation:
    """AdamW with fp32 moments behind a clip of the global norm; constant rate after an optional warm-up."""
    rate = optax.linear_schedule(0.0, own.lr, own.warmup) if own.warmup else own.lr
    adamw = optax.adamw(rate, b1=common.b1, b2=common.b2, weight_decay=own.weight_decay)
    return optax.chain(optax.clip_by_global_norm(common.clip), adamw)


def lora_config(settings: Any, family: str) -> lora.LoraConfig:
    """Rank, alpha and targets of a LoRA on a family's denoiser."""
    return lora.LoraConfig(
        settings.rank, settings.alpha, choice("lora.targets", settings.targets, LORA_TARGETS[family])
    )


def make_generator(config: Any, family: str, plan: Plan, base: Tree) -> Tree:
    """The student that is the teacher: its own weights, or a LoRA that is zero."""
    if plan.generator_lora_scale is None:
        return without_buffers(base)
    key, _ = jax.random.split(jax.random.key(config.seed))
    return lora.init(key, base, lora_config(config.generator.lora, family))


def generator_from_file(config: Any, pipeline: Pipeline, plan: Plan) -> Tree:
    """The student that starts as the LoRA file ``config.generator.lora.start``, whoever trained it.

    Raises:
      UserError: the file does not fit, or the run trains no LoRA.
    """
    file = config.generator.lora.start
    if plan.generator_lora_scale is None:
        raise UserError(f"config.generator.lora.start={file} needs config.generator.kind='lora'.")
    base = pipeline.params[pipeline.denoiser]
    delta, scale = read_lora(locate_lora(file), base, pipeline.denoiser)
    initial = make_generator(config, pipeline.family, plan, base)
    return start_from(initial, delta, scale / plan.generator_lora_scale)


def make_state(config: Any, family: str, plan: Plan, base: Tree, generator: Tree | None = None) -> TrainState:
    """The state before the first update: both deltas are zero, and the student is the teacher or ``generator``."""
    if generator is None:
        generator = make_generator(config, family, plan, base)
    _, key_fake = jax.random.split(jax.random.key(config.seed))
    fake = lora.init(key_fake, base, lora_config(config.fake.lora, family))
    extra = compose.extra_state(plan, key_fake, generator)
    return new_state(config.seed, generator, fake, plan.generator_tx, plan.fake_tx, extra)


def latest_or_new(
    make: Callable[..., Tree], args: tuple[Tree, ...], checkpoints: Checkpoints, meta: dict[str, Any], layout: Layout
) -> Tree:
    """The latest checkpoint's state, or where there is none ``make(*args)``; placed on the mesh either way."""
    abstract = layout.abstract_state(jax.eval_shape(make, *args))
    if checkpoints.latest() is not None:
        return checkpoints.restore(abstract, meta)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=shardings)(*args)
