"""The two programs of training: `fake_step` and `generator_step`.

Both are pure functions ``(plan, .., state, frozen, batch) -> (state, metrics)``. `Plan` is static and
hashable, everything with memory is an argument: the frozen networks are never closed over, never
in the state, and never differentiated.

A generator step is a rollout without gradient, what must be known of it (rewards, targets, winners), and one or several
updates of the student on it. What is computed is the union of what its terms need (`dmdr_jax.objectives.base`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.sampler import at_index
from dmdr_jax.distill.dm import DMDraw
from dmdr_jax.distill.simulate import StudentInput
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.objectives.base import (
    ADVERSARY,
    DENOISING_PAIRS,
    DM_DRAW,
    DM_REWARD,
    FAKE_ON_ROLLOUT,
    FEATURES,
    IMPORTANCE,
    PAIRS,
    REFERENCE,
    REFERENCE_X0,
    REUSE,
    REWARDS,
    REWARDS_WITH_GRADIENT,
    SAMPLE_REWARDS,
    TARGETS,
    TRANSITIONS,
    Context,
    Pairs,
    TargetGain,
    Term,
    as_groups,
    needs_of,
    total_loss,
)
from dmdr_jax.objectives.dpo import best_and_worst
from dmdr_jax.training import scoring
from dmdr_jax.training.fake import NOISE_BIN, FakeState, apply_gradients, fake_update
from dmdr_jax.training.plan import (
    FAKE_DATA,
    Batch,
    Frozen,
    Keys,
    MethodPlan,
    Plan,
    generator_weights,
    grouped,
    keys_of,
)
from dmdr_jax.training.rollouts import (
    Rollout,
    group_of,
    importance,
    pair_errors,
    pair_log_prob,
    realise,
    reference_x0,
    roll_out,
    start_noise,
    transitions,
)
from dmdr_jax.training.scoring import Scorer
from dmdr_jax.training.state import TrainState, ema_update

__all__ = [
    "FAKE_DATA",
    "NOISE_BIN",
    "Batch",
    "Frozen",
    "MethodPlan",
    "Plan",
    "apply_gradients",
    "fake_step",
    "generator_step",
    "generator_weights",
]

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]


def fake_step(plan: Plan, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update of the fake score on fresh samples of the current student."""
    keys, cond = keys_of(state), batch.cond
    student = generator_weights(plan, state.generator, frozen.base)
    given = plan.fake_simulation.student_input(
        lambda z, t: plan.denoiser.output(student, z, t, cond),
        plan.denoiser.process,
        start_noise(plan, keys("fake/noise"), cond.batch, 1),
        keys("fake/simulation"),
    )
    samples, s = _fake_data(plan, student, given, cond, keys)
    new, metrics = fake_update(plan, frozen, _fake_state(state), samples, s, cond, keys, state.step)
    return _with_fake(state, new)._replace(inner=state.inner + 1), metrics


def _fake_data(
    plan: Plan, student: Weights, given: StudentInput, cond: Conditioning, keys: Keys
) -> tuple[Array, Array | None]:
    """What the fake score trains on, of a simulation: samples ``[b, h, w, c]`` and, of realised ones, their times."""
    samples, s = given.simulated, None
    renoised = plan.fake_simulation.mode == "ode_final"
    if renoised and (plan.fake_data == "student_x0" or plan.method.boundary is not None):
        samples = plan.denoiser.x0(student, given.z, given.t, cond)
    if plan.method.boundary is not None:
        samples, s = realise(plan, given, samples, scoring.boundary_noise(keys, samples))
    return jax.lax.stop_gradient(samples), s


