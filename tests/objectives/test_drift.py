"""The drift against the definition written out in numpy, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.objectives.base import FeatureSets
from dmdr_jax.objectives.drift import Drift, drift_force, drift_loss
from tests.objectives.contexts import context, normal, spec

N, D = 6, 5
RADII = (0.02, 0.05, 0.2)


def supports(seed=0, d=D):
    x, neg, pos = normal(seed, (N, d)), normal(seed + 1, (3, d)) - 0.5, normal(seed + 2, (4, d)) + 0.5
    same = jnp.concatenate([jnp.eye(N, dtype=bool), jnp.zeros((N, 7), bool)], axis=1)
    return x, neg, pos, same


def softmax(a, axis):
    e = np.exp(a - a.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def reference_force(x, neg, pos, same, w_neg, w_pos):
    """The definition, term by term, in double precision."""
    x, neg, pos, same = (np.asarray(a, np.float64) for a in (x, neg, pos, same))
    targets = np.concatenate([x, neg, pos])
    w = np.concatenate([np.ones(len(x)), np.full(len(neg), w_neg), np.full(len(pos), w_pos)])
    dist = np.array([[np.linalg.norm(t - a) for t in targets] for a in x])
    s = (dist * w).sum() / (dist.size * w.mean())
    s_d, split, total = s / np.sqrt(x.shape[1]), len(x) + len(neg), np.zeros_like(x)
    for radius in RADII:
        logits = -dist / (s * radius) - 100.0 / radius * same
        a = np.sqrt(softmax(logits, 1) * softmax(logits, 0)) * w
        force = np.zeros_like(x)
        for i in range(len(x)):
            m_pos, m_neg = a[i, split:].sum(), a[i, :split].sum()
            for j, t in enumerate(targets):
                sign, m = (1.0, m_neg) if j >= split else (-1.0, m_pos)
                force[i] += sign * a[i, j] * m * (t - x[i]) / s_d
        total += force / np.sqrt((force**2).mean())
    return total, s_d


def test_the_force_is_the_definition():
    arguments = supports()
    expected, unit = reference_force(*arguments, 30.0, 20.0)
    force, scale = drift_force(*arguments, 30.0, 20.0, RADII)
    assert np.allclose(force, expected, rtol=2e-3, atol=2e-3)
    assert float(scale) == pytest.approx(unit, rel=1e-5)


def test_the_loss_descends_along_the_force():
    x, neg, pos, same = supports(5)
    force, unit = drift_force(x, neg, pos, same, 30.0, 20.0, RADII)
    slope = jax.grad(lambda y: drift_loss(y, neg, pos, same, 30.0, 20.0, RADII))(x)
    assert np.allclose(slope, -2.0 * force / (x.size * unit), rtol=1e-4, atol=1e-6)


def test_the_force_hardly_depends_on_the_weights_scale():
    """In many dimensions, where all distances are alike."""
    arguments = supports(9, d=512)
    forces = [np.asarray(drift_force(*arguments, w, w, RADII)[0]).ravel() for w in (1e3, 1e4)]
    cosine = forces[0] @ forces[1] / np.linalg.norm(forces[0]) / np.linalg.norm(forces[1])
    assert cosine > 0.9999


def test_good_samples_attract():
    """A step along the force brings the samples nearer to the positives and away from the negatives."""
    x = 0.1 * normal(0, (N, D))
    pos, neg = 0.1 * normal(1, (4, D)) + 1.0, 0.1 * normal(2, (3, D)) - 1.0
    same = jnp.concatenate([jnp.eye(N, dtype=bool), jnp.zeros((N, 7), bool)], axis=1)
    force, _ = drift_force(x, neg, pos, same, 3000.0, 2000.0, RADII)
    assert float((force @ jnp.ones(D)).min()) > 0


def term(**settings):
    return Drift(Advantages((spec(),)), count=2, **settings)


def test_the_term_ranks_and_rewards_alone_decide_who_attracts():
    sample = {"f": normal(20, (8, D))}
    features = FeatureSets(sample, {"f": normal(21, (8, D))})

    def slope(rewards, **settings):
        def loss(f):
            ctx = context(jnp.zeros((8, 1, 1, 1)), group=4, rewards={"r": rewards})
            return term(**settings)(ctx._replace(features=FeatureSets({"f": f}, features.reference)))[0]

        return jax.grad(loss)(sample["f"])

    equal = slope(jnp.array([1.0, 1.0, 1.0, 1.0, 4.0, 3.0, 2.0, 1.0]), reference_weight=0.0)
    assert not np.any(equal[:4]) and np.any(equal[4:])
    rewards = jnp.array([0.1, 0.2, 0.3, 0.4, 4.0, 3.0, 2.0, 1.0])
    assert np.allclose(slope(rewards), slope(rewards**3), atol=1e-6)  # only ranks count
    assert not np.allclose(slope(rewards), slope(-rewards), atol=1e-3)
    # Groups do not mix: another group's features leave this one's force as it is, up to the mean over groups.
    alone = slope(rewards, reference_weight=0.0)
    sample["f"] = sample["f"].at[4:].add(1.0)
    assert np.allclose(alone[:4], slope(rewards, reference_weight=0.0)[:4], atol=1e-6)


def test_needs_without_a_reference():
    assert "reference" in term().needs and "reference" not in term(reference_weight=0.0).needs
