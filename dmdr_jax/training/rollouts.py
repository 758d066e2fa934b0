"""Rollouts of the student: made once without gradient, stored, and looked at again by the student as it is now."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.kernels import Transition, gaussian_kl, log_prob
from dmdr_jax.diffusion.sampler import Trajectory, at_index
from dmdr_jax.distill.simulate import StudentInput
from dmdr_jax.models.conditioning import Conditioning, map_rows
from dmdr_jax.objectives.base import (
    FAKE_ON_ROLLOUT,
    GROUPS,
    LAST_STEP,
    PAIRS,
    SAMPLE_NEEDS,
    TARGETS,
    TRANSITIONS,
    PairErrors,
    Transitions,
    as_groups,
)
from dmdr_jax.training.plan import Keys, Plan

Array = jax.Array


class Rollout(NamedTuple):
    """A stored rollout.

    Attributes:
      given: where the student is called.
      trajectory: all states, where a term needs them.
      chosen: the steps ``[m]`` that get a policy gradient.
    """

    given: StudentInput
    trajectory: Trajectory | None = None
    chosen: Array | None = None


def group_of(plan: Plan, needs: frozenset[str]) -> int:
    """Rows per prompt."""
    return plan.method.group if GROUPS in needs else 1


def roll_out(plan: Plan, needs: frozenset[str], student: Weights, cond: Conditioning, keys: Keys) -> Rollout:
    """Simulates what the generator's terms need; nothing carries gradient."""
    group, last, simulation = group_of(plan, needs), LAST_STEP in needs, plan.simulation
    noise = start_noise(plan, keys("generator/noise"), cond.batch, group)
    key = keys("generator/simulation")

    def output_fn(z: Array, t: Array) -> Array:
        return plan.denoiser.output(student, z, t, cond)

    if not needs & SAMPLE_NEEDS:
        with_sample = FAKE_ON_ROLLOUT in needs and TARGETS not in needs
        given = simulation.student_input(output_fn, plan.denoiser.process, noise, key, with_sample, group, last)
        return Rollout(jax.lax.stop_gradient(given))
    with_steps, prompts = needs & {TRANSITIONS, PAIRS}, cond.batch // group
    chosen = choose_steps(plan, keys("policy/steps"), prompts) if with_steps else None
    step_keys = None
    if plan.method.shared_noise and chosen is not None:
        step_keys = group_keys(keys("policy/noise"), chosen, simulation.steps, cond.batch, group)
    arguments = output_fn, plan.denoiser.process, plan.rollout_kernel, noise, key, step_keys, group, last
    given, trajectory = simulation.whole_input(*arguments)
    return Rollout(*jax.lax.stop_gradient((given, trajectory)), chosen)


