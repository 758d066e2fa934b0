"""An evaluation, from its command line to its files."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import DEFAULT_JUDGE, DEFAULT_REWARDS, DEFAULTS_OF
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation import shapes_eval
from dmdr_jax.evaluation.contestants import check_complete, draw_own, model_row
from dmdr_jax.evaluation.entries import Entry, load_scorers, open_models, parse_entries
from dmdr_jax.evaluation.environment import command, describe_environment
from dmdr_jax.evaluation.folder_scores import score_folder
from dmdr_jax.evaluation.gallery import PREFIX, Order
from dmdr_jax.evaluation.geneval import judge_detections_file
from dmdr_jax.evaluation.images import to_uint8, write_image
from dmdr_jax.evaluation.prompt_eval import evaluate_prompts
from dmdr_jax.evaluation.questions import Questions
from dmdr_jax.evaluation.results import Measured
from dmdr_jax.evaluation.shards import OthersAtWork, Shard, wait_for_others
from dmdr_jax.generate import Recipe
from dmdr_jax.model import Model
from dmdr_jax.rewards.clip_reward import ClipReward
from dmdr_jax.shapes.diversity import frechet_features
from dmdr_jax.shapes.prompts import TAGS
from dmdr_jax.shapes.world import World
from dmdr_jax.training.preview import image_grid

FLOOR = "renders"
GRID_IMAGES = 64


def evaluate(args: Any) -> str:
    """Does what the parsed command line ``args`` asks for; returns the table, or what other processes still owe."""
    given = [f"--{option}" for option in ("model", "images", "detections") if getattr(args, option)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: compare models, score images, or judge detections.")
    try:
        if args.images:
            return score_folder(args)
        if args.detections:
            return judge_detections_file(args)
        if not args.model:
            raise UserError("give --model NAME=PATH at least once, or --images FOLDER; see --help.")
        entries, ask = parse_entries(args.model, args.baseline), Questions.make(args)
        return evaluate_world(args, entries, ask) if ask.world else evaluate_prompts(args, entries, ask)
    except OthersAtWork as waiting:
        return str(waiting)


def evaluate_world(args: Any, entries: list[Entry], ask: Questions) -> str:
    """Compares models in the embedded world and writes the results; returns the table."""
    started = time.time()
    assert ask.world is not None
    _refuse_elsewhere(args, entries)
    scorers = {
        f"{kind}/{name}": s for kind, option in KINDS.items() for name, s in _scorers(args, option, ask.world).items()
    }
    models = open_models(entries, args.dtype)
    recipes = [model.recipe(e.steps, e.kernel, e.guidance, ask.size(model)) for e, model in zip(entries, models)]
    _check_sizes(entries, models, ask.world)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    drawn = _draw_all(args, ask, entries, models, recipes)
    references = {"renders": shapes_eval.reference_features(ask.world, ask.records)}
    measured: dict[str, Measured] = {}
    rows = []
    for entry, model, recipe, (images, speed) in zip(entries, models, recipes, drawn):
        measured[entry.name] = measure(ask, images, references, scorers)
        references.setdefault("teacher", frechet_features(images))
        rows.append(model_row(entry, model, recipe) | {"images_per_second": speed})
    compared_with = list(dict.fromkeys([entries[0].name, args.baseline or entries[0].name]))
    for row in rows:
        row |= _summaries(ask, measured, row["name"], compared_with)
    results = {
        "title": "Evaluation",
        "caption": caption(ask, args, entries[0].name),
        "command": command(),
        "settings": vars(args),
        "environment": describe_environment(),
        "seconds": round(time.time() - started, 1),
        "columns": files.columns(TAGS, list(scorers), True),
        "compared_with": compared_with,
        "prompts": [{**record, "noise_seed": seed} for record, seed in zip(ask.records, ask.seeds)],
        "models": rows,
        "floor": _floor(ask, references, scorers),
    }
    if Shard.make(args.shard).index == 0 or args.shard:
        _save_pictures(out, [entry.name for entry in entries], [images for images, _ in drawn], args.keep)
        files.write(out, results)
    wait_for_others("written")
    return (out / files.TABLE_FILE).read_text(encoding="utf-8")


KINDS = {"reward": "rewards", "judge": "judge"}
"""Kinds of scorers and the options that name them."""


def _refuse_elsewhere(args: Any, entries: list[Entry]) -> None:
    """UserError for what has no meaning in a world."""
    if any(entry.path.startswith(PREFIX) for entry in entries):
        raise UserError(f"--model NAME={PREFIX}FOLDER goes with --prompts FILE: a world judges what its models draw.")
    for option in ("reward", "trained", "features", "reference", "lpips"):
        if getattr(args, option):
            raise UserError(
                f"--{option} goes with --prompts FILE; a world's rewards are named by --rewards and --judge."
            )


def _scorers(args: Any, option: str, world: World) -> dict[str, ClipReward]:
    own = {"rewards": DEFAULT_REWARDS, "judge": DEFAULT_JUDGE} if world.name == DEFAULTS_OF else {}
    named = getattr(args, option) or own.get(option, "none")
    return load_scorers([] if named == "none" else named.split(","), option)


def _check_sizes(entries: list[Entry], models: list[Model], world: World) -> None:
    """UserError where a model's image size is not the world's."""
    for entry, model in zip(entries, models):
        if model.size != (world.size, world.size):
            size = " x ".join(map(str, model.size))
            raise UserError(
                f"{entry.name} draws {size} pixels and the world {world.name!r} has {world.size} x {world.size}: "
                "give --world for a model of another one, --prompts FILE for models from outside them."
            )


def caption(ask: Questions, args: Any, teacher: str) -> str:
    """What the table shows, in a few sentences."""
    common = (
        f"{len(ask.records)} images per model, all models on the same prompts and the same noise (seed {args.seed}). "
        "± is one standard error, prompts being the unit where several images share one."
    )
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


def _draw_all(
    args: Any, ask: Questions, entries: list[Entry], models: list[Model], recipes: list[Recipe]
) -> list[tuple[np.ndarray, float | None]]:
    """`_draw` for every model; this process's part of all of them is done before others are waited for."""
    drawn, waiting = [], []
    for entry, model, recipe in zip(entries, models, recipes):
        try:
            drawn.append(_draw(args, ask, entry, model, recipe))
        except OthersAtWork as others:
            waiting.append(others)
    if waiting:
        raise waiting[0]
    return drawn


