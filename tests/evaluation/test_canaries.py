"""What canary images say, against sums by hand."""

import numpy as np
import pytest

from dmdr_jax.evaluation import canaries
from dmdr_jax.evaluation.appearance import MEASURES
from dmdr_jax.evaluation.overoptimisation import Observation
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import load_clip_reward
from dmdr_jax.rewards.registry import open_reward
from tests.rewards.test_clip_reward import make_folder

PROMPTS = ["a red circle", "a red circle", "a blue square", "a blue square"]
FUNCTIONS = """
def red(images, prompts): return images[..., 0].mean((1, 2))
def dark(images, prompts): return -images.mean((1, 2, 3))
"""


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return [open_reward("python", f"{tmp_path / 'mine.py'}:{name}", name=name) for name in ("red", "dark")]


def pictures(*values):
    return np.stack([np.full((8, 8, 3), value, np.float32) for value in values])


def test_every_measure_of_every_image(rewards):
    images = pictures((1, 0, 0), (0.5, 0.5, 0.5), (0.2, 0.4, 0.6), (0.1, 0.1, 0.1))
    found = canaries.measure(images, PROMPTS, rewards[:1], rewards[1:])
    assert set(found) == {"reward/red", "judge/dark", *MEASURES, "diversity", "palette"}
    np.testing.assert_allclose(found["reward/red"], [1, 0.5, 0.2, 0.1], atol=1e-6)
    np.testing.assert_allclose(found["judge/dark"], [-1 / 3, -0.5, -0.4, -0.1], atol=1e-6)
    assert found["clipped"].tolist() == [1, 0, 0, 0] and found["saturation"].tolist()[:2] == [1, 0]
    assert found["diversity"] > 0
    assert canaries.measure(pictures(*[(0.5, 0.2, 0.1)] * 4), PROMPTS, (), ())["diversity"] == 0


def test_metrics_are_means_and_comparisons_with_the_teacher():
    looks = {
        "chroma": np.array([0.1, 0.3]),
        "saturation": np.ones(2),
        "contrast": np.zeros(2),
        "palette": np.array(0.5),
    }
    teacher = {"reward/a": np.array([0.0, 2.0]), "judge/b": np.array([1.0, 5.0]), "judge/flat": np.ones(2)}
    teacher |= looks | {"clipped": np.array([0.0, 0.2]), "diversity": np.array(2.0)}
    student = {"reward/a": np.array([3.0, 5.0]), "judge/b": np.array([1.0, 1.0]), "judge/flat": np.ones(2)}
    student |= looks | {"chroma": np.array([0.3, 0.3]), "clipped": np.full(2, 0.5), "diversity": np.array(1.0)}
    student["palette"] = np.array(0.1)
    found = canaries.compare(student, teacher)
    assert found["watch/z_trained"] == 3 and found["watch/z_held_out"] == -1 and found["watch/reward_gap"] == 4
    assert found["watch/reward/a"] == 4 and found["watch/judge/flat"] == 1
    assert found["watch/chroma_share"] == pytest.approx(1.5) and found["watch/diversity_share"] == 0.5
    assert found["watch/clipped_more"] == pytest.approx(0.4)
    assert "watch/contrast_share" not in found  # the teacher has none to compare with
    seen = canaries.observation(7, found)
    assert (seen.step, seen.gap, seen.diversity, seen.palette) == (7, 4, 0.5, pytest.approx(0.2))
    assert seen.chroma == pytest.approx(1.5)
    itself = canaries.compare(teacher, teacher)
    assert itself["watch/reward_gap"] == 0 and itself["watch/diversity_share"] == 1


def test_one_background_for_all_is_a_lost_palette(tmp_path):
    """Backgrounds fill most of a picture and say nothing of the prompt."""
    rng = np.random.default_rng(0)
    objects = rng.random((8, 3, 3, 3))
    images = np.repeat(np.linspace(0, 1, 8), 16 * 16 * 3).reshape(8, 16, 16, 3)
    images[:, 4:7, 4:7] = objects
    alike = np.full_like(images, 0.5)
    alike[:, 4:7, 4:7] = objects
    prompts = ["a"] * 4 + ["b"] * 4
    varied, settled = (canaries.measure(x, prompts, (), ())["palette"] for x in (images, alike))
    assert settled < 0.1 * varied
    lightness = np.linspace(0, 1, 3)[:, None, None, None] * np.ones((1, 4, 4, 3))  # greys: OKLab L is the cube root
    found = canaries.measure(lightness, ["a"] * 3, (), ())["palette"]
    linear = lambda v: ((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92
    middle = np.cbrt(linear(round(0.5 * 255) / 255))
    assert found == pytest.approx((middle + 1.0 + (1 - middle)) / 3, abs=1e-3)


def test_spread_is_the_mean_distance_within_a_prompt():
    rows = np.array([[0.0, 0], [3, 4], [10, 0], [10, 2], [10, 4]])
    assert canaries.spread(rows, ["a", "a", "b", "b", "b"]) == pytest.approx((5 + (2 + 4 + 2) / 3) / 2)
    assert canaries.spread(rows[:2], ["a", "b"]) == 5  # of any two, where every prompt has one image
    assert canaries.spread(rows[:1], ["a"]) == 0


def test_features_of_the_held_out_clip(tmp_path):
    make_folder(tmp_path)
    reward = canaries.apart(load_clip_reward(RewardSpec("clip", str(tmp_path))), to_host=True)
    images = np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)
    features = canaries.clip_features(reward, images)
    assert features.shape == (3, 20) and np.linalg.norm(features, axis=1) == pytest.approx(np.ones(3))
    assert canaries.measure(images, PROMPTS[:3], (), (reward,))["diversity"] == canaries.spread(features, PROMPTS[:3])


def test_watching_leaves_the_cache_of_training_alone(tmp_path):
    make_folder(tmp_path)
    reward = load_clip_reward(RewardSpec("clip", str(tmp_path)))
    own = canaries.apart(reward, to_host=True)
    images = np.zeros((4, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(own.score_prompts(images, PROMPTS), reward.score_prompts(images, PROMPTS))
    assert own.cache is not reward.cache and isinstance(own.params["visual_projection"]["kernel"], np.ndarray)


def test_a_run_is_recalled_from_its_metrics():
    rows = [{"step": 0, "watch/z_trained": 1.0, "watch/z_held_out": None}, {"step": 1, "fake/loss": 2.0}]
    rows += [{"step": 0, "watch/z_trained": 3.0}, {"step": 2, "watch/diversity_share": 0.5}]
    assert canaries.observations(rows) == [Observation(0, 3.0), Observation(2, diversity=0.5)]
