"""The training loop: reads top to bottom in the order things happen."""

import json
import os
import platform
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from dmdr_jax import __version__, methods
from dmdr_jax.data.prompts import PromptStream, all_prompts, not_blank
from dmdr_jax.data.survey import Survey, survey_large
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import Text, encode_uncond, read_text, text_params, tokenize
from dmdr_jax.evaluation.environment import command, commit, versions
from dmdr_jax.evaluation.runs import flat
from dmdr_jax.objectives.base import Term, active_terms, separate_fake_updates, stage
from dmdr_jax.rewards.base import Reward
from dmdr_jax.training import calibration, disk, mesh_choice, ode, runtime, setup
from dmdr_jax.training.abstract import AbstractRun
from dmdr_jax.training.ahead import Ahead
from dmdr_jax.training.checkpoints import Checkpoints, checksums
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import MetricWriter, Progress
from dmdr_jax.training.preview import Preview
from dmdr_jax.training.programs import fake_program, generator_program
from dmdr_jax.training.real_images import load_real
from dmdr_jax.training.reporting import ON_NONFINITE, Skipped, report, save
from dmdr_jax.training.state import TrainState
from dmdr_jax.training.step import Batch, Frozen, Plan
from dmdr_jax.training.text import make_encoder
from dmdr_jax.training.watch import Watch
from dmdr_jax.workdir import CHECKPOINTS, CONFIG

Array = jax.Array
Metrics = dict[str, Array]

SHOWN = ("dm/score_gap", "fake/loss")
"""The numbers on the console; the rewards follow."""


