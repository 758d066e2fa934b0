"""Attribute entropy and the Frechet distance."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage

from dmdr_jax.errors import UserError
from dmdr_jax.shapes import diversity, prompts, render, verifier
from dmdr_jax.shapes.world import SMALL


def test_entropy_of_known_counts():
    assert diversity.entropy([10, 0, 0]) == 0
    assert diversity.entropy([50, 50]) == pytest.approx(math.log(2))  # the correction may not exceed the maximum
    share = np.array([0.7, 0.2, 0.1])
    plug_in = -(share * np.log(share)).sum()
    assert diversity.entropy([70, 20, 10, 0]) == pytest.approx(plug_in + 2 / 200)
    assert math.isnan(diversity.entropy([0, 0]))


def test_the_correction_removes_most_of_the_bias():
    rng = np.random.default_rng(0)
    share = np.array([0.5, 0.3, 0.15, 0.05])
    truth = -(share * np.log(share)).sum()
    counts = rng.multinomial(16, share, size=3000)
    corrected = np.mean([diversity.entropy(row) for row in counts])
    safe = np.maximum(counts / 16, 1e-12)
    plug_in = -(safe * np.log(safe)).sum(1).mean()
    assert abs(corrected - truth) < 0.35 * abs(plug_in - truth)


def test_collapse_is_seen():
    rng = np.random.default_rng(0)
    records = [prompts.single_object("circle")] * 200 + [prompts.colors("red", "square")] * 200
    scenes = [prompts.sample_scene(SMALL, record, rng) for record in records]

    def measure(change=lambda scene: scene, groups=None):
        images = render.render(SMALL, [change(scene) for scene in scenes])
        return diversity.attribute_diversity(SMALL, verifier.detect(SMALL, images), records, groups)

    healthy = measure()
    assert healthy.background_entropy == pytest.approx(math.log(3), abs=0.02)
    assert healthy.color_entropy == pytest.approx(math.log(4), abs=0.03)  # of the 200 whose color is open
    assert healthy.position_std == pytest.approx(4 * math.sqrt(2), rel=0.05)  # five lattice points, 4 px apart
    assert healthy.unknown_background == 0 and healthy.samples == 400

    assert measure(lambda s: dataclasses.replace(s, background="gray")).background_entropy == 0
    recolored = lambda s: dataclasses.replace(s, objects=(dataclasses.replace(s.objects[0], color="red"),))
    assert measure(recolored).color_entropy == 0
    centered = lambda s: dataclasses.replace(s, objects=(dataclasses.replace(s.objects[0], x=15.5, y=15.5),))
    assert measure(centered).position_std < 0.3

    by_prompt = lambda s: dataclasses.replace(s, background="gray" if s.objects[0].shape == "circle" else "white")
    assert measure(by_prompt).background_entropy == pytest.approx(math.log(2), abs=0.01)
    assert measure(by_prompt, [r["prompt"] for r in records]).background_entropy == 0


def test_no_objects_and_no_background_give_nan():
    images = np.full((3, 32, 32, 3), (0.9, 0.2, 0.8), np.float32)
    records = [prompts.single_object("circle")] * 3
    found = diversity.attribute_diversity(SMALL, verifier.detect(SMALL, images), records)
    assert math.isnan(found.background_entropy) and math.isnan(found.color_entropy) and math.isnan(found.position_std)
    assert found.unknown_background == 1
    with pytest.raises(UserError, match="3 images, 2 records"):
        diversity.attribute_diversity(SMALL, verifier.detect(SMALL, images), records[:2])


def test_frechet_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    spread_a, spread_b, shift = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 6), rng.normal(size=6)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))  # commuting covariances: the closed form is per axis
    cov = [turn @ np.diag(spread**2) @ turn.T for spread in (spread_a, spread_b)]
    expected = (shift**2).sum() + ((spread_a - spread_b) ** 2).sum()
    assert diversity.gaussian_frechet(shift, cov[0], np.zeros(6), cov[1]) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    # 2 x 2: tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)) with M = ab
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    assert diversity.gaussian_frechet(zero, a, zero, b) == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross)
    assert diversity.gaussian_frechet(zero, a, zero, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_in_the_references_units():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 3)) * [1, 5, 0.3]
    shifted = reference + [1, 5, 0.3] * reference.std(0) / [1, 5, 0.3]
    assert diversity.frechet_distance(shifted, reference) == pytest.approx(3, rel=1e-6)
    assert diversity.frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)
    nearly_constant = np.concatenate([reference, 1e-4 * rng.normal(size=(500, 1))], 1)
    moved = nearly_constant + np.array([0, 0, 0, 0.002])
    assert diversity.frechet_distance(moved, nearly_constant) == pytest.approx(0.01, rel=0.05)  # (.002 / .02)^2
    few = diversity.frechet_distance(reference[:2], reference)  # rank deficient
    assert np.isfinite(few) and few > 0


def test_bad_features_are_refused():
    with pytest.raises(UserError, match="at least two rows"):
        diversity.frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(UserError, match="at least two rows"):
        diversity.frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(UserError, match="divisible by 4"):
        diversity.frechet_features(np.zeros((2, 30, 30, 3)))


def test_frechet_sees_faults_above_its_floor():
    scenes, _ = prompts.sample_batch(SMALL, 1500, 0, split="all")
    images = render.render(SMALL, scenes)
    features = diversity.frechet_features(images)
    assert features.shape == (1500, diversity.FEATURES) == (1500, 63)
    reference, sample = features[500:], images[:500]
    order = np.random.default_rng(0).permutation(len(reference))
    floor = diversity.frechet_distance(reference[order[:500]], reference[order[500:]])  # of a perfect sampler
    distance = lambda x: diversity.frechet_distance(diversity.frechet_features(x), reference)
    assert distance(sample) < 2 * floor
    assert distance(ndimage.gaussian_filter(sample, (0, 0.8, 0.8, 0))) > 4 * floor
    noisy = np.clip(sample + np.random.default_rng(0).normal(size=sample.shape) * 8 / 255, 0, 1)
    assert distance(noisy) > 8 * floor
    black = [dataclasses.replace(scene, background="black") for scene in scenes[:500]]
    assert distance(render.render(SMALL, black)) > 15 * floor
