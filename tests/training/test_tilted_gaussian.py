"""Methods come to the tilted teacher where it is known: a Gaussian, a quadratic reward (`tests.training.gaussian`).

All scores are taken at one renoise level tau, where the estimates of data of variance v have the gain
k(v) = a v / (a^2 v + tau^2), a = 1 - tau. With the weight W of distribution matching and L of the reward's gradient at
x0 the student's mean and variance come to rest at

    W (mu - m) (1 - a k(v_teacher)) + L q (mu - c) = 0,      W a (k(v) - k(v_teacher)) + L q = 0,

a minimum of KL(student || teacher) at level tau minus beta E[reward], beta = L a^2 / (W tau^2). At tau = .2 that is
within 8 % of the tilted teacher itself, N((m/v + beta q c)/p, 1/p) with p = 1/v + beta q.

Two-step students with a fixed last step, z / (1 - t1), draw x0 of the first step plus noise of variance
rho^2 = (t1 / (1 - t1))^2. The fake score sees the samples of both steps: it is their mean variance that comes to rest.
"""

import jax
import numpy as np
import optax
import pytest

from dmdr_jax.objectives.base import FAKE_ON_ROLLOUT, needs_of
from dmdr_jax.training.step import fake_step, generator_step
from tests.training import gaussian
from tests.training.gaussian import CENTRE, CURVATURE, MEAN, VARIANCE

TAU, BETA, FLOOR = 0.2, 1.0, 1e3
ALPHA = 1.0 - TAU
REWARD = BETA * TAU**2 / ALPHA**2
"""L where W = 1."""
FAST = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
PRECISION = 1.0 / VARIANCE + BETA * CURVATURE
TILTED = (MEAN / VARIANCE + BETA * CURVATURE * CENTRE) / PRECISION, 1.0 / PRECISION


def resting_point():
    gain = ALPHA * VARIANCE / (ALPHA**2 * VARIANCE + TAU**2)
    pull = 1.0 - ALPHA * gain
    mean = (pull * MEAN + REWARD * CURVATURE * CENTRE) / (pull + REWARD * CURVATURE)
    own = gain - REWARD * CURVATURE / ALPHA
    return mean, own * TAU**2 / (ALPHA * (1.0 - ALPHA * own))


def test_the_resting_point_is_near_the_tilted_teacher():
    mean, variance = resting_point()
    assert np.allclose(variance, TILTED[1], rtol=0.08)
    assert np.allclose(mean, TILTED[0], atol=0.02)
    assert np.abs(mean - MEAN).min() > 0.15  # and far from the teacher


def settle(world, rounds, fakes, average):
    """The student's coefficients and the fake's, averaged over the last rounds, after so many rounds of updates."""
    inside = FAKE_ON_ROLLOUT in needs_of(world.terms)

    def one(state, _):
        for _ in range(0 if inside else fakes):
            state, _ = fake_step(world.plan, state, world.frozen, world.batch)
        state = state._replace(inner=state.inner + 1)
        state, _ = generator_step(world.plan, world.terms, state, world.frozen, world.batch)
        return state, state.generator

    # Many rounds of one small program: here, unlike in other tests, it is worth its compiler's while.
    run = jax.jit(lambda s: jax.lax.scan(one, s, None, length=rounds), compiler_options=FAST)
    _, path = run(world.state)
    return {name: np.asarray(x[-average:]).mean(0) for name, x in path.items()}


def world(method, batch, reward, **changes):
    """One renoise level, one guidance scale of 1, a normaliser that is a constant, plain gradient descent."""
    settings = dict(
        dynamics__tau_low=TAU,
        dynamics__tau_high=TAU,
        dynamics__dg=0.0,  # else the real score is not the teacher's
        dm__normaliser_floor=FLOOR,
        dm__weight=2.0 * FLOOR,
    )
    if "group__size" in changes:
        settings |= {"group__normalise": "none", "group__limit": 1e6, "group__combine": "sum"}
    tx = optax.sgd(3.0), optax.sgd(2.0)
    return gaussian.make(method, batch=batch, tx=tx, reward=reward, **settings, **changes)


def test_dmdr_comes_to_the_tilted_teacher():
    """One step, DM and the reward's own gradient: L is the reward's weight."""
    w = world("dmdr_refl", 4096, REWARD, student__steps=1, trained=("first_bias", "first_scale"))
    found = settle(w, rounds=120, fakes=3, average=60)
    mean, variance = resting_point()
    assert np.allclose(MEAN + found["first_bias"], mean, atol=0.02)
    assert np.allclose(found["first_scale"] ** 2, variance, rtol=0.05)


GROUP = 8
SHARE = (GROUP - 1) / GROUP / 2.0
"""Of the policy's weight in L: a group's baseline, and log-probabilities that are means over two elements."""


