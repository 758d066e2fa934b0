"""The embedded world and its renderer."""

import dataclasses
import hashlib

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.shapes import prompts, render
from dmdr_jax.shapes.world import (
    EXTENTS,
    LARGE,
    RELATIONS,
    SMALL,
    Scene,
    SceneObject,
    get_world,
    lattice,
    position_components,
    relations_between,
)

# Changes only when the renderer, the palette or the sampler changes on purpose; trained folders depend on all three.
REFERENCE_DIGEST = "3a86a204f51b7327"


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown world 'huge'"):
        get_world("huge")
    with pytest.raises(UserError, match="unknown shape 'blob'"):
        dataclasses.replace(SMALL, shapes=("circle", "blob"))


@pytest.mark.parametrize("shape", EXTENTS)
def test_extents_are_those_of_the_inside_test(shape):
    points = np.linspace(-1.4, 1.4, 1401)
    hits = render.inside(shape, points[None, :], points[:, None])
    columns, rows = points[hits.any(0)], points[hits.any(1)]
    half_width, top, bottom = EXTENTS[shape]
    np.testing.assert_allclose([columns[-1], -columns[0]], half_width, atol=0.006)
    np.testing.assert_allclose([rows[0], rows[-1]], [top, bottom], atol=0.006)


@pytest.mark.parametrize("world", [SMALL, LARGE], ids=lambda world: world.name)
def test_every_lattice_position_keeps_the_margin(world):
    for radius in world.radii:
        points = lattice(world, radius)
        assert len(points) >= 5
        assert points[0] - world.reach * radius >= world.margin
        assert points[-1] + world.reach * radius <= world.size - world.margin


def test_area_and_colors_of_one_object():
    scene = Scene((SceneObject("circle", "red", 15.5, 11.5, 5.8),), "white")
    image = render.render(SMALL, [scene])[0]
    red, white = render.color_array(["red"])[0], render.color_array(["white"])[0]
    np.testing.assert_allclose(image[11, 15], red, atol=1e-6)
    np.testing.assert_allclose(image[31, 0], white, atol=1e-6)
    coverage = (image - white) @ (red - white) / ((red - white) @ (red - white))
    assert coverage.sum() == pytest.approx(np.pi * 5.8**2, rel=0.01)
    rows = np.arange(32) + 0.5
    assert (coverage.sum(1) @ rows) / coverage.sum() == pytest.approx(11.5, abs=1e-3)
    assert (coverage.sum(0) @ rows) / coverage.sum() == pytest.approx(15.5, abs=1e-3)


def test_later_objects_are_in_front_and_objects_may_leave_the_image():
    back, front = SceneObject("square", "blue", 15.5, 15.5, 5.8), SceneObject("circle", "yellow", 15.5, 15.5, 5.0)
    outside = SceneObject("circle", "red", 0.5, 31.5, 5.0)
    image = render.render(SMALL, [Scene((back, front, outside), "black"), Scene((), "gray")])
    np.testing.assert_allclose(image[0, 15, 15], render.color_array(["yellow"])[0], atol=1e-6)
    np.testing.assert_allclose(image[0, 31, 0], render.color_array(["red"])[0], atol=1e-6)
    np.testing.assert_allclose(image[1], np.broadcast_to(render.color_array(["gray"])[0], (32, 32, 3)), atol=1e-6)


def test_rendering_does_not_depend_on_the_batch():
    scenes, _ = prompts.sample_batch(LARGE, 12, 3, split="all")
    together = render.render(LARGE, scenes)
    assert together.shape == (12, 64, 64, 3) and together.dtype == np.float32
    np.testing.assert_array_equal(together[7:8], render.render(LARGE, scenes[7:8]))


def test_reference_renders_are_unchanged():
    scenes, _ = prompts.sample_batch(SMALL, 64, 2024, split="all")
    # Coverage is in sixteenths, so a rounding offset of 1/64 keeps every pixel off the ties.
    pixels = np.floor(render.render(SMALL, scenes) * 255 + 0.5 + 1 / 64).astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == REFERENCE_DIGEST


def test_oklab_of_known_colors():
    # White, and Ottosson's published values of the sRGB primaries.
    lab = render.oklab(np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    expected = [[1, 0, 0], [0.62796, 0.22486, 0.12585], [0.86644, -0.23389, 0.1795], [0.45201, -0.03246, -0.31153]]
    np.testing.assert_allclose(lab[:4], expected, atol=2e-4)
    np.testing.assert_allclose(lab[4], 0, atol=1e-6)
    assert render.chroma(lab[1]) == pytest.approx(np.hypot(0.22486, 0.12585), abs=2e-4)


def test_relations_follow_genevals_rule():
    box = (0.0, 0.0, 10.0, 10.0)
    shift = lambda dx, dy: (dx, dy, 10 + dx, 10 + dy)
    assert relations_between(box, shift(20, 0)) == {"left of"}
    assert relations_between(shift(20, 0), box) == {"right of"}
    assert relations_between(box, shift(0, 20)) == {"above"}
    assert relations_between(shift(14, 14), box) == {"right of", "below"}  # (14 - 2) / 19.8 = .61
    assert relations_between(shift(9, 9), box) == {"right of", "below"}  # (9 - 2) / 12.7 = .55
    assert relations_between(shift(6, 6), box) == set()  # (6 - 2) / 8.5 = .47
    assert relations_between(box, box) == set()


def test_array_and_scalar_relations_agree():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (200, 2, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 12, (200, 2, 2))], -1)
    components = position_components(boxes[:, 0], boxes[:, 1])
    for (a, b), row in zip(boxes, components):
        assert relations_between(a, b) == {name for name, value in zip(RELATIONS, row) if value > 0.5}
