"""An evaluation, from its command line to its files."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmdr_jax.data.prompts import read_eval_records
from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import DEFAULT_JUDGE, DEFAULT_REWARDS
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation import shapes_eval
from dmdr_jax.evaluation.entries import Entry, draw, load_scorers, open_models, parse_entries
from dmdr_jax.evaluation.environment import command, describe_environment
from dmdr_jax.evaluation.results import Measured
from dmdr_jax.generate import Recipe, initial_noise
from dmdr_jax.model import Model
from dmdr_jax.rewards.clip_reward import ClipReward
from dmdr_jax.shapes.diversity import frechet_features
from dmdr_jax.shapes.prompts import TAGS, eval_records
from dmdr_jax.shapes.world import World, get_world
from dmdr_jax.training.preview import image_grid

DEFAULT_WORLD = "small"
FLOOR = "renders"
SEED_STRIDE = 100_000  # noise seeds between one evaluation seed and the next
GRID_IMAGES = 64


def evaluate(args: Any) -> str:
    """Runs the evaluation of the parsed command line ``args`` and writes it; returns the table."""
    started = time.time()
    entries = parse_entries(args.model, args.baseline)
    ask = Questions.make(args)
    scorers = {f"{kind}/{name}": s for kind, option in KINDS.items() for name, s in _scorers(args, option).items()}
    if ask.world is None and not scorers:
        raise UserError("--prompts without --rewards and --judge leaves nothing to measure: name at least one.")
    models = open_models(entries, args.dtype)
    recipes = [model.recipe(e.steps, e.kernel, e.guidance, ask.size(model)) for e, model in zip(entries, models)]
    if ask.world is not None:
        _check_sizes(entries, models, ask.world)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    references = {} if ask.world is None else {"renders": shapes_eval.reference_features(ask.world, ask.records)}
    measured: dict[str, Measured] = {}
    rows, pictures = [], []
    for entry, model, recipe in zip(entries, models, recipes):
        images, speed = _draw(args, ask, entry, model, recipe)
        measured[entry.name] = measure(ask, images, references, scorers)
        if ask.world is not None and "teacher" not in references:
            references["teacher"] = frechet_features(images)
        rows.append(_row(entry, model, recipe, speed))
        pictures.append(images[_kept(len(images), args.keep)])
        Image.fromarray(image_grid(images[_kept(len(images), GRID_IMAGES)])).save(out / f"{entry.name}.png")
    compared_with = list(dict.fromkeys([entries[0].name, args.baseline or entries[0].name]))
    for row in rows:
        row |= _summaries(ask, measured, row["name"], compared_with)
    _save_images(out, pictures, _kept(len(ask.records), args.keep))
    results = {
        "title": "Evaluation",
        "caption": caption(ask, args, entries[0].name),
        "command": command(),
        "settings": vars(args),
        "environment": describe_environment(),
        "seconds": round(time.time() - started, 1),
        "columns": files.columns(TAGS, list(scorers), ask.world is not None),
        "compared_with": compared_with,
        "prompts": [{**record, "noise_seed": seed} for record, seed in zip(ask.records, ask.seeds)],
        "models": rows,
        "floor": None if ask.world is None else _floor(ask, references, scorers),
    }
    files.write(out, results)
    return (out / files.TABLE_FILE).read_text(encoding="utf-8")


KINDS = {"reward": "rewards", "judge": "judge"}
"""Kinds of scorers and the options that name them."""


# --- what is asked -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Questions:
    """What every model is asked: prompts, and the noise each image starts from.

    Attributes:
      world: whose verifier judges the images; None: no verifier.
      records: one per image.
      seeds: of the noise, one per image.
    """

    world: World | None
    records: list[dict[str, Any]]
    seeds: list[int]

    @classmethod
    def make(cls, args: Any) -> "Questions":
        """From the command line; UserError where it asks for nothing or for two things."""
        if args.prompts and args.world:
            raise UserError("--prompts and --world exclude each other: a world brings its own prompts.")
        for option in ("per_tag", "per_prompt", "batch", "keep"):
            if getattr(args, option) < 1:
                raise UserError(f"--{option} must be at least 1, not {getattr(args, option)}.")
        if args.prompts:
            world, records = None, read_eval_records(args.prompts)
        else:
            world = get_world(args.world or DEFAULT_WORLD)
            records = eval_records(world, args.per_tag, args.seed)
        records = [record for record in records for _ in range(args.per_prompt)]
        return cls(world, records, [(args.seed * SEED_STRIDE + i) % 2**32 for i in range(len(records))])

    @functools.cached_property
    def prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records]

    @functools.cached_property
    def subsets(self) -> dict[str, np.ndarray]:
        return {} if self.world is None else shapes_eval.subsets(self.records)

    def size(self, model: Model) -> tuple[int, int]:
        """Image height and width, pixels."""
        return model.size if self.world is None else (self.world.size, self.world.size)


def _scorers(args: Any, option: str) -> dict[str, ClipReward]:
    default = {"rewards": DEFAULT_REWARDS, "judge": DEFAULT_JUDGE}[option]
    named = getattr(args, option) or ("none" if args.prompts else default)
    return load_scorers([] if named == "none" else named.split(","), option)


def _check_sizes(entries: list[Entry], models: list[Model], world: World) -> None:
    """UserError where a model's image size is not the world's."""
    for entry, model in zip(entries, models):
        if model.size != (world.size, world.size):
            size = " x ".join(map(str, model.size))
            raise UserError(
                f"{entry.name} draws {size} pixels and the world {world.name!r} has {world.size} x {world.size}: "
                "give --prompts FILE for models from outside it."
            )


def caption(ask: Questions, args: Any, teacher: str) -> str:
    """What the table shows, in a few sentences."""
    common = (
        f"{len(ask.records)} images per model, all models on the same prompts and the same noise (seed {args.seed}). "
        "± is one standard error, prompts being the unit where several images share one."
    )
    if ask.world is None:
        return common
    return (
        f"{common} World `{ask.world.name}`, {args.per_tag} prompts for each of six tasks. The task columns and "
        "*unseen* are strict verdicts; *unseen* holds only compositions that never occur in training, so it leaves out "
        "single object and counting, which have too few prompts to keep any apart. "
        f"`{FLOOR}` are perfect images: the ceiling of the verdicts and the floor of the Fréchet distance at this "
        f"number of images. *Fréchet to teacher* is the distance to the images of `{teacher}`; "
        "entropies, in nats, and the spread of positions, in pixels, are of what prompts leave open; *junk* is the "
        "share of the image that is neither background nor an object."
    )


# --- drawing and measuring -----------------------------------------------------------------------------------------


def _draw(args: Any, ask: Questions, entry: Entry, model: Model, recipe: Recipe) -> tuple[np.ndarray, float]:
    noise = initial_noise(model.pipeline, *ask.size(model), ask.seeds)
    with tqdm(total=len(ask.records), desc=f"{entry.name}, {recipe.nfe} NFE", unit="image") as bar:
        return draw(model, recipe, ask.prompts, noise, batch=args.batch, seed=args.seed, progress=bar.update)


def measure(
    ask: Questions, images: np.ndarray, references: Mapping[str, np.ndarray], scorers: Mapping[str, ClipReward]
) -> Measured:
    """Every measure of one model's images."""
    scores = {name: scorer.score_prompts(images, ask.prompts).astype(np.float64) for name, scorer in scorers.items()}
    if ask.world is None:
        return Measured(scores, {})
    seen = shapes_eval.measure(ask.world, images, ask.records, references)
    return Measured(seen.per_image | scores, seen.statistics)


