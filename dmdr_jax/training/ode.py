"""The stage ``pretrain-ode``: the student's first weights, by regression on the teacher's ODE.

Called once, on pure noise, a teacher answers with the mean of all images (flow) or, at a timestep where it never saw
pure noise (SDXL at k = 399), with nonsense, from which distribution matching hardly recovers. DMD2 (arXiv 2405.14867)
therefore starts its one-step student from a regression on noise-image pairs of the teacher. Here the pairs are drawn
first, from the run's own prompts: no data set is needed and nobody's weights.

1. `draw_pairs`: for pair j, a prompt and noise, the teacher's guided sampler gives latents.
2. `regress`: the student learns to answer with them in one call (`dmdr_jax.distill.regression`).

All of it lies in the folder ode/ of the run: pairs, checkpoints, curves. Both phases go on where they stopped. Once the
run has a checkpoint of its own the folder is not looked at again.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dmdr_jax.arrays import on_host
from dmdr_jax.data.prompts import PromptStream
from dmdr_jax.diffusers_io.components import SDXL
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.sampler import sample
from dmdr_jax.distill.regression import LOSSES, regression_input, squared_error
from dmdr_jax.generate import Recipe, teacher_recipe
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.training import runtime, setup
from dmdr_jax.training.checkpoints import Checkpoints
from dmdr_jax.training.fake import apply_gradients
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import MetricWriter, Progress
from dmdr_jax.training.ode_pairs import PairStore
from dmdr_jax.training.plan import Batch, Frozen, Plan, generator_weights
from dmdr_jax.training.preview import Preview
from dmdr_jax.training.programs import update_program
from dmdr_jax.training.reporting import report, save
from dmdr_jax.training.state import ema_update
from dmdr_jax.workdir import CHECKPOINTS, ODE

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]
Encode = Callable[[Sequence[str]], Batch]
Stop = Callable[[int], bool]

SHOWN = ("ode/loss", "ode/error")


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What is static of the stage; compared by identity.

    Attributes:
      plan: of the run: the networks, the student's grid.
      recipe: how the teacher draws.
      seed: of every random number here.
      loss: a name in `dmdr_jax.distill.regression.LOSSES`.
      tx, ema_decay: optimiser and average of the student.
    """

    plan: Plan
    recipe: Recipe
    seed: int
    loss: str
    tx: optax.GradientTransformation
    ema_decay: float

    @classmethod
    def make(cls, config: Any, pipeline: Pipeline, plan: Plan) -> "Stage":
        guidance = config.ode.guidance or config.guidance.scale
        recipe = teacher_recipe(pipeline, config.ode.teacher_steps, guidance, plan.image_size)
        tx = setup.make_optimiser(config.optim, config.ode)
        return cls(plan, recipe, config.seed, config.ode.loss, tx, config.ode.ema)

    def key(self, purpose: str, counter: Array | int) -> Array:
        """The key for one purpose at one pair or step."""
        purpose_id = zlib.crc32(f"{ODE}/{purpose}".encode()) & 0x7FFFFFFF
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), purpose_id), counter)


class OdeState(NamedTuple):
    """What the regression changes.

    Attributes:
      step: updates done.
      generator, ema: the student and its average, trees as in TrainState.
      generator_opt: optimiser state.
    """

    step: Array
    generator: Tree
    generator_opt: Tree
    ema: Tree


