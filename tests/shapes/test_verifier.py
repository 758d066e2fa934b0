"""The verifier: exact on clean scenes, graceful on bad ones, GenEval's rules on hand-made detections."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from dmdr_jax.errors import UserError
from dmdr_jax.shapes import prompts, render, verifier
from dmdr_jax.shapes.verifier import Detection, lenient_verdict, partial_verdict, strict_verdict
from dmdr_jax.shapes.world import LARGE, SMALL, Scene, SceneObject


def drawn(world, n, seed, tag_weights=prompts.TAG_WEIGHTS):
    rng = np.random.default_rng(seed)
    records = prompts.sample_records(world, n, rng, "all", tag_weights)
    scenes = [prompts.sample_scene(world, record, rng) for record in records]
    return records, scenes, render.render(world, scenes)


def thing(shape, color="red", x=5.0, y=5.0, iou=0.9, side=10.0):
    return Detection(shape, color, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), 80, iou, 0.1)


# --- clean scenes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", prompts.TAGS)
def test_clean_scenes_are_read_without_error(tag):
    records, scenes, images = drawn(SMALL, 200, 0, {tag: 1.0})
    verdicts = verifier.judge(SMALL, np.rint(images * 255).astype(np.uint8), records)
    assert verdicts.lenient.all() and verdicts.strict.all() and (verdicts.partial == 1).all()
    assert (verdicts.junk_fraction == 0).all()
    for scene, found, background in zip(scenes, verdicts.detections.objects, verdicts.background):
        assert SMALL.backgrounds[background] == scene.background
        assert sorted((o.shape, o.color) for o in scene.objects) == sorted((d.shape, d.color) for d in found)
        for d in found:
            (same,) = [o for o in scene.objects if abs(o.x - (d.box[0] + d.box[2]) / 2) <= 1.5 and
                       abs(o.y - (d.box[1] + d.box[3]) / 2) <= 1.5]  # fmt: skip
            np.testing.assert_allclose(d.box, same.box, atol=1.0)


def test_clean_scenes_of_the_large_world():
    records, _, images = drawn(LARGE, 80, 1)
    verdicts = verifier.judge(LARGE, images, records)
    assert verdicts.strict.all()
    assert verdicts.summary()["junk_fraction"] == 0


def test_objects_off_the_lattice_are_still_read():
    records, scenes, _ = drawn(SMALL, 300, 2)
    rng = np.random.default_rng(0)

    def nudged(obj):
        dx, dy, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(5.0, 5.8)
        return SceneObject(obj.shape, obj.color, obj.x + dx, obj.y + dy, radius)

    moved = [Scene(tuple(map(nudged, scene.objects)), scene.background) for scene in scenes]
    assert verifier.judge(SMALL, render.render(SMALL, moved), records).strict.mean() > 0.99


def test_detection_does_not_depend_on_the_batch():
    _, _, images = drawn(SMALL, 9, 3)
    noisy = np.clip(images + np.random.default_rng(0).normal(size=images.shape) * 0.05, 0, 1)
    together, apart = verifier.detect(SMALL, noisy), verifier.detect(SMALL, noisy, batch=2)
    np.testing.assert_allclose(together.junk_fraction, apart.junk_fraction)
    for a, b in zip(together.objects, apart.objects):
        assert [(d.shape, d.color, d.box) for d in a] == [(d.shape, d.color, d.box) for d in b]


# --- degraded scenes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    records, scenes, images = drawn(SMALL, 180, 4, dict.fromkeys(prompts.TAGS, 1.0))
    flat = render.color_array([scene.background for scene in scenes])[:, None, None]
    return records, scenes, images, flat


def noise(level):
    return lambda images, flat, scenes: images + np.random.default_rng(0).normal(size=images.shape) * level / 255


def blur(sigma):
    return lambda images, flat, scenes: ndimage.gaussian_filter(images, (0, sigma, sigma, 0))


def opacity(share):
    return lambda images, flat, scenes: flat + share * (images - flat)


def missing(share):
    def hide(images, flat, scenes):
        images = images.copy()
        for i, scene in enumerate(scenes):
            for left, top, right, bottom in (obj.box for obj in scene.objects):
                edge = round(left + share * (right - left))
                images[i, int(top) - 1 : int(bottom) + 2, int(left) - 1 : edge] = flat[i]
        return images

    return hide


@pytest.mark.parametrize(
    ("degrade", "levels", "first", "last"),
    [
        (noise, (0, 4, 8, 16, 32), 1.0, 0.0),
        (blur, (0.3, 0.5, 0.8, 1.2, 1.6), 1.0, 0.5),
        (opacity, (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), 1.0, 0.0),
        (missing, (0.0, 0.1, 0.2, 0.3, 0.5), 1.0, 0.0),
    ],
    ids=["noise", "blur", "opacity", "missing"],
)
def test_accuracy_falls_monotonically(scenes, degrade, levels, first, last):
    records, drawn_scenes, images, flat = scenes
    accuracy = []
    for level in levels:
        worse = np.clip(degrade(level)(images, flat, drawn_scenes), 0, 1)
        verdicts = verifier.judge(SMALL, worse, records)
        assert (verdicts.strict <= verdicts.strict_unguarded).all()
        assert (verdicts.strict_unguarded <= verdicts.lenient).all()
        accuracy.append(verdicts.strict.mean())
    assert accuracy[0] == first and accuracy[-1] <= last
    assert all(later <= earlier + 0.01 for earlier, later in itertools.pairwise(accuracy)), accuracy


def test_noise_is_caught_by_the_guard_not_by_the_shapes(scenes):
    records, _, images, _ = scenes
    noisy = np.clip(images + np.random.default_rng(0).normal(size=images.shape) * 24 / 255, 0, 1)
    verdicts = verifier.judge(SMALL, noisy, records)
    assert verdicts.strict_unguarded.mean() > 0.95 and verdicts.strict.mean() == 0
    assert verdicts.junk_fraction.mean() > 0.1


def test_images_of_nothing_satisfy_nothing(scenes):
    records, _, images, flat = scenes
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=images.shape), (0, 2, 2, 0))
    checker = np.indices((32, 32)).sum(0)[None, ..., None] % 2
    for empty in (
        np.broadcast_to(flat, images.shape),
        rng.random(images.shape),
        np.clip(0.5 + 0.25 * smooth / smooth.std(), 0, 1),
        np.where(checker == 1, flat, images),
    ):
        verdicts = verifier.judge(SMALL, empty, records)
        assert verdicts.strict.sum() == 0 and verdicts.lenient.mean() < 0.02


def test_collage_of_all_shapes_passes_lenient_only():
    places = ((7.5, 7.5), (23.5, 7.5), (7.5, 23.5), (23.5, 23.5))
    collage = Scene(tuple(SceneObject(s, "blue", x, y, 5.0) for s, (x, y) in zip(SMALL.shapes, places)), "gray")
    image = render.render(SMALL, [collage])
    records = [prompts.colors("blue", shape) for shape in SMALL.shapes]
    verdicts = verifier.judge(SMALL, np.repeat(image, 4, axis=0), records)
    assert verdicts.lenient.all() and not verdicts.strict.any() and (verdicts.partial == 1).all()
    assert (verdicts.objects == 4).all() and (verdicts.junk_fraction == 0).all()


def test_half_an_object_is_junk():
    scene = Scene((SceneObject("square", "red", 15.5, 15.5, 5.8),), "white")
    image = render.render(SMALL, [scene])
    image[:, :, 15:] = render.color_array(["white"])[0]
    found = verifier.detect(SMALL, image)
    assert found.objects == ((),) and found.junk_fraction[0] > verifier.JUNK_LIMIT


def test_background_is_unknown_when_it_is_no_background_of_the_world():
    images = np.zeros((2, 32, 32, 3), np.float32)
    images[0], images[1] = (0.9, 0.3, 0.7), render.color_array(["gray"])[0] + 0.03
    assert verifier.detect(SMALL, images).background.tolist() == [-1, SMALL.backgrounds.index("gray")]


def test_bad_images_are_refused():
    with pytest.raises(UserError, match=r"reads images \[n, 32, 32, 3\]"):
        verifier.detect(SMALL, np.zeros((2, 64, 64, 3)))
    with pytest.raises(UserError, match="not finite"):
        verifier.detect(SMALL, np.full((1, 32, 32, 3), np.nan))
    with pytest.raises(UserError, match="one record per image"):
        verifier.judge(SMALL, np.zeros((2, 32, 32, 3)), [prompts.single_object("circle")])
    assert verifier.judge(SMALL, np.zeros((0, 32, 32, 3)), []).strict.shape == (0,)


# --- verdicts on hand-made detections ------------------------------------------------------------------------------


def test_single_and_two_objects():
    record = prompts.two_object("circle", "square")
    assert lenient_verdict([thing("circle"), thing("square")], record)
    assert not lenient_verdict([thing("circle"), thing("circle")], record)
    crowd = [thing("circle"), thing("square"), thing("cross")]
    assert lenient_verdict(crowd, record) and not strict_verdict(crowd, record)
    assert partial_verdict([thing("circle")], record) == 0.5
    assert partial_verdict([thing("circle")] * 2, record) == 0  # one too many of one, none of the other


def test_counting_has_an_exclude_clause():
    record = prompts.counting("circle", 2)
    verdicts = [lenient_verdict([thing("circle")] * n, record) for n in range(4)]
    assert verdicts == [False, False, True, False]
    assert lenient_verdict([thing("circle")] * 2 + [thing("cross")], record)
    assert [partial_verdict([thing("circle")] * n, record) for n in range(6)] == [0, 0.5, 1, 0.5, 0, 0]


def test_color_is_that_of_the_most_confident_objects():
    record = prompts.colors("red", "circle")
    surer, less_sure = thing("circle", "blue", iou=0.95), thing("circle", "red", iou=0.9)
    assert lenient_verdict([less_sure], record)
    assert not lenient_verdict([surer, less_sure], record)
    assert partial_verdict([surer], record) == 0.5


def test_color_attr_binds_colors_to_shapes():
    record = prompts.color_attr(("red", "circle"), ("blue", "square"))
    assert strict_verdict([thing("square", "blue"), thing("circle", "red")], record)
    assert not lenient_verdict([thing("square", "red"), thing("circle", "blue")], record)
    assert partial_verdict([thing("square", "red"), thing("circle", "blue")], record) == 0.5


def test_position_wants_every_pair_and_allows_diagonals():
    record = prompts.position("circle", "left of", "square")
    square = thing("square", x=20.0)
    assert strict_verdict([thing("circle", x=5.0), square], record)
    assert not lenient_verdict([thing("circle", x=35.0), square], record)
    assert strict_verdict([thing("circle", x=6.0, y=19.0), square], record)  # (14 - 2) / 19.8 > .5
    assert not lenient_verdict([thing("circle", x=16.0, y=20.0), square], record)
    assert not lenient_verdict([thing("circle", x=5.0)], record)
    assert partial_verdict([thing("circle", x=35.0), square], record) == pytest.approx(2 / 3)
    assert partial_verdict([thing("circle")], record) == pytest.approx(1 / 3)


def test_failed_reference_fails_the_relation():
    record = {
        "include": [
            {"class": "square", "count": 1, "color": "red"},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ],
    }
    assert not lenient_verdict([thing("circle", x=5.0), thing("square", "blue", x=20.0)], record)
    assert lenient_verdict([thing("circle", x=5.0), thing("square", "red", x=20.0)], record)