def train(config: Any, workdir: epath.PathLike, stop: Callable[[int], bool] = runtime.never) -> TrainState | None:
    """Runs (or goes on with) the run of ``config`` in ``workdir``; returns the last state.

    Args:
      workdir: a local folder, or a URL such as gs://bucket/runs/first.
      stop: asked at every step whether to save and return before the next; see `dmdr_jax.training.runtime`.

    Returns:
      None where it was stopped in the stage before the run (`dmdr_jax.training.ode`).
    """
    workdir = disk.absolute(workdir)
    runtime.keep_compiled(config.compile_cache, workdir)
    setup.check(config)
    config = methods.resolve(config)
    skips = setup.choice("config.on_nonfinite", config.on_nonfinite, ON_NONFINITE) == "skip"
    texts = all_prompts(config.prompts)
    prompts = not_blank(texts, config.prompts)
    layout = mesh_choice.make_layout(config.mesh, lambda: AbstractRun.of(config).residents())
    setup.check_batches(config, layout)
    pipeline = setup.load_teacher(config, layout, prompts)
    rewards = setup.load_rewards(config, prompts, layout)
    held_out = setup.held_out_rewards(config, rewards)
    terms = setup.make_terms(config, rewards)
    plan = setup.make_plan(config, pipeline, rewards)
    meta = run_metadata(config, pipeline, plan)

    make_folder(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.checkpoint.keep)
    preview = Preview.make(config, pipeline, plan, prompts, workdir, layout)
    if (counted := calibration.in_teacher_units(config, preview, prompts, rewards)) is not rewards:
        rewards = counted
        terms, plan = setup.make_terms(config, rewards), setup.make_plan(config, pipeline, rewards)
    frozen = freeze(config, pipeline, plan, rewards, layout)
    watch = Watch.make(config, preview, prompts, rewards, held_out)
    generator = None
    if config.generator.lora.start and checkpoints.latest() is None:
        generator = setup.generator_from_file(config, pipeline, plan)
    if config.ode.steps and checkpoints.latest() is None:
        text = make_encoder(config, pipeline, plan.image_size, (), layout)
        generator = ode.pretrain(config, pipeline, plan, frozen, prompts, text, layout, preview, meta, workdir, stop)
        if generator is None:
            checkpoints.close()
            return None
    make = partial(setup.make_state, config, pipeline.family, plan)
    state = setup.latest_or_new(make, (frozen.base, generator), checkpoints, meta, layout)
    del generator  # the state has its own copy
    start = int(state.step)
    asked = survey_prompts(config, pipeline, (*rewards, *held_out), texts)
    changed = changed_settings(workdir, meta["config"]) if start else []
    write_config(workdir, config, meta, asked)

    stream = PromptStream(prompts, config.batch, config.seed)
    skipped = Skipped() if skips else None
    shown = [*SHOWN, *(f"reward/{reward.spec.name}" for reward in rewards)]
    encode_batch = make_encoder(config, pipeline, plan.image_size, rewards, layout)

    def read(n: int) -> tuple[list[str], Text]:
        chosen = stream.batch(n)
        return chosen, read_text(pipeline, chosen)

    updates = Updates(plan, terms, layout)
    with (
        Ahead(read) as ahead,
        checkpoints,  # also when an error ends the run, a save under way is finished
        MetricWriter(workdir, resume_step=start, primary=runtime.is_first()) as writer,
        Progress(config.steps, start, shown, stage=partial(stage, terms)) as progress,
    ):
        progress.note(f"{layout}; {describe(pipeline, plan, state)}; from step {start} of {config.steps}")
        progress.note(f"{config.prompts}: {asked}")
        if changed:
            progress.note(f"not as this run had it before: {', '.join(changed)}")
        preview.teacher(writer, start)
        watch.begin(start, state.ema, frozen, writer, checkpoints)
        tell = partial(report, writer=writer, progress=progress, checkpoints=checkpoints, skipped=skipped)
        pending, seen, step, inner, stopped = None, [], start, int(state.inner), False
        while step < config.steps and not watch.ends_the_run and not (stopped := stop(step)):
            batch = encode_batch(*ahead(inner))
            state, metrics = updates.fake(step, state, frozen, batch)
            seen.append(metrics)
            inner += 1
            if not generator_turn(inner - 1, updates.before_generator(step, config.fake.updates)):
                continue
            state, metrics = updates.generator(step, state, frozen, batch)
            step += 1
            pending = tell(pending, then=(step, [*seen, metrics]))
            seen = []
            if watch.due(step, config.steps):
                pending = tell(pending, also=watch.look(step, state.ema, frozen, writer))
            if step % config.checkpoint.every == 0 or step == config.steps or watch.ends_the_run:
                pending = tell(pending)
                save(step, state, meta, writer, checkpoints)
            if watch.due(step, config.steps):
                watch.mark(checkpoints, progress)
            if step % config.preview.every == 0 or step == config.steps:
                preview.student(writer, step, state.ema, frozen)
        tell(pending)
        if watch.ends_the_run:
            progress.note(f"{watch.sentence()}; the run ends here (config.watch.stop)")
        elif step >= config.steps:
            draw, show = (f"python -m dmdr_jax.{program} {workdir}" for program in ("sample --model", "report"))
            progress.note(f"all {config.steps} steps are done: {draw} --prompts FILE draws, {show} shows the run")
        if stopped:
            if step > start:
                save(step, state, meta, writer, checkpoints)
            progress.note(f"stopped by SIGTERM after step {step}; the same command goes on from there")
    return state


def generator_turn(n: int, fake_updates: int) -> bool:
    """Whether inner iteration ``n`` (counted from 0, one fake update each) also updates the generator.

    As in the authors' loop: every ``fake_updates``-th, the very first one excepted.
    """
    return n > 0 and n % fake_updates == 0