def start_noise(plan: Plan, key: Array, batch: int, group: int) -> Array:
    """The rollouts' first states ``[b, h, w, c]``, one for all rows of a group where the plan says so."""
    if not plan.method.shared_start or group == 1:
        return jax.random.normal(key, (batch, *plan.latent_shape), jnp.float32)
    noise = jax.random.normal(key, (batch // group, 1, *plan.latent_shape), jnp.float32)
    return jnp.broadcast_to(noise, (batch // group, group, *plan.latent_shape)).reshape(batch, *plan.latent_shape)


def choose_steps(plan: Plan, key: Array, prompts: int) -> Array:
    """The steps that get a policy gradient, ``[prompts, m]``.

    All stochastic ones, or a random subset in ascending order: one for all, or each prompt's own.
    """
    stochastic = plan.simulation.steps - 1
    if plan.policy_steps == stochastic:
        return jnp.broadcast_to(jnp.arange(stochastic), (prompts, stochastic))

    def draw(key: Array) -> Array:
        return jnp.sort(jax.random.permutation(key, stochastic)[: plan.policy_steps])

    if plan.method.steps_of == "prompt":
        return jax.vmap(lambda prompt: draw(jax.random.fold_in(key, prompt)))(jnp.arange(prompts))
    return jnp.broadcast_to(draw(key), (prompts, plan.policy_steps))


def group_keys(key: Array, chosen: Array, steps: int, batch: int, group: int) -> Array:
    """Keys ``[steps, b]``: one per row at its prompt's ``chosen`` ``[b / group, m]``, else one per group of rows."""
    row = jnp.arange(batch)
    own = (jnp.arange(steps)[:, None, None] == chosen[row // group]).any(-1)
    which = jnp.where(own, batch + row, row // group)
    step_keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(steps))
    return jax.vmap(lambda k, rows: jax.vmap(lambda r: jax.random.fold_in(k, r))(rows))(step_keys, which)


def realise(plan: Plan, given: StudentInput, x0: Array, noise: Array) -> tuple[Array, Array]:
    """The latents ``[b, h, w, c]`` that the sampler makes of the student's ``x0``, and their times ``[b]``."""
    process, kernel = plan.denoiser.process, plan.rollout_kernel
    s = jnp.asarray(plan.simulation.grid, jnp.float32)[given.index + 1]
    eps = process.eps_from_x0(given.z, x0, given.t)
    return kernel.step(process, x0, eps, s, noise, given.z, given.t), s


def repeat_rows(cond: Conditioning, times: int) -> Conditioning:
    """Each row ``times`` times, one after the other."""
    return map_rows(lambda x: jnp.repeat(x, times, 0), cond)


def take_rows(cond: Conditioning, group: int, count: int) -> Conditioning:
    """The first ``count`` rows of each group; all rows of a group have one prompt."""

    def take(x: Array) -> Array:
        return as_groups(x, group)[:, :count].reshape(-1, *x.shape[1:])

    return map_rows(take, cond)


class _Steps(NamedTuple):
    """Chosen steps of stored states, flattened to ``b m`` rows, and how to say what a network makes of them."""

    z: Array
    z_next: Array
    t: Array
    t_next: Array


def _stored_steps(plan: Plan, states: Array, chosen: Array) -> _Steps:
    """Of states ``[K + 1, b, ...]`` those at their prompts' ``chosen`` ``[prompts, m]``.

    The rows of a sample stay together, so that a split batch stays split.
    """
    grid = jnp.asarray(plan.simulation.grid, jnp.float32)
    chosen = jnp.repeat(chosen, states.shape[1] // chosen.shape[0], 0)

    def rows(steps: Array) -> Array:
        return at_index(states, steps).reshape(-1, *states.shape[2:])

    times = (grid[steps].reshape(-1) for steps in (chosen, chosen + 1))
    return _Steps(rows(chosen), rows(chosen + 1), *times)


def _transition(plan: Plan, steps: _Steps, x0: Array) -> Transition:
    process = plan.denoiser.process
    eps = process.eps_from_x0(steps.z, x0, steps.t)
    return plan.rollout_kernel.transition(process, steps.z, steps.t, x0, eps, steps.t_next)


def _density(plan: Plan, steps: _Steps, x0: Array) -> Array:
    """Log-probability of the stored next states, given the estimates ``x0``; one number per row."""
    mine = _transition(plan, steps, x0)
    if plan.method.density == "rtdmd":
        return -((steps.z_next - mine.mean) ** 2).mean(axis=(1, 2, 3))
    return log_prob(mine, steps.z_next)


def reference_x0(plan: Plan, rollout: Rollout, reference: Weights, cond: Conditioning) -> Array:
    """The reference's estimates ``[b m, h, w, c]`` at the chosen steps, for the KL; one pass without gradient."""
    steps, rows = _stored_steps(plan, rollout.trajectory.states, rollout.chosen), _chosen_rows(rollout, cond)
    return jax.lax.stop_gradient(plan.denoiser.x0(reference, steps.z, steps.t, rows))


def _chosen_rows(rollout: Rollout, cond: Conditioning) -> Conditioning:
    return repeat_rows(cond, rollout.chosen.shape[1])


def transitions(
    plan: Plan, rollout: Rollout, student: Weights, theirs: Array | None, cond: Conditioning
) -> Transitions:
    """The chosen steps of a stored rollout as ``student`` sees them; one pass of b m rows with gradient.

    Args:
      theirs: the reference's estimates of them (`reference_x0`), for the KL.
    """
    m, b = rollout.chosen.shape[1], cond.batch
    steps, rows = _stored_steps(plan, rollout.trajectory.states, rollout.chosen), _chosen_rows(rollout, cond)
    x0 = plan.denoiser.x0(student, steps.z, steps.t, rows)
    kl = None
    if theirs is not None:
        kl = gaussian_kl(_transition(plan, steps, x0), _transition(plan, steps, theirs))
        kl = (kl * (steps.t - steps.t_next) if plan.method.kl_form == "flow_grpo" else kl).reshape(b, m)
    slope = jax.grad(lambda x: _density(plan, steps, x).sum())(jax.lax.stop_gradient(x0))
    shape = b, m, *plan.latent_shape
    scale = (plan.simulation.steps - 1) / m
    density = _density(plan, steps, x0).reshape(b, m)
    old = jax.lax.stop_gradient(density)
    return Transitions(density, old, kl, x0.reshape(shape), slope.reshape(shape), scale)


def pair_log_prob(plan: Plan, rollout: Rollout, winners: Array, weights: Weights, cond: Conditioning) -> Array:
    """Log-probabilities ``[prompts, 2, m]`` of each group's best and worst rollout, one pass of 2 m rows a prompt.

    Args:
      winners: their places ``[prompts, 2]``.
      weights: whose; the student's carry gradient.
    """
    m, group = rollout.chosen.shape[1], plan.method.group
    states = take_pairs(rollout.trajectory.states, winners, group)
    steps, rows = _stored_steps(plan, states, rollout.chosen), repeat_rows(take_rows(cond, group, 2), m)
    return _density(plan, steps, plan.denoiser.x0(weights, steps.z, steps.t, rows)).reshape(-1, 2, m)


def pair_errors(
    plan: Plan,
    rollout: Rollout,
    winners: Array,
    student: Weights,
    reference: Weights,
    cond: Conditioning,
    keys: Keys,
) -> PairErrors:
    """Denoising errors of each group's best and worst final sample, at one time of the grid and with one noise."""
    group, process = plan.method.group, plan.denoiser.process
    x = take_pairs(rollout.trajectory.states[-1:], winners, group)[0]
    pairs = x.shape[0] // 2
    index = jax.random.randint(keys("dpo/index"), (pairs,), 0, plan.simulation.steps)
    t = jnp.repeat(jnp.asarray(plan.simulation.grid, jnp.float32)[index], 2)
    noise = jnp.repeat(jax.random.normal(keys("dpo/noise"), (pairs, *x.shape[1:]), jnp.float32), 2, 0)
    x_t, rows = process.add_noise(x, noise, t), take_rows(cond, group, 2)

    def error(weights: Weights) -> Array:
        difference = plan.denoiser.output(weights, x_t, t, rows) - process.target(x, noise, t)
        return (difference**2).mean(axis=(1, 2, 3)).reshape(-1, 2)

    return PairErrors(error(student), jax.lax.stop_gradient(error(reference)))


def take_pairs(states: Array, winners: Array, group: int) -> Array:
    """Rows of ``states`` ``[K + 1, b, ...]`` at places ``winners`` ``[prompts, 2]``: ``[K + 1, 2 prompts, ...]``."""
    groups = states.reshape(states.shape[0], -1, group, *states.shape[2:])
    places = winners.reshape(1, *winners.shape, *(1,) * (states.ndim - 2))
    return jnp.take_along_axis(groups, places, axis=2).reshape(states.shape[0], -1, *states.shape[2:])


def importance(plan: Plan, rollout: Rollout, student: Weights, cond: Conditioning) -> Array:
    """``pi(z_i | z_{i-1}) / pi_old`` of the transition into the student's input, ``[b]``; 1 where that is pure noise.

    One pass without gradient; the exponent is averaged over elements, as everywhere.
    """
    given, trajectory = rollout.given, rollout.trajectory
    before = jnp.maximum(given.index - 1, 0)
    t = jnp.asarray(plan.simulation.grid, jnp.float32)[before]
    z = at_index(trajectory.states, before)
    steps = _Steps(z, given.z, t, given.t)
    # At i = 0 any positive deviation will do: the result is not used.
    safe = steps._replace(t_next=jnp.where(given.index > 0, given.t, plan.simulation.grid[1]))
    new = _density(plan, safe, plan.denoiser.x0(student, z, t, cond))
    old = _density(plan, safe, at_index(trajectory.x0, before))
    return jax.lax.stop_gradient(jnp.where(given.index > 0, jnp.exp(new - old), 1.0))