@flax.struct.dataclass
class OdeBatch:
    """Pairs: their indices ``[b]``, prompts, and the teacher's latents ``[b, h, w, c]`` fp32."""

    pair: Array
    cond: Conditioning
    latents: Array


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs by their index, ready for the devices; ``prompts[j]`` is that of pair j."""

    prompts: Sequence[str]
    store: PairStore
    encode: Encode
    layout: Layout

    def __len__(self) -> int:
        return len(self.prompts)

    def inputs(self, indices: np.ndarray) -> tuple[Array, Conditioning]:
        """The indices ``[b]`` and the prompts of pairs, on the devices."""
        cond = self.encode([self.prompts[pair] for pair in indices]).cond
        return self.layout.put_batch(indices.astype(np.uint32)), cond

    def batch(self, indices: np.ndarray) -> OdeBatch:
        return OdeBatch(*self.inputs(indices), self.layout.put_batch(self.store.latents(indices)))


def pretrain(
    config: Any,
    pipeline: Pipeline,
    plan: Plan,
    frozen: Frozen,
    prompts: Sequence[str],
    encode: Encode,
    layout: Layout,
    preview: Preview,
    meta: dict[str, Any],
    workdir: epath.Path,
    stop: Stop = runtime.never,
) -> Tree | None:
    """Runs the stage, or what is left of it.

    Args:
      prompts: of the run; pair j has the j-th in the order in which a run visits them.
      encode: prompts to a `Batch` on the devices.
      meta: of the run's checkpoints. The stage's own say the same, so that one can draw with them.
      stop: asked at every step whether to keep what is done and return before the next.

    Returns:
      The averaged student, a tree like TrainState's generator; None where it was stopped before the end.

    Raises:
      UserError: the folder ode/ holds another setting's pairs or student, something in it is damaged, the disk is
        full, or a number is not finite.
    """
    stage, folder = Stage.make(config, pipeline, plan), workdir / ODE
    document = describe_pairs(config, pipeline, stage, prompts, meta)
    store = PairStore(folder, document, plan.latent_shape)
    pairs = Pairs(PromptStream(prompts, config.ode.pairs, config.seed).batch(0), store, encode, layout)
    meta = {**meta, "model": {**meta["model"], "ode_pairs": document}}
    with Checkpoints(folder / CHECKPOINTS, keep=config.checkpoint.keep) as checkpoints:
        unfinished = (checkpoints.latest() or 0) < config.ode.steps
        if unfinished and not draw_pairs(stage, pairs, frozen, config.ode.batch, stop):
            return None
        make = partial(first_state, config, pipeline.family, stage)
        state = setup.latest_or_new(make, (frozen.base,), checkpoints, meta, layout)
        state = regress(config, stage, state, pairs, frozen, checkpoints, meta, stop)
    if int(state.step) < config.ode.steps:
        return None
    if unfinished or not (preview.folder / f"{ODE}.png").exists():
        with MetricWriter(folder, int(state.step)) as writer:
            preview.student(writer, int(state.step), state.ema, frozen, ODE)
    return state.ema


def describe_pairs(
    config: Any, pipeline: Pipeline, stage: Stage, prompts: Sequence[str], meta: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a pair depends on; how many there are is not among it."""
    return {
        "family": meta["model"]["family"],
        "teacher_checksum": meta["model"]["teacher_checksum"],
        "seed": stage.seed,
        "prompts": [len(prompts), zlib.crc32(repr(list(prompts)).encode())],
        "t5_length": None if pipeline.denoiser == SDXL.denoiser else config.t5_length,
        "teacher_steps": len(stage.recipe.grid) - 1,
        "guidance": stage.recipe.guidance,
        "uncond": "zeros" if setup.zero_uncond(config, pipeline) else "empty",
        "latent_shape": list(stage.plan.latent_shape),
        "grid": list(stage.recipe.grid),
    }


# --- the pairs -----------------------------------------------------------------------------------------------------


def pair_noise(stage: Stage, pair: Array) -> Array:
    """The standard normal noise ``[b, h, w, c]`` of the pairs ``[b]``; a row depends on (seed, pair) alone."""
    shape = stage.plan.latent_shape
    return jax.vmap(lambda j: jax.random.normal(stage.key("noise", j), shape, jnp.float32))(pair)


def teacher_latents(stage: Stage, base: Tree, uncond: Conditioning, pair: Array, cond: Conditioning) -> Array:
    """The teacher's latents ``[b, h, w, c]`` for pairs ``[b]`` and their prompts, by the sampler that draws images."""
    denoiser, recipe = stage.plan.denoiser, stage.recipe
    uncond = uncond if recipe.guided else None

    def output_fn(z, t):
        return denoiser.guided_output(Weights(base), z, t, cond, uncond, recipe.guidance)

    first = pair_noise(stage, pair) * recipe.initial_scale
    return sample(output_fn, denoiser.process, recipe.kernel, first, recipe.grid, stage.key("kernel", 0))


def pairs_program(stage: Stage, layout: Layout) -> Any:
    """`teacher_latents` on a mesh, jitted: ``(base, uncond, pair, cond) -> latents``."""
    return jax.jit(layout.on_mesh(partial(teacher_latents, stage)))


