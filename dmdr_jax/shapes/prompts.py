"""Prompts of the embedded world in GenEval's schema, their compositional split, and scenes that satisfy them.

A record is a JSON object with GenEval's fields: `tag`, `include` (list of {class, count, color?, position?: [relation,
index of the reference item]}), `exclude` (list of {class, count}) and `prompt` (Ghosh et al. 2023, "GenEval"). The six
tags are GenEval's. Evaluation records also carry `id`, `split` ("held_out" or "seen") and `scene_seed`.

The split is by composition: about a fifth of the (color, shape) pairs of `colors`, of the pairs of `two_object`, of the
relations of `position` and of the combinations of `color_attr` never occur in training. Prompts that describe the same
scenes ("a circle left of a square", "a square right of a circle"; "a and b", "b and a") fall on the same side. Each tag
is split by itself, so every part of a held-out prompt is known from other prompts. `single_object` and `counting` have
too few prompts to hold any out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.shapes.world import (
    COUNT_WORDS,
    OPPOSITE,
    POSITION_THRESHOLD,
    RELATIONS,
    Scene,
    SceneObject,
    World,
    lattice,
    position_components,
    relations_between,
)

Record = dict[str, Any]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT_TAGS = ("two_object", "colors", "position", "color_attr")
HELD_OUT_FRACTION = 0.2

# Share of each tag in training batches: binding and relations are hardest and get most.
TAG_WEIGHTS = {
    "single_object": 0.08,
    "two_object": 0.17,
    "counting": 0.10,
    "colors": 0.15,
    "position": 0.25,
    "color_attr": 0.25,
}

# Scenes drawn for a relation clear GenEval's threshold by this much, so that a box read off pixels agrees.
_RELATION_MARGIN = 0.06
_CANDIDATES = 64  # placements tried at once
_MAX_ROUNDS = 400


# --- records -------------------------------------------------------------------------------------------------------


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(shape: str) -> str:
    """The shape's plural as captions write it."""
    return shape + ("es" if shape.endswith("s") else "s")


def _record(tag: str, include: list[dict], prompt: str, exclude: list[dict] | None = None) -> Record:
    return {"tag": tag, "include": include, "exclude": exclude or [], "prompt": prompt}


def single_object(shape: str) -> Record:
    """Record of "a circle"."""
    return _record("single_object", [{"class": shape, "count": 1}], _article(shape))


def two_object(first: str, second: str) -> Record:
    """Record of "a circle and a square"; the shapes differ."""
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _record("two_object", include, f"{_article(first)} and {_article(second)}")


def counting(shape: str, count: int) -> Record:
    """Record of "two circles"; GenEval's exclude clause forbids one more."""
    include, exclude = [{"class": shape, "count": count}], [{"class": shape, "count": count + 1}]
    return _record("counting", include, f"{COUNT_WORDS[count]} {plural(shape)}", exclude)


def colors(color: str, shape: str) -> Record:
    """Record of "a red circle"."""
    return _record("colors", [{"class": shape, "count": 1, "color": color}], _article(f"{color} {shape}"))


