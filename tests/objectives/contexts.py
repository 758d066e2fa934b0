"""Contexts of arrays alone, for tests of single terms."""

import jax
import jax.numpy as jnp

from dmdr_jax.distill.dm import DMDraw, dm_draw
from dmdr_jax.distill.scores import Scores
from dmdr_jax.objectives.base import Context
from dmdr_jax.rewards.base import RewardSpec

SHAPE = (4, 2, 2, 3)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def draw(x, seed=10, guidance=2.0) -> DMDraw:
    scores = Scores(*(normal(seed + i, x.shape) for i in range(3)))
    return dm_draw(x, jnp.full(len(x), 0.5), scores, guidance)


def context(x0, **fields) -> Context:
    b = len(x0)
    return Context(jnp.int32(10), x0, jnp.zeros(b, jnp.int32), jnp.ones(b), **fields)


def spec(name="r", **fields) -> RewardSpec:
    return RewardSpec(name, **{"weight": 1.0, "margin": None, **fields})
