"""Sample grids at fixed prompts and noise: the student as it learns, beside the teacher."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dmdr_jax.data.prompts import evenly
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.evaluation.journal import key_of
from dmdr_jax.generate import Recipe, draw_images, initial_noise, teacher_recipe
from dmdr_jax.training import disk, runtime
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import MetricWriter
from dmdr_jax.training.step import Frozen, Plan, generator_weights
from dmdr_jax.workdir import SAMPLES

Tree = Any

BORDER = 2  # pixels between images
BATCH = 16  # images drawn at a time, at least
TOLD = "known_as"  # the field of a PNG that says what it shows


@dataclasses.dataclass
class Preview:
    """Draws and writes the grids; the teacher's is drawn once and kept. All processes draw, the first writes."""

    pipeline: Pipeline
    plan: Plan
    prompts: list[str]
    noise: np.ndarray
    teacher_recipe: Recipe
    folder: epath.Path
    layout: Layout

    @classmethod
    def make(
        cls, config: Any, pipeline: Pipeline, plan: Plan, prompts: list[str], workdir: epath.Path, layout: Layout
    ) -> "Preview":
        count = config.preview.images
        height, width = (side * pipeline.modules["vae"].config.downsampling for side in plan.latent_shape[:2])
        recipe = teacher_recipe(pipeline, config.preview.teacher_steps, config.guidance.scale, (height, width))
        noise = initial_noise(pipeline, height, width, range(count))
        return cls(pipeline, plan, evenly(prompts, count), noise, recipe, workdir / SAMPLES, layout)

    def of(self, prompts: list[str]) -> "Preview":
        """The same with other prompts, one image each from noise of its own."""
        factor = self.pipeline.modules["vae"].config.downsampling
        height, width = (side * factor for side in self.plan.latent_shape[:2])
        noise = initial_noise(self.pipeline, height, width, range(len(prompts)))
        return dataclasses.replace(self, prompts=prompts, noise=noise)

    def teacher(self, writer: MetricWriter, step: int) -> None:
        """The prompts and the teacher's grid, where it is not there yet, or is of other prompts or settings."""
        if not self.prompts:
            return
        self._write_file("prompts.txt", ("\n".join(self.prompts) + "\n").encode())
        known_as = key_of(self.prompts, str(self.teacher_recipe), list(self.noise.shape), self.pipeline.name)
        if not runtime.from_first(_told(self.folder / "teacher.png") == known_as):
            self.write(writer, step, "teacher", self.draw_teacher(), told=known_as)

    def student(self, writer: MetricWriter, step: int, average: Tree, frozen: Frozen, file: str | None = None) -> None:
        """The averaged student's grid at ``step``, in ``file``.png or one that names the step."""
        if not self.prompts:
            return
        self.write(writer, step, "student", self.draw_student(average, frozen), file or f"student_{step:06d}")

    def draw_teacher(self, progress: Callable[[int], Any] = lambda drawn: None) -> np.ndarray:
        """The teacher's images ``[n, H, W, 3]`` in [0, 1]; ``progress`` is called with how many more are drawn."""
        return self._draw(Weights(self.pipeline.params[self.pipeline.denoiser]), self.teacher_recipe, progress)

    def draw_student(self, average: Tree, frozen: Frozen) -> np.ndarray:
        """The averaged student's."""
        return self._draw(generator_weights(self.plan, average, frozen.base), student_recipe(self.plan))

    def _draw(
        self, weights: Weights, recipe: Recipe, progress: Callable[[int], Any] = lambda drawn: None
    ) -> np.ndarray:
        batch, sharding = batch_of(self.layout, len(self.prompts))
        options: dict[str, Any] = dict(batch=batch, sharding=sharding, progress=progress)
        return draw_images(self.pipeline, weights, recipe, self.prompts, self.noise, **options)

    def write(
        self, writer: MetricWriter, step: int, name: str, images: np.ndarray, file: str | None = None, told: str = ""
    ) -> None:
        """A grid of images as ``file``.png, by default ``name``.png, and as a picture of the event files.

        Args:
          told: kept in the picture, see `_told`.
        """
        grid, picture, inside = image_grid(images), io.BytesIO(), PngInfo()
        inside.add_text(TOLD, told)
        Image.fromarray(grid).save(picture, format="png", pnginfo=inside)
        self._write_file(f"{file or name}.png", picture.getvalue())
        writer.images(step, {f"samples/{name}": grid})

    def _write_file(self, name: str, content: bytes) -> None:
        if runtime.is_first():
            disk.write_file(self.folder / name, content)


def student_recipe(plan: Plan) -> Recipe:
    """How a run's student draws."""
    return Recipe(plan.simulation.grid, plan.simulation.kernel, 1.0)


def batch_of(layout: Layout, images: int) -> tuple[int, NamedSharding | None]:
    """How many of ``images`` are drawn at a time, and how they are split over the devices."""
    return layout.drawing(min(images, BATCH))


def image_grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """One uint8 picture ``[h, w, 3]`` of images ``[n, H, W, 3]`` in [0, 1], row by row, on white."""
    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (height + BORDER) + BORDER, columns * (width + BORDER) + BORDER, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (k * (side + BORDER) + BORDER for k, side in zip(divmod(i, columns), (height, width)))
        canvas[top : top + height, left : left + width] = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return canvas


def _told(file: epath.Path) -> str:
    """What a picture of ours says that it shows; "" where there is none, or it cannot be read."""
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            return str(picture.info.get(TOLD, ""))
    except OSError:
        return ""
