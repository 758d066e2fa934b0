"""The pictures, losses and measures behind the embedded world's rewards."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.shapes import contrast_words, prompts
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.shapes.reward_data import KINDS, PICTURE_KINDS, SCENE_KINDS, all_world_records, make_groups
from dmdr_jax.shapes.reward_measures import auc, retrieval_metrics, verdict_metrics
from dmdr_jax.shapes.rewards import (
    biased_pair,
    blind_to_order,
    contrastive_loss,
    multi_positive_nce,
    patch_labels,
    patch_loss,
    preference_loss,
    preference_pairs,
    same_words,
    saturate,
)
from dmdr_jax.shapes.verifier import judge
from dmdr_jax.shapes.world import SMALL

GROUPS = 40


@pytest.fixture(scope="module")
def groups():
    return make_groups(SMALL, GROUPS, seed=0)


def own_truth(groups):
    return np.take_along_axis(groups.truth, groups.prompt[:, None, None], 2)[..., 0]


# --- pictures ------------------------------------------------------------------------------------------------------


def test_groups_have_the_pictures_they_say(groups):
    assert groups.images.shape == (GROUPS, 8, 32, 32, 3) and groups.images.dtype == np.uint8
    assert (groups.kinds[:, 0] == 0).all() and own_truth(groups)[:, 0].all()
    assert {KINDS[k] for k in groups.kinds[:, 1:4].flat} <= set(SCENE_KINDS)
    assert {KINDS[k] for k in groups.kinds[:, 4:].flat} <= set(PICTURE_KINDS)


def test_truth_is_the_verifiers_strict_verdict_on_every_record(groups):
    records = all_world_records(SMALL)
    for column in range(0, len(records), 37):
        images = groups.images[:, ::3].reshape(-1, 32, 32, 3)
        expected = judge(SMALL, images, [records[column]] * len(images)).strict
        np.testing.assert_array_equal(groups.truth[:, ::3, column].ravel(), expected)


def test_objects_are_what_the_verifier_sees(groups):
    clean = groups.objects[:, 0]
    counts = [sum(item["count"] for item in all_world_records(SMALL)[p]["include"]) for p in groups.prompt]
    np.testing.assert_array_equal((clean[..., 0] > 0).sum(1), counts)
    record = all_world_records(SMALL)[groups.prompt[0]]
    shapes = sorted(SMALL.shapes[(int(k) - 1) % len(SMALL.shapes)] for k in clean[0, :, 0] if k)
    assert shapes == sorted(item["class"] for item in record["include"] for _ in range(item["count"]))


def test_near_misses_fail_their_prompt(groups):
    truth, kinds = own_truth(groups), groups.kinds
    for kind in ("reshaped", "missing", "extra", "collage", "noisy"):
        chosen = kinds == KINDS.index(kind)
        assert chosen.any() and not truth[chosen].any()


def test_swaps_change_what_is_true_of_a_pair():
    only = make_groups(SMALL, 30, seed=1, scene_kinds=(("swapped_colors",), ("swapped_places",)), picture_kinds=())
    records = all_world_records(SMALL)
    truth = own_truth(only)
    for position, (kind, tag) in enumerate((("swapped_colors", "color_attr"), ("swapped_places", "position")), 1):
        rows = [i for i, p in enumerate(only.prompt) if records[p]["tag"] == tag]
        swapped = [i for i in rows if KINDS[only.kinds[i, position]] == kind]
        assert len(swapped) > 2 and not truth[swapped, position].any()


def test_groups_are_functions_of_the_seed_and_keep_the_split(groups):
    again = make_groups(SMALL, GROUPS, seed=0)
    np.testing.assert_array_equal(again.images, groups.images)
    records = all_world_records(SMALL)
    assert not any(prompts.is_held_out(SMALL, records[p]) for p in groups.prompt)
    held_out = make_groups(SMALL, 5, seed=0, split="held_out", scene_kinds=(), picture_kinds=())
    assert all(prompts.is_held_out(SMALL, records[p]) for p in held_out.prompt)


# --- losses --------------------------------------------------------------------------------------------------------


def test_one_positive_is_cross_entropy():
    logits = jax.random.normal(jax.random.key(0), (4, 4)) * 3
    positive = jnp.eye(4, dtype=bool)
    expected = -jax.nn.log_softmax(logits, 1)[jnp.arange(4), jnp.arange(4)].mean()
    np.testing.assert_allclose(multi_positive_nce(logits, positive, ~positive), expected, rtol=1e-5)
    both = 0.5 * (expected - jax.nn.log_softmax(logits, 0)[jnp.arange(4), jnp.arange(4)].mean())
    np.testing.assert_allclose(contrastive_loss(logits / 5, jnp.float32(5), positive, ~positive), both, rtol=1e-5)


def test_positives_do_not_compete_and_neutral_ones_do_not_count():
    logits = jnp.array([[2.0, 1.0, 0.0, 9.0]])
    positive, negative = jnp.array([[1, 1, 0, 0]], bool), jnp.array([[0, 0, 1, 0]], bool)
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
    np.testing.assert_allclose(multi_positive_nce(logits, positive, negative), expected, rtol=1e-5)


def test_rows_without_a_positive_do_not_count():
    logits = jnp.array([[1.0, 0.0], [5.0, 5.0]])
    positive, negative = jnp.array([[1, 0], [0, 0]], bool), jnp.array([[0, 1], [1, 1]], bool)
    np.testing.assert_allclose(multi_positive_nce(logits, positive, negative), np.log1p(np.exp(-1.0)), rtol=1e-5)
    assert multi_positive_nce(logits[1:], positive[1:], negative[1:]) == 0


def test_preference_loss_is_bradley_terry():
    loss = preference_loss(jnp.array([0.3]), jnp.array([0.1]), jnp.float32(10))
    np.testing.assert_allclose(loss, -np.log(1 / (1 + np.exp(-2.0))), rtol=1e-5)


def test_a_model_blind_to_order_never_sees_a_caption_of_the_same_words_as_wrong():
    captions = ["a red circle and a blue square", "a blue circle and a red square", "a red circle"]
    truth = np.eye(3, dtype=bool)
    expected = [[False, False, True], [False, False, True], [True, True, False]]
    np.testing.assert_array_equal(blind_to_order(truth, same_words(captions)), expected)


def test_patch_labels_and_loss():
    objects = jnp.array([[[3.0, 7.5, 7.5], [5.0, 23.5, 11.5], [0.0, 0.0, 0.0]]])
    labels = patch_labels(objects, image_size=32, patch=8)
    expected = np.zeros((4, 4), int)
    expected[0, 0], expected[1, 2] = 3, 5
    np.testing.assert_array_equal(labels[0].reshape(4, 4), expected)
    sure = 20.0 * jax.nn.one_hot(labels, 6)
    assert patch_loss(sure, labels) < 1e-6
    np.testing.assert_allclose(patch_loss(jnp.zeros((1, 16, 6)), labels), np.log(6), rtol=1e-5)


# --- preferences ---------------------------------------------------------------------------------------------------


def test_saturate_scales_the_distance_from_gray():
    image = jnp.array([0.6, 0.4, 0.4]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(saturate(image, jnp.ones(1)), image, atol=1e-6)
    gray = saturate(image, jnp.zeros(1)).ravel()
    np.testing.assert_allclose(gray, 0.299 * 0.6 + 0.701 * 0.4, rtol=1e-5)
    np.testing.assert_allclose(saturate(image, jnp.full(1, 2.0)).ravel() - gray, 2 * (image.ravel() - gray), atol=1e-6)


def test_raters_have_the_stated_taste_and_carelessness():
    n = 4000
    red, blue = (jnp.tile(jnp.array(c), (n, 1, 1, 1)) for c in ([0.6, 0.4, 0.4], [0.4, 0.4, 0.6]))
    preferred, rejected = biased_pair(jax.random.key(0), red, blue, bias=0.7, noise=0.1)
    is_red = np.asarray(preferred[:, 0, 0, 0] > preferred[:, 0, 0, 2])
    assert abs(is_red.mean() - 0.9) < 0.02
    spread = [np.ptp(np.asarray(x[:, 0, 0]), axis=-1) for x in (preferred, rejected)]
    # 70:30 before one label in ten is exchanged.
    assert abs((spread[0] > spread[1]).mean() - (0.7 * 0.9 + 0.3 * 0.1)) < 0.03


def test_pairs_are_right_against_wrong_or_right_against_right(groups):
    pairs = preference_pairs(groups, ("recolored", "blurred"), equal_share=0.3, seed=0)
    records = all_world_records(SMALL)
    asked = [records[p] for p in pairs.prompt]
    assert judge(SMALL, pairs.better, asked).strict.all()
    np.testing.assert_array_equal(judge(SMALL, pairs.worse, asked).strict, pairs.equal)
    assert 0 < pairs.equal.mean() < 1


# --- measures ------------------------------------------------------------------------------------------------------


def test_auc_counts_ties_half():
    assert auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(3.5 / 4)


def test_an_oracle_measures_as_perfect_and_noise_as_chance(groups):
    oracle = groups.truth.astype(np.float32)
    found = {**verdict_metrics(oracle, groups), **retrieval_metrics(oracle, groups)}
    assert found["auc/all"] == found["pair/all"] == found["retrieval/caption"] == found["retrieval/image"] == 1
    noise = np.random.default_rng(0).normal(size=oracle.shape)
    assert abs(verdict_metrics(noise, groups)["auc/all"] - 0.5) < 0.15
    assert retrieval_metrics(noise, groups)["retrieval/caption"] < 0.3


def test_prompts_alone_judge_as_they_did_after_training_and_a_contrast_has_less_taste():
    alone, pairs = contrast_words.measure("shapes_hps", k=0.1)
    recorded = json.loads((Path(resolve("shapes:rewards/shapes_hps")) / "metrics.json").read_text())
    assert {f"seen/{key}": value for key, value in alone.items()} == {
        key: pytest.approx(value, abs=0.01) for key, value in recorded.items() if key.startswith("seen/preference/")
    }
    words = prompts.vocabulary(SMALL)
    assert len(pairs) == len(words) * (len(words) - 1)
    best = max(value["preference/unbiased"] for value in pairs.values())
    assert 0.5 < best < alone["preference/unbiased"]  # words before a prompt cost judgement
    assert pairs["and", "below"]["preference/taste"] < alone["preference/taste"] - 0.1