def draw_pairs(stage: Stage, pairs: Pairs, frozen: Frozen, batch: int, stop: Stop = runtime.never) -> bool:
    """Draws what the store lacks, a shard per batch; while one is written the next is being drawn.

    Returns:
      Whether all are there, for every process to read; False where it was told to stop.
    """
    total, store = len(pairs), pairs.store
    if len(store) >= total:
        return True
    draw = pairs_program(stage, pairs.layout)
    with Progress(total, len(store), unit="pair", stage=lambda step: "teacher's pairs") as progress:
        recipe = f"{len(stage.recipe.grid) - 1} steps, guidance {stage.recipe.guidance:g}"
        progress.note(f"ode: the teacher draws {total} pairs ({recipe}) into {store.folder}, from pair {len(store)}")
        pending = None
        for first in range(len(store), total, batch):
            if stop(first):
                break
            indices = np.minimum(np.arange(first, first + batch), total - 1)  # the last batch is filled up
            latents = draw(frozen.base, frozen.uncond, *pairs.inputs(indices))
            _keep(pending, store, total, progress)
            pending = latents
        _keep(pending, store, total, progress)
        if len(store) < total:
            progress.note(f"stopped by SIGTERM after pair {len(store)}; the same command goes on from there")
    runtime.sync("the teacher's pairs")
    return len(store) >= total


def _keep(latents: Array | None, store: PairStore, total: int, progress: Progress) -> None:
    if latents is not None:
        store.append(on_host(latents)[: total - len(store)])
        progress.update(len(store))


# --- the regression ------------------------------------------------------------------------------------------------


def first_state(config: Any, family: str, stage: Stage, base: Tree) -> OdeState:
    """The state before the first update: the student is what a run without the stage starts from."""
    generator = setup.make_generator(config, family, stage.plan, base)
    return OdeState(jnp.zeros((), jnp.int32), generator, stage.tx.init(generator), jax.tree.map(jnp.copy, generator))


def ode_step(stage: Stage, state: OdeState, base: Tree, batch: OdeBatch) -> tuple[OdeState, Metrics]:
    """One update of the student, by equations (1) and (2) of `dmdr_jax.distill.regression`."""
    plan, key = stage.plan, stage.key("input", state.step)
    noise = pair_noise(stage, batch.pair)
    z, t = regression_input(plan.denoiser.process, plan.simulation.grid, noise, batch.latents, key)

    def loss_fn(generator: Tree) -> tuple[Array, Array]:
        x0 = plan.denoiser.x0(generator_weights(plan, generator, base), z, t, batch.cond)
        error = squared_error(x0, batch.latents)
        return jnp.mean(LOSSES[stage.loss](error)), jnp.mean(error)

    (loss, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.generator)
    generator, opt, norm = apply_gradients(stage.tx, grads, state.generator_opt, state.generator)
    metrics = {"ode/loss": loss, "ode/error": error, "ode/gradient_norm": norm}
    return OdeState(state.step + 1, generator, opt, ema_update(state.ema, generator, stage.ema_decay)), metrics


def regression_program(stage: Stage, layout: Layout, state: OdeState) -> Any:
    """`ode_step` on a mesh, jitted; see `dmdr_jax.training.programs.update_program`."""
    return update_program(partial(ode_step, stage), layout, state)


def regress(
    config: Any,
    stage: Stage,
    state: OdeState,
    pairs: Pairs,
    frozen: Frozen,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    stop: Stop = runtime.never,
) -> OdeState:
    """From ``state`` to ``config.ode.steps`` updates or to where it is stopped, with checkpoints and curves."""
    start, steps = int(state.step), config.ode.steps
    update = regression_program(stage, pairs.layout, state)
    order = PromptStream(pairs.prompts, config.ode.batch, config.seed)  # of the pairs, as of a run's prompts
    with (
        MetricWriter(pairs.store.folder, start) as writer,
        Progress(steps, start, SHOWN, stage=lambda step: "regression") as progress,
    ):
        progress.note(f"ode: regression on {len(pairs)} pairs, from step {start} of {steps}")
        pending, step, stopped = None, start, False
        while step < steps and not (stopped := stop(len(pairs) + step)):
            state, metrics = update(state, frozen.base, pairs.batch(order.indices(step)))
            step += 1
            pending = report(pending, writer, progress, checkpoints, then=(step, [metrics]))
            if step % config.checkpoint.every == 0 or step == steps:
                pending = report(pending, writer, progress, checkpoints)
                save(step, state, meta, writer, checkpoints)
        report(pending, writer, progress, checkpoints)
        if stopped:
            if step > start:
                save(step, state, meta, writer, checkpoints)
            progress.note(f"stopped by SIGTERM after step {step}; the same command goes on from there")
    return state
