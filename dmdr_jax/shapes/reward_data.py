"""Images for the learned rewards: clean scenes, scenes that are nearly right, and spoilt pictures.

Each group starts from one clean scene drawn for a prompt and holds pictures a hair's breadth from
it, so that a contrastive loss has to look at what the exact verifier looks at. What is true of a
picture is never assumed from how it was made: `truth_table` asks the verifier's strict verdict for
every prompt of the world.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dmdr_jax.shapes import prompts
from dmdr_jax.shapes.render import render
from dmdr_jax.shapes.verifier import JUNK_LIMIT, Detections, detect, strict_verdict
from dmdr_jax.shapes.world import Scene, SceneObject, World, lattice

Rng = np.random.Generator

# Scenes with one thing changed, and pictures that are no scene. "clean" is the group's own scene.
SCENE_KINDS = ("recolored", "reshaped", "swapped_colors", "swapped_places", "missing", "extra", "collage")
PICTURE_KINDS = ("ghost", "half", "blend", "patchwork", "blurred", "noisy")
KINDS = ("clean", *SCENE_KINDS, *PICTURE_KINDS)

MAX_OBJECTS = 4  # remembered of a picture

_PLACE_TRIES = 40


# --- scenes with one thing changed ---------------------------------------------------------------------------------


def _replace(scene: Scene, index: int, **changes) -> Scene:
    fields = {name: getattr(scene.objects[index], name) for name in ("shape", "color", "x", "y", "radius")}
    objects = list(scene.objects)
    objects[index] = SceneObject(**{**fields, **changes})
    return Scene(tuple(objects), scene.background)


def _pick(choices: Sequence, rng: Rng, avoid: Sequence = ()):
    free = [choice for choice in choices if choice not in avoid]
    return free[rng.integers(len(free))]


def recolored(world: World, scene: Scene, rng: Rng) -> Scene:
    """One object in another color."""
    i = int(rng.integers(len(scene.objects)))
    return _replace(scene, i, color=_pick(world.colors, rng, [scene.objects[i].color]))


def reshaped(world: World, scene: Scene, rng: Rng) -> Scene:
    """One object in another shape."""
    i = int(rng.integers(len(scene.objects)))
    return _replace(scene, i, shape=_pick(world.shapes, rng, [scene.objects[i].shape]))


def swapped_colors(world: World, scene: Scene, rng: Rng) -> Scene | None:
    """The colors of the first two objects exchanged; None where they do not differ."""
    if len(scene.objects) < 2 or scene.objects[0].color == scene.objects[1].color:
        return None
    first, second = scene.objects[:2]
    return _replace(_replace(scene, 0, color=second.color), 1, color=first.color)


def swapped_places(world: World, scene: Scene, rng: Rng) -> Scene | None:
    """The first two objects exchange places (and radii, so that they fit); None where they look alike."""
    if len(scene.objects) < 2 or scene.objects[0].shape == scene.objects[1].shape:
        return None
    a, b = scene.objects[:2]
    swapped = _replace(scene, 0, x=b.x, y=b.y, radius=b.radius)
    return _replace(swapped, 1, x=a.x, y=a.y, radius=a.radius)


def missing(world: World, scene: Scene, rng: Rng) -> Scene:
    """One object taken away, which may leave nothing."""
    i = int(rng.integers(len(scene.objects)))
    return Scene(scene.objects[:i] + scene.objects[i + 1 :], scene.background)


def extra(world: World, scene: Scene, rng: Rng) -> Scene | None:
    """One object more, of any shape and color; None where it finds no place."""
    radius = float(min(world.radii))
    points = lattice(world, radius)
    for _ in range(_PLACE_TRIES):
        x, y = rng.choice(points, 2)
        if all(np.hypot(x - o.x, y - o.y) >= radius + o.radius + world.min_gap for o in scene.objects):
            new = SceneObject(_pick(world.shapes, rng), _pick(world.colors, rng), float(x), float(y), radius)
            return Scene((*scene.objects, new), scene.background)
    return None


def collage(world: World, scene: Scene, rng: Rng) -> Scene:
    """Every shape of the world at once, on a grid, in the scene's colors: it holds whatever a prompt asks for."""
    side = int(np.ceil(np.sqrt(len(world.shapes))))
    radius = float(min(world.radii))
    points = lattice(world, radius)
    places = points[np.linspace(0, len(points) - 1, side).round().astype(int)]
    colors = [o.color for o in scene.objects]
    order = rng.permutation(len(world.shapes))
    objects = [
        SceneObject(shape, colors[int(k) % len(colors)], float(places[k % side]), float(places[k // side]), radius)
        for shape, k in zip(world.shapes, order)
    ]
    return Scene(tuple(objects), scene.background)


_SCENES: dict[str, Callable[[World, Scene, Rng], Scene | None]] = {
    f.__name__: f for f in (recolored, reshaped, swapped_colors, swapped_places, missing, extra, collage)
}


def changed(world: World, scene: Scene, kind: str, rng: Rng) -> tuple[Scene, str]:
    """The scene changed as `kind` says, or recolored where that is not possible, with the kind it got."""
    result = _SCENES[kind](world, scene, rng)
    return (result, kind) if result is not None else (recolored(world, scene, rng), "recolored")


# --- pictures that are no scene ------------------------------------------------------------------------------------


def _smooth_masks(n: int, size: int, rng: Rng) -> np.ndarray:
    """Random blotches, [n, size, size, 1] in [0, 1], about half of the area each, borders a few pixels wide."""
    coarse = rng.normal(size=(n, 5, 5))
    fields = np.stack([ndimage.zoom(field, size / 5, order=1, mode="nearest", grid_mode=True) for field in coarse])
    return (1 / (1 + np.exp(-8 * fields)))[..., None]


def _half_masks(scenes: Sequence[Scene], size: int, rng: Rng) -> np.ndarray:
    """Half-planes through an object of each scene, bool [n, size, size, 1]."""
    grid = np.arange(size) + 0.5
    masks = []
    for scene in scenes:
        target = scene.objects[rng.integers(len(scene.objects))]
        angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3) * target.radius
        across = (grid[None] - target.x) * np.cos(angle) + (grid[:, None] - target.y) * np.sin(angle)
        masks.append(across > shift)
    return np.stack(masks)[..., None]


def spoilt(
    kind: str, scenes: Sequence[Scene], images: np.ndarray, emptied: np.ndarray, others: np.ndarray, rng: Rng
) -> np.ndarray:
    """Pictures between scenes, or worn ones.

    Args:
      kind: of PICTURE_KINDS: "ghost" (an object fades), "half" (part of one is cut off), "blend" and
        "patchwork" (two renders mixed evenly or in blotches, as few-step students do), "blurred", "noisy".
      scenes, images: the clean scenes and their renders [n, h, w, 3] in [0, 1].
      emptied: the same with an object missing.
      others: renders to mix with.
    """
    n, size = images.shape[:2]
    share = rng.uniform(0.3, 0.7, (n, 1, 1, 1))
    if kind == "ghost":
        return emptied + share * (images - emptied)
    if kind == "half":
        return np.where(_half_masks(scenes, size, rng), images, emptied)
    if kind == "blend":
        return others + share * (images - others)
    if kind == "patchwork":
        return others + _smooth_masks(n, size, rng) * (images - others)
    if kind == "blurred":
        sigmas = rng.uniform(1.0, 3.0, (n,))
        return np.stack([ndimage.gaussian_filter(x, (s, s, 0), mode="nearest") for x, s in zip(images, sigmas)])
    if kind == "noisy":
        return np.clip(images + rng.uniform(0.1, 0.3, (n, 1, 1, 1)) * rng.normal(size=images.shape), 0, 1)
    raise ValueError(f"unknown kind {kind!r}")


# --- truth ---------------------------------------------------------------------------------------------------------


def truth_table(world: World, detections: Detections, records: Sequence[prompts.Record]) -> np.ndarray:
    """The strict verdict of every image on every record, bool [n, len(records)]."""
    by_shapes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, record in enumerate(records):
        shapes = sorted(item["class"] for item in record["include"] for _ in range(item["count"]))
        by_shapes[tuple(shapes)].append(j)
    table = np.zeros((len(detections.objects), len(records)), bool)
    for i, found in enumerate(detections.objects):
        if detections.junk_fraction[i] < JUNK_LIMIT:
            # Only records that ask for exactly these shapes can hold.
            for j in by_shapes.get(tuple(sorted(d.shape for d in found)), ()):
                table[i, j] = strict_verdict(found, records[j])
    return table


def object_table(world: World, detections: Detections) -> np.ndarray:
    """The most confident accepted objects of every image, float32 [n, MAX_OBJECTS, 3]: class, x, y (pixels).

    A class is a (color, shape) pair, counted from 1; 0 stands for no object.
    """
    table = np.zeros((len(detections.objects), MAX_OBJECTS, 3), np.float32)
    for i, found in enumerate(detections.objects):
        for k, d in enumerate(found[:MAX_OBJECTS]):
            kind = 1 + world.colors.index(d.color) * len(world.shapes) + world.shapes.index(d.shape)
            table[i, k] = kind, (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2
    return table


# --- groups --------------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Pictures in groups; position 0 of a group is its clean scene.

    Attributes:
      images: uint8 [g, m, h, w, 3].
      kinds: int [g, m], index into KINDS.
      truth: bool [g, m, c], strict verdict on each of the world's records (`all_world_records`).
      objects: float32 [g, m, MAX_OBJECTS, 3], what the verifier sees (`object_table`).
      prompt: int [g], the record that the clean scene was drawn for.
    """

    images: np.ndarray
    kinds: np.ndarray
    truth: np.ndarray
    objects: np.ndarray
    prompt: np.ndarray


def all_world_records(world: World) -> list[prompts.Record]:
    """Every record of the world, tag by tag: the columns of a truth table."""
    return [record for tag in prompts.TAGS for record in prompts.all_records(world, tag)]


def make_groups(
    world: World,
    count: int,
    seed: int,
    split: str = "train",
    scene_kinds: Sequence[Sequence[str]] = (SCENE_KINDS,) * 3,
    picture_kinds: Sequence[Sequence[str]] = (PICTURE_KINDS,) * 4,
) -> Groups:
    """`count` groups of 1 + len(scene_kinds) + len(picture_kinds) pictures.

    Args:
      split: of the prompts that the clean scenes are drawn for ("train", "held_out", "all").
      scene_kinds, picture_kinds: per position, the kinds to choose from at random.
    """
    rng = np.random.default_rng(seed)
    columns = {record["prompt"]: j for j, record in enumerate(all_world_records(world))}
    records = prompts.sample_records(world, count, rng, split)
    scenes = [prompts.sample_scene(world, record, rng) for record in records]
    clean = render(world, scenes)
    images, kinds = [clean], [np.zeros(count, int)]
    for choice in scene_kinds:
        drawn = [changed(world, scene, _pick(choice, rng), rng) for scene in scenes]
        images.append(render(world, [scene for scene, _ in drawn]))
        kinds.append(np.array([KINDS.index(kind) for _, kind in drawn]))
    for choice in picture_kinds:
        made, kind = _spoilt_mixture(world, choice, records, scenes, clean, rng)
        images.append(made)
        kinds.append(kind)
    stacked = (np.stack(images, 1) * 255).round().astype(np.uint8)
    flat = stacked.reshape(-1, *stacked.shape[2:])
    detections = detect(world, flat)
    shape = stacked.shape[:2]
    return Groups(
        images=stacked,
        kinds=np.stack(kinds, 1),
        truth=truth_table(world, detections, all_world_records(world)).reshape(*shape, -1),
        objects=object_table(world, detections).reshape(*shape, MAX_OBJECTS, 3),
        prompt=np.array([columns[record["prompt"]] for record in records]),
    )


def _spoilt_mixture(world: World, choice, records, scenes, clean, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """One spoilt picture per scene, each of a kind drawn from `choice`: (images, kinds)."""
    emptied = render(world, [missing(world, scene, rng) for scene in scenes])
    # What a student averages is as often another picture of the same prompt as one of another prompt.
    others = [
        prompts.sample_scene(world, record, rng) if rng.random() < 0.5 else scenes[rng.integers(len(scenes))]
        for record in records
    ]
    share_ground = rng.random(len(scenes)) < 0.7
    others = [Scene(o.objects, (s if same else o).background) for o, s, same in zip(others, scenes, share_ground)]
    elsewhere = render(world, others)
    kinds = rng.choice([KINDS.index(kind) for kind in choice], len(scenes))
    images = np.empty_like(clean)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        chosen = [scenes[i] for i in rows]
        images[rows] = spoilt(KINDS[kind], chosen, clean[rows], emptied[rows], elsewhere[rows], rng)
    return images, kinds