def _row(entry: Entry, model: Model, recipe: Recipe, speed: float) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": entry.path,
        "trained_steps": (model.meta or model.pipeline.student or {}).get("step"),
        "grid": recipe.grid,
        "kernel": str(recipe.kernel),
        "guidance": recipe.guidance,
        "nfe": recipe.nfe,
        "images_per_second": speed,
    }


def _summaries(ask: Questions, measured: Mapping[str, Measured], name: str, compared_with: list[str]) -> dict[str, Any]:
    own, units = measured[name], np.array(ask.prompts)
    return {
        "summary": files.summarise(own, units, ask.subsets),
        "differences": {o: files.compare(own, measured[o], units, ask.subsets) for o in compared_with if o != name},
        "images": [dict(zip(own.per_image, values)) for values in zip(*own.per_image.values())],
    }


def _floor(ask: Questions, references: Mapping[str, np.ndarray], scorers: Mapping[str, ClipReward]) -> dict[str, Any]:
    """The row of perfect images."""
    measured = {FLOOR: measure(ask, shapes_eval.floor_renders(ask.world, ask.records), references, scorers)}
    row = {"name": FLOOR, "nfe": None, "images_per_second": None}
    return row | _summaries(ask, measured, FLOOR, []) | {"images": []}


# --- pictures ------------------------------------------------------------------------------------------------------


def _kept(n: int, count: int) -> np.ndarray:
    """At most ``count`` of n indices, spread evenly."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).round().astype(int))


def _save_images(out: Path, pictures: list[np.ndarray], index: np.ndarray) -> None:
    """``images.npz``: ``index`` of the prompts, and ``model_i`` uint8 ``[k, h, w, 3]`` in the table's order."""
    named = {f"model_{i}": np.round(images * 255).astype(np.uint8) for i, images in enumerate(pictures)}
    np.savez_compressed(out / files.IMAGES_FILE, index=index, **named)
