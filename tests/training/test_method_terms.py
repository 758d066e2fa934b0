"""Every method: which trees receive gradient from which term, and what its steps change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmdr_jax import methods
from dmdr_jax.objectives.base import needs_of, separate_fake_updates
from dmdr_jax.training import step as train_step
from dmdr_jax.training.plan import RealImages, grouped, keys_of
from dmdr_jax.training.step import fake_step, generator_step
from tests.training import gaussian
from tests.training.conftest import leaves_equal

START = 3
FIRST, LATER = ("first_bias", "first_scale"), ("later_bias", "later_scale")
BOTH = {"dm", "refl", "augmentation", "gdmd", "drift", "anchor", "adversarial"}
FIRST_ONLY = {"policy", "dpo"}
"""Terms of the stochastic steps: of two steps that is the first."""
LATER_ONLY = {"last_step"}

GROUPED = ("dmdr_grpo", "dmdr_dpo", "ddmd_adv", "gndmr", "rtdmd", "drpo", "dpo_only", "grpo_only")
TERMS = {
    "dmd": (["dm"], ["dm"]),
    "dmd2": (["dm", "adversarial"], ["dm", "adversarial"]),
    "dmdr_refl": (["dm"], ["dm", "refl"]),
    "dmdr_srpo": (["dm"], ["dm", "refl"]),
    "dmdr_grpo": (["dm"], ["dm", "policy"]),
    "dmdr_dpo": (["dm"], ["dm", "dpo"]),
    "ddmd": (["dm"], ["dm"]),
    "ddmd_adv": (["dm"], ["augmentation"]),
    "gdmd": (["dm"], ["dm", "gdmd"]),
    "gndm": (["dm"], ["dm"]),
    "gndmr": (["dm"], ["dm", "policy"]),
    "rtdmd": (["dm"], ["dm", "policy", "last_step"]),
    "drpo": (["dm"], ["drift"]),
    "refl_only": (["dm"], ["refl", "anchor"]),
    "dpo_only": (["dm"], ["dpo"]),
    "grpo_only": (["dm"], ["policy"]),
}
"""The terms of the cold start and of the joint stage."""


def world(method, **changes):
    settings = {"group__size": 4, "batch": 64} if method in GROUPED else {}  # a prompt's rows share a grid index
    settings |= {"rtdmd": {"policy__steps": 1, "fake__updates": 2}, "gdmd": {"fake__updates": 2}}.get(method, {})
    settings |= {"refl_only": {"refl__anchor": 0.1}, "dmd2": {"gan__images": "some"}}.get(method, {})
    real = RealImages(jax.random.normal(jax.random.key(8), (5, 1, 1, 2)), gaussian.conditioning(5))
    return gaussian.make(method, start=START, real=real if method == "dmd2" else None, **(settings | changes))


def active(w, step):
    return tuple(term for term in w.terms if term.active(step))


def test_every_method_is_here():
    assert set(TERMS) == set(methods.METHODS)


@pytest.mark.parametrize("method", TERMS)
def test_stages(method):
    w = world(method)
    for step, names in zip((0, START), TERMS[method]):
        assert [term.name for term in active(w, step)] == names


MODES = [
    ("gndm", {"gndm__mode": "prompt", "batch": 64}),
    ("gndm", {"gndm__mode": "scalar", "batch": 64}),
    ("dmdr_dpo", {"dpo__form": "denoising"}),
    ("gdmd", {"gdmd__group": "renoise"}),
    ("drpo", {"drpo__anchor": "dm"}),
]
MODES += [
    pytest.param(method, changes, marks=pytest.mark.slow)
    for method, changes in (
        ("gndm", {"rollout__updates": 2}),
        ("gdmd", {"gdmd__group": "fake"}),
        ("ddmd", {"split__schedule": "independent"}),
        ("ddmd", {"split__schedule": "cleaner"}),
        ("rtdmd", {"boundary__normaliser": "estimate", "boundary__times": "grid", "policy__steps_of": "prompt"}),
        ("dmdr_grpo", {"rollout__kernel": "flow_sde(0.7)"}),
    )
]


@pytest.mark.parametrize(("method", "changes"), MODES, ids=str)
def test_the_other_modes_take_their_steps(method, changes):
    w = world(method, **changes)
    state, terms = moved(w), active(w, START)
    step = jax.jit(
        lambda s: generator_step(w.plan, terms, fake_step(w.plan, s, w.frozen, w.batch)[0], w.frozen, w.batch)
    )
    new, metrics = step(state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new.generator, new.fake, metrics)))
    assert not leaves_equal(new.generator, state.generator) and not leaves_equal(new.fake, state.fake)


def test_subgrpo_with_all_steps_is_grpo():
    """RTDMD, eq. 17, with as many chosen steps as there are. (None is left whose noise a group would share.)"""
    after = []
    for changes in ({}, {"policy__steps": 2}):
        w = world("dmdr_grpo", student__steps=3, **changes)
        step = jax.jit(partial(generator_step, w.plan, active(w, START)))
        after.append(step(moved(w), w.frozen, w.batch)[0].generator_opt)
    moments = [jax.tree.leaves(opt) for opt in after]  # Adam's, of the one gradient so far
    assert max(np.abs(x).max() for x in moments[0]) > 1e-3
    for a, b in zip(*moments):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def moved(w):
    """The state at the joint stage with reference and discriminator away from where they start."""
    extra = dict(w.state.extra)
    if "reference" in extra:
        extra["reference"] = jax.tree.map(lambda x: x + 0.05, extra["reference"])
    if "gan" in extra:
        head = jax.tree.map(lambda x: x + 0.1, extra["gan"]["head"])
        extra["gan"] = {**extra["gan"], "head": head}
    return w.state._replace(step=jnp.int32(START + 1), extra=extra)


@pytest.mark.parametrize("method", TERMS)
def test_which_trees_receive_gradient_from_which_term(method):
    """Each term moves the student alone: never fake score, reference or discriminator."""
    w = world(method)
    terms, state = active(w, START), moved(w)
    needs = needs_of(terms)
    batch = grouped(w.batch, train_step.group_of(w.plan, needs))

    numbers, places = jax.tree.flatten(state.extra)
    real = [jnp.issubdtype(x.dtype, jnp.floating) for x in numbers]

    def losses(generator, fake, floats):
        rest = iter(floats)
        extra = jax.tree.unflatten(places, [next(rest) if one else x for one, x in zip(real, numbers)])
        now = state._replace(fake=fake, extra=extra)
        student = train_step.generator_weights(w.plan, state.generator, w.frozen.base)
        rollout = train_step.roll_out(w.plan, needs, student, batch.cond, keys_of(now))
        stored = train_step.Stored(jax.lax.stop_gradient(rollout))
        stored = train_step._judge_samples(w.plan, needs, stored, now, w.frozen, batch)
        stored = train_step._ask_reference(w.plan, needs, stored, now, w.frozen, batch)
        if "targets" in needs:
            _, stored, _ = train_step._make_targets(w.plan, stored, now, w.frozen, batch)
            stored = stored._replace(
                **jax.tree.map(lambda x: x[0], dict(draws=stored.draws, target_rewards=stored.target_rewards))
            )
        ctx = train_step._context(w.plan, needs, stored, now, generator, w.frozen, batch, keys_of(now))
        return jnp.stack([term(ctx)[0] for term in terms])

    jacobian = jax.jit(jax.jacrev(losses, argnums=(0, 1, 2)))(
        state.generator, state.fake, [x for one, x in zip(real, numbers) if one]
    )
    to_student, to_fake, to_extra = jacobian
    assert not any(np.any(g) for g in jax.tree.leaves((to_fake, to_extra)))
    for i, term in enumerate(terms):
        sizes = {part: sum(np.abs(to_student[name][i]).max() for name in part) for part in (FIRST, LATER)}
        assert np.isfinite(list(sizes.values())).all()
        assert (sizes[FIRST] > 0) == (term.name in BOTH | FIRST_ONLY), (term.name, sizes)
        assert (sizes[LATER] > 0) == (term.name in BOTH | LATER_ONLY), (term.name, sizes)


@pytest.mark.parametrize("method", ["gdmd", "rtdmd"])
def test_methods_that_train_the_fake_score_on_the_rollout(method):
    w = world(method)
    state = w.state._replace(step=jnp.int32(START))
    terms = active(w, START)
    assert separate_fake_updates(terms, 5) == 0 and separate_fake_updates(active(w, 0), 5) == 5
    new, metrics = jax.jit(lambda s: generator_step(w.plan, terms, s, w.frozen, w.batch))(state)
    assert not leaves_equal(new.fake, state.fake) and not leaves_equal(new.generator, state.generator)
    assert np.isfinite(metrics["fake/loss"]) and int(new.step) == START + 1
    if method == "gdmd":
        assert all(float(pair[1]) > 0 for pair in new.extra["spread"].values())


def targets_of(w, state):
    """GDMD's stored targets."""
    needs = needs_of(active(w, START))
    student = train_step.generator_weights(w.plan, state.generator, w.frozen.base)
    stored = train_step.Stored(train_step.roll_out(w.plan, needs, student, w.batch.cond, keys_of(state)))
    return train_step._make_targets(w.plan, stored, state, w.frozen, w.batch)[1]


