"""Preference losses against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import PairErrors, Pairs
from dmdr_jax.objectives.dpo import PairPreference, best_and_worst, denoising_margin, transition_margin
from tests.objectives.contexts import context, normal, spec

RANKING = Advantages((spec(),))


def run(form, student, reference, **settings):
    ctx = context(jnp.zeros((4, 1, 1, 1)), group=2, sample_rewards={"r": jnp.arange(4.0)})
    pairs = Pairs(student, reference) if form == "transitions" else None
    errors = PairErrors(student, reference) if form == "denoising" else None
    return PairPreference(RANKING, form, **settings)(ctx._replace(pairs=pairs, pair_errors=errors))[0]


@pytest.mark.parametrize("form, shape", [("transitions", (2, 2, 3)), ("denoising", (2, 2))])
def test_the_loss_is_log_2_where_the_student_is_its_reference(form, shape):
    x = jnp.abs(normal(0, shape))
    assert float(run(form, x, x)) == pytest.approx(np.log(2.0), rel=1e-6)


def test_the_transition_form():
    student, reference = 0.05 * normal(1, (2, 2, 3)), 0.05 * normal(2, (2, 2, 3))
    d = np.log(np.clip(np.exp(np.asarray(student - reference)), 0.9, 1.1))
    expected = np.log1p(np.exp(-50.0 * (d[:, 0] - d[:, 1]))).mean()
    assert float(run("transitions", student, reference)) == pytest.approx(expected, rel=1e-4)
    # Beyond the clip a side gives no gradient.
    far = jnp.zeros((1, 2, 1)).at[0, 0, 0].set(0.5)
    slope = jax.grad(lambda s: transition_margin(s, jnp.zeros((1, 2, 1)), 0.1).sum())(far)
    assert float(slope[0, 0, 0]) == 0.0 and float(slope[0, 1, 0]) == -1.0


def test_pairs_at_the_clip_on_both_sides_are_half_right():
    moved = jnp.array([[[0.05], [-0.05]], [[0.5], [0.5]], [[-0.05], [0.05]], [[-0.5], [-0.5]]])
    ctx = context(jnp.zeros((8, 1, 1, 1)), group=2, sample_rewards={"r": jnp.arange(8.0)})
    ctx = ctx._replace(pairs=Pairs(moved, jnp.zeros_like(moved)))
    assert float(PairPreference(RANKING)(ctx)[1]["dpo/right"]) == 0.5
    ctx = ctx._replace(pairs=Pairs(moved.at[2].multiply(-1.0), jnp.zeros_like(moved)))
    assert float(PairPreference(RANKING)(ctx)[1]["dpo/right"]) == 0.75


def test_the_denoising_form_is_diffusion_dpos():
    student, reference = jnp.abs(normal(3, (2, 2))), jnp.abs(normal(4, (2, 2)))
    d = np.asarray(student - reference)
    inside = -0.5 * 100.0 * (d[:, 0] - d[:, 1])
    expected = np.log1p(np.exp(-np.abs(inside))) + np.maximum(-inside, 0.0)
    assert float(run("denoising", student, reference, beta=100.0)) == pytest.approx(expected.mean(), rel=1e-4)
    # Denoising the winner better than the reference does lowers the loss.
    assert jax.grad(lambda s: denoising_margin(s, reference).sum())(student)[0, 0] < 0


def test_equal_rewards_are_no_preference():
    student, reference = 0.05 * normal(1, (2, 2, 3)), 0.05 * normal(2, (2, 2, 3))

    def loss(student):
        rewards = {"r": jnp.array([0.0, 1.0, 1.0, 1.0])}  # two prompts of two samples
        ctx = context(jnp.zeros((4, 1, 1, 1)), group=2, sample_rewards=rewards, pairs=Pairs(student, reference))
        return PairPreference(RANKING)(ctx)[0]

    slope = np.asarray(jax.grad(loss)(student))
    assert np.any(slope[0]) and not np.any(slope[1])


def test_best_and_worst_are_never_the_same():
    values = jnp.array([[0.1, 0.9, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert np.array_equal(best_and_worst(values), [[1, 0], [0, 3]])