def generator_step(
    plan: Plan, terms: tuple[Term, ...], state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One rollout of the student, and one or several updates of it by the sum of ``terms``."""
    needs = needs_of(terms)
    batch = grouped(batch, group_of(plan, needs))
    if REFERENCE in needs:
        state = _refresh_reference(plan, state)
    student = generator_weights(plan, state.generator, frozen.base)
    stored = Stored(roll_out(plan, needs, student, batch.cond, keys_of(state)))
    stored = _judge_samples(plan, needs, stored, state, frozen, batch)
    stored = _ask_reference(plan, needs, stored, state, frozen, batch)
    state, stored, metrics = _train_on_rollout(plan, needs, stored, state, frozen, batch)

    updates = plan.method.updates if needs & REUSE else 1
    if updates == 1:
        only = jax.tree.map(lambda x: x[0], (stored.draws, stored.target_rewards))
        stored = stored._replace(draws=only[0], target_rewards=only[1])
        state, more = _update(plan, terms, stored, state, frozen, batch, keys_of(state))
    else:
        state, more = _updates(plan, terms, stored, state, frozen, batch, updates)
    return state._replace(step=state.step + 1), metrics | more


class Stored(NamedTuple):
    """What is known of a rollout before the student is updated on it; nothing carries gradient.

    Attributes:
      sample_rewards: of the final samples, by name ``[b]``.
      winners: places ``[prompts, 2]`` of each group's best and worst.
      reference_x0: the reference's estimates ``[b m, h, w, c]`` at the chosen steps.
      reference_log_prob: its log-probabilities ``[prompts, 2, m]`` of best and worst.
      draws, target_rewards: of the implicit targets, stacked on a leading axis.
      sampled_x0, old_rewards: the student's x0 at its input and its rewards.
      old_x0: the old student's x0 there.
      spread: of reward gains, by name.
      old_log_prob: which of several updates this is, and the first one's log-probabilities ``[b, m]``.
    """

    rollout: Rollout
    sample_rewards: dict[str, Array] | None = None
    winners: Array | None = None
    reference_x0: Array | None = None
    reference_log_prob: Array | None = None
    draws: DMDraw | None = None
    target_rewards: dict[str, Array] | None = None
    sampled_x0: Array | None = None
    old_x0: Array | None = None
    old_rewards: dict[str, Array] | None = None
    spread: dict[str, Array] | None = None
    old_log_prob: tuple[Array, Array] | None = None


def _judge_samples(
    plan: Plan, needs: frozenset[str], stored: Stored, state: TrainState, frozen: Frozen, batch: Batch
) -> Stored:
    """Rewards of the rollout's final samples, and by them the winners of the groups."""
    rewards, group = {}, group_of(plan, needs)
    if SAMPLE_REWARDS in needs:
        final = stored.rollout.trajectory.states[-1]
        rewards = jax.lax.stop_gradient(scoring.score_images(plan, frozen, final, batch)[1])
    if DM_REWARD in needs:
        scorer, final = Scorer.at(plan, frozen, state.fake, state.step), stored.rollout.trajectory.states[-1]
        rewards |= {"dm": scoring.matching_reward(scorer, final, batch.cond, keys_of(state), group)}
    winners = None
    if needs & {PAIRS, DENOISING_PAIRS}:
        winners = best_and_worst(as_groups(plan.method.ranking(rewards, state.step, group), group))
    return stored._replace(sample_rewards=rewards or None, winners=winners)


def _ask_reference(
    plan: Plan, needs: frozenset[str], stored: Stored, state: TrainState, frozen: Frozen, batch: Batch
) -> Stored:
    """What the reference says of the stored steps: once, as neither changes while updates share the rollout."""
    if REFERENCE not in needs:
        return stored
    rollout, reference = stored.rollout, _reference(plan, state, frozen)
    if TRANSITIONS in needs:
        stored = stored._replace(reference_x0=reference_x0(plan, rollout, reference, batch.cond))
    if PAIRS in needs:
        theirs = pair_log_prob(plan, rollout, stored.winners, reference, batch.cond)
        stored = stored._replace(reference_log_prob=jax.lax.stop_gradient(theirs))
    return stored


def _train_on_rollout(
    plan: Plan, needs: frozenset[str], stored: Stored, state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[TrainState, Stored, Metrics]:
    """The fake updates that belong to the rollout, with GDMD's targets between them."""
    if TARGETS in needs:
        return _make_targets(plan, stored, state, frozen, batch)
    if FAKE_ON_ROLLOUT not in needs:
        return state, stored, {}
    if stored.rollout.trajectory is None:
        student = generator_weights(plan, state.generator, frozen.base)
        samples, s = _fake_data(plan, student, stored.rollout.given, batch.cond, keys_of(state))
    else:
        samples, s = _stored_fake_data(plan, stored.rollout)
    fake, metrics = _fake_updates(plan, state, frozen, batch, samples, s)
    return _with_fake(state, fake), stored, metrics


def _stored_fake_data(plan: Plan, rollout: Rollout) -> tuple[Array, Array | None]:
    """`_fake_data` of a rollout whose states are all there."""
    index, trajectory = rollout.given.index, rollout.trajectory
    if plan.method.boundary is None:
        return at_index(trajectory.x0, index), None
    return at_index(trajectory.states, index + 1), jnp.asarray(plan.simulation.grid, jnp.float32)[index + 1]


def _fake_updates(
    plan: Plan, state: TrainState, frozen: Frozen, batch: Batch, samples: Array, s: Array | None
) -> tuple[FakeState, Metrics]:
    """As many fake updates on one set of samples as the plan says."""

    def one(fake: FakeState, i: Array) -> tuple[FakeState, Metrics]:
        return fake_update(plan, frozen, fake, samples, s, batch.cond, keys_of(state, i), state.step)

    fake, metrics = jax.lax.scan(one, _fake_state(state), jnp.arange(plan.method.fake_updates))
    return fake, _mean(metrics)


def _fake_state(state: TrainState) -> FakeState:
    return FakeState(state.fake, state.fake_opt, state.extra.get("gan"))


def _make_targets(
    plan: Plan, stored: Stored, state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[TrainState, Stored, Metrics]:
    """GDMD's group of implicit targets (`dmdr_jax.objectives.target`), each with its rewards."""
    given, mode = stored.rollout.given, plan.method.targets
    student = generator_weights(plan, state.generator, frozen.base)
    x0 = jax.lax.stop_gradient(plan.denoiser.x0(student, given.z, given.t, batch.cond))
    rewards = scoring.score_images(plan, frozen, x0, batch)[1]

    def one(fake: FakeState, i: Array) -> tuple[FakeState, tuple[DMDraw, dict[str, Array], Metrics]]:
        metrics: Metrics = {}
        if mode != "renoise":
            fake, metrics = fake_update(plan, frozen, fake, x0, None, batch.cond, keys_of(state, i), state.step)
        scorer = Scorer.at(plan, frozen, fake.fake, state.step)
        keys = keys_of(state) if mode == "fake" else keys_of(state, i)
        draw = scoring.one_draw(scorer, given, x0, batch.cond, keys)
        if not plan.method.targets_normalised:
            draw = draw._replace(gradient=draw.gradient * draw.normaliser)
        return fake, (draw, scoring.score_images(plan, frozen, x0 - draw.gradient, batch)[1], metrics)

    fake = FakeState(state.fake, state.fake_opt)
    before: Metrics = {}
    if mode == "renoise":
        fake, before = _fake_updates(plan, state, frozen, batch, x0, None)
    fake, (draws, targets, metrics) = jax.lax.scan(one, fake, jnp.arange(plan.method.updates))
    state = _with_fake(state, fake)
    gains = {name: targets[name] - rewards[name] for name in rewards}
    running, spread = update_spread(state.extra.get("spread", {}), gains, plan.method.spread_decay)
    state = state._replace(extra={**state.extra, "spread": running})
    known: dict[str, Any] = {"draws": draws, "target_rewards": targets}
    known |= {"sampled_x0": x0, "old_x0": x0, "old_rewards": rewards, "spread": spread}
    if plan.method.old == "average":
        average = generator_weights(plan, state.ema, frozen.base)
        known["old_x0"] = plan.denoiser.x0(average, given.z, given.t, batch.cond)
    return state, stored._replace(**jax.lax.stop_gradient(known)), before | _mean(metrics)


def update_spread(
    running: dict[str, Array], gains: dict[str, Array], decay: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """A decaying mean of each reward's variance of gains, and its root.

    Args:
      running: by name ``[2]``: the weighted sum of variances so far and the sum of weights.
      gains: by name, of any shape.
    """
    new = {}
    for name, gain in gains.items():
        latest, before = jnp.stack([gain.astype(jnp.float32).var(), jnp.ones(())]), running.get(name, jnp.zeros(2))
        # One gain that is not finite would stay in the memory for ever.
        new[name] = jnp.where(jnp.isfinite(latest[0]), decay * before + (1.0 - decay) * latest, before)
    return new, {name: jnp.sqrt(pair[0] / pair[1]) for name, pair in new.items()}


def _updates(
    plan: Plan,
    terms: tuple[Term, ...],
    stored: Stored,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    count: int,
) -> tuple[TrainState, Metrics]:
    """Several updates on one rollout, each with its own target and keys; metrics are means."""
    fixed, swept = stored._replace(draws=None, target_rewards=None), (stored.draws, stored.target_rewards)

    def one(carry: tuple, x: tuple) -> tuple[tuple, Metrics]:
        state, old_log_prob = carry
        i, (draws, rewards) = x
        mine = fixed._replace(draws=draws, target_rewards=rewards, old_log_prob=(i, old_log_prob))
        state, metrics = _update(plan, terms, mine, state, frozen, batch, keys_of(state, i))
        return (state, metrics.pop(_LOG_PROB, old_log_prob)), metrics

    m = 0 if stored.rollout.chosen is None else stored.rollout.chosen.shape[1]
    start = state, jnp.zeros((batch.cond.batch, m))
    (state, _), metrics = jax.lax.scan(one, start, (jnp.arange(count), swept))
    return state, _mean(metrics)


_LOG_PROB = "_old_log_prob"


def _update(
    plan: Plan, terms: tuple[Term, ...], stored: Stored, state: TrainState, frozen: Frozen, batch: Batch, keys: Keys
) -> tuple[TrainState, Metrics]:
    """One update of the student; gradient flows through its calls in `_context` alone."""

    def loss_fn(generator: Tree) -> tuple[Array, Metrics]:
        ctx = _context(plan, needs_of(terms), stored, state, generator, frozen, batch, keys)
        loss, metrics = total_loss(terms, ctx)
        if stored.old_log_prob is not None and ctx.transitions is not None:
            metrics[_LOG_PROB] = ctx.transitions.old_log_prob
        return loss, metrics

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.generator)
    generator, generator_opt, norm = apply_gradients(plan.generator_tx, grads, state.generator_opt, state.generator)
    ema = ema_update(state.ema, generator, plan.ema_decay)
    metrics |= {"generator/loss": loss, "generator/gradient_norm": norm}
    return state._replace(generator=generator, generator_opt=generator_opt, ema=ema), metrics


def _context(
    plan: Plan,
    needs: frozenset[str],
    stored: Stored,
    state: TrainState,
    generator: Tree,
    frozen: Frozen,
    batch: Batch,
    keys: Keys,
) -> Context:
    """What the terms need, computed with the student ``generator``, to which it carries gradient."""
    given, cond, group = stored.rollout.given, batch.cond, group_of(plan, needs)
    student = generator_weights(plan, generator, frozen.base)
    reference = _reference(plan, state, frozen) if REFERENCE in needs else None
    x0 = plan.denoiser.x0(student, given.z, given.t, cond)
    ctx = Context(state.step, x0, given.index, given.t, steps=plan.simulation.steps, group=group)
    ctx = ctx._replace(sample_rewards=stored.sample_rewards, sampled_x0=stored.sampled_x0, old_x0=stored.old_x0)

    if TARGETS in needs:
        gain = TargetGain(stored.old_rewards, stored.target_rewards, stored.spread)
        ctx = ctx._replace(draw=stored.draws, target_gain=gain)
    elif DM_DRAW in needs:
        scorer = Scorer.at(plan, frozen, state.fake, state.step)
        ctx = ctx._replace(draw=scoring.draw(scorer, given, x0, cond, keys, group))
    if plan.method.boundary is not None:
        ctx = ctx._replace(matched=realise(plan, given, x0, scoring.boundary_noise(keys, x0))[0])
    if needs & {REWARDS, REWARDS_WITH_GRADIENT}:
        rewarded = x0 if REWARDS_WITH_GRADIENT in needs else jax.lax.stop_gradient(x0)
        images, rewards = scoring.score_images(plan, frozen, rewarded, batch)
        ctx = ctx._replace(images=images, rewards=rewards)
    if REFERENCE_X0 in needs:
        ctx = ctx._replace(reference_x0=jax.lax.stop_gradient(plan.denoiser.x0(reference, given.z, given.t, cond)))
    if FEATURES in needs:
        ctx = ctx._replace(
            features=scoring.feature_sets(plan, frozen, x0, ctx.reference_x0, cond, keys("features/noise"))
        )
    if ADVERSARY in needs:
        head = state.extra["gan"]["head"]
        ctx = ctx._replace(realness=scoring.realness(plan, frozen, state.fake, head, x0, cond, keys, state.step))
    return _with_rollout(plan, needs, stored, ctx, student, reference, cond, keys)


def _with_rollout(
    plan: Plan,
    needs: frozenset[str],
    stored: Stored,
    ctx: Context,
    student: Weights,
    reference: Weights | None,
    cond: Any,
    keys: Keys,
) -> Context:
    """The context with the stored rollout as the student and its reference see it now."""
    rollout = stored.rollout
    if TRANSITIONS in needs:
        found = transitions(plan, rollout, student, stored.reference_x0, cond)
        if stored.old_log_prob is not None:
            i, old = stored.old_log_prob
            found = found._replace(old_log_prob=jnp.where(i > 0, old, found.old_log_prob))
        ctx = ctx._replace(transitions=found)
    if PAIRS in needs:
        mine = pair_log_prob(plan, rollout, stored.winners, student, cond)
        ctx = ctx._replace(pairs=Pairs(mine, stored.reference_log_prob))
    if DENOISING_PAIRS in needs:
        errors = pair_errors(plan, rollout, stored.winners, student, reference, cond, keys)
        ctx = ctx._replace(pair_errors=errors)
    if IMPORTANCE in needs:
        first = plan.method.updates == 1
        ratio = jnp.ones(cond.batch) if first else importance(plan, rollout, student, cond)
        ctx = ctx._replace(importance=ratio)
    return ctx


def _reference(plan: Plan, state: TrainState, frozen: Frozen) -> Weights:
    return generator_weights(plan, jax.lax.stop_gradient(state.extra["reference"]), frozen.base)


def _refresh_reference(plan: Plan, state: TrainState) -> TrainState:
    """The reference becomes the student at its first step and, where it is refreshed, every so many later."""
    since, every = state.step - plan.method.reference_start, plan.method.reference_refresh
    due = since == 0
    if every:
        due = (since >= 0) & (since % every == 0)
    reference = jax.tree.map(lambda new, old: jnp.where(due, new, old), state.generator, state.extra["reference"])
    return state._replace(extra={**state.extra, "reference": reference})


def _with_fake(state: TrainState, new: FakeState) -> TrainState:
    state = state._replace(fake=new.fake, fake_opt=new.opt)
    return state if new.gan is None else state._replace(extra={**state.extra, "gan": new.gan})


def _mean(metrics: Metrics) -> Metrics:
    """Means over the updates of a scan; a noise level that one of them did not have is left out of its mean."""
    return {name: jnp.nanmean(x, 0) if name.startswith(NOISE_BIN) else x.mean(0) for name, x in metrics.items()}
