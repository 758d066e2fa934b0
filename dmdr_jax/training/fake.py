"""One update of the fake score, whatever it is trained on, and of the discriminator that rides on it."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.distill import gan
from dmdr_jax.distill.bridge import bridge_loss
from dmdr_jax.distill.fake import fake_score_loss
from dmdr_jax.distill.features import with_features
from dmdr_jax.models.conditioning import Conditioning, map_rows
from dmdr_jax.training.plan import Frozen, Keys, Plan, RealImages

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]

NOISE_BINS = 4
NOISE_BIN = "fake_by_noise/"


class FakeState(NamedTuple):
    """What an update of the fake score changes; ``gan`` holds "head" and "opt" where there is a discriminator."""

    fake: Tree
    opt: Tree
    gan: Tree | None = None


def fake_update(
    plan: Plan,
    frozen: Frozen,
    state: FakeState,
    samples: Array,
    s: Array | None,
    cond: Conditioning,
    keys: Keys,
    step: Array,
) -> tuple[FakeState, Metrics]:
    """One step of the optimiser on samples ``[b, h, w, c]``, which get no gradient.

    Args:
      s: times ``[b]`` of the samples where they are realised latents; None where they are clean.
      keys: "fake/tau", "fake/renoise", and those of the bridge or the discriminator.
      step: generator step, for the density of renoise times.
    """
    if state.gan is not None:
        return _adversarial_update(plan, frozen, state, samples, cond, keys, step)

    def loss_fn(fake: Tree) -> tuple[Array, tuple[Array, Array, Metrics]]:
        weights = Weights(frozen.base, fake, plan.fake_scale)
        if s is None:
            tau, noise = _renoise(plan, samples, keys, step)
            loss, per_sample = fake_score_loss(plan.denoiser, weights, samples, tau, noise, cond)
            return loss, (per_sample, tau, {})
        t = plan.denoiser.process.snap(plan.method.boundary.times(keys("fake/tau"), s))
        kernel, settings, key = plan.rollout_kernel, plan.method.boundary, keys("fake/renoise")
        loss, per_sample, consistency = bridge_loss(plan.denoiser, weights, kernel, settings, samples, s, t, cond, key)
        return loss, (per_sample, t, {"fake/consistency": consistency})

    (loss, (per_sample, tau, more)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.fake)
    fake, opt, norm = apply_gradients(plan.fake_tx, grads, state.opt, state.fake)
    metrics = {"fake/loss": loss, "fake/gradient_norm": norm, **by_noise_level(per_sample, tau), **more}
    return FakeState(fake, opt), metrics


def _renoise(plan: Plan, samples: Array, keys: Keys, step: Array) -> tuple[Array, Array]:
    tau = plan.denoiser.process.snap(plan.renoise.sample(keys("fake/tau"), samples.shape[0], step))
    return tau, jax.random.normal(keys("fake/renoise"), samples.shape, jnp.float32)


def _adversarial_update(
    plan: Plan, frozen: Frozen, state: FakeState, samples: Array, cond: Conditioning, keys: Keys, step: Array
) -> tuple[FakeState, Metrics]:
    """Denoising and discrimination in one loss; the student's rows serve both."""
    spec, process = plan.method.gan, plan.denoiser.process
    tau, noise = _renoise(plan, samples, keys, step)
    real, real_cond = draw_real(frozen.real, cond, keys("gan/real"))
    x_fake = process.add_noise(samples, noise, tau)
    real_noise = jax.random.normal(keys("gan/real_noise"), real.shape, jnp.float32)
    x_real = process.add_noise(real, real_noise, tau)
    target = process.target(samples, noise, tau)

    def loss_fn(trained: tuple[Tree, gan.Head]) -> tuple[Array, tuple[Array, Array, Array]]:
        fake, head = trained
        weights = Weights(frozen.base, fake, plan.fake_scale)
        output, features = with_features(plan.denoiser, weights, x_fake, tau, cond, spec.layers)
        _, real_features = with_features(plan.denoiser, weights, x_real, tau, real_cond, spec.layers)
        per_sample = ((output - target) ** 2).mean(axis=(1, 2, 3))
        logits = gan.logits(head, features), gan.logits(head, real_features)
        loss = per_sample.mean() + spec.weight * gan.discriminator_loss(*logits)
        return loss, (per_sample, *logits)

    trained = state.fake, state.gan["head"]
    (loss, (per_sample, fakes, reals)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    fake, opt, norm = apply_gradients(plan.fake_tx, grads[0], state.opt, state.fake)
    head, head_opt, head_norm = apply_gradients(spec.tx, grads[1], state.gan["opt"], state.gan["head"])
    right = jnp.concatenate([fakes < 0, reals > 0]).astype(jnp.float32).mean()
    metrics = {"fake/loss": per_sample.mean(), "fake/gradient_norm": norm, **by_noise_level(per_sample, tau)}
    metrics |= {"gan/loss": loss - per_sample.mean(), "gan/right": right, "gan/gradient_norm": head_norm}
    return FakeState(fake, opt, {"head": head, "opt": head_opt}), metrics


def draw_real(real: RealImages, like: Conditioning, key: Array) -> tuple[Array, Conditioning]:
    """As many real latents as there are rows in ``like``, with their captions."""
    rows = jax.random.randint(key, (like.batch,), 0, real.latents.shape[0])
    cond = map_rows(lambda x: x[rows], real.cond)
    # Sizes and crops are the run's own.
    return real.latents[rows], cond if like.time_ids is None else dataclasses.replace(cond, time_ids=like.time_ids)


def apply_gradients(
    tx: optax.GradientTransformation, grads: Tree, opt_state: Tree, params: Tree
) -> tuple[Tree, Tree, Array]:
    """One optimiser update; a non-finite gradient changes nothing (the loop stops the run when it reads the norm)."""
    norm = optax.global_norm(grads)
    updates, new_opt_state = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    # Three selections for each leaf, of which SDXL's U-Net has 500: not `jnp.where`, a function for the compiler each.
    keep = partial(jax.lax.select, jnp.isfinite(norm))
    return jax.tree.map(keep, new_params, params), jax.tree.map(keep, new_opt_state, opt_state), norm


def by_noise_level(per_sample: Array, tau: Array) -> Metrics:
    """Mean fake loss in equal bins of tau; NaN where a bin has no sample."""
    bins = jnp.clip((tau * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)
    member = bins[None] == jnp.arange(NOISE_BINS)[:, None]
    count = member.sum(1)
    mean = jnp.where(member, per_sample[None], 0.0).sum(1) / jnp.maximum(count, 1)
    return {
        f"{NOISE_BIN}tau_{i / NOISE_BINS:.2f}_{(i + 1) / NOISE_BINS:.2f}": jnp.where(count[i] > 0, mean[i], jnp.nan)
        for i in range(NOISE_BINS)
    }
