"""Stored rollouts: noise by keys, groups of rows, log-probabilities, pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.kernels import log_prob
from dmdr_jax.diffusion.sampler import Trajectory, rollout, step_noise
from dmdr_jax.distill.simulate import Simulation
from dmdr_jax.training import rollouts
from dmdr_jax.training.plan import Batch, generator_weights, grouped, keys_of
from tests.training import gaussian

G, B, K = 3, 6, 4
GRID = (1.0, 0.9, 0.75, 0.5, 0.0)


def data(keys):
    return np.asarray(jax.random.key_data(keys)).reshape(K, B, -1)


def test_steps_that_are_not_chosen_share_their_noise_within_a_group():
    keys = rollouts.group_keys(jax.random.key(0), jnp.array([[0, 2]] * 2), K, B, G)
    raw = data(keys)
    for k in range(K):
        distinct = len({tuple(row) for row in raw[k]})
        assert distinct == (B if k in (0, 2) else B // G)
    assert len({tuple(row) for row in raw.reshape(K * B, -1)}) == 2 * B + 2 * (B // G)
    noise = np.asarray(step_noise(keys, 1, jnp.zeros((B, 2))))
    assert np.array_equal(noise[0], noise[1]) and not np.array_equal(noise[0], noise[G])


def test_with_all_steps_chosen_all_noise_is_independent():
    """SubGRPO with every step is GRPO: each row and step has a key of its own (and the loss's factor is 1)."""
    keys = rollouts.group_keys(jax.random.key(0), jnp.array([range(K)] * 2), K, B, G)
    assert len({tuple(row) for row in data(keys).reshape(K * B, -1)}) == K * B


def test_a_rollout_is_replayed_from_its_keys():
    keys = rollouts.group_keys(jax.random.key(1), jnp.array([[1], [2]]), K, B, G)
    noise = jax.random.normal(jax.random.key(2), (B, 1, 1, 2))
    kernel = Simulation("cps(0.9)", GRID).kernel
    output = lambda z, t: jnp.sin(z) * t
    process = gaussian.make("dmd").plan.denoiser.process
    first, again = (rollout(output, process, kernel, noise, GRID, keys) for _ in range(2))
    assert np.array_equal(first.states, again.states)


def test_the_chosen_steps_are_a_subset_of_the_stochastic_ones():
    plan = gaussian.make("dmd").plan
    simulation = Simulation("renoise", GRID)
    method = dataclasses.replace(plan.method, policy_steps=2)
    some = dataclasses.replace(plan, simulation=simulation, method=method)
    drawn = [np.asarray(rollouts.choose_steps(some, jax.random.key(i), 5)) for i in range(40)]
    assert {tuple(row) for rows in drawn for row in rows} == {(0, 1), (0, 2), (1, 2)}
    assert all((rows == rows[0]).all() for rows in drawn)
    own = dataclasses.replace(some, method=dataclasses.replace(method, steps_of="prompt"))
    drawn = np.asarray(rollouts.choose_steps(own, jax.random.key(0), 40))
    assert {tuple(row) for row in drawn} == {(0, 1), (0, 2), (1, 2)}
    everything = dataclasses.replace(some, method=dataclasses.replace(method, policy_steps=0))
    assert np.array_equal(rollouts.choose_steps(everything, jax.random.key(0), 2), [[0, 1, 2]] * 2)


def test_groups_have_one_prompt_one_index_and_if_wanted_one_start():
    w = gaussian.make("dmd")
    cond = w.batch.cond.replace(pooled=jnp.arange(8.0)[:, None])
    batch = grouped(Batch(cond, {"r": jnp.arange(8.0)[:, None]}), 4)
    assert np.array_equal(batch.cond.pooled[:, 0], [0, 0, 0, 0, 4, 4, 4, 4])
    assert np.array_equal(batch.reward_text["r"][:, 0], [0, 0, 0, 0, 4, 4, 4, 4])
    index = np.asarray(Simulation("renoise", GRID).draw_index(jax.random.key(3), 80, 4)).reshape(20, 4)
    assert (index == index[:, :1]).all() and len(set(index[:, 0])) == 4
    plan = dataclasses.replace(w.plan, method=dataclasses.replace(w.plan.method, shared_start=True))
    start = np.asarray(rollouts.start_noise(plan, jax.random.key(4), 8, 4)).reshape(2, 4, -1)
    assert (start == start[:, :1]).all() and not np.array_equal(start[0], start[1])


def stored(method="dmdr_grpo", **changes):
    w = gaussian.make(method, batch=6, group__size=3, **changes)
    student = generator_weights(w.plan, w.state.generator, w.frozen.base)
    needs = frozenset().union(*(term.needs for term in w.terms))
    return w, student, rollouts.roll_out(w.plan, needs, student, w.batch.cond, keys_of(w.state))


@pytest.mark.parametrize("kernel", ["renoise", "cps(0.8)", "flow_sde(0.5)"])
def test_transitions_are_the_kernels_densities_of_stored_states(kernel):
    w, student, roll = stored(student__steps=3, rollout__kernel=kernel)
    theirs = rollouts.reference_x0(w.plan, roll, student, w.batch.cond)
    found = rollouts.transitions(w.plan, roll, student, theirs, w.batch.cond)
    process, states = w.plan.denoiser.process, roll.trajectory.states
    for k in range(2):
        t, t_next = (jnp.float32(w.plan.simulation.grid[k + i]) for i in (0, 1))
        x0 = roll.trajectory.x0[k]
        eps = process.eps_from_x0(states[k], x0, t)
        transition = w.plan.rollout_kernel.transition(process, states[k], t, x0, eps, t_next)
        assert np.allclose(found.log_prob[:, k], log_prob(transition, states[k + 1]), atol=1e-4)
        assert np.allclose(found.x0[:, k], x0, atol=1e-5)
    assert np.array_equal(found.old_log_prob, found.log_prob) and found.scale == 1.0
    assert np.allclose(found.kl, 0.0, atol=1e-9)


def test_rtdmds_density_drops_the_variance_and_flow_grpos_kl_the_time():
    plain, student, roll = stored()
    other, *_ = stored(policy__density="rtdmd", policy__kl_form="flow_grpo")
    moved = jax.tree.map(lambda x: x + 0.1, plain.state.generator)
    reference = generator_weights(plain.plan, moved, plain.frozen.base)
    theirs = rollouts.reference_x0(plain.plan, roll, reference, plain.batch.cond)
    a, b = (rollouts.transitions(w.plan, roll, student, theirs, w.batch.cond) for w in (plain, other))
    t_next = plain.plan.simulation.grid[1]
    constant = np.log(t_next) + 0.5 * np.log(2 * np.pi)
    assert np.allclose(b.log_prob, 2 * t_next**2 * (a.log_prob + constant), rtol=1e-3, atol=1e-5)
    assert np.allclose(b.kl, (1.0 - t_next) * a.kl, rtol=1e-5)


def test_pairs_are_the_winners_and_losers_rows():
    states = jnp.arange(2 * 6 * 2.0).reshape(2, 6, 1, 1, 2)
    winners = jnp.array([[2, 0], [1, 2]])
    rows = rollouts.take_pairs(states, winners, 3)
    assert np.array_equal(rows, states[:, jnp.array([2, 0, 4, 5])])


def test_importance_is_the_ratio_of_the_step_into_the_input():
    w, student, roll = stored()
    ones = rollouts.importance(w.plan, roll, student, w.batch.cond)
    assert np.allclose(ones, 1.0, atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.2, w.state.generator)
    other = generator_weights(w.plan, moved, w.frozen.base)
    given = roll.given._replace(index=jnp.array([0, 1, 1, 0, 1, 1]))
    z = roll.trajectory.states[given.index, jnp.arange(6)]
    roll = roll._replace(given=given._replace(z=z, t=jnp.asarray(w.plan.simulation.grid)[given.index]))
    ratio = rollouts.importance(w.plan, roll, other, w.batch.cond)
    both = [rollouts.transitions(w.plan, roll, s, None, w.batch.cond).log_prob[:, 0] for s in (other, student)]
    expected = np.where(np.asarray(given.index) > 0, np.exp(both[0] - both[1]), 1.0)
    assert np.allclose(ratio, expected, rtol=1e-4) and np.abs(np.log(ratio)).max() > 1e-3


def test_realised_latents_are_the_samplers_next_states():
    """With the noise that the sampler had, the realised latent is its next state."""
    w, _, roll = stored(student__steps=3)
    kernel, process = w.plan.rollout_kernel, w.plan.denoiser.process
    x0 = roll.trajectory.x0[roll.given.index, jnp.arange(6)]
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    x_s, s = rollouts.realise(w.plan, roll.given, x0, noise)
    grid = np.asarray(w.plan.simulation.grid)
    assert np.allclose(s, grid[np.asarray(roll.given.index) + 1])
    expected = (1 - s)[:, None, None, None] * x0 + s[:, None, None, None] * noise
    assert str(kernel) == "renoise" and np.allclose(x_s, expected, atol=1e-6) and process is not None
    assert isinstance(roll.trajectory, Trajectory)
