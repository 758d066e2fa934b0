"""One model's images of one evaluation, as numbered PNG files that are drawn where they are missing.

A gallery is known by everything that its images depend on (weights, grid, kernel, guidance, size, prompts, noise), so
that a killed evaluation goes on where it was, and another evaluation finds what it shares with this one.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.images import image_files, read_images, to_uint8, write_image
from dmdr_jax.evaluation.journal import Journal, key_of, write_text
from dmdr_jax.evaluation.scorers import fingerprint
from dmdr_jax.generate import Recipe, draw_images, initial_noise
from dmdr_jax.model import Model
from dmdr_jax.training.sharding import batch_sharding, make_mesh, replicated

ABOUT = "about.json"
PREFIX = "images:"  # of an entry whose images were drawn elsewhere


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images 0 .. n - 1 of a model.

    Attributes:
      folder: theirs.
      files: in the order of the prompts, whether they are there or not.
      about: what they depend on.
      speeds: the journal of how long batches took.
    """

    folder: Path
    files: list[Path]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    speeds: Journal | None = None

    def missing(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Those of the rows that have no image yet."""
        there = {file.name for file in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [int(i) for i in rows if self.files[i].name not in there]

    def read(self) -> np.ndarray:
        """All images, ``[n, h, w, 3]`` float32 in [0, 1]."""
        return np.stack(read_images(self.files)).astype(np.float32) / np.float32(255)

    def images_per_second(self) -> float | None:
        """Of the median batch, prompts to pixels, in one process; None where nothing was timed."""
        rates = [] if self.speeds is None else [r["images"] / r["seconds"] for r in self.speeds.read().values()]
        return float(np.median(rates)) if rates else None


def elsewhere(folder: str, count: int) -> Gallery:
    """Images that somebody else has drawn, in the order of their names.

    Raises:
      UserError: there are not ``count`` of them.
    """
    files = image_files(folder)
    if len(files) != count:
        raise UserError(
            f"{folder} holds {len(files)} images, and the other models are asked for {count}: give one image for each "
            "prompt (and each of --per_prompt), in the order of their file names."
        )
    return Gallery(Path(folder), files)


@dataclasses.dataclass(frozen=True)
class Order:
    """What a gallery shows.

    Attributes:
      prompts, seeds: one per image; noise depends on the seed alone.
      size: height and width in pixels.
      seed: of stochastic kernels.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    size: tuple[int, int]
    seed: int = 0


def gallery_of(root: Path, name: str, model: Model, recipe: Recipe, order: Order, dtype: str, writer: int) -> Gallery:
    """The gallery of a model's answers to ``order``, with what is in it already."""
    about = {
        "weights": fingerprint([model.weights, beside_denoiser(model)]),
        "grid": recipe.grid,
        "kernel": str(recipe.kernel),
        "guidance": recipe.guidance,
        "initial_scale": recipe.initial_scale,
        "size": order.size,
        "kernel_seed": order.seed,
        "dtype": dtype,
        "questions": key_of(list(order.prompts), list(order.seeds)),
    }
    folder = root / f"{name}-{key_of(about)[:10]}"
    files = [folder / f"{i:05d}.png" for i in range(len(order.prompts))]
    if not (folder / ABOUT).is_file():
        write_text(folder / ABOUT, json.dumps(about, indent=1, default=str))
    return Gallery(folder, files, about, Journal(folder / "speed", writer))


def draw_missing(
    gallery: Gallery,
    model: Model,
    recipe: Recipe,
    order: Order,
    rows: Sequence[int] | np.ndarray,
    batch: int,
    progress: Callable[[int], Any] = lambda drawn: None,
) -> None:
    """Draws those of the rows that the gallery lacks, and times it.

    The first batch compiles and is not timed; where there is no other, it is drawn once more.

    Args:
      progress: called with the number of images drawn, those from before at once.
    """
    missing = gallery.missing(rows)
    progress(len(rows) - len(missing))
    if not missing or gallery.speeds is None:
        return
    draw = Drawing(model, recipe, order, min(batch, len(missing)))
    for start in range(0, len(missing), draw.batch):
        lot = missing[start : start + draw.batch]
        images, seconds = draw(lot)
        for i, image in zip(lot, to_uint8(images)):
            write_image(gallery.files[i], image)
        if start:
            gallery.speeds.add(_speed(lot, draw.batch, seconds))
        progress(len(lot))
    if gallery.images_per_second() is None:
        gallery.speeds.add(_speed(missing[:1], draw.batch, draw(missing[: draw.batch])[1]))


def beside_denoiser(model: Model) -> dict[str, Any]:
    """The pipeline's other networks: text encoders and VAE."""
    return {name: params for name, params in model.pipeline.params.items() if name != model.pipeline.denoiser}


def _speed(lot: Sequence[int], images: int, seconds: float) -> dict[str, Any]:
    return {f"{lot[0]}": {"images": images, "seconds": seconds}}


class Drawing:
    """Draws images of an order, on all of this process's devices at a time.

    Attributes:
      batch: images at a time, a multiple of the number of devices.
    """

    def __init__(self, model: Model, recipe: Recipe, order: Order, batch: int):
        self._model, self._recipe, self._order = model, recipe, order
        self._weights, self._params, self._sharding = model.weights, beside_denoiser(model), None
        devices = jax.local_devices()
        if len(devices) > 1:
            batch = -(-batch // len(devices)) * len(devices)
            mesh = make_mesh(devices=devices)
            self._sharding = batch_sharding(mesh, batch)
            self._weights, self._params = jax.device_put((self._weights, self._params), replicated(mesh))
        self.batch = batch

    def __call__(self, lot: Sequence[int]) -> tuple[np.ndarray, float]:
        """Images ``[len(lot), h, w, 3]`` in [0, 1] of these rows, and the seconds that a whole batch took."""
        rows = [*lot, *[lot[-1]] * (self.batch - len(lot))]
        started = time.perf_counter()
        order, pipeline = self._order, self._model.pipeline
        images = draw_images(
            pipeline,
            self._weights,
            self._recipe,
            [order.prompts[i] for i in rows],
            initial_noise(pipeline, *order.size, [order.seeds[i] for i in rows]),
            batch=self.batch,
            seed=order.seed,
            places=rows,
            params=self._params,
            sharding=self._sharding,
        )
        return images[: len(lot)], time.perf_counter() - started