def _draw(args: Any, ask: Questions, entry: Entry, model: Model, recipe: Recipe) -> tuple[np.ndarray, float | None]:
    """Images ``[n, h, w, 3]`` in [0, 1] and images per second; OthersAtWork while other processes owe some."""
    order = Order(ask.prompts, ask.seeds, ask.size(model), args.seed)
    gallery = draw_own(args, entry.name, model, recipe, order, Shard.make(args.shard))
    wait_for_others(f"drawn {entry.name}")
    check_complete(entry.name, gallery)
    return gallery.read(), gallery.images_per_second()


def measure(
    ask: Questions, images: np.ndarray, references: Mapping[str, np.ndarray], scorers: Mapping[str, ClipReward]
) -> Measured:
    """Every measure of one model's images."""
    scores = {name: scorer.score_prompts(images, ask.prompts).astype(np.float64) for name, scorer in scorers.items()}
    seen = shapes_eval.measure(ask.world, images, ask.records, references)
    return Measured(seen.per_image | scores, seen.statistics)


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


def _save_pictures(out: Path, names: list[str], drawn: list[np.ndarray], keep: int) -> None:
    """A grid for each model, and ``images.npz``: ``index`` of the prompts, ``model_i`` uint8 ``[k, h, w, 3]``."""
    for name, images in zip(names, drawn):
        grid = image_grid(images[_kept(len(images), GRID_IMAGES)])
        write_image(out / f"{name}.png", grid)
    index = _kept(len(drawn[0]), keep)
    named: dict[str, Any] = {f"model_{i}": to_uint8(images[index]) for i, images in enumerate(drawn)}
    np.savez_compressed(out / files.IMAGES_FILE, index=index, **named)
