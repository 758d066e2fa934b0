"""Opens whatever a user may want to draw with: a diffusers folder, a hub id, an exported student, a run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dmdr_jax.diffusers_io.pipeline import Pipeline, load_pipeline
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.diffusion.grids import authors_grid, flow_match_euler_sigmas, student_grid
from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.errors import UserError
from dmdr_jax.generate import Recipe
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.state import with_buffers

TEACHER_STEPS = 28  # the defaults of diffusers' StableDiffusion3Pipeline
TEACHER_GUIDANCE = 7.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser to draw with, and how it wants to be drawn with.

    Attributes:
      pipeline: text encoders, VAE, scheduler and the base.
      weights: the denoiser: the folder's own transformer, or a run's student on its base.
      meta: a checkpoint's metadata, or None for a folder.
    """

    pipeline: Pipeline
    weights: Weights
    meta: dict[str, Any] | None = None

    @property
    def is_student(self) -> bool:
        return self.meta is not None or self.pipeline.student is not None

    @property
    def size(self) -> tuple[int, int]:
        """Default image height and width, pixels."""
        factor = self.pipeline.modules["vae"].config.downsampling
        if self.meta is not None:
            height, width, _ = self.meta["student"]["latent_shape"]
            return height * factor, width * factor
        side = self.pipeline.modules["transformer"].config.sample_size * factor
        return side, side

    def recipe(
        self,
        steps: int | None = None,
        kernel: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> Recipe:
        """The grid, kernel and guidance to draw with; what is None is the model's own.

        A plain folder draws on its scheduler's grid, as diffusers does; a student on the grid it was
        trained on.
        """
        if steps is not None and steps < 1:
            raise UserError(f"--steps must be at least 1, not {steps}.")
        default_guidance = 1.0 if self.is_student else TEACHER_GUIDANCE
        return Recipe(
            grid=tuple(map(float, self._grid(steps, size or self.size))),
            kernel=parse_kernel(kernel) if kernel else self._kernel(),
            guidance=default_guidance if guidance is None else guidance,
        )

    def _grid(self, steps: int | None, size: tuple[int, int]) -> Any:
        if self.meta is not None:
            own = self.meta["student"]["grid"]
            if steps in (None, len(own) - 1):
                return own
            settings = self.meta["config"]["student"]
            make = authors_grid if settings["grid"] == "authors" else student_grid
            return make(steps, settings["shift"])
        student = self.pipeline.student
        if student is not None:
            own = student["grid"]
            return own if steps in (None, len(own) - 1) else student_grid(steps, student["shift"])
        factor, patch = self.pipeline.modules["vae"].config.downsampling, self.pipeline.modules["transformer"].config
        tokens = (size[0] // factor // patch.patch_size) * (size[1] // factor // patch.patch_size)
        return flow_match_euler_sigmas(self.pipeline.scheduler, steps or TEACHER_STEPS, tokens)

    def _kernel(self) -> Kernel:
        if self.meta is not None:
            return parse_kernel(self.meta["student"]["kernel"])
        return parse_kernel("renoise" if self.pipeline.scheduler.get("stochastic_sampling") else "ode")


def open_model(path: str, dtype: Any = jnp.float32, use_ema: bool = True) -> Model:
    """Opens a diffusers folder, a hub id, ``shapes:NAME``, or a run (its workdir, or one checkpoint in it).

    Raises:
      UserError: it is none of these, or something in it is missing or damaged.
    """
    folder = Path(resolve(path))
    if folder.is_dir() and not (folder / "model_index.json").exists():
        return open_checkpoint(path, dtype, use_ema)
    pipeline = load_pipeline(resolve(path), dtype=dtype)
    return Model(pipeline, Weights(pipeline.params["transformer"]))


def open_checkpoint(path: str, dtype: Any = jnp.float32, use_ema: bool = True) -> Model:
    """A run's student on the teacher it was trained from (which is read from where the run read it)."""
    field = "ema" if use_ema else "generator"
    trees, meta = load_trained(path, (field,))
    if "student" not in meta or "teacher" not in meta:
        raise UserError(f"{path} was not written by dmdr_jax.train: its metadata names no teacher.")
    pipeline = load_pipeline(resolve(meta["teacher"]), dtype=dtype, variant=meta["config"]["variant"] or None)
    if pipeline.configs["transformer"] != meta["model"]["transformer"]:
        raise UserError(f"{path} was trained from another transformer than the one now in {meta['teacher']}.")
    base, scale = pipeline.params["transformer"], meta["student"]["generator_lora_scale"]
    if scale is None:
        return Model(pipeline, Weights(with_buffers(trees[field], base)), meta)
    return Model(pipeline, Weights(base, trees[field], scale), meta)