class Updates:
    """The compiled programs: one for the fake score, one for each set of active generator terms."""

    def __init__(self, plan: Plan, terms: Sequence[Term], layout: Layout):
        self._plan, self._terms, self._layout = plan, tuple(terms), layout
        self._fake: Callable | None = None
        self._generator: dict[tuple[Term, ...], Callable] = {}

    def fake(self, step: int, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of the fake score; where no active term wants one, only the counter moves."""
        if not separate_fake_updates(active_terms(self._terms, step), 1):
            return state._replace(inner=state.inner + 1), {}
        self._fake = self._fake or fake_program(self._plan, self._layout, state)
        return self._fake(state, frozen, batch)

    def before_generator(self, step: int, fake_updates: int) -> int:
        """Inner iterations per generator update: one where they would make no fake update of their own."""
        return separate_fake_updates(active_terms(self._terms, step), fake_updates) or 1

    def generator(self, step: int, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        active = active_terms(self._terms, step)
        if active not in self._generator:
            self._generator[active] = generator_program(self._plan, active, self._layout, state)
        return self._generator[active](state, frozen, batch)


def freeze(config: Any, pipeline: Pipeline, plan: Plan, rewards: Sequence[Reward], layout: Layout) -> Frozen:
    """The frozen networks on their devices, and the unconditional prompt."""
    zeros = setup.zero_uncond(config, pipeline)
    fixed: dict[str, Any] = dict(size=plan.image_size, zeros=zeros, max_sequence_length=pipeline.t5_length)
    encode_empty = jax.jit(partial(encode_uncond, pipeline.modules, **fixed))
    empty = read_text(pipeline, [""])
    return Frozen(
        base=pipeline.params[pipeline.denoiser],
        vae=setup.reward_decoder(pipeline.params),
        rewards={reward.spec.name: layout.place_reward(reward) for reward in rewards},
        uncond=layout.replicate(encode_empty(text_params(pipeline), empty)),
        real=layout.replicate(load_real(config, pipeline, plan)),
    )


def survey_prompts(config: Any, pipeline: Pipeline, rewards: Sequence[Reward], texts: Sequence[str]) -> Survey:
    """What is odd about the prompts ``texts`` of a run, blank ones included."""
    lengths = {name: ids.shape[-1] for name, ids in tokenize(pipeline, [""]).items()}
    readers = {name: (pipeline.tokenizers[name], length) for name, length in lengths.items()}
    texted = [reward for reward in rewards if hasattr(reward, "tokenizer")]
    readers |= {reward.spec.name: (reward.tokenizer, reward.tokenize([""]).shape[-1]) for reward in texted}
    return survey_large(texts, readers)


def run_metadata(config: Any, pipeline: Pipeline, plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to refuse another model and to export without the config file."""
    weights = jax.tree.leaves(pipeline.params[pipeline.denoiser])
    model = {
        "family": pipeline.family,
        "teacher_checksum": zlib.crc32(repr(checksums(weights)).encode()),
        "denoiser": pipeline.configs[pipeline.denoiser],
        "generator": config.generator.to_dict() if plan.generator_lora_scale is not None else {"kind": "full"},
    }
    recipe = {
        "grid": list(plan.simulation.grid),
        "kernel": str(plan.simulation.kernel),
        "latent_shape": list(plan.latent_shape),
        "generator_lora_scale": plan.generator_lora_scale,
    }
    model = json.loads(json.dumps(model))  # as it will be read back
    local = not disk.is_remote(config.model) and os.path.isdir(os.path.expanduser(config.model))
    teacher = os.path.abspath(os.path.expanduser(config.model)) if local else config.model  # from whichever folder
    known = {"model": model, "teacher": teacher, "student": recipe, "config": _plain(config)}
    return known | {"versions": run_versions()}


def run_versions() -> dict[str, str]:
    """Of this program and of what its numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"dmdr_jax": __version__, "python": platform.python_version(), **versions(packages)}


def make_folder(workdir: epath.Path) -> None:
    """UserError where the workdir cannot be a folder, or is not the same one for all processes."""
    disk.make_folder(workdir)
    runtime.check_shared(workdir)


def changed_settings(workdir: epath.Path, config: dict[str, Any]) -> list[str]:
    """In what a configuration is not the one that the run in ``workdir`` was last started with: "KEY OLD -> NEW"."""
    file = workdir / CONFIG
    if not file.exists():
        return []
    before, now = (flat(settings) for settings in (json.loads(file.read_text())["config"], config))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys]


def write_config(workdir: epath.Path, config: Any, meta: dict[str, Any], prompts: Survey) -> None:
    """``config.json``: the whole configuration, what its prompts are like, and the versions it ran with."""
    document = {
        "command": command(),
        "config": meta["config"],
        "prompts": str(prompts),
        "versions": meta["versions"],
        "commit": commit(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    if runtime.is_first():
        disk.write_file(workdir / CONFIG, json.dumps(document, indent=2).encode())


def describe(pipeline: Pipeline, plan: Plan, state: TrainState) -> str:
    def millions(tree: Any) -> str:
        return f"{sum(np.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6:.2f}M"

    kind = "full" if plan.generator_lora_scale is None else "LoRA"
    return (
        f"{pipeline.name}: {pipeline.denoiser} {millions(pipeline.params[pipeline.denoiser])}, "
        f"generator ({kind}) {millions(state.generator)}, fake score (LoRA) {millions(state.fake)}"
    )


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())
