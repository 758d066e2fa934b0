"""What networks say of the student's samples: score differences, rewards, features, realness."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.distill import gan
from dmdr_jax.distill.bridge import boundary_draw, bridge
from dmdr_jax.distill.dm import DMDraw, dm_draw, dm_reward, group_draw, share_normaliser
from dmdr_jax.distill.features import pooled, with_features
from dmdr_jax.distill.schedules import dyna_dg_scale, jittered_guidance
from dmdr_jax.distill.scores import Scores, score_pass
from dmdr_jax.distill.simulate import StudentInput
from dmdr_jax.distill.split import split_draw, split_score_pass
from dmdr_jax.errors import UserError
from dmdr_jax.generate import decode_images
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.placement import BATCH_AXES, FSDP, axis_size, batch_parts, unsplit
from dmdr_jax.objectives.base import FeatureSets
from dmdr_jax.rewards.memory import in_microbatches
from dmdr_jax.rewards.scoring import gathers_layers
from dmdr_jax.training.plan import Batch, Frozen, Keys, Plan, Tree
from dmdr_jax.training.rollouts import realise

Array = jax.Array
Rewards = dict[str, Array]


class Scorer(NamedTuple):
    """The scoring networks at one moment: nothing here carries gradient.

    Attributes:
      fake: the guidance LoRA.
      real_scale: its effective scale on the real score.
      step: generator step, for the schedules.
    """

    plan: Plan
    frozen: Frozen
    fake: Tree
    real_scale: Array
    step: Array

    @classmethod
    def at(cls, plan: Plan, frozen: Frozen, fake: Tree, step: Array) -> "Scorer":
        scale = dyna_dg_scale(step, plan.dg_initial, plan.dynamic_steps)
        return cls(plan, frozen, jax.lax.stop_gradient(fake), scale, step)

    @property
    def scales(self) -> dict[str, Any]:
        return {"fake_scale": self.plan.fake_scale, "real_scale": self.real_scale}

    def tau(self, key: Array, batch: int) -> Array:
        """Renoise times ``[batch]``."""
        return self.plan.denoiser.process.snap(self.plan.renoise.sample(key, batch, self.step))

    def scores(self, x_tau: Array, tau: Array, cond: Conditioning) -> Scores:
        networks = self.plan.denoiser, self.frozen.base, self.fake
        return score_pass(*networks, x_tau, tau, cond, self.frozen.uncond, **self.scales)

    def guidance(self, key: Array) -> Array:
        return jittered_guidance(key, self.plan.guidance, self.plan.guidance_jitter)


def draw(scorer: Scorer, given: StudentInput, x0: Array, cond: Conditioning, keys: Keys, group: int = 1) -> DMDraw:
    """The score difference at renoised ``x0``, in the plan's way; nothing carries gradient.

    Args:
      keys: "dm/tau", "dm/renoise", "dm/guidance" and, for several points, what is folded from them.
      group: rows per prompt, which share noise level and normaliser where these make a group.
    """
    x0, method = jax.lax.stop_gradient(x0), scorer.plan.method
    if method.draw_mode == "renoise_group":
        return group_draw(draws(scorer, given, x0, cond, keys), scorer.plan.normaliser_floor, method.draw_rms)
    if method.draw_mode == "prompt_group":
        # At levels of their own, one number for all would weight levels against one another.
        return share_normaliser(one_draw(scorer, given, x0, cond, keys, group), group)
    return one_draw(scorer, given, x0, cond, keys)


def draws(scorer: Scorer, given: StudentInput, x0: Array, cond: Conditioning, keys: Keys, group: int = 1) -> DMDraw:
    """As many draws as the plan says, stacked on a leading axis, with one guidance scale; a ``group`` shares times."""

    def one(_: None, s: Array) -> tuple[None, DMDraw]:
        def key(purpose: str) -> Array:
            own = keys(purpose)
            return own if purpose == "dm/guidance" else jnp.where(s > 0, jax.random.fold_in(own, s), own)

        return None, one_draw(scorer, given, x0, cond, key, group)

    return jax.lax.scan(one, None, jnp.arange(scorer.plan.method.draws))[1]


def one_draw(scorer: Scorer, given: StudentInput, x0: Array, cond: Conditioning, keys: Keys, group: int = 1) -> DMDraw:
    """One draw at one renoised point: plain, split (Decoupled DMD), or of realised latents (AC-DMD)."""
    plan, process, guidance = scorer.plan, scorer.plan.denoiser.process, scorer.guidance(keys("dm/guidance"))
    noise = jax.random.normal(keys("dm/renoise"), x0.shape, jnp.float32)
    if plan.method.boundary is not None:
        return _boundary_draw(scorer, given, x0, cond, keys, noise, guidance)
    tau = jnp.repeat(scorer.tau(keys("dm/tau"), cond.batch // group), group)
    x_tau = process.add_noise(x0, noise, tau)
    if plan.method.split is None:
        return dm_draw(x0, tau, scorer.scores(x_tau, tau, cond), guidance, plan.normaliser_floor)
    return _split_draw(scorer, given, x0, cond, keys, noise, tau, guidance)


def _split_draw(
    scorer: Scorer,
    given: StudentInput,
    x0: Array,
    cond: Conditioning,
    keys: Keys,
    noise: Array,
    tau: Array,
    guidance: Array,
) -> DMDraw:
    plan, process, split = scorer.plan, scorer.plan.denoiser.process, scorer.plan.method.split
    free = scorer.tau(keys("ca/tau"), cond.batch)
    tau, tau_ca = map(process.snap, split.times(keys("ca/below"), tau, given.t, free))
    tied = split.schedule == "tied"
    noise_ca = noise if tied else jax.random.normal(keys("ca/renoise"), x0.shape, jnp.float32)
    points = process.add_noise(x0, noise, tau), tau, process.add_noise(x0, noise_ca, tau_ca), tau_ca
    networks = plan.denoiser, scorer.frozen.base, scorer.fake
    scores, cond_at_ca = split_score_pass(*networks, *points, cond, scorer.frozen.uncond, **scorer.scales)
    return split_draw(x0, tau, scores, cond_at_ca, guidance, plan.normaliser_floor, split.normaliser)


def _boundary_draw(
    scorer: Scorer, given: StudentInput, x0: Array, cond: Conditioning, keys: Keys, noise: Array, guidance: Array
) -> DMDraw:
    plan, process, settings = scorer.plan, scorer.plan.denoiser.process, scorer.plan.method.boundary
    x_s, s = realise(plan, given, x0, boundary_noise(keys, x0))
    t = process.snap(settings.times(keys("dm/tau"), s))
    x_t, _ = bridge(process, x_s, s, t, noise)
    shared = jax.random.normal(keys("boundary/transition"), x0.shape, jnp.float32)
    points = x_s, s, x0, x_t, t, scorer.scores(x_t, t, cond), guidance, shared
    return boundary_draw(process, plan.rollout_kernel, settings, *points, plan.normaliser_floor)


def boundary_noise(keys: Keys, x0: Array) -> Array:
    """The noise of the step that realises the student's latents: the same for a draw and for what it acts on."""
    return jax.random.normal(keys("boundary/realise"), x0.shape, jnp.float32)


