"""A small evaluation made by hand: real measuring and writing code over images that need no network."""

from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation import shapes_eval
from dmdr_jax.evaluation.results import Measured
from dmdr_jax.shapes.diversity import frechet_features
from dmdr_jax.shapes.prompts import TAGS, eval_records
from dmdr_jax.shapes.world import SMALL

SCORERS = ("reward/shapes_clip", "judge/shapes_judge")


def write_results(folder: Path, shares: dict[str, float], per_tag: int = 8) -> None:
    """An evaluation whose model NAME draws the share ``shares[NAME]`` of its prompts perfectly, and noise else.

    The first name is the teacher, the second the baseline.
    """
    records = eval_records(SMALL, per_tag, seed=0)
    n, rng = len(records), np.random.default_rng(0)
    perfect, rank = shapes_eval.floor_renders(SMALL, records), rng.permutation(n) / n
    static = rng.random(perfect.shape, np.float32)
    pictures = {k: np.where((rank < share)[:, None, None, None], perfect, static) for k, share in shares.items()}
    references = {"renders": shapes_eval.reference_features(SMALL, records)}
    names = list(pictures)
    measured = {}
    for name, images in pictures.items():
        seen = shapes_eval.measure(SMALL, images, records, references)
        scores = dict.fromkeys(SCORERS, seen.per_image["partial"] * 0.1)
        measured[name] = Measured(seen.per_image | scores, seen.statistics)
        references.setdefault("teacher", frechet_features(images))
    units, subsets = np.array([r["prompt"] for r in records]), shapes_eval.subsets(records)
    rows = [_row(name, measured, names[:2], units, subsets) for name in names]
    results = {
        "title": "Evaluation",
        "caption": "Made by hand: `renders` are perfect.",
        "command": "python -m dmdr_jax.evaluate --out evaluation",
        "settings": {"seed": 0},
        "environment": {"versions": {"jax": "1"}},
        "seconds": 1.0,
        "columns": files.columns(TAGS, SCORERS, in_world=True),
        "compared_with": names[:2],
        "prompts": records,
        "models": rows,
        "floor": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder, results)
    stored = {f"model_{i}": np.round(images * 255).astype(np.uint8) for i, images in enumerate(pictures.values())}
    np.savez_compressed(folder / files.IMAGES_FILE, index=np.arange(n), **stored)


def _row(name: str, measured: dict[str, Measured], references: list[str], units: Any, subsets: Any) -> dict[str, Any]:
    own = measured[name]
    return {
        "name": name,
        "path": name,
        "trained_steps": None,
        "grid": [1.0, 0.5, 0.0],
        "kernel": "ode",
        "guidance": 1.0,
        "nfe": 2,
        "images_per_second": 12.3,
        "summary": files.summarise(own, units, subsets),
        "differences": {o: files.compare(own, measured[o], units, subsets) for o in references if o != name},
        "images": [dict(zip(own.per_image, values)) for values in zip(*own.per_image.values())],
    }
