"""The two updates: what moves, what stays, what receives gradient (check 7 of the method), and the counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base as base_config
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.errors import UserError
from dmdr_jax.generate import decode_images
from dmdr_jax.objectives.base import active_terms
from dmdr_jax.training import setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import freeze, generator_turn
from dmdr_jax.training.step import fake_step, generator_step, generator_weights
from dmdr_jax.training.text import make_encoder
from tests.training import tiny
from tests.training.conftest import leaves_equal


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def run(request, teacher, prompts_file, reward_folder):
    config = tiny.config(teacher, prompts_file, generator__kind=request.param)
    with config.unlocked():
        config.rewards.clip = base_config.reward(str(reward_folder), weight=0.5, start=1)
    layout = Layout.make(-1, 1)
    pipeline, rewards = setup.load_teacher(config, layout), setup.load_rewards(config)
    plan = setup.make_plan(config, pipeline, rewards)
    frozen = freeze(config, pipeline, plan, rewards, layout)
    batch = make_encoder(config, pipeline, plan.image_size, rewards, layout)(tiny.PROMPTS[:3])
    terms, state = setup.make_terms(config, rewards), setup.make_state(config, pipeline.family, plan, frozen.base)
    return Run(plan, terms, state, frozen, batch)


class Run:
    """A run's pieces, and its two updates compiled once."""

    def __init__(self, plan, terms, state, frozen, batch):
        self.plan, self.terms, self.state, self.frozen, self.batch = plan, terms, state, frozen, batch
        self._fake = jax.jit(lambda s, f, b: fake_step(plan, s, f, b))
        self._generator = {n: jax.jit(self._make(terms[-n:])) for n in (1, 2)}

    def _make(self, terms):
        return lambda s, f, b: generator_step(self.plan, terms, s, f, b)

    def fake(self, state):
        return self._fake(state, self.frozen, self.batch)

    def generator(self, state, last_terms=2):
        return self._generator[last_terms](state, self.frozen, self.batch)


def test_the_student_starts_as_the_teacher(run):
    z = jax.random.normal(jax.random.key(0), (3, *run.plan.latent_shape))
    student = generator_weights(run.plan, run.state.generator, run.frozen.base)
    outputs = [run.plan.denoiser.output(w, z, 0.7, run.batch.cond) for w in (Weights(run.frozen.base), student)]
    assert np.array_equal(*outputs)


def test_fake_update_moves_the_fake_score_alone(run):
    state = run.state
    new, metrics = run.fake(state)
    assert leaves_equal(new.generator, state.generator) and leaves_equal(new.ema, state.ema)
    assert not leaves_equal(new.fake, state.fake)
    assert (int(new.step), int(new.inner)) == (0, 1)
    assert np.isfinite(metrics["fake/loss"]) and metrics["fake/gradient_norm"] > 0


def test_generator_update_moves_the_generator_alone(run):
    state = run.state
    new, metrics = run.generator(state)
    assert leaves_equal(new.fake, state.fake) and leaves_equal(new.fake_opt, state.fake_opt)
    assert not leaves_equal(new.generator, state.generator)
    assert (int(new.step), int(new.inner)) == (1, 0)
    assert metrics["generator/gradient_norm"] > 0


def test_no_gradient_reaches_the_fake_score(run):
    """The distribution matching loss depends on the fake score in value, and must not in gradient."""

    def objective(fake):
        return generator_step(run.plan, run.terms[:1], run.state._replace(fake=fake), run.frozen, run.batch)[1][
            "dm/loss"
        ]

    value, grads = jax.jit(jax.value_and_grad(objective))(run.state.fake)
    assert np.isfinite(value) and all(not np.any(g) for g in jax.tree.leaves(grads))


def test_no_gradient_reaches_a_reward(run):
    reward, text = run.plan.rewards[0], run.batch.reward_text["clip"]
    images = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3))
    grads = jax.jit(jax.grad(lambda p, t: reward.score(p, images, t).sum(), argnums=(0, 1)))(reward.params, text)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_reward_gradient_reaches_the_latents_of_the_first_step(run):
    """The x0 estimate at t = 1, from pure noise, already gets a finite, non-zero reward gradient."""
    plan, frozen, text = run.plan, run.frozen, run.batch.reward_text["clip"]
    noise = jax.random.normal(jax.random.key(0), (3, *plan.latent_shape))
    x0 = plan.denoiser.x0(generator_weights(plan, run.state.generator, frozen.base), noise, 1.0, run.batch.cond)

    def score(z):
        images = decode_images(plan.vae, frozen.vae, z)
        return plan.rewards[0].score(frozen.rewards["clip"], images, text).sum()

    grads = jax.jit(jax.grad(score))(x0)
    assert np.isfinite(grads).all() and (np.abs(grads).max(axis=(1, 2, 3)) > 0).all()


def test_rewards_come_in_at_their_step(run):
    assert [t.name for t in active_terms(run.terms, 0)] == ["dm"]
    assert [t.name for t in active_terms(run.terms, 1)] == ["dm", "refl"]


def test_reward_gradient_reaches_the_generator_by_itself(run):
    new, metrics = run.generator(run.state._replace(step=jnp.int32(5)), last_terms=1)
    assert not leaves_equal(new.generator, run.state.generator)
    assert "dm/loss" not in metrics and np.isfinite(metrics["reward/clip"])


def test_a_non_finite_update_changes_nothing(run):
    broken = run.state._replace(generator=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), run.state.generator))
    new, metrics = run.generator(broken)
    same = zip(jax.tree.leaves(new.generator), jax.tree.leaves(broken.generator), strict=True)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in same)
    assert not np.isfinite(metrics["generator/gradient_norm"])


def test_randomness_is_a_function_of_seed_and_step(run):
    first, again, other = (run.generator(run.state._replace(inner=jnp.int32(i)))[0] for i in (0, 0, 1))
    assert leaves_equal(first, again)
    assert not leaves_equal(first.generator, other.generator)


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
        ({"seed": -1}, "config.seed must not be negative, and is -1"),
        ({"optim__generator__lr": -1e-4}, "config.optim.generator.lr must not be negative"),
        ({"optim__fake__lr": float("nan")}, "config.optim.fake.lr must not be negative, and is nan"),
        ({"student__shift": 0.0}, "config.student.shift must be above 0"),
        ({"ema": 1.5}, "config.ema must be at least 0 and below 1"),
        ({"dynamics__tau_high": 1.1}, "config.dynamics.tau_high must lie between 0 and 1"),
        ({"dynamics__tau_low": 0.99}, r"config.dynamics.tau_low must not be above tau_high, 0\.98, and is 0\.99"),
    ],
)
def test_bad_settings_are_one_clear_sentence(teacher, prompts_file, change, message):
    config = tiny.config(teacher, prompts_file, **change)
    with pytest.raises(UserError, match=message):
        setup.check(config)
        pipeline = setup.load_teacher(config, Layout.make(-1, 1))
        setup.make_plan(config, pipeline, ())
        setup.make_terms(config, ())
