"""Opens whatever a user may want to draw with: a diffusers folder, a hub id, an exported student, a run."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io.hub import locate_lora
from dmdr_jax.diffusers_io.lora_file import read_lora
from dmdr_jax.diffusers_io.pipeline import Pipeline, components_of, load_pipeline
from dmdr_jax.diffusers_io.text import Encoded, encode_text, load_text_first, text_params, tokenize
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.grids import authors_grid, grid_at, student_grid
from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.errors import UserError
from dmdr_jax.generate import Recipe, teacher_recipe
from dmdr_jax.models.attention import kernel_for
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training import disk
from dmdr_jax.training.checkpoints import is_best, load_trained
from dmdr_jax.training.state import with_buffers

EncodeAll = Callable[[Pipeline], Encoded]


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser to draw with, and how it wants to be drawn with.

    Attributes:
      pipeline: text encoders, VAE, scheduler and the base.
      weights: the denoiser: the folder's own, or a run's student on its base.
      meta: a checkpoint's metadata, or None for a folder.
    """

    pipeline: Pipeline
    weights: Weights
    meta: dict[str, Any] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Default image height and width, pixels."""
        factor = self.pipeline.modules["vae"].config.downsampling
        if self.meta is not None:
            height, width, _ = self.meta["student"]["latent_shape"]
            return height * factor, width * factor
        side = self.pipeline.modules[self.pipeline.denoiser].config.sample_size * factor
        return side, side

    def recipe(
        self,
        steps: int | None = None,
        kernel: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Recipe:
        """The grid, kernel and guidance to draw with; what is None is the model's own.

        A plain folder draws on its scheduler's grid, as diffusers does; a student on the grid it was
        trained on; with ``timesteps``, the network's own, either draws at these.
        """
        if steps is not None and steps < 1:
            raise UserError(f"--steps must be at least 1, not {steps}.")
        chosen = parse_kernel(kernel) if kernel else self._kernel()
        student = self._student()
        if timesteps is not None:
            if steps not in (None, len(timesteps)):
                raise UserError(f"--steps {steps} and {len(timesteps)} --timesteps contradict each other.")
            listed = grid_at(self.pipeline.process, timesteps)
            default = 1.0 if student is not None else self.pipeline.kind.guidance
            return Recipe(listed, chosen, default if guidance is None else guidance)
        if student is None:
            return teacher_recipe(self.pipeline, steps, guidance, size or self.size, chosen)
        grid = student["grid"]
        if steps not in (None, len(grid) - 1):
            make = authors_grid if student["kind"] == "authors" else student_grid
            times: Any = np.asarray(make(steps, student["shift"]))[:-1]
            grid = [*np.asarray(self.pipeline.process.snap(times)), 0.0]
        return Recipe(tuple(map(float, grid)), chosen, 1.0 if guidance is None else guidance)

    def _student(self) -> dict[str, Any] | None:
        """The grid a student was trained on and how to make one of another length; None for a teacher."""
        if self.meta is not None:
            settings = self.meta["config"]["student"]
            return {"grid": self.meta["student"]["grid"], "kind": settings["grid"], "shift": settings["shift"]}
        return None if self.pipeline.student is None else {"kind": "uniform", **self.pipeline.student}

    def _kernel(self) -> Kernel:
        if self.meta is not None:
            return parse_kernel(self.meta["student"]["kernel"])
        if self.pipeline.student is not None:
            return parse_kernel(self.pipeline.student["kernel"])
        return parse_kernel("renoise" if self.pipeline.scheduler.get("stochastic_sampling") else "ode")


def with_lora(model: Model, file: str, scale: float = 1.0, alpha: float | None = None) -> Model:
    """The model with a LoRA (a file, a folder, a URL or a hub id) on its denoiser, whoever trained it.

    Args:
      scale: factor of the file's own scale.
      alpha: for a file that does not say it.

    Raises:
      UserError: the file does not fit, or the model is a run that has a LoRA of its own.
    """
    if model.weights.lora is not None:
        raise UserError(f"this run has a LoRA of its own: export it to a folder and put {file} on that.")
    delta, own = read_lora(locate_lora(file), model.weights.params, model.pipeline.denoiser, alpha)
    return dataclasses.replace(model, weights=Weights(model.weights.params, delta, scale * own))


def open_model(
    path: str, dtype: Any = jnp.float32, use_ema: bool = True, t5: bool = True, encode_all: EncodeAll | None = None
) -> Model:
    """Opens a diffusers folder, a hub id, ``shapes:NAME``, or a run (its workdir, or one checkpoint in it).

    Args:
      t5: False leaves SD3's T5 out; a run says itself whether it was trained with it.
      encode_all: what the text encoders make of all prompts that will be asked for (`encode_prompts`): they are
        loaded first and alone, and leave before the rest is loaded. None: they stay.

    Raises:
      UserError: it is none of these, or something in it is missing or damaged.
    """
    folder = Path(resolve(path))
    of_a_run = folder.is_dir() and not (folder / "model_index.json").exists()
    if disk.is_remote(path) or of_a_run or is_best(path):
        return open_checkpoint(path, dtype, use_ema, encode_all)
    pipeline = _load(path, dtype, None, t5, encode_all)
    return Model(pipeline, Weights(pipeline.params[pipeline.denoiser]))


def open_checkpoint(
    path: str, dtype: Any = jnp.float32, use_ema: bool = True, encode_all: EncodeAll | None = None
) -> Model:
    """A run's student on the teacher it was trained from (which is read from where the run read it)."""
    field = "ema" if use_ema else "generator"
    trees, meta = load_trained(path, (field,))
    if "student" not in meta or "teacher" not in meta:
        raise UserError(f"{path} was not written by dmdr_jax.train: its metadata names no teacher.")
    settings = meta["config"]
    variant, t5, length = settings["variant"] or None, settings.get("t5", True), settings.get("t5_length")
    try:
        pipeline = _load(meta["teacher"], dtype, variant, t5, encode_all, length)
    except UserError as error:
        raise UserError(f"the teacher of {path}, config.model={meta['teacher']}: {error}") from error
    if pipeline.configs[pipeline.denoiser] != meta["model"]["denoiser"]:
        raise UserError(f"{path} was trained from another {pipeline.denoiser} than the one now in {meta['teacher']}.")
    base, scale = pipeline.params[pipeline.denoiser], meta["student"]["generator_lora_scale"]
    if scale is None:
        return Model(pipeline, Weights(with_buffers(trees[field], base)), meta)
    return Model(pipeline, Weights(base, trees[field], scale), meta)


def encode_prompts(
    pipeline: Pipeline, prompts: Sequence[str], batch: int, progress: Callable[[int], Any] = lambda encoded: None
) -> Encoded:
    """What a pipeline's text encoders make of prompts, ``batch`` at a time, in the host's memory."""
    program = jax.jit(partial(encode_text, pipeline.modules, max_sequence_length=pipeline.t5_length))

    def encode_batch(texts: Sequence[str]) -> Conditioning:
        return program(text_params(pipeline), tokenize(pipeline, texts))

    return Encoded.make(prompts, batch, encode_batch, progress)


def _load(
    name: str, dtype: Any, variant: str | None, t5: bool, encode_all: EncodeAll | None, t5_length: int | None = None
) -> Pipeline:
    """The pipeline; without T5 it is one that has none, also where it is written out again."""
    name, wanted = resolve(name), components_of(resolve(name), optional=t5)
    load = partial(load_pipeline, name, dtype=dtype, variant=variant, t5_length=t5_length)
    pipeline = load_text_first(load, wanted, encode_all) if encode_all else load(wanted)
    if not t5:
        pipeline.configs = {component: pipeline.configs[component] for component in wanted}
    pipeline.attend_with(kernel_for())
    return pipeline