@pytest.mark.parametrize("method", ["dmdr_grpo", "rtdmd"])
def test_policy_gradients_with_matching_come_to_the_tilted_teacher(method):
    """The first of two steps is trained: half of the calls match it, the policy gradient brings the reward.

    RTDMD matches the latents z at level t1 made of it: its direction and the chain to x0 have the factor 1 - t1 each.
    """
    t1 = 0.1
    matching = 0.5 * ((1.0 - t1) ** 2 if method == "rtdmd" else 1.0)
    changes = dict(policy__weight=REWARD * matching / SHARE, policy__clip=1.0, group__size=GROUP)
    if method == "rtdmd":
        changes |= dict(
            policy__steps=1, last_step__dm_weight=2.0 * FLOOR, last_step__weight=0.0, last_step__fake_updates=3
        )
        changes |= dict(boundary__consistency=0.0)
    w = world(
        method, 8192, 1.0, grid=(1.0, t1, 0.0), trained=("first_bias", "first_scale"), later=1.0 / (1.0 - t1), **changes
    )
    found = settle(w, rounds=150, fakes=3, average=80)
    mean, variance = resting_point()
    rho = t1 / (1.0 - t1)
    assert np.allclose(MEAN + found["first_bias"], mean, atol=0.04)
    assert np.allclose(found["first_scale"] ** 2 + 0.5 * rho**2, variance, rtol=0.08)


def test_the_last_steps_reward_gradient_with_matching_comes_to_the_tilted_teacher():
    """RTDMD as released: the last step alone is matched and has the reward's gradient; its input is given."""
    changes = dict(policy__weight=0.0, policy__steps=1, group__size=GROUP, last_step__dm_weight=2.0 * FLOOR)
    changes |= dict(last_step__weight=REWARD, last_step__margin=1e6, last_step__every_step=False)
    changes |= dict(last_step__fake_updates=3, boundary__consistency=0.0)
    w = world("rtdmd", 4096, 1.0, grid=(1.0, 0.4, 0.0), trained=("later_bias", "later_scale"), **changes)
    found = settle(w, rounds=150, fakes=0, average=80)
    mean, variance = resting_point()
    z_mean, z_variance = 0.6 * (MEAN + np.array([0.2, 0.1])), 0.36 * VARIANCE + 0.16
    assert np.allclose(found["later_bias"] + found["later_scale"] * z_mean, mean, atol=0.03)
    assert np.allclose(found["later_scale"] ** 2 * z_variance, variance, rtol=0.06)


def first_state(kernel, x0, z, n, t1):
    """The state at t1 that a kernel makes of pure noise z, its estimate x0 and fresh noise n, written out at t = 1."""
    dt, velocity = t1 - 1.0, z - x0
    match kernel:
        case "renoise":
            return (1.0 - t1) * x0 + t1 * n
        case "cps(0.6)":
            return (1.0 - t1) * x0 + t1 * (np.cos(0.3 * np.pi) * z + np.sin(0.3 * np.pi) * n)
        case "flow_sde(0.7)":
            rate = 0.7 / np.sqrt(1.0 - t1)
            return z * (1.0 + rate**2 * dt / 2.0) + velocity * dt + rate * np.sqrt(-dt) * n
        case "dance(0.8)":
            return z + velocity * dt + 0.8**2 * z * dt / 2.0 + 0.8 * np.sqrt(-dt) * n


@pytest.mark.parametrize("kernel", ["renoise", "cps(0.6)", "flow_sde(0.7)", "dance(0.8)"])
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(kernel):
    """Against finite differences of the mean reward over the same noise, for a trained first step of two."""
    b, t1 = 200_000, 0.5
    changes = dict(policy__weight=1.0, policy__clip=1.0, group__size=GROUP, policy__kl=0.0, rollout__kernel=kernel)
    w = world("grpo_only", b, 1.0, grid=(1.0, t1, 0.0), trained=("first_bias", "first_scale"), **changes)
    assert_rewarded(w, kernel, t1, dict.fromkeys(w.state.generator, SHARE))


def test_policy_gradient_and_last_step_together_are_the_gradient_of_the_expected_reward():
    """RTDMD without matching: all but the last step by the policy's half, the last by the reward's own gradient."""
    b, t1 = 200_000, 0.5
    changes = dict(policy__weight=1.0, policy__steps=1, policy__clip=1.0, group__size=GROUP)
    changes |= dict(last_step__weight=0.5, last_step__margin=1e6, last_step__dm_weight=0.0)
    w = world("rtdmd", b, 1.0, grid=(1.0, t1, 0.0), trained=gaussian.TRAINED, **changes)
    assert_rewarded(w, "renoise", t1, {n: SHARE if n.startswith("first") else 0.5 for n in gaussian.TRAINED})


def assert_rewarded(w, kernel, t1, weights):
    """One update's gradient is, by coefficient, its weight times the finite difference of the mean reward."""
    new, _ = jax.jit(lambda s: generator_step(w.plan, w.terms, s, w.frozen, w.batch))(w.state)
    got = jax.tree.map(lambda a, b: (a - b) / 3.0, new.generator, w.state.generator)  # the rate is 3
    z, n = (jax.random.normal(jax.random.key(i), (200_000, 2)) for i in (1, 2))

    @jax.jit
    def mean_reward(p):
        p = w.frozen.base | p
        first = MEAN + p["first_bias"] + p["first_scale"] * z
        x = p["later_bias"] + p["later_scale"] * first_state(kernel, first, z, n, t1)
        return (-0.5 * CURVATURE * (x - CENTRE) ** 2).sum(-1).mean()

    step = 1e-2
    for name, value in w.state.generator.items():
        slopes = []
        for d in range(2):
            up, down = (w.state.generator | {name: value.at[d].add(h)} for h in (step, -step))
            slopes.append(float(mean_reward(up) - mean_reward(down)) / (2 * step))
        assert max(map(abs, slopes)) > 0.05, name
        np.testing.assert_allclose(got[name], weights[name] * np.array(slopes), atol=0.012, err_msg=name)
