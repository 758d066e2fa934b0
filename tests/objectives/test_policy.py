"""The policy gradient against the score-function identity, PPO's formula and GRPO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.kernels import Transition, log_prob
from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import Transitions
from dmdr_jax.objectives.policy import PolicyGradient, clipped_surrogate
from tests.objectives.contexts import context, draw, normal, spec

PLAIN = Advantages((spec(),), normalise="none", limit=1e9)


def steps(log_prob, old=None, kl=None, x0=None, slope=None, scale=1.0):
    old = jax.lax.stop_gradient(log_prob) if old is None else old
    x0 = jnp.zeros((*log_prob.shape, 1, 1, 1)) if x0 is None else x0
    return Transitions(log_prob, old, kl, x0, jnp.ones_like(x0) if slope is None else slope, scale)


@pytest.mark.parametrize("group", [2, 8])
def test_a_group_baseline_leaves_its_part_of_the_score_function_gradient(group):
    """d/dm E[a . z] = a for z ~ N(m, s^2): the estimate is (G - 1)/G of it (the log-probability is a mean of 2)."""
    n, std, a = 400_000, 0.6, jnp.array([1.0, -2.0])
    mean = jnp.array([0.3, 0.1])
    z = mean + std * jax.random.normal(jax.random.key(0), (n, 2))

    def loss(m):
        density = log_prob(Transition(jnp.broadcast_to(m, z.shape), jnp.float32(std)), z)
        ctx = context(
            jnp.zeros((n, 1, 1, 1)), sample_rewards={"r": z @ a}, group=group, transitions=steps(density[:, None])
        )
        return PolicyGradient(PLAIN)(ctx)[0]

    assert np.allclose(-2.0 * jax.jit(jax.grad(loss))(mean), (group - 1) / group * a, atol=0.03)


def test_the_surrogate_is_ppos():
    ratio, advantage = jnp.array([0.8, 1.0, 1.3, 0.8, 1.3]), jnp.array([1.0, 1.0, 1.0, -1.0, -1.0])
    value, slope = jax.vmap(jax.value_and_grad(lambda r, a: clipped_surrogate(r, a, 0.1)))(ratio, advantage)
    assert np.allclose(value, [-0.8, -1.0, -1.1, 0.9, 1.3])
    assert np.allclose(slope, [-1.0, -1.0, 0.0, 0.0, 1.0])


def test_loss_over_steps_kl_and_scale():
    b, m = 4, 3
    density, old, kl = normal(1, (b, m)) * 0.1, normal(2, (b, m)) * 0.1, jnp.abs(normal(3, (b, m)))
    rewards = {"r": normal(4, (b,))}
    ctx = context(
        jnp.zeros((b, 1, 1, 1)), sample_rewards=rewards, group=2, transitions=steps(density, old, kl, scale=1.5)
    )
    term = PolicyGradient(Advantages((spec(),)), weight=2.0, clip=0.05, kl=0.04)
    loss, metrics = term(ctx)
    advantage = np.asarray(Advantages((spec(),))(rewards, 0, 2))[:, None]
    ratio = np.exp(np.asarray(density - old))
    expected = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.95, 1.05)).sum(1).mean()
    assert float(loss) == pytest.approx(2.0 * 1.5 * expected + 0.04 * 1.5 * float(kl.sum(1).mean()), rel=1e-4)
    assert float(metrics["policy/kl"]) == pytest.approx(1.5 * float(kl.sum(1).mean()), rel=1e-5)


def test_a_random_subset_of_steps_has_the_gradient_of_all_in_the_mean():
    """The factor (K - 1)/M: the mean of the three pairs' losses is the loss of all three steps."""
    b, density = 4, normal(5, (4, 3)) * 0.1
    rewards = {"r": normal(6, (b,))}

    def slope(chosen):
        def loss(d):
            sub = d[:, jnp.array(chosen)]
            ctx = context(jnp.zeros((b, 1, 1, 1)), sample_rewards=rewards, group=2)
            return PolicyGradient(PLAIN)(ctx._replace(transitions=steps(sub, scale=3.0 / len(chosen))))[0]

        return jax.grad(loss)(density)

    pairs = (slope([0, 1]) + slope([0, 2]) + slope([1, 2])) / 3.0
    assert np.allclose(pairs, slope([0, 1, 2]), atol=1e-6)


def test_matching_as_a_reward_is_added_to_the_advantage():
    b = 4
    rewards = {"r": normal(7, (b,)), "dm": normal(8, (b,))}
    ctx = context(jnp.zeros((b, 1, 1, 1)), sample_rewards=rewards, group=2, transitions=steps(jnp.zeros((b, 1))))
    term = PolicyGradient(Advantages((spec(),)), dm_weight=0.5)
    alone = Advantages((spec(),))
    assert np.allclose(term.advantage(ctx), alone.of(rewards["r"], 2) + 0.5 * alone.of(rewards["dm"], 2), atol=1e-6)
    assert np.allclose(
        PolicyGradient(Advantages(()), dm_weight=1.0).advantage(ctx), alone.of(rewards["dm"], 2), atol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_balance_brings_the_gradient_to_the_size_of_distribution_matchings(scale):
    """Whatever the log-probabilities' scale, the gradient at the estimates is as long as g / (b h w c)."""
    b, x0, direction = 4, normal(9, (4, 2, 2, 2, 3)), normal(10, (4, 2, 2, 2, 3))
    matching = draw(normal(11))

    def loss(x):
        density = scale * (x * direction).mean((2, 3, 4))
        slope = scale * direction / direction[0, 0].size
        ctx = context(jnp.zeros((b, 1, 1, 1)), sample_rewards={"r": normal(12, (b,))}, group=2, draw=matching)
        ctx = ctx._replace(transitions=steps(density, x0=x, slope=slope))
        return PolicyGradient(Advantages((spec(),)), balance=0.5)(ctx)[0]

    size = float(jnp.linalg.norm(jax.grad(loss)(x0)))
    assert size == pytest.approx(0.5 * float(jnp.linalg.norm(matching.gradient)) / matching.gradient.size, rel=1e-3)


def test_needs_follow_the_settings():
    plain = PolicyGradient(Advantages((spec(),)))
    assert plain.needs == {"groups", "transitions", "sample_rewards"}
    assert dataclasses.replace(plain, kl=0.1).needs == plain.needs | {"reference"}
    assert dataclasses.replace(plain, dm_weight=1.0, advantages=Advantages(())).needs == {
        "groups",
        "transitions",
        "dm_reward",
    }
