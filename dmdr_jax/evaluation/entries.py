"""What is compared: the models and how each is drawn with, and the rewards that score their images."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.generate import Recipe, draw_images
from dmdr_jax.model import Model, open_model
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import ClipReward, load_clip_reward
from dmdr_jax.shapes.assets import resolve

_NAME = re.compile(r"[\w.@+-]+")
_FIELDS: dict[str, Callable[[str], Any]] = {"steps": int, "kernel": str, "guidance": float}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a model and how to draw with it; what is None is the model's own."""

    name: str
    path: str
    steps: int | None = None
    kernel: str | None = None
    guidance: float | None = None


def parse_entry(text: str) -> Entry:
    """Reads ``NAME=PATH[,steps=N][,kernel=K][,guidance=G]``.

    Raises:
      UserError: it is not of this form.
    """
    name, equals, rest = text.partition("=")
    path, *settings = rest.split(",")
    if not equals or not path or not _NAME.fullmatch(name):
        raise UserError(f"--model {text!r} is not NAME=PATH[,steps=N,kernel=K,guidance=G] with a plain word as NAME.")
    fields: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in _FIELDS:
            raise UserError(f"--model {text!r}: {setting!r} is none of {', '.join(f'{f}=...' for f in _FIELDS)}.")
        try:
            fields[key] = _FIELDS[key](value)
        except ValueError:
            raise UserError(f"--model {text!r}: {key} cannot be {value!r}.") from None
    return Entry(name, path, **fields)


def parse_entries(texts: Sequence[str], baseline: str | None = None) -> list[Entry]:
    """All of them; UserError where names repeat or ``baseline`` is none of them."""
    entries = [parse_entry(text) for text in texts]
    names = [entry.name for entry in entries]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"two models are called {repeated[0]!r}: give each its own name.")
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline!r} is none of the models; they are: {', '.join(names)}.")
    return entries


def open_models(entries: Sequence[Entry], dtype: str) -> list[Model]:
    """The entries' models, each path opened once; all are held at a time, so that none fails after hours."""
    opened: dict[str, Model] = {}
    for entry in entries:
        if entry.path not in opened:
            opened[entry.path] = open_model(entry.path, jnp.dtype(dtype))
    return [opened[entry.path] for entry in entries]


def load_scorers(paths: Sequence[str], option: str) -> dict[str, ClipReward]:
    """Rewards by name, which is the last part of their path.

    Raises:
      UserError: one cannot be read, or two have the same name.
    """
    scorers: dict[str, ClipReward] = {}
    for path in paths:
        folder = resolve(path)
        name = Path(folder).name
        if name in scorers:
            raise UserError(f"--{option} names two rewards called {name!r}.")
        scorers[name] = load_clip_reward(RewardSpec(name=name, path=folder))
    return scorers


def draw(
    model: Model,
    recipe: Recipe,
    prompts: Sequence[str],
    noise: np.ndarray,
    *,
    batch: int,
    seed: int,
    progress: Callable[[int], Any] = lambda drawn: None,
) -> tuple[np.ndarray, float]:
    """Images ``[n, H, W, 3]`` in [0, 1], and images per second, prompts to pixels.

    The first batch compiles and is not timed; the speed is that of the median batch after it.
    """
    stamps = [time.perf_counter()]

    def report(drawn: int) -> None:
        stamps.append(time.perf_counter())
        progress(drawn)

    def images_of(chosen: slice) -> np.ndarray:
        arguments = (model.pipeline, model.weights, recipe, prompts[chosen], noise[chosen])
        return draw_images(*arguments, batch=batch, seed=seed, progress=report)

    images = images_of(slice(None))
    if len(prompts) <= batch:
        images_of(slice(None))
    return images, min(batch, len(prompts)) / float(np.median(np.diff(stamps)[1:]))
