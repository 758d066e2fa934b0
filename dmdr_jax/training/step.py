"""The two programs of training: `fake_step` and `generator_step`.

Both are pure functions ``(plan, state, frozen, batch) -> (state, metrics)``. `Plan` is static and
hashable, everything with memory is an argument: the frozen networks are never closed over, never
in the state, and never differentiated.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.distill.dm import DMDraw, dm_draw
from dmdr_jax.distill.fake import fake_score_loss
from dmdr_jax.distill.schedules import RenoiseTimes, dyna_dg_scale, jittered_guidance
from dmdr_jax.distill.scores import score_pass
from dmdr_jax.distill.simulate import Simulation, StudentInput
from dmdr_jax.generate import decode_images
from dmdr_jax.models.autoencoder import AutoencoderKL
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.objectives.base import DM_DRAW, REWARDS_WITH_GRADIENT, Context, Term, total_loss
from dmdr_jax.rewards.clip_reward import ClipReward
from dmdr_jax.training.state import TrainState, ema_update, purpose_key, with_buffers

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]

FAKE_DATA = ("student_x0", "simulated")
NOISE_BINS = 4
NOISE_BIN = "fake_by_noise/"


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything static about a run's updates; compared by identity.

    Attributes:
      generator_lora_scale: effective scale (alpha / rank) of the generator's LoRA, or None for a full tree.
      fake_scale, dg_initial: effective LoRA scales of the fake score and, at step 0, of the real score.
      dynamic_steps: S of DynaDG.
      guidance, guidance_jitter: classifier-free guidance of the real score and half its range.
      fake_data: what the fake score trains on: the student's x0 at (z_i, t_i), or the simulated sample.
      latent_shape: ``(h, w, c)``.
      normaliser_floor: see `dmdr_jax.distill.dm`.
    """

    denoiser: Denoiser
    vae: AutoencoderKL
    rewards: tuple[ClipReward, ...]
    simulation: Simulation
    renoise: RenoiseTimes
    generator_lora_scale: float | None
    fake_scale: float
    dg_initial: float
    dynamic_steps: int
    guidance: float
    guidance_jitter: float
    fake_data: str
    latent_shape: tuple[int, int, int]
    generator_tx: optax.GradientTransformation
    fake_tx: optax.GradientTransformation
    ema_decay: float
    normaliser_floor: float = 1e-3

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        factor = self.vae.config.downsampling
        return self.latent_shape[0] * factor, self.latent_shape[1] * factor


@flax.struct.dataclass
class Frozen:
    """Networks that are read and never changed, and the unconditional prompt (one row)."""

    base: Tree
    vae: Tree
    rewards: dict[str, Tree]
    uncond: Conditioning


@flax.struct.dataclass
class Batch:
    """One batch of prompts, encoded: for the denoiser, and for each reward ``[b, d]``."""

    cond: Conditioning
    reward_text: dict[str, Array]


def generator_weights(plan: Plan, trained: Tree, base: Tree) -> Weights:
    """The student: a LoRA on the frozen base, or a full tree with the base's buffers."""
    if plan.generator_lora_scale is None:
        return Weights(with_buffers(trained, base))
    return Weights(base, trained, plan.generator_lora_scale)


def _simulate(plan: Plan, state: TrainState, frozen: Frozen, cond: Conditioning, purpose: str) -> StudentInput:
    weights = generator_weights(plan, state.generator, frozen.base)
    noise_key = purpose_key(state, state.inner, f"{purpose}/noise")
    noise = jax.random.normal(noise_key, (cond.batch, *plan.latent_shape), jnp.float32)
    return plan.simulation.student_input(
        lambda z, t: plan.denoiser.output(weights, z, t, cond),
        plan.denoiser.process,
        noise,
        purpose_key(state, state.inner, f"{purpose}/simulation"),
        with_sample=purpose == "fake",
    )


