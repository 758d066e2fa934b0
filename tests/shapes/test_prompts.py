"""Records, the compositional split, scenes for records, captions."""

import math

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.shapes import prompts
from dmdr_jax.shapes.verifier import Detection, strict_verdict
from dmdr_jax.shapes.world import LARGE, SMALL

BOTH = pytest.mark.parametrize("world", [SMALL, LARGE], ids=lambda world: world.name)


def as_seen(scene):
    """The scene as an errorless detector would report it."""
    return [Detection(obj.shape, obj.color, obj.box, 80, 1.0, 0.2) for obj in scene.objects]


def record_of(world, prompt):
    (record,) = [r for tag in prompts.TAGS for r in prompts.all_records(world, tag) if r["prompt"] == prompt]
    return record


def test_records_have_genevals_fields():
    assert prompts.position("circle", "left of", "square") == {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        "exclude": [],
        "prompt": "a circle left of a square",
    }
    assert prompts.counting("cross", 2) == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "two crosses",
    }
    assert prompts.colors("orange", "star")["prompt"] == "an orange star"
    attr = prompts.color_attr(("red", "circle"), ("blue", "square"))
    assert attr["prompt"] == "a red circle and a blue square"
    assert attr["include"][1] == {"class": "square", "count": 1, "color": "blue"}


def test_number_of_distinct_prompts():
    counts = {tag: len({r["prompt"] for r in prompts.all_records(SMALL, tag)}) for tag in prompts.TAGS}
    assert counts == {
        "single_object": 4, "two_object": 12, "counting": 4, "colors": 16, "position": 48, "color_attr": 144
    }  # fmt: skip
    assert [len(prompts.all_records(LARGE, tag)) for tag in prompts.TAGS] == [8, 56, 24, 64, 224, 3136]
    with pytest.raises(UserError, match="unknown tag"):
        prompts.all_records(SMALL, "texture")


@BOTH
def test_about_a_fifth_is_held_out_and_every_part_is_trained(world):
    train = set(prompts.balanced_train_prompts(world))
    for tag in prompts.TAGS:
        seen = [record for record in prompts.all_records(world, tag) if record["prompt"] in train]
        share = 1 - len(seen) / len(prompts.all_records(world, tag))
        assert share == 0 if tag not in prompts.HELD_OUT_TAGS else 0.1 < share < 0.25
        words = {word for record in seen for word in record["prompt"].split()}
        assert words == {word for r in prompts.all_records(world, tag) for word in r["prompt"].split()}


@BOTH
def test_both_wordings_of_a_scene_are_on_the_same_side(world):
    side = lambda record: prompts.is_held_out(world, record)
    for a, b in [("circle", "square"), ("triangle", "cross"), ("square", "triangle")]:
        assert side(prompts.two_object(a, b)) == side(prompts.two_object(b, a))
        assert side(prompts.position(a, "left of", b)) == side(prompts.position(b, "right of", a))
        assert side(prompts.position(a, "above", b)) == side(prompts.position(b, "below", a))
        for ca, cb in [("red", "blue"), ("green", "yellow")]:
            assert side(prompts.color_attr((ca, a), (cb, b))) == side(prompts.color_attr((cb, b), (ca, a)))


def test_the_split_is_the_same_on_every_machine():
    held_out = sorted(k for k in prompts.held_out_compositions(SMALL) if k.startswith(("colors", "two_object")))
    assert held_out == [
        "colors: 1 green cross",
        "colors: 1 green triangle",
        "colors: 1 yellow cross",
        "two_object: 1  square + 1  triangle",
    ]


def test_eval_records_are_held_out_where_possible():
    records = prompts.eval_records(SMALL, 20, seed=1)
    assert [r["tag"] for r in records] == [tag for tag in prompts.TAGS for _ in range(20)]
    assert len({r["id"] for r in records}) == len({r["scene_seed"] for r in records}) == 120
    trained = set(prompts.balanced_train_prompts(SMALL))
    for record in records:
        assert record["split"] == ("held_out" if record["tag"] in prompts.HELD_OUT_TAGS else "seen")
        assert (record["prompt"] in trained) == (record["split"] == "seen")
    attr = [r["prompt"] for r in records if r["tag"] == "color_attr"]
    assert len(set(attr)) == 20  # 28 exist: no repeats
    assert records == prompts.eval_records(SMALL, 20, seed=1) != prompts.eval_records(SMALL, 20, seed=2)


def test_vocabulary():
    words = prompts.vocabulary(SMALL)
    assert len(words) == 20 and {"a", "two", "crosses", "left", "of"} <= set(words)
    assert len(prompts.vocabulary(LARGE)) < 50


@BOTH
@pytest.mark.parametrize("tag", prompts.TAGS)
def test_sampled_scenes_satisfy_their_record(world, tag):
    rng = np.random.default_rng(0)
    for record in prompts.sample_records(world, 60, rng, "all", {tag: 1.0}):
        scene = prompts.sample_scene(world, record, rng)
        assert strict_verdict(as_seen(scene), record), (record["prompt"], scene)
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + world.min_gap


def test_nuisance_attributes_are_uniform():
    rng = np.random.default_rng(0)
    scenes = [prompts.sample_scene(SMALL, prompts.single_object("cross"), rng) for _ in range(1200)]
    for values, kinds in (
        ([s.background for s in scenes], 3),
        ([s.objects[0].color for s in scenes], 4),
        ([s.objects[0].radius for s in scenes], 2),
        ([s.objects[0].x for s in scenes], 5),
        ([s.objects[0].y for s in scenes], 5),
    ):
        _, counts = np.unique(values, return_counts=True)
        expected = 1200 / kinds
        assert len(counts) == kinds
        assert ((counts - expected) ** 2 / expected).sum() < kinds - 1 + 4.5 * math.sqrt(2 * (kinds - 1))


def test_batches_are_reproducible_and_respect_the_split():
    scenes, captions = prompts.sample_batch(SMALL, 300, 5)
    assert (scenes, captions) == prompts.sample_batch(SMALL, 300, 5)
    assert captions != prompts.sample_batch(SMALL, 300, 6)[1]
    assert set(captions) <= set(prompts.balanced_train_prompts(SMALL))
    _, held_out = prompts.sample_batch(SMALL, 300, 5, split="held_out")
    assert not set(held_out) & set(prompts.balanced_train_prompts(SMALL))
    with pytest.raises(UserError, match="unknown split"):
        prompts.sample_batch(SMALL, 3, 5, split="test")
    with pytest.raises(UserError, match="positive weight"):
        prompts.sample_batch(SMALL, 3, 5, split="held_out", tag_weights={"counting": 1.0})


def test_tags_follow_their_weights():
    rng = np.random.default_rng(0)
    tags = [record["tag"] for record in prompts.sample_records(SMALL, 4000, rng)]
    for tag, weight in prompts.TAG_WEIGHTS.items():
        assert tags.count(tag) / 4000 == pytest.approx(weight, abs=0.03)


@BOTH
def test_captions_are_true_and_complete(world):
    rng = np.random.default_rng(1)
    for record in prompts.sample_records(world, 60, rng, "all"):
        scene = prompts.sample_scene(world, record, rng)
        captions = prompts.captions_of(world, scene, train_only=False)
        assert record["prompt"] in captions and len(set(captions)) == len(captions)
        assert all(strict_verdict(as_seen(scene), record_of(world, caption)) for caption in captions)
        trained = prompts.captions_of(world, scene)
        assert set(trained) <= set(captions)
        assert not any(prompts.is_held_out(world, record_of(world, caption)) for caption in trained)