def test_gdmds_old_student_may_be_the_average():
    w, averaged = world("gdmd"), world("gdmd", gdmd__old="average")
    state = w.state._replace(step=jnp.int32(START))
    block, same = targets_of(w, state), targets_of(averaged, state._replace(ema=state.generator))
    assert np.array_equal(block.old_x0, block.sampled_x0) and np.allclose(same.old_x0, block.old_x0, atol=1e-6)
    ahead = targets_of(averaged, state._replace(ema=jax.tree.map(lambda x: x + 0.1, state.generator)))
    assert np.array_equal(ahead.sampled_x0, block.sampled_x0) and np.abs(ahead.old_x0 - block.old_x0).max() > 1e-3


def test_gdmds_targets_may_be_at_the_bare_difference():
    w, bare = world("gdmd"), world("gdmd", gdmd__normalised=False)
    state = w.state._replace(step=jnp.int32(START))
    a, b = (targets_of(one, state).draws for one in (w, bare))
    np.testing.assert_allclose(b.gradient, b.scores.fake - b.real, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a.gradient * a.normaliser, b.gradient, rtol=1e-4, atol=1e-6)


def test_the_discriminator_learns_with_the_fake_score():
    w = world("dmd2")
    new, metrics = jax.jit(lambda s: fake_step(w.plan, s, w.frozen, w.batch))(w.state)
    assert not leaves_equal(new.extra["gan"]["head"], w.state.extra["gan"]["head"])
    assert not leaves_equal(new.fake, w.state.fake) and np.isfinite(metrics["gan/loss"])


