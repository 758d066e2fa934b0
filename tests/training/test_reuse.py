"""``rollout.reuse``: fake updates on the generator's own rollout, and what that saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.objectives.base import needs_of, separate_fake_updates
from dmdr_jax.training import step as programs
from dmdr_jax.training.plan import generator_weights, keys_of
from dmdr_jax.training.rollouts import roll_out
from dmdr_jax.training.step import fake_step, generator_step
from tests.distill import toy
from tests.training import toy_run
from tests.training.test_passes import LATENT, NETWORK, cond, flops, written_out
from tests.training.test_passes import MMDiT as Transformer

assert written_out  # loops as straight programs, for the count

STEPS, UPDATES, BATCH = 2, 3, 4


@functools.cache
def run(method="dmdr_refl", **changes):
    sizes = {"student__steps": STEPS, "fake__updates": UPDATES, "batch": BATCH}
    return toy_run.make(method, module=Transformer(NETWORK), cond=cond, latent=LATENT, **sizes | changes)


def generator_flops(r):
    return flops(functools.partial(generator_step, r.plan, r.active(0)), r.state, r.frozen, r.batch)


def test_one_rollout_serves_all_updates():
    fresh, reused = run(), run(rollout__reuse=True)
    assert separate_fake_updates(fresh.active(0), UPDATES) == UPDATES
    assert separate_fake_updates(reused.active(0), UPDATES) == 0
    apart = UPDATES * flops(functools.partial(fake_step, fresh.plan), fresh.state, fresh.frozen, fresh.batch)
    apart, together = apart + generator_flops(fresh), generator_flops(reused)
    z, t, denoiser = jnp.zeros((BATCH, *LATENT)), jnp.full(BATCH, 0.5), fresh.plan.denoiser

    def student(g, z):
        return denoiser.x0(generator_weights(fresh.plan, g, fresh.frozen.base), z, t, fresh.batch.cond)

    # Each fake update's own rollout is gone, and the generator's has one call more: its samples.
    saved = flops(student, fresh.state.generator, z) * (UPDATES * STEPS - 1)
    assert apart - together == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(("simulation", "shared_index"), [("renoise", True), ("ode_final", False)])
def test_the_fake_score_sees_the_generators_samples(monkeypatch, simulation, shared_index):
    inner, counted = programs.fake_update, []

    def watched(plan, frozen, fake, samples, s, *more):
        new, metrics = inner(plan, frozen, fake, samples, s, *more)
        counted.append(metrics["fake/loss"])
        return new, metrics | {"samples": samples}

    monkeypatch.setattr(programs, "fake_update", watched)
    r = run(rollout__reuse=True, student__simulation=simulation, student__shared_index=shared_index)
    terms, frozen = r.active(0), r.frozen.replace(base=toy.noisy(r.frozen.base, jax.random.key(3), 0.1))
    state, metrics = jax.jit(functools.partial(generator_step, r.plan, terms))(r.state, frozen, r.batch)

    @jax.jit
    def expected():
        student = generator_weights(r.plan, r.state.generator, frozen.base)
        given = roll_out(r.plan, needs_of(terms), student, r.batch.cond, keys_of(r.state)).given
        return given.z, r.plan.denoiser.x0(student, given.z, given.t, r.batch.cond)

    z, x0 = expected()
    assert float(jnp.abs(x0 - z).max()) > 0.1
    np.testing.assert_allclose(metrics.pop("samples"), x0, rtol=2e-4, atol=2e-5)
    assert len(counted) in (1, UPDATES)  # traced once, or written out
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.fake, r.state.fake)
    assert max(jax.tree.leaves(moved)) > 0
    assert int(state.step) == 1
    assert int(state.inner) == int(r.state.inner)
    assert {"fake/loss", "dm/loss", "generator/loss"} <= set(metrics)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("rtdmd", {"policy__steps": 1, "group__size": 2}), ("gdmd", {}), ("ddmd_adv", {"group__size": 2})],
)
def test_methods_that_train_the_fake_score_their_own_way_refuse_it(method, settings):
    with pytest.raises(UserError, match=r"config\.rollout\.reuse is for methods whose fake score serves distribution"):
        run(method, rollout__reuse=True, **settings)
