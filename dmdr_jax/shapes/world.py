"""The embedded world: what a scene is made of, and which scenes exist.

A `World` is a small, fully specified universe of flat shapes on a flat background. Everything else (renderer, prompts,
verifier, metrics) is a function of it, so a larger world is another instance and no other code.

Coordinates are in pixels with the origin at the image's top-left *edge*, x to the right and y down: the centre of pixel
(row i, column j) is (j + .5, i + .5). Centres lie on a lattice whose offset from the pixel grid is fixed; at these
sizes that keeps every clean scene readable without error.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from dmdr_jax.errors import UserError

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}

PALETTE = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 210, 40),
    "purple": (140, 70, 190),
    "orange": (255, 127, 14),
    "cyan": (40, 200, 210),
    "pink": (240, 120, 190),
}
BACKGROUND_PALETTE = {
    "black": (18, 18, 20),
    "white": (242, 242, 240),
    "gray": (128, 128, 130),
    "beige": (222, 212, 188),
}

# Half-width and top/bottom of each unit-radius shape about its centre: (half width, top, bottom), y down.
EXTENTS = {
    "circle": (1.0, -1.0, 1.0),
    "square": (0.886, -0.886, 0.886),
    "triangle": (1.04, -1.0, 0.8),
    "diamond": (1.2, -1.2, 1.2),
    "cross": (1.05, -1.05, 1.05),
    "star": (1.1413, -1.2, 0.9708),
    "ring": (1.05, -1.05, 1.05),
    "heart": (0.99, -0.944, 1.0),
}

POSITION_SHRINK = 0.1  # GenEval: part of the two sizes taken off the centre offset on each axis
POSITION_THRESHOLD = 0.5  # GenEval: a relation holds when its component of the unit offset exceeds this


@dataclasses.dataclass(frozen=True)
class World:
    """A closed set of scenes.

    Attributes:
      name: the registry's key.
      size: image height and width, pixels.
      shapes, colors, backgrounds: the names in use; keys of EXTENTS, PALETTE and BACKGROUND_PALETTE.
      radii: the possible radii, pixels.
      lattice_origin, lattice_step: centres lie at origin + k * step on both axes, pixels.
      max_objects: most objects in one scene.
      min_gap: least distance between the nominal circles of two objects, pixels.
      margin: least distance between an object and the image's edge, pixels.
      crowded_radius: largest radius in scenes of three or more objects, pixels.
    """

    name: str
    size: int
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    backgrounds: tuple[str, ...]
    radii: tuple[float, ...]
    lattice_origin: float
    lattice_step: float
    max_objects: int
    min_gap: float
    margin: float = 1.0
    crowded_radius: float = float("inf")

    def __post_init__(self):
        for kind, names, known in (
            ("shape", self.shapes, EXTENTS),
            ("color", self.colors, PALETTE),
            ("background", self.backgrounds, BACKGROUND_PALETTE),
        ):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise UserError(
                    f"world {self.name!r} names the unknown {kind} {unknown[0]!r}; known: {', '.join(known)}"
                )

    @property
    def reach(self) -> float:
        """Largest extent of any of the world's shapes along an axis, in radii."""
        return max(abs(extent) for shape in self.shapes for extent in EXTENTS[shape])

    def radii_for(self, count: int) -> tuple[float, ...]:
        """Radii allowed in a scene of `count` objects."""
        return self.radii if count < 3 else tuple(r for r in self.radii if r <= self.crowded_radius)


@dataclasses.dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its names, its centre (x, y) and its radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (left, top, right, bottom), pixels."""
        half_width, top, bottom = EXTENTS[self.shape]
        r = self.radius
        return self.x - half_width * r, self.y + top * r, self.x + half_width * r, self.y + bottom * r


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Objects, drawn in order, on a flat background."""

    objects: tuple[SceneObject, ...]
    background: str


SMALL = World(
    name="small",
    size=32,
    shapes=("circle", "square", "triangle", "cross"),
    colors=("red", "green", "blue", "yellow"),
    backgrounds=("black", "white", "gray"),
    radii=(5.0, 5.8),
    lattice_origin=7.5,
    lattice_step=4.0,
    max_objects=2,
    min_gap=2.0,
)

LARGE = World(
    name="large",
    size=64,
    shapes=tuple(EXTENTS),
    colors=tuple(PALETTE),
    backgrounds=tuple(BACKGROUND_PALETTE),
    radii=(7.0, 8.0, 9.0, 10.0),
    lattice_origin=7.5,
    lattice_step=4.0,
    max_objects=4,
    min_gap=7.0,  # corners of squares and triangles reach beyond the nominal circles
    crowded_radius=8.0,
)

WORLDS = {world.name: world for world in (SMALL, LARGE)}


def get_world(name: str) -> World:
    """The registered world called `name`. Raises UserError for an unknown name."""
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}; choose one of: {', '.join(WORLDS)}")
    return WORLDS[name]


@functools.cache
def lattice(world: World, radius: float) -> np.ndarray:
    """Lattice coordinates (one axis, pixels, increasing) at which an object of `radius` fits whatever its shape."""
    reach = world.reach * radius + world.margin
    count = int(world.size / world.lattice_step) + 1
    points = world.lattice_origin + world.lattice_step * np.arange(count)
    return points[(points >= reach) & (points <= world.size - reach)]


def position_components(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """GenEval's position measure of `a` relative to `b`.

    The offset between the box centres is shrunk towards zero on each axis by POSITION_SHRINK times the sum of the two
    sizes and divided by the length of the unshrunk offset. A relation holds when its component is beyond
    POSITION_THRESHOLD, so a diagonal pair can satisfy two.

    Args:
      boxes_a, boxes_b: [..., 4] (left, top, right, bottom), pixels.
    Returns:
      [..., 4] signed components in the order of RELATIONS; larger is more so.
    """
    boxes_a, boxes_b = np.asarray(boxes_a, np.float64), np.asarray(boxes_b, np.float64)
    offset = (boxes_a[..., :2] + boxes_a[..., 2:] - boxes_b[..., :2] - boxes_b[..., 2:]) / 2
    sizes = boxes_a[..., 2:] - boxes_a[..., :2] + boxes_b[..., 2:] - boxes_b[..., :2]
    shrunk = np.maximum(np.abs(offset) - POSITION_SHRINK * sizes, 0) * np.sign(offset)
    length = np.linalg.norm(offset, axis=-1, keepdims=True)
    dx, dy = np.moveaxis(shrunk / np.maximum(length, 1e-9), -1, 0)
    return np.stack([-dx, dx, -dy, dy], axis=-1)


def relations_between(box_a: tuple[float, ...], box_b: tuple[float, ...]) -> set[str]:
    """Names of the relations that hold for box `a` relative to box `b`: `position_components` over the threshold.

    Plain floats, because a verdict asks for one pair at a time and arrays of two would cost more than the arithmetic.
    """
    offsets = [(box_a[i] + box_a[i + 2] - box_b[i] - box_b[i + 2]) / 2 for i in (0, 1)]
    sizes = [box_a[i + 2] - box_a[i] + box_b[i + 2] - box_b[i] for i in (0, 1)]
    length = math.hypot(*offsets)
    found = set()
    for offset, size, (before, after) in zip(offsets, sizes, (RELATIONS[:2], RELATIONS[2:])):
        if abs(offset) - POSITION_SHRINK * size > POSITION_THRESHOLD * length:
            found.add(before if offset < 0 else after)
    return found