def test_the_reference_is_the_student_of_the_end_of_the_cold_start():
    w = world("grpo_only", policy__refresh=2)
    run = jax.jit(lambda s: generator_step(w.plan, active(w, START), s, w.frozen, w.batch)[0])
    state = w.state._replace(step=jnp.int32(START), generator=jax.tree.map(lambda x: x + 0.3, w.state.generator))
    students, references = [], []
    for _ in range(3):
        students.append(state.generator)
        state = run(state)
        references.append(state.extra["reference"])
    assert leaves_equal(references[0], students[0]) and leaves_equal(references[1], students[0])
    assert leaves_equal(references[2], students[2])


def test_one_draw_per_sample_with_its_own_normaliser_is_distribution_matching():
    """GNDM with a single renoised point is `dmd`, keys included."""
    new = []
    for method, changes in (("dmd", {}), ("gndm", {"gndm__draws": 1, "gndm__rms": False})):
        w = gaussian.make(method, **changes)
        new.append(jax.jit(lambda s: generator_step(w.plan, w.terms, s, w.frozen, w.batch)[0])(w.state).generator)
    assert all(np.allclose(a, b, atol=1e-7) for a, b in zip(*map(jax.tree.leaves, new)))


def test_a_tied_split_is_coupled_and_a_free_one_is_not():
    new = {}
    for schedule in ("coupled", "tied", "hybrid"):
        changes = {} if schedule == "coupled" else {"dm__form": "split", "split__schedule": schedule}
        descent = optax.sgd(1.0), optax.sgd(1.0)  # Adam's first step has one size whatever the gradient
        w = gaussian.make("dmd", guidance__scale=3.0, tx=descent, **changes)
        new[schedule] = jax.jit(lambda s: generator_step(w.plan, w.terms, s, w.frozen, w.batch)[0])(w.state).generator
    same = [np.allclose(new["coupled"][n], new[other][n], atol=1e-6) for other in ("tied", "hybrid") for n in FIRST]
    assert same[:2] == [True, True] and not all(same[2:])


def test_several_updates_on_one_rollout_move_the_ratio():
    """The first of them is on-policy, the second is not; GNDM then weighs its rows by importance."""
    once, twice = (world("dmdr_grpo", rollout__updates=n, policy__clip=0.5) for n in (1, 2))
    distance = []
    for w in (once, twice):
        terms, state = active(w, START), w.state._replace(step=jnp.int32(START))
        distance.append(jax.jit(lambda s: generator_step(w.plan, terms, s, w.frozen, w.batch)[1])(state))
    assert float(distance[0]["policy/ratio_distance"]) == 0.0
    assert float(distance[1]["policy/ratio_distance"]) > 0.0
    w = gaussian.make("gndm", rollout__updates=2, optim__generator__lr=1e-2)
    metrics = jax.jit(lambda s: generator_step(w.plan, w.terms, s, w.frozen, w.batch)[1])(w.state)
    assert 0.0 < float(metrics["dm/importance_distance"]) < 1.0