def matching_reward(scorer: Scorer, samples: Array, cond: Conditioning, keys: Keys, group: int) -> Array:
    """R_dm ``[b]`` of samples ``[b, h, w, c]`` (`dmdr_jax.distill.dm.dm_reward`); a group is judged at equal times."""

    def key(purpose: str) -> Array:
        return keys(purpose.replace("dm/", "dm_reward/"))

    return jax.lax.stop_gradient(dm_reward(samples, draws(scorer, None, samples, cond, key, group)))


def score_images(plan: Plan, frozen: Frozen, x0: Array, batch: Batch) -> tuple[Array, Rewards]:
    """Decodes ``x0`` and scores it; gradient flows to ``x0`` alone. Activations are recomputed."""
    names = {reward.spec.name: reward for reward in plan.rewards}
    text = {name: batch.reward_text[name] for name in names}

    def decoded(x0: Array) -> Array:
        with unsplit():
            return jax.checkpoint(lambda z: decode_images(plan.vae, frozen.vae, z))(x0)

    def scored(images: Array, text: Rewards) -> Rewards:
        scores = {}
        for name, reward in names.items():
            with contextlib.nullcontext() if gathers_layers(reward) else unsplit():
                scores[name] = reward.score(frozen.rewards[name], images, text[name])
        return scores

    def both(x0: Array, text: Rewards) -> tuple[Array, Rewards]:
        images = decoded(x0)
        return images, scored(images, text)

    rows = plan.reward_microbatch * batch_parts()
    if not plan.decode_split:
        return in_microbatches(both, rows, remat=False)(x0, text)
    images = decode_together(decoded, x0)
    return images, in_microbatches(scored, rows, remat=False)(images, text)