def fake_step(plan: Plan, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update of the fake score on fresh samples of the current student."""
    given = _simulate(plan, state, frozen, batch.cond, "fake")
    samples = given.simulated
    if plan.fake_data == "student_x0" and plan.simulation.mode == "ode_final":
        weights = generator_weights(plan, state.generator, frozen.base)
        samples = plan.denoiser.x0(weights, given.z, given.t, batch.cond)
    samples = jax.lax.stop_gradient(samples)
    tau = plan.renoise.sample(purpose_key(state, state.inner, "fake/tau"), batch.cond.batch, state.step)
    tau = plan.denoiser.process.snap(tau)
    noise = jax.random.normal(purpose_key(state, state.inner, "fake/renoise"), samples.shape, jnp.float32)

    def loss_fn(fake: Tree) -> tuple[Array, Array]:
        weights = Weights(frozen.base, fake, plan.fake_scale)
        return fake_score_loss(plan.denoiser, weights, samples, tau, noise, batch.cond)

    (loss, per_sample), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.fake)
    fake, fake_opt, norm = apply_gradients(plan.fake_tx, grads, state.fake_opt, state.fake)
    metrics = {"fake/loss": loss, "fake/gradient_norm": norm, **_by_noise_level(per_sample, tau)}
    return state._replace(inner=state.inner + 1, fake=fake, fake_opt=fake_opt), metrics


def generator_step(
    plan: Plan, terms: tuple[Term, ...], state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update of the student by the sum of ``terms``; gradient flows through one student call."""
    given = jax.lax.stop_gradient(_simulate(plan, state, frozen, batch.cond, "generator"))
    needs = frozenset().union(*(term.needs for term in terms))

    def loss_fn(generator: Tree) -> tuple[Array, Metrics]:
        weights = generator_weights(plan, generator, frozen.base)
        x0 = plan.denoiser.x0(weights, given.z, given.t, batch.cond)
        draw = _draw(plan, state, frozen, x0, batch.cond) if DM_DRAW in needs else None
        images, rewards = _reward(plan, frozen, x0, batch) if REWARDS_WITH_GRADIENT in needs else (None, None)
        return total_loss(terms, Context(state.step, x0, given.index, given.t, draw, images, rewards))

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.generator)
    generator, generator_opt, norm = apply_gradients(plan.generator_tx, grads, state.generator_opt, state.generator)
    ema = ema_update(state.ema, generator, plan.ema_decay)
    metrics |= {"generator/loss": loss, "generator/gradient_norm": norm}
    state = state._replace(step=state.step + 1, generator=generator, generator_opt=generator_opt, ema=ema)
    return state, metrics


def _draw(plan: Plan, state: TrainState, frozen: Frozen, x0: Array, cond: Conditioning) -> DMDraw:
    """Renoises the student's x0 and evaluates the score difference there; nothing carries gradient."""
    x0 = jax.lax.stop_gradient(x0)
    tau = plan.renoise.sample(purpose_key(state, state.inner, "dm/tau"), cond.batch, state.step)
    tau = plan.denoiser.process.snap(tau)
    noise = jax.random.normal(purpose_key(state, state.inner, "dm/renoise"), x0.shape, jnp.float32)
    scores = score_pass(
        plan.denoiser,
        frozen.base,
        jax.lax.stop_gradient(state.fake),
        plan.denoiser.process.add_noise(x0, noise, tau),
        tau,
        cond,
        frozen.uncond,
        fake_scale=plan.fake_scale,
        real_scale=dyna_dg_scale(state.step, plan.dg_initial, plan.dynamic_steps),
    )
    guidance_key = purpose_key(state, state.inner, "dm/guidance")
    guidance = jittered_guidance(guidance_key, plan.guidance, plan.guidance_jitter)
    return dm_draw(x0, tau, scores, guidance, plan.normaliser_floor)


def _reward(plan: Plan, frozen: Frozen, x0: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Decodes the rewarded x0 and scores it; gradient flows to x0 alone. Activations are recomputed."""
    images = jax.checkpoint(lambda z: decode_images(plan.vae, frozen.vae, z))(x0)
    names = {reward.spec.name: reward for reward in plan.rewards}
    return images, {
        name: reward.score(frozen.rewards[name], images, batch.reward_text[name]) for name, reward in names.items()
    }


def apply_gradients(
    tx: optax.GradientTransformation, grads: Tree, opt_state: Tree, params: Tree
) -> tuple[Tree, Tree, Array]:
    """One optimiser update; a non-finite gradient changes nothing (the loop stops the run when it reads the norm)."""
    norm = optax.global_norm(grads)
    updates, new_opt_state = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(jnp.isfinite(norm), new, old)  # noqa: E731
    return jax.tree.map(keep, new_params, params), jax.tree.map(keep, new_opt_state, opt_state), norm


def _by_noise_level(per_sample: Array, tau: Array) -> Metrics:
    """Mean fake loss in equal bins of tau; NaN where a bin has no sample."""
    bins = jnp.clip((tau * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)
    member = bins[None] == jnp.arange(NOISE_BINS)[:, None]
    count = member.sum(1)
    mean = jnp.where(member, per_sample[None], 0.0).sum(1) / jnp.maximum(count, 1)
    return {
        f"{NOISE_BIN}tau_{i / NOISE_BINS:.2f}_{(i + 1) / NOISE_BINS:.2f}": jnp.where(count[i] > 0, mean[i], jnp.nan)
        for i in range(NOISE_BINS)
    }
