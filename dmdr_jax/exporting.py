"""A student on its way back to diffusers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmdr_jax import lora
from dmdr_jax.diffusers_io.components import MAX_SEQUENCE_LENGTH
from dmdr_jax.diffusers_io.lora_file import write_lora
from dmdr_jax.diffusers_io.pipeline import save_pipeline
from dmdr_jax.diffusion.ddpm_grids import student_scheduler, timesteps_of
from dmdr_jax.diffusion.grids import explicit_config, explicit_sigmas, scheduler_config_for
from dmdr_jax.diffusion.kernels import Kernel, parse_kernel
from dmdr_jax.diffusion.process import VariancePreserving
from dmdr_jax.errors import UserError
from dmdr_jax.model import Model
from dmdr_jax.training import disk

LOADING = """import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({folder!r}, torch_dtype=torch.{dtype}{without})
"""
SCHEDULER = """from diffusers import {name}

pipe.scheduler = {name}(**{settings})
"""
WITHOUT_T5 = ", text_encoder_3=None, tokenizer_3=None"
"""What diffusers wants to be told of a folder that has no T5."""


def export_folder(model: Model, out: str, dtype: str | None, kernel: str | None, overwrite: bool) -> str:
    """Writes the complete pipeline; returns how to call it."""
    if model.pipeline.folder.resolve().is_relative_to(Path(out).resolve()):
        raise UserError(f"--out {out} is the teacher's own folder: give another name.")
    scheduler, call = sampler_settings(model, kernel)
    weights = model.weights
    params = weights.params if weights.lora is None else lora.merge(weights.params, weights.lora, weights.lora_scale)
    student = {
        "grid": student_levels(model),
        "shift": model.meta["config"]["student"]["shift"],
        "kernel": str(student_kernel(model, kernel)),
        "teacher": model.meta["teacher"],
        "step": model.meta["step"],
        "t5_length": model.pipeline.t5_length,
        "call": call,
    }
    stored = None if dtype is None else jnp.dtype(dtype)
    folder = save_pipeline(
        model.pipeline, out, {model.pipeline.denoiser: params}, scheduler, student, stored, overwrite
    )
    return loading(model, str(folder), dtype) + f"image = {call}"


def loading(model: Model, folder: str, dtype: str | None) -> str:
    """The Python lines that load a folder of this model into diffusers."""
    kind = model.pipeline.kind
    without = WITHOUT_T5 if "text_encoder_3" in kind.classes and "text_encoder_3" not in model.pipeline.configs else ""
    return LOADING.format(pipeline=kind.pipeline_class, folder=folder, dtype=dtype or "float16", without=without)


def export_lora(model: Model, out: str, dtype: str | None, kernel: str | None, overwrite: bool) -> str:
    """Writes the generator's LoRA; returns how to use it on the teacher."""
    if model.weights.lora is None:
        raise UserError("this run trained the full network, not a LoRA: export it without --lora.")
    if not out.endswith(".safetensors"):
        raise UserError(f"--out {out}: a LoRA file's name ends in .safetensors.")
    if Path(out).exists() and not overwrite:
        raise UserError(f"{out} exists: give another name or --overwrite.")
    scheduler, call = sampler_settings(model, kernel)
    stored = np.dtype(jnp.dtype(dtype or "float32"))
    disk.make_folder(Path(out).parent)
    write_lora(out, model.weights.lora, model.weights.lora_scale, stored, model.pipeline.denoiser)
    settings = {k: v for k, v in scheduler.items() if not k.startswith("_")}
    return (
        loading(model, str(model.pipeline.folder), dtype)
        + f"pipe.load_lora_weights({out!r})\n"
        + SCHEDULER.format(name=scheduler["_class_name"], settings=settings)
        + f"image = {call}"
    )


def student_kernel(model: Model, kernel: str | None) -> Kernel:
    return parse_kernel(kernel or model.meta["student"]["kernel"])


def student_levels(model: Model) -> list[float]:
    """The student's grid with the last target 0, where diffusers ends (the released code's grid ends at 0.001)."""
    return [*model.meta["student"]["grid"][:-1], 0.0]


def sampler_settings(model: Model, kernel: str | None) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration and the one call that draws the student with it.

    Raises:
      UserError: diffusers has no scheduler for the student's kernel.
    """
    chosen = student_kernel(model, kernel)
    if chosen not in (Kernel(0.0), Kernel(1.0)):
        raise UserError(f"diffusers has no scheduler for the kernel {chosen}: choose --kernel ode or --kernel renoise.")
    grid, base = student_levels(model), model.pipeline.scheduler
    process, steps = model.pipeline.process, len(grid) - 1
    if isinstance(process, VariancePreserving):
        timesteps = timesteps_of(process, grid)
        config = student_scheduler(base, timesteps, chosen.stochastic)
        return config, f"pipe(prompt, timesteps={timesteps}, guidance_scale=0.0).images[0]"
    config, length = scheduler_config_for(grid, base, chosen.stochastic), model.pipeline.t5_length
    more = "guidance_scale=0.0" + (f", max_sequence_length={length}" if length != MAX_SEQUENCE_LENGTH else "")
    if config is not None:
        return config, f"pipe(prompt, num_inference_steps={steps}, {more}).images[0]"
    sigmas = [round(s, 7) for s in explicit_sigmas(grid, 1.0)]
    return explicit_config(base, chosen.stochastic), f"pipe(prompt, sigmas={sigmas}, {more}).images[0]"