def position(shape: str, relation: str, reference: str) -> Record:
    """Record of "a circle left of a square"; as in GenEval the reference comes first in `include`."""
    include = [{"class": reference, "count": 1}, {"class": shape, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{_article(shape)} {relation} {_article(reference)}")


def color_attr(first: tuple[str, str], second: tuple[str, str]) -> Record:
    """Record of "a red circle and a blue square", from two (color, shape) pairs that differ in both."""
    include = [{"class": shape, "count": 1, "color": color} for color, shape in (first, second)]
    return _record("color_attr", include, f"{_article(' '.join(first))} and {_article(' '.join(second))}")


@functools.cache
def _all_records(world: World) -> dict[str, tuple[Record, ...]]:
    shape_pairs = list(itertools.permutations(world.shapes, 2))
    color_pairs = list(itertools.permutations(world.colors, 2))
    counts = [count for count in COUNT_WORDS if count <= world.max_objects]
    return {
        "single_object": tuple(map(single_object, world.shapes)),
        "two_object": tuple(two_object(a, b) for a, b in shape_pairs),
        "counting": tuple(counting(shape, count) for shape in world.shapes for count in counts),
        "colors": tuple(colors(color, shape) for color in world.colors for shape in world.shapes),
        "position": tuple(position(a, relation, b) for a, b in shape_pairs for relation in RELATIONS),
        "color_attr": tuple(
            color_attr((ca, a), (cb, b)) for (a, b), (ca, cb) in itertools.product(shape_pairs, color_pairs)
        ),
    }


def all_records(world: World, tag: str) -> tuple[Record, ...]:
    """Every distinct record of a tag, in a fixed order. Raises UserError for an unknown tag."""
    if tag not in TAGS:
        raise UserError(f"unknown tag {tag!r}; choose one of: {', '.join(TAGS)}")
    return _all_records(world)[tag]


# --- the split -----------------------------------------------------------------------------------------------------


def composition(record: Record) -> str:
    """What a record is about, the same string for every wording of the same scenes."""
    items = record["include"]
    if record["tag"] == "position":
        (relation, reference), shape = items[1]["position"], items[1]["class"]
        ends = (shape, items[reference]["class"])
        if relation in ("right of", "below"):
            relation, ends = OPPOSITE[relation], ends[::-1]
        return f"position: {ends[0]} {relation} {ends[1]}"
    parts = sorted(f"{item['count']} {item.get('color', '')} {item['class']}" for item in items)
    return f"{record['tag']}: {' + '.join(parts)}"


def _stable_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@functools.cache
def held_out_compositions(world: World) -> frozenset[str]:
    """Compositions that never occur in training: of each split tag the fifth with the smallest hashes."""
    held_out: set[str] = set()
    for tag in HELD_OUT_TAGS:
        keys = sorted({composition(record) for record in all_records(world, tag)}, key=_stable_hash)
        held_out.update(keys[: max(1, round(HELD_OUT_FRACTION * len(keys)))])
    return frozenset(held_out)


def is_held_out(world: World, record: Record) -> bool:
    """Whether the record belongs to the evaluation side of the compositional split."""
    return composition(record) in held_out_compositions(world)


@functools.cache
def _split_records(world: World, tag: str, held_out: bool) -> tuple[Record, ...]:
    return tuple(record for record in all_records(world, tag) if is_held_out(world, record) == held_out)


@functools.cache
def _held_out_prompts(world: World) -> frozenset[str]:
    return frozenset(record["prompt"] for tag in HELD_OUT_TAGS for record in _split_records(world, tag, True))


def balanced_train_prompts(world: World) -> list[str]:
    """The training prompts, each repeated so that all tags have about equally many: the mixture evaluation scores."""
    by_tag = [[record["prompt"] for record in _split_records(world, tag, False)] for tag in TAGS]
    most = max(map(len, by_tag))
    return [prompt for prompts in by_tag for prompt in prompts * max(1, round(most / len(prompts)))]


def eval_records(world: World, per_tag: int, seed: int = 0) -> list[Record]:
    """Evaluation records, `per_tag` of each tag in the order of TAGS.

    Held-out records where a tag has them, otherwise seen ones; both are shuffled by `seed` and repeated, with a new
    `scene_seed`, where fewer than `per_tag` exist.

    Returns:
      Copies of the records with `id` (unique), `split` ("held_out" or "seen") and `scene_seed`.
    """
    rng = np.random.default_rng(seed)
    records = []
    for tag in TAGS:
        held_out = tag in HELD_OUT_TAGS
        pool = _split_records(world, tag, held_out)
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-per_tag // len(pool)))])[:per_tag]
        for number, index in enumerate(order):
            extra = {
                "id": f"{tag}-{number:03d}",
                "split": "held_out" if held_out else "seen",
                "scene_seed": int(rng.integers(2**31)),
            }
            records.append({**pool[index], **extra})
    return records


def vocabulary(world: World) -> list[str]:
    """Every word that occurs in the world's prompts, sorted."""
    return sorted({word for tag in TAGS for record in all_records(world, tag) for word in record["prompt"].split()})


# --- scenes --------------------------------------------------------------------------------------------------------


def sample_scene(world: World, record: Record, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies `record` exactly; whatever the record leaves open is uniform."""
    items = [(index, item) for index, item in enumerate(record["include"]) for _ in range(item["count"])]
    shapes = [item["class"] for _, item in items]
    # One draw of many bits is several times faster than one generator call per attribute.
    draws = rng.random(2 * len(items) + 1)
    names = [
        item.get("color") or world.colors[int(draw * len(world.colors))] for (_, item), draw in zip(items, draws[1:])
    ]
    allowed = world.radii_for(len(items))
    radii = [allowed[int(draw * len(allowed))] for draw in draws[1 + len(items) :]]
    wanted = [
        (a, b, RELATIONS.index(item["position"][0]))
        for a, (_, item) in enumerate(items)
        if "position" in item
        for b, (index, _) in enumerate(items)
        if index == item["position"][1]
    ]
    centers = _place(world, shapes, radii, wanted, rng)
    objects = tuple(
        SceneObject(shape, color, x, y, radius)
        for shape, color, (x, y), radius in zip(shapes, names, centers.tolist(), radii)
    )
    return Scene(objects, world.backgrounds[int(draws[0] * len(world.backgrounds))])


def _place(world: World, shapes, radii, wanted, rng: np.random.Generator) -> np.ndarray:
    """Uniform lattice centres [n, 2] that keep the gap and satisfy the wanted (a, b, relation index) triples."""
    n = len(shapes)
    lattices = [lattice(world, radius) for radius in radii]
    if n == 1:
        return lattices[0][rng.integers(len(lattices[0]), size=(1, 2))]
    for _ in range(_MAX_ROUNDS):
        draws = rng.random((_CANDIDATES, n, 2))
        centers = np.stack([points[(draws[:, i] * len(points)).astype(int)] for i, points in enumerate(lattices)], 1)
        good: np.ndarray = np.ones(_CANDIDATES, bool)
        for a, b in itertools.combinations(range(n), 2):
            apart = centers[:, a] - centers[:, b]
            good &= (apart * apart).sum(-1) >= (radii[a] + radii[b] + world.min_gap) ** 2
        for a, b, relation in wanted:
            boxes = [_boxes(shapes[i], radii[i], centers[:, i]) for i in (a, b)]
            good &= position_components(*boxes)[:, relation] > POSITION_THRESHOLD + _RELATION_MARGIN
        if good.any():
            return centers[good.argmax()]
    raise UserError(f"world {world.name!r} has no room for {n} objects of radii {radii}; lower radii or min_gap")


def _boxes(shape: str, radius: float, centers: np.ndarray) -> np.ndarray:
    corners = np.array(SceneObject(shape, "", 0.0, 0.0, radius).box)
    return np.concatenate([centers, centers], axis=-1) + corners


def sample_records(
    world: World,
    n: int,
    rng: np.random.Generator,
    split: str = "train",
    tag_weights: Mapping[str, float] = TAG_WEIGHTS,
) -> list[Record]:
    """`n` random records: a tag by weight, then uniform within the tag.

    Args:
      split: "train" (never a held-out composition), "held_out", or "all".
      tag_weights: relative weights; tags without records in the split are left out.
    """
    pools = {tag: _pool(world, tag, split) for tag in tag_weights}
    tags = [tag for tag in tag_weights if pools[tag] and tag_weights[tag] > 0]
    if not tags:
        raise UserError(f"no tag with records in split {split!r} has a positive weight")
    weights = np.array([tag_weights[tag] for tag in tags], np.float64)
    chosen = rng.choice(len(tags), size=n, p=weights / weights.sum())
    draws = rng.random(n)
    return [pools[tags[t]][int(draw * len(pools[tags[t]]))] for t, draw in zip(chosen, draws)]


def _pool(world: World, tag: str, split: str) -> tuple[Record, ...]:
    if split == "all":
        return all_records(world, tag)
    if split not in ("train", "held_out"):
        raise UserError(f"unknown split {split!r}; choose train, held_out or all")
    return _split_records(world, tag, split == "held_out")


def sample_batch(
    world: World,
    n: int,
    seed: int | np.random.Generator,
    split: str = "train",
    tag_weights: Mapping[str, float] = TAG_WEIGHTS,
) -> tuple[list[Scene], list[str]]:
    """`n` random (scene, caption) pairs; the same integer seed gives the same pairs."""
    rng = np.random.default_rng(seed)
    records = sample_records(world, n, rng, split, tag_weights)
    return [sample_scene(world, record, rng) for record in records], [record["prompt"] for record in records]


# --- captions for contrastive training -----------------------------------------------------------------------------


def captions_of(world: World, scene: Scene, train_only: bool = True) -> list[str]:
    """Every prompt of the world that describes the scene exactly (strict verdict).

    Args:
      train_only: leave out the held-out compositions.
    """
    objects = scene.objects
    if len(objects) == 1:
        (only,) = objects
        records = [single_object(only.shape), colors(only.color, only.shape)]
    elif len({obj.shape for obj in objects}) == 1:
        records = [counting(objects[0].shape, len(objects))]
    elif len(objects) == 2:
        records = [record for a, b in (objects, objects[::-1]) for record in _pair_records(a, b)]
    else:
        records = []
    excluded = _held_out_prompts(world) if train_only else frozenset()
    return [record["prompt"] for record in records if record["prompt"] not in excluded]


def _pair_records(a: SceneObject, b: SceneObject) -> list[Record]:
    """Records that name object `a` first and hold for two objects of different shapes."""
    records = [two_object(a.shape, b.shape)]
    records += [position(a.shape, relation, b.shape) for relation in sorted(relations_between(a.box, b.box))]
    if a.color != b.color:
        records.append(color_attr((a.color, a.shape), (b.color, b.shape)))
    return records


def rich_caption(world: World, scene: Scene, rng: np.random.Generator) -> str:
    """A description of the scene in freer wording than the prompts', in the same words.

    Colours are named or not, object by object, with "and" or with a relation that holds: "a red circle left of a
    square", "two blue crosses". A few hundred prompts can be learned by heart, and then nothing new is understood;
    these wordings have to be read. No held-out composition occurs in them.
    """
    objects = list(scene.objects)
    if len(objects) == 1 or len(objects) > 2:
        return str(rng.choice(captions_of(world, scene) or [""]))
    a, b = (objects[i] for i in rng.permutation(2))
    if a.shape == b.shape and a.color == b.color:
        return f"two {a.color} {plural(a.shape)}"
    held_out = held_out_compositions(world)
    names = [obj.shape if rng.random() < 0.35 else f"{obj.color} {obj.shape}" for obj in (a, b)]
    if a.shape != b.shape and composition(color_attr((a.color, a.shape), (b.color, b.shape))) in held_out:
        names[rng.integers(2)] = None  # one colour at most
        names = [name or obj.shape for name, obj in zip(names, (a, b))]
    joints = ["and"]
    if a.shape != b.shape:
        relations = sorted(relations_between(a.box, b.box))
        allowed = [r for r in relations if composition(position(a.shape, r, b.shape)) not in held_out]
        joints += allowed * 2
    joint = str(rng.choice(joints))
    if joint == "and" and names == [a.shape, b.shape]:
        names[0] = f"{a.color} {a.shape}"
    return f"{_article(names[0])} {joint} {_article(names[1])}"
