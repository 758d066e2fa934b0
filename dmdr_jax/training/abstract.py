"""A run's programs over shapes alone: nothing is read, allocated or computed.

`AbstractRun.of(config)` has what `dmdr_jax.training.loop.train` would hand to its two compiled programs, as
``jax.ShapeDtypeStruct``: enough to trace them, to compile them for a machine that is not there, or to count.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.published import abstract_pipeline
from dmdr_jax.diffusers_io.text import CLIP_TOWERS, T5, encode, encode_uncond, is_text_encoder
from dmdr_jax.generate import trace_drawing
from dmdr_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from dmdr_jax.models.conditioning import Conditioning, map_rows
from dmdr_jax.objectives.base import Term
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import ClipReward, Preprocessing, abstract_clip, shape_of, split_params, towers
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training import ode, setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.mesh_choice import Residents, residents
from dmdr_jax.training.plan import RealImages
from dmdr_jax.training.preview import batch_of, student_recipe
from dmdr_jax.training.real_images import count_images
from dmdr_jax.training.sharding import batch_sharding
from dmdr_jax.training.state import TrainState
from dmdr_jax.training.step import Batch, Frozen, Plan, fake_step, generator_step, generator_weights

Tree = Any

CLIP_H14 = ClipConfig(
    text=ClipTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
    ),
    vision=ClipVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
)
"""ViT-H/14 at 224 px, the shape of DMDR's two rewards (DFN5B-CLIP and HPSv2.1)."""


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """The static parts of a run, and the shapes of the rest."""

    plan: Plan
    terms: tuple[Term, ...]
    state: TrainState
    frozen: Frozen
    batch: Batch
    pipeline: Pipeline

    @classmethod
    def of(cls, config: Any) -> "AbstractRun":
        """The run of a configuration, with plain attention; a reward whose files are not here counts as a `CLIP_H14`.

        Raises:
          UserError: the configuration is refused, as by the training program.
        """
        setup.check(config)
        stored = setup.choice("config.base_dtype", config.base_dtype, setup.DTYPES)
        compute = setup.choice("config.compute_dtype", config.compute_dtype, setup.DTYPES)
        pipeline = abstract_pipeline(resolve(config.model), stored, compute)
        pipeline.t5_length = config.t5_length
        if not config.t5:
            pipeline.params.pop(T5, None)
        setup.set_remat(config, pipeline)
        specs = [dataclasses.replace(spec, std=spec.std or 1.0) for spec in setup.reward_specs(config)]
        rewards = tuple(abstract_reward(spec, stored, config.remat != "none") for spec in specs)
        terms, plan = setup.make_terms(config, rewards), setup.make_plan(config, pipeline, rewards)
        base = pipeline.params[pipeline.denoiser]
        state = jax.eval_shape(partial(setup.make_state, config, pipeline.family, plan), base)
        frozen = Frozen(
            base=base,
            vae=setup.reward_decoder(pipeline.params),
            rewards={reward.spec.name: reward.params for reward in rewards},
            uncond=_encoded(encode_uncond, pipeline, plan, 1, zeros=setup.zero_uncond(config, pipeline)),
            real=_abstract_real(config, pipeline, plan) if plan.method.gan else None,
        )
        widths = {reward.spec.name: reward.vision.config.projection_dim for reward in rewards}
        text: dict[str, Any] = {n: jax.ShapeDtypeStruct((config.batch, w), jnp.float32) for n, w in widths.items()}
        batch = Batch(_encoded(encode, pipeline, plan, config.batch), text)
        if config.encode_once:
            pipeline.params = {name: tree for name, tree in pipeline.params.items() if not is_text_encoder(name)}
        return cls(plan, terms, state, frozen, batch, pipeline)

    def attending(self, config: Any, mesh: jax.sharding.Mesh) -> "AbstractRun":
        """The same run, whose networks use the attention kernel of the mesh's devices. No shape depends on that."""
        pipeline = dataclasses.replace(self.pipeline, modules=dict(self.pipeline.modules))
        setup.set_attention(config, pipeline, mesh)
        return dataclasses.replace(self, pipeline=pipeline, plan=setup.make_plan(config, pipeline, self.plan.rewards))

    def residents(self) -> Residents:
        """What lives on the devices between steps."""
        full = self.plan.generator_lora_scale is None
        return residents(self.state, self.pipeline.params, self.frozen.rewards, full)

    def placed(self, layout: Layout) -> "AbstractRun":
        """The same run with every shape placed as the training program places the array.

        Raises:
          UserError: the batch does not divide over the mesh.
        """
        copies = layout.whole(self.frozen)
        base = layout.abstract_component(self.pipeline.denoiser, self.frozen.base)
        rewards = {
            reward.spec.name: layout.with_shardings(reward.params, layout.reward_shardings(reward))
            for reward in self.plan.rewards
        }
        batch = layout.with_shardings(self.batch, layout.batch_shardings(self.batch))
        state = layout.abstract_state(self.state)
        return dataclasses.replace(self, state=state, frozen=copies.replace(base=base, rewards=rewards), batch=batch)

    def trace_drawing(self, layout: Layout, images: int) -> tuple[Any, Tree]:
        """The drawing of a grid of so many images by the averaged student, traced, and its inputs; of a placed run.

        See `dmdr_jax.training.preview`.
        """
        batch, sharding = batch_of(layout, images)
        pipeline = self.pipeline
        params = {name: layout.abstract_component(name, tree) for name, tree in pipeline.params.items()}
        noise: Any = jax.ShapeDtypeStruct((batch, *self.plan.latent_shape), jnp.float32)
        inputs = self._text(batch), noise
        text, noise = layout.with_shardings(inputs, layout.batch_shardings(inputs))
        weights = generator_weights(self.plan, self.state.ema, self.frozen.base)
        empty = layout.whole(self._text(1))
        recipe = student_recipe(self.plan)
        return trace_drawing(pipeline, recipe, sharding, params, weights, text, empty, noise)

    def _text(self, rows: int) -> Any:
        """So many prompts as drawing takes them: token ids, or what text encoders that have left made of them."""
        return _token_ids(self.pipeline, rows) or _rows_of(dataclasses.replace(self.batch.cond, time_ids=None), rows)

    def trace(self, step: int | None = None) -> tuple[TrainState, TrainState]:
        """The states after a fake update and after a generator update, as shapes; a mistake in either raises.

        Args:
          step: generator step, which decides on the terms that count; None: all of them.
        """
        terms = tuple(term for term in self.terms if step is None or term.active(step))
        inputs = self.state, self.frozen, self.batch
        after_fake, _ = jax.eval_shape(partial(fake_step, self.plan), *inputs)
        after_generator, _ = jax.eval_shape(partial(generator_step, self.plan, terms), *inputs)
        return after_fake, after_generator


