"""The verifier as a held-out reward."""

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.registry import open_reward
from dmdr_jax.shapes import verifier
from dmdr_jax.shapes.prompts import eval_records, sample_scene
from dmdr_jax.shapes.render import render
from dmdr_jax.shapes.world import get_world

WORLD = get_world("small")


def test_a_reward_that_knows_the_truth():
    reward = open_reward("python", "dmdr_jax.shapes.judge:verdict")
    records = eval_records(WORLD, 2, seed=0)
    prompts = [record["prompt"] for record in records]
    scenes = [sample_scene(WORLD, r, np.random.default_rng(i)) for i, r in enumerate(records)]
    images = render(WORLD, scenes)
    assert not reward.differentiable
    np.testing.assert_array_equal(reward.score_prompts(images, prompts, 5), np.ones(len(records)))
    others = np.roll(images, 1, axis=0)
    found = reward.score_prompts(others, prompts, 5)
    np.testing.assert_allclose(found, verifier.judge(WORLD, others, records).partial, atol=1e-6)
    assert found.min() >= 0 and found.mean() < 0.8
    littered = np.where(np.arange(32)[:, None, None] < 4, np.random.default_rng(0).random(images.shape), images)
    assert reward.score_prompts(littered, prompts).max() == 0


def test_what_is_of_no_world():
    reward = open_reward("python", "dmdr_jax.shapes.judge:verdict")
    with pytest.raises(UserError, match=r"has no prompt 'a dog'.*leave it out"):
        reward.score_prompts(np.zeros((1, 32, 32, 3)), ["a dog"])
    with pytest.raises(UserError, match="no embedded world has images of 17 pixels"):
        reward.score_prompts(np.zeros((1, 17, 17, 3)), ["a circle"])