def decode_together(decoded: Callable[[Array], Array], x0: Array) -> Array:
    """Images of latents, one at a time decoded by all devices along fsdp, each of which takes some of its pixels' rows.

    What a decoder keeps of one large image is then divided among them. Convolutions exchange the rows at the borders.

    Raises:
      UserError: rows of latents that do not divide over the devices.
    """
    groups, parts = axis_size("data"), axis_size(FSDP)
    if x0.shape[1] % parts:
        raise UserError(
            f"config.decode_split: {x0.shape[1]} rows of latents do not divide over {parts} devices (fsdp)."
        )

    def split(x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, spec) if groups * parts > 1 else x

    by_rows, by_images = PartitionSpec("data", FSDP), PartitionSpec(BATCH_AXES)

    def together(x0: Array) -> Array:
        return split(decoded(split(x0, by_rows)), by_rows)

    return split(in_microbatches(together, groups, remat=False)(x0), by_images)


def feature_sets(
    plan: Plan, frozen: Frozen, x0: Array, reference_x0: Array | None, cond: Conditioning, key: Array
) -> FeatureSets:
    """Features of the student's and the reference's x0 in the frozen base; gradient flows to ``x0``.

    All rows have one noise, so that only what they show keeps them apart.
    """
    spec, process = plan.method.features, plan.denoiser.process
    noise = jnp.broadcast_to(jax.random.normal(key, x0.shape[1:], jnp.float32), x0.shape)
    t = process.snap(jnp.full((cond.batch,), spec.time, jnp.float32))

    def features(x: Array) -> dict[str, Array]:
        _, found = with_features(
            plan.denoiser, Weights(frozen.base), process.add_noise(x, noise, t), t, cond, spec.layers
        )
        height, width = x.shape[1:3]
        return pooled(found, height, width, spec.cells)

    reference = None if reference_x0 is None else jax.lax.stop_gradient(features(reference_x0))
    return FeatureSets(features(x0), reference)


def realness(
    plan: Plan, frozen: Frozen, fake: Tree, head: gan.Head, x0: Array, cond: Conditioning, keys: Keys, step: Array
) -> Array:
    """The discriminator's logit ``[b]`` of renoised ``x0``; gradient flows to ``x0`` alone."""
    weights = Weights(frozen.base, jax.lax.stop_gradient(fake), plan.fake_scale)
    process = plan.denoiser.process
    tau = process.snap(plan.renoise.sample(keys("gan/tau"), cond.batch, step))
    noise = jax.random.normal(keys("gan/renoise"), x0.shape, jnp.float32)
    x_tau = process.add_noise(x0, noise, tau)
    _, features = with_features(plan.denoiser, weights, x_tau, tau, cond, plan.method.gan.layers)
    return gan.logits(jax.lax.stop_gradient(head), features)
