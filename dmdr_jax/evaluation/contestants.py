"""The models of an evaluation on prompts, each with its images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from dmdr_jax.data.survey import survey
from dmdr_jax.diffusers_io.text import tokenize
from dmdr_jax.evaluation.entries import Entry
from dmdr_jax.evaluation.gallery import PREFIX, Gallery, Order, draw_missing, elsewhere, gallery_of
from dmdr_jax.evaluation.questions import Questions
from dmdr_jax.evaluation.shards import OthersAtWork, Shard
from dmdr_jax.generate import Recipe
from dmdr_jax.model import Model, open_model
from dmdr_jax.sample import image_size

IMAGES = "images"
"""Folder of the galleries, in that of the results."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model with its images.

    Attributes:
      row: what the results say of it beside its measures.
      trained: names of the rewards that it was trained on, with a weight.
    """

    entry: Entry
    gallery: Gallery
    row: dict[str, Any]
    trained: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.entry.name


def enter(args: Any, entries: Sequence[Entry], ask: Questions, shard: Shard) -> list[Contestant]:
    """Opens the models one after the other and draws this process's part of their images.

    Raises:
      UserError: one cannot be opened, or cannot draw images of the size that is asked.
    """
    opened: dict[str, Model] = {}
    contestants = []
    for entry in entries:
        if entry.path.startswith(PREFIX):
            contestants.append(_with_images(entry, len(ask.records)))
            continue
        if entry.path not in opened:
            opened.clear()  # one at a time
            opened[entry.path] = open_model(entry.path, jnp.dtype(args.dtype))
        contestants.append(_drawn(args, entry, opened[entry.path], ask, shard))
    return contestants


def _with_images(entry: Entry, count: int) -> Contestant:
    row = {"name": entry.name, "path": entry.path, "trained_steps": None}
    nothing = dict.fromkeys(("grid", "kernel", "guidance", "nfe"))
    return Contestant(entry, elsewhere(entry.path.removeprefix(PREFIX), count), row | nothing)


def _drawn(args: Any, entry: Entry, model: Model, ask: Questions, shard: Shard) -> Contestant:
    size = image_size(model, *ask.size(model), None)
    recipe = model.recipe(entry.steps, entry.kernel, entry.guidance, size)
    row = model_row(entry, model, recipe) | {"size": size, "cut_prompts": cut_prompts(model, ask.prompts)}
    gallery = draw_own(args, entry.name, model, recipe, Order(ask.prompts, ask.seeds, size, args.seed), shard)
    return Contestant(entry, gallery, row, trained_rewards(model))


def draw_own(args: Any, name: str, model: Model, recipe: Recipe, order: Order, shard: Shard) -> Gallery:
    """A model's gallery, with this process's part of the images drawn."""
    gallery = gallery_of(Path(args.out) / IMAGES, name, model, recipe, order, args.dtype, shard.index)
    rows = shard.rows(len(order.prompts))
    with tqdm(total=len(rows), desc=f"{name}, {recipe.nfe} NFE", unit="image") as bar:
        draw_missing(gallery, model, recipe, order, rows, args.batch, bar.update)
    return gallery


def check_complete(name: str, gallery: Gallery) -> None:
    """OthersAtWork while images are missing that other processes draw."""
    missing = gallery.missing(range(len(gallery.files)))
    if missing:
        raise OthersAtWork(f"images of {name}", len(gallery.files) - len(missing), len(gallery.files))


def model_row(entry: Entry, model: Model, recipe: Recipe) -> dict[str, Any]:
    """What the results say of a model: where it is from and how it is drawn with."""
    return {
        "name": entry.name,
        "path": entry.path,
        "trained_steps": (model.meta or model.pipeline.student or {}).get("step"),
        "grid": recipe.grid,
        "kernel": str(recipe.kernel),
        "guidance": recipe.guidance,
        "nfe": recipe.nfe,
    }


def trained_rewards(model: Model) -> tuple[str, ...]:
    """Names of the rewards that a run was trained on; an exported folder does not say them."""
    rewards = {} if model.meta is None else model.meta["config"].get("rewards", {})
    return tuple(name for name, reward in rewards.items() if reward["weight"])


def cut_prompts(model: Model, prompts: Sequence[str]) -> dict[str, int]:
    """How many different prompts are longer than each text encoder reads."""
    lengths = {name: ids.shape[1] for name, ids in tokenize(model.pipeline, [""]).items()}
    tokenizers = {name: (model.pipeline.tokenizers[name], length) for name, length in lengths.items()}
    return dict(survey(dict.fromkeys(prompts), tokenizers).cut)
