"""The two updates: what moves, what stays, what receives gradient (check 7 of the method), and the counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base as base_config
from dmdr_jax.errors import UserError
from dmdr_jax.objectives.base import active_terms
from dmdr_jax.training import setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import freeze, generator_turn, make_encoder
from dmdr_jax.training.step import fake_step, generator_step, generator_weights
from tests.training import tiny
from tests.training.conftest import leaves_equal


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, teacher, prompts_file, reward_folder):
    config = tiny.config(teacher, prompts_file, generator__kind=request.param)
    with config.unlocked():
        config.rewards.clip = base_config.reward(str(reward_folder), weight=0.5, start=1)
    layout = Layout.make(-1, 1)
    pipeline, rewards = setup.load_teacher(config, layout), setup.load_rewards(config)
    plan = setup.make_plan(config, pipeline, rewards)
    frozen = freeze(pipeline, rewards, layout)
    batch = make_encoder(pipeline, rewards, layout)(tiny.PROMPTS[:3])
    return plan, setup.make_terms(config, rewards), setup.make_state(config, plan, frozen.base), frozen, batch


def test_the_student_starts_as_the_teacher(run):
    plan, _, state, frozen, batch = run
    z = jax.random.normal(jax.random.key(0), (3, *plan.latent_shape))
    teacher = plan.denoiser.output(setup_weights(frozen), z, 0.7, batch.cond)
    student = plan.denoiser.output(generator_weights(plan, state.generator, frozen.base), z, 0.7, batch.cond)
    assert np.array_equal(teacher, student)


def setup_weights(frozen):
    from dmdr_jax.diffusion.denoiser import Weights

    return Weights(frozen.base)


def test_fake_update_moves_the_fake_score_alone(run):
    plan, _, state, frozen, batch = run
    new, metrics = jax.jit(lambda s: fake_step(plan, s, frozen, batch))(state)
    assert leaves_equal(new.generator, state.generator) and leaves_equal(new.ema, state.ema)
    assert not leaves_equal(new.fake, state.fake)
    assert (int(new.step), int(new.inner)) == (0, 1)
    assert np.isfinite(metrics["fake/loss"]) and metrics["fake/gradient_norm"] > 0


def test_generator_update_moves_the_generator_alone(run):
    plan, terms, state, frozen, batch = run
    new, metrics = jax.jit(lambda s: generator_step(plan, terms, s, frozen, batch))(state)
    assert leaves_equal(new.fake, state.fake) and leaves_equal(new.fake_opt, state.fake_opt)
    assert not leaves_equal(new.generator, state.generator)
    assert (int(new.step), int(new.inner)) == (1, 0)
    assert metrics["generator/gradient_norm"] > 0


def test_no_gradient_reaches_a_frozen_network_or_the_fake_score(run):
    """Differentiating the whole update with respect to everything frozen gives exactly nothing."""
    plan, terms, state, frozen, batch = run

    def objective(vae, rewards, fake):
        _, metrics = generator_step(
            plan, terms, state._replace(fake=fake), frozen.replace(vae=vae, rewards=rewards), batch
        )
        return metrics["dm/loss"]

    # The distribution matching loss depends on the fake score in value, and must not in gradient.
    grads = jax.grad(objective, argnums=(0, 1, 2))(frozen.vae, frozen.rewards, state.fake)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_rewards_come_in_at_their_step(run):
    terms = run[1]
    assert [t.name for t in active_terms(terms, 0)] == ["dm"]
    assert [t.name for t in active_terms(terms, 1)] == ["dm", "refl"]


def test_reward_gradient_reaches_the_generator_by_itself(run):
    plan, terms, state, frozen, batch = run
    refl = tuple(t for t in terms if t.name == "refl")
    late = state._replace(step=jnp.int32(5))
    new, metrics = jax.jit(lambda s: generator_step(plan, refl, s, frozen, batch))(late)
    assert not leaves_equal(new.generator, state.generator)
    assert "dm/loss" not in metrics and np.isfinite(metrics["reward/clip"])


def test_a_non_finite_update_changes_nothing(run):
    plan, terms, state, frozen, batch = run
    broken = state._replace(generator=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.generator))
    new, metrics = jax.jit(lambda s: generator_step(plan, terms[:1], s, frozen, batch))(broken)
    same = zip(jax.tree.leaves(new.generator), jax.tree.leaves(broken.generator), strict=True)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in same)
    assert not np.isfinite(metrics["generator/gradient_norm"])


def test_randomness_is_a_function_of_seed_and_step(run):
    plan, terms, state, frozen, batch = run
    step = jax.jit(lambda s: generator_step(plan, terms, s, frozen, batch)[0])
    assert leaves_equal(step(state), step(state))
    assert not leaves_equal(step(state).generator, step(state._replace(inner=jnp.int32(1))).generator)


def test_generator_turns_are_counted_as_the_authors_do():
    """26 inner iterations (0 to 25) at 5:1 make exactly 5 generator updates; the first one makes none."""
    turns = [n for n in range(26) if generator_turn(n, 5)]
    assert turns == [5, 10, 15, 20, 25]
    assert [n for n in range(3) if generator_turn(n, 1)] == [1, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generator__kind": "half"}, "config.generator.kind"),
        ({"student__simulation": "heun"}, "kernel"),
        ({"student__grid": "cosine"}, "config.student.grid"),
        ({"fake__data": "real"}, "config.fake.data"),
        ({"dynamics__rs": "off"}, "config.dynamics.rs"),
        ({"height": 33}, "multiples of"),
        ({"model": ""}, "config.model is empty"),
        ({"dm__weight": 0.0}, "nothing to train"),
        ({"fake__updates": 0}, "config.fake.updates must be at least 1"),
        ({"fake__lora__rank": 0}, "config.fake.lora.rank must be at least 1"),
        ({"seed": -1}, "config.seed"),
    ],
)
def test_bad_settings_are_one_clear_sentence(teacher, prompts_file, change, message):
    config = tiny.config(teacher, prompts_file, **change)
    with pytest.raises(UserError, match=message):
        setup.check(config)
        pipeline = setup.load_teacher(config, Layout.make(-1, 1))
        setup.make_plan(config, pipeline, ())
        setup.make_terms(config, ())
