"""What the embedded world measures on images: verdicts, diversity, distance to renders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmdr_jax.evaluation.results import Measured
from dmdr_jax.evaluation.table import Statistic
from dmdr_jax.shapes import verifier
from dmdr_jax.shapes.diversity import AttributeDiversity, attribute_diversity, frechet_distance, frechet_features
from dmdr_jax.shapes.prompts import sample_scene
from dmdr_jax.shapes.render import chroma, oklab, render
from dmdr_jax.shapes.verifier import Detections
from dmdr_jax.shapes.world import World

Record = Mapping[str, Any]

REFERENCE_COPIES = 8
"""Renders per prompt that distances are measured to."""


def renders(world: World, records: Sequence[Record], copies: Sequence[int]) -> np.ndarray:
    """Pictures that satisfy the records, ``[len(copies) * n, h, w, 3]``; copy k of a record is always the same."""
    seeds = [(dict(r), k) for k in copies for r in records]
    scenes = [sample_scene(world, r, np.random.default_rng([r["scene_seed"], k])) for r, k in seeds]
    return render(world, scenes)


def reference_features(world: World, records: Sequence[Record]) -> np.ndarray:
    """Features of the renders that stand for the data; `floor_renders` are none of them."""
    return frechet_features(renders(world, records, range(1, REFERENCE_COPIES + 1)))


def floor_renders(world: World, records: Sequence[Record]) -> np.ndarray:
    """One render per record, ``[n, h, w, 3]``: what a perfect model would draw. Its distance is the floor."""
    return renders(world, records, [0])


def measure(
    world: World, images: np.ndarray, records: Sequence[Record], references: Mapping[str, np.ndarray]
) -> Measured:
    """Everything the world says of images ``[n, h, w, 3]`` in [0, 1], drawn for the n records.

    Args:
      references: Frechet features ``[m, d]`` by name; each gives the statistic ``frechet/NAME``.
    """
    verdicts = verifier.judge(world, images, records)
    per_image = {
        "lenient": verdicts.lenient,
        "strict": verdicts.strict,
        "partial": verdicts.partial,
        "junk": verdicts.junk_fraction,
        "chroma": chroma(oklab(images)).mean((1, 2)).astype(np.float64),
    }
    features = frechet_features(images)
    statistics = {f"frechet/{name}": _distance(features, target) for name, target in references.items()}
    diversity = _diversity(world, verdicts.detections, records)
    for field in ("background_entropy", "color_entropy", "position_std"):
        statistics[field] = _field_of(diversity, field)
    return Measured(per_image, statistics)


def _field_of(f: Callable[[np.ndarray], Any], field: str) -> Statistic:
    return lambda index: getattr(f(index), field)


def _distance(features: np.ndarray, target: np.ndarray) -> Statistic:
    return _remembering(lambda index: frechet_distance(features[index], target))


def _diversity(
    world: World, detections: Detections, records: Sequence[Record]
) -> Callable[[np.ndarray], AttributeDiversity]:
    def of(index: np.ndarray) -> AttributeDiversity:
        objects = tuple(detections.objects[i] for i in index)
        chosen = Detections(objects, detections.background[index], detections.junk_fraction[index])
        return attribute_diversity(world, chosen, [records[i] for i in index])

    return _remembering(of)


def _remembering(f: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """``f``, computed once for each set of images: every comparison asks for the same few."""
    known: dict[bytes, Any] = {}

    def remembered(index: np.ndarray) -> Any:
        key = index.tobytes()
        if key not in known:
            known[key] = f(index)
        return known[key]

    return remembered


def subsets(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Indices of the images of each task, and of those whose compositions never occur in training (``unseen``)."""
    tags = np.array([record["tag"] for record in records])
    rows = {tag: np.flatnonzero(tags == tag) for tag in dict.fromkeys(tags.tolist())}
    unseen = np.array([record.get("split") == "held_out" for record in records])
    return {"unseen": np.flatnonzero(unseen), **rows}