@dataclasses.dataclass(frozen=True)
class AbstractOde:
    """The stage before a run (`dmdr_jax.training.ode`), over shapes likewise."""

    stage: ode.Stage
    state: ode.OdeState
    base: Tree
    uncond: Conditioning
    batch: ode.OdeBatch

    @classmethod
    def of(cls, config: Any, run: AbstractRun) -> "AbstractOde":
        """The stage of a run that has one."""
        stage, rows = ode.Stage.make(config, run.pipeline, run.plan), config.ode.batch
        state = jax.eval_shape(partial(ode.first_state, config, run.pipeline.family, stage), run.frozen.base)
        pair: Any = jax.ShapeDtypeStruct((rows,), jnp.uint32)
        latents: Any = jax.ShapeDtypeStruct((rows, *run.plan.latent_shape), jnp.float32)
        batch = ode.OdeBatch(pair, _rows_of(run.batch.cond, rows), latents)
        return cls(stage, state, run.frozen.base, run.frozen.uncond, batch)

    @property
    def pairs(self) -> tuple[Any, ...]:
        """What the drawing of a batch of pairs is given."""
        return self.base, self.uncond, self.batch.pair, self.batch.cond

    @property
    def regression(self) -> tuple[Any, ...]:
        """What an update is given."""
        return self.state, self.base, self.batch

    def placed(self, layout: Layout) -> "AbstractOde":
        """The same stage, of a placed run, with every shape placed; its batch divides over the mesh."""
        shardings = layout.batch_shardings(self.batch)
        shardings = shardings.replace(pair=batch_sharding(layout.mesh, len(self.batch.pair)))
        batch = layout.with_shardings(self.batch, shardings)
        return dataclasses.replace(self, state=layout.abstract_state(self.state), batch=batch)


def _rows_of(cond: Conditioning, rows: int) -> Conditioning:
    """The shapes of so many prompts."""

    def of_rows(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    return map_rows(of_rows, cond)


def abstract_reward(spec: RewardSpec, dtype: Any, remat: bool) -> ClipReward:
    """A reward in the shape of the CLIP at its path, or else of a `CLIP_H14`, its parameters in ``dtype``."""
    size = CLIP_H14.vision.image_size
    config, preprocessing = shape_of(spec) or (CLIP_H14, Preprocessing.from_config({}, size))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_clip(config))
    image_side, text_side = split_params(params)
    vision, text = towers(config, dtype, remat)
    return ClipReward(spec, image_side, text_side, vision, text, preprocessing, tokenizer=None)


def _abstract_real(config: Any, pipeline: Pipeline, plan: Plan) -> RealImages:
    """The discriminator's images, as many as there are."""
    count = count_images(config.gan.images)
    latents: Any = jax.ShapeDtypeStruct((count, *plan.latent_shape), jnp.float32)
    return RealImages(latents, _encoded(encode, pipeline, plan, count))


def _encoded(function: Any, pipeline: Pipeline, plan: Plan, batch: int, **fixed: Any) -> Any:
    """The shapes of what the text encoders give for ``batch`` prompts."""
    ids = _token_ids(pipeline, batch)
    params = {name: pipeline.params[name] for name in ids}
    fixed |= dict(size=plan.image_size, max_sequence_length=pipeline.t5_length)
    return jax.eval_shape(partial(function, pipeline.modules, **fixed), params, ids)


def _token_ids(pipeline: Pipeline, rows: int) -> dict[str, Any]:
    """The shapes of so many prompts as the text encoders read them; nothing where these have left."""
    lengths = {name: pipeline.modules[name].config.max_position_embeddings for name in CLIP_TOWERS}
    lengths[T5] = pipeline.t5_length
    return {n: jax.ShapeDtypeStruct((rows, length), jnp.int32) for n, length in lengths.items() if n in pipeline.params}
