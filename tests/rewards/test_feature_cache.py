"""Text features of training's batches: what is known is not computed again, and nothing changes by that."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import ClipReward, load_clip_reward
from dmdr_jax.rewards.feature_cache import BatchFeatures
from tests.rewards.test_clip_reward import make_folder

PROMPTS = ["a red circle", "a blue square", "a photo", "red and blue", "", "a blue square and " * 9]


@dataclasses.dataclass(frozen=True, eq=False)
class Counting(ClipReward):
    """Notes the batches that are computed."""

    asked: list = dataclasses.field(default_factory=list)

    def text_features(self, ids):
        self.asked.append(len(ids))
        return super().text_features(ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_folder(folder)
    return folder


def counting(folder, **fields):
    reward = load_clip_reward(RewardSpec("clip", str(folder), **fields))
    return Counting(**{f.name: getattr(reward, f.name) for f in dataclasses.fields(ClipReward)})


def expected(reward, prompts):
    return np.asarray(load_clip_reward(reward.spec).text_features(reward.tokenize(prompts)))


def test_a_batch_of_known_prompts_is_not_computed(folder):
    reward = counting(folder)
    features = BatchFeatures(reward, jnp.asarray)
    for batch in (PROMPTS[:3], PROMPTS[3:], PROMPTS[4:1:-1], [PROMPTS[5], PROMPTS[0], PROMPTS[5]]):
        np.testing.assert_array_equal(np.asarray(features(batch)), expected(reward, batch))  # to the last bit
    assert reward.asked == [3, 3]
    np.testing.assert_array_equal(
        np.asarray(features([PROMPTS[0], "a circle"])), expected(reward, [PROMPTS[0], "a circle"])
    )
    assert reward.asked == [3, 3, 2]


def test_a_contrast_is_known_by_both_of_its_texts(folder):
    """Its words are drawn anew for every batch: the same prompt in another batch may be another contrast."""
    reward = counting(folder, positive_words=("red", "blue", "photo"), negative_words=("circle", "square"))
    features = BatchFeatures(reward, jnp.asarray)
    batches = [PROMPTS[:2], PROMPTS[1:3], PROMPTS[:2], PROMPTS[2:4], PROMPTS[1:3]]
    for batch in batches:
        np.testing.assert_array_equal(np.asarray(features(batch)), expected(reward, batch))
    assert len(reward.asked) == 3


def test_the_oldest_are_forgotten(folder):
    reward = counting(folder)
    features = BatchFeatures(reward, jnp.asarray, capacity=3)
    for batch in (PROMPTS[:3], PROMPTS[3:], PROMPTS[3:], PROMPTS[:3]):
        np.testing.assert_array_equal(np.asarray(features(batch)), expected(reward, batch))
    assert len(reward.asked) == 3
