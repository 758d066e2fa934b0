"""Augmentation by advantage, the last step's reward, the adversary, the anchor, and the hinge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.adversarial import Adversarial
from dmdr_jax.objectives.anchor import Anchor
from dmdr_jax.objectives.augmentation import AdvantageAugmentation
from dmdr_jax.objectives.dm import DistributionMatching
from dmdr_jax.objectives.last_step import LastStepReward
from dmdr_jax.objectives.refl import ReFL
from tests.objectives.contexts import context, draw, normal, spec


def slope(term, x, **fields):
    return jax.grad(lambda y: term(context(y, **fields))[0])(x)


def test_without_advantage_it_is_distribution_matching():
    x = normal(0)
    matching, equal = draw(x), {"r": jnp.ones(4)}
    ours = slope(AdvantageAugmentation(Advantages((spec(),))), x, draw=matching, rewards=equal, group=2)
    assert np.allclose(ours, slope(DistributionMatching(), x, draw=matching), rtol=1e-4, atol=1e-7)


def test_the_advantage_multiplies_the_augmentation_alone():
    x, rewards = normal(1), {"r": jnp.array([2.0, 1.0, 0.0, 5.0])}
    matching = draw(x)
    term = AdvantageAugmentation(Advantages((spec(),)), kappa=1.0, shift=0.0)
    a = np.array([1.0, -1.0, -1.0, 1.0])[:, None, None, None]
    expected = (matching.matching - a * matching.augmentation) / matching.normaliser / x.size
    assert np.allclose(slope(term, x, draw=matching, rewards=rewards, group=2), expected, rtol=2e-3, atol=1e-6)


def test_only_calls_at_the_last_step_get_the_rewards_gradient():
    x, index = normal(2), jnp.array([0, 1, 2, 2])
    specs = spec("a", weight=2.0), spec("b", weight=1.0)

    def loss(y, margin):
        rewards = {"a": y.mean((1, 2, 3)), "b": (y**2).mean((1, 2, 3))}
        ctx = context(y, rewards=rewards, images=y, steps=3)._replace(index=index)
        return LastStepReward(specs, 0.5, margin)(ctx)[0]

    got = jax.grad(loss)(x, None)
    expected = -0.5 * 3.0 / 4.0 * (2.0 + 2.0 * x) / x[0].size
    assert np.allclose(got[2:], expected[2:], rtol=1e-4) and not np.any(got[:2])
    assert not np.any(jax.grad(loss)(x, -100.0))


def test_the_hinge_gives_no_gradient_above_its_margin():
    def loss(score):
        ctx = context(jnp.zeros((2, 1, 1, 1)), images=jnp.zeros((2, 2, 2, 3)), rewards={"r": score})
        return ReFL((spec(margin=0.7, weight=0.3),))(ctx)[0]

    assert np.allclose(jax.grad(loss)(jnp.array([0.6, 0.8])), [-0.15, 0.0])


def test_the_adversary_and_the_anchor():
    logit = jnp.array([0.3, -2.0])
    x = jnp.zeros((2, 1, 1, 1))
    assert float(Adversarial(2.0)(context(x, realness=logit))[0]) == pytest.approx(
        2.0 * float(np.log1p(np.exp(-np.asarray(logit))).mean()), rel=1e-5
    )
    x, there = normal(3), normal(4)
    assert np.allclose(slope(Anchor(0.5), x, reference_x0=there), (x - there) / x.size, rtol=1e-4, atol=1e-8)


def test_terms_act_between_their_steps():
    dm = DistributionMatching(start=2, until=5)
    assert [dm.active(s) for s in (1, 2, 4, 5)] == [False, True, True, False]
    assert DistributionMatching().active(10**9) and not DistributionMatching(0.0).active(0)


def test_importance_weighs_rows_within_its_clip():
    x = normal(5)
    matching, ratio = draw(x), jnp.array([1.0, 1.1, 3.0, 0.1])
    plain = slope(DistributionMatching(), x, draw=matching)
    weighted = slope(DistributionMatching(importance=0.2), x, draw=matching, importance=ratio)
    expected = np.array([1.0, 1.1, 1.2, 0.8])[:, None, None, None] * plain
    assert np.allclose(weighted, expected, rtol=1e-4, atol=1e-8)
