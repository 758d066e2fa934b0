"""Draws images from prompts, with a teacher or a student.

    python -m dmdr_jax.sample --model FOLDER-OR-RUN --prompts prompts.txt --out images

A plain diffusers folder is drawn with its own scheduler, so that the same latents, prompts, steps
and guidance give the pixels that diffusers gives; a student is drawn on the grid it was trained on.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from dmdr_jax import cli
from dmdr_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--model", required=True, help="diffusers folder, hub id, shapes:NAME, exported student, or a run")
    p.add_argument("--prompts", required=True, help="prompts: .txt (one per line), .jsonl, .parquet, ...")
    p.add_argument("--out", required=True, help="folder for the images")
    p.add_argument("--steps", type=int, help="sampler steps (default: diffusers' for a teacher, a student's own)")
    p.add_argument("--timesteps", help="the network's own timesteps to draw at, such as 999,749,499,249")
    p.add_argument("--lora", help="a LoRA to put on the denoiser, file or hub id: PEFT, diffusers or kohya names")
    p.add_argument("--lora_scale", type=float, default=1.0, help="factor of the LoRA")
    p.add_argument("--lora_alpha", type=float, help="the LoRA's alpha, where its file does not say it")
    p.add_argument("--kernel", help="ode, renoise or cps(eta) (default: the model's own)")
    p.add_argument(
        "--guidance", type=float, help="guidance scale; 1 or less: none (default: diffusers' for a teacher, students 1)"
    )
    p.add_argument(
        "--negative_prompt", help="what guidance leads away from (default: the model's own, usually nothing)"
    )
    p.add_argument("--seed", type=int, default=0, help="image i starts from the noise of seed + i")
    p.add_argument("--latents", help="initial noise, .npy [b, c, h, w] as diffusers shapes it, one per prompt")
    p.add_argument("--height", type=int, help="pixels (default: the model's own)")
    p.add_argument("--width", type=int, help="pixels")
    p.add_argument("--batch", type=int, default=16, help="images drawn at a time")
    p.add_argument("--format", choices=("png", "npy"), default="png", help="npy: one images.npy [b, h, w, 3] in [0, 1]")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of networks and activations")
    p.add_argument("--no_t5", action="store_true", help="SD3 without its T5, which takes most of the memory")
    p.add_argument(
        "--encode_once",
        action="store_true",
        help="the text encoders read all prompts first and leave the device's memory before the rest is loaded",
    )
    p.add_argument("--no_ema", action="store_true", help="of a run, the last weights in place of their average")
    return p


def main(args: Any) -> None:
    import json
    from functools import partial

    from dmdr_jax.data.prompts import load_prompts

    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed must be from 0 to 2147483647, and is {args.seed}.")
    if not math.isfinite(args.guidance or 0.0):
        raise UserError(f"--guidance must be a number, not {args.guidance}.")
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, not {args.batch}.")
    out = check_folder(args.out)
    timesteps = read_timesteps(args.timesteps) if args.timesteps else None
    prompts = load_prompts(args.prompts)
    latents = read_latents(args.latents, len(prompts)) if args.latents else None

    import jax.numpy as jnp
    from tqdm import tqdm

    from dmdr_jax.generate import draw_images, initial_noise
    from dmdr_jax.model import encode_prompts, open_model, with_lora

    texts = [args.negative_prompt or "", *prompts]
    encode_all = partial(encode_prompts, prompts=texts, batch=args.batch) if args.encode_once else None
    model = open_model(args.model, getattr(jnp, args.dtype), not args.no_ema, not args.no_t5, encode_all)
    if args.lora:
        model = with_lora(model, args.lora, args.lora_scale, args.lora_alpha)
    size = image_size(model, args.height, args.width, latents)
    recipe = model.recipe(args.steps, args.kernel, args.guidance, size, timesteps)
    if latents is None:
        latents = initial_noise(model.pipeline, *size, range(args.seed, args.seed + len(prompts)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}.") from None
    with tqdm(total=len(prompts), desc=f"{len(recipe.grid) - 1} steps, {recipe.kernel}", unit="image") as bar:
        options = dict(batch=args.batch, negative_prompt=args.negative_prompt, seed=args.seed, progress=bar.update)
        images = draw_images(model.pipeline, model.weights, recipe, prompts, latents, **options)
    write_images(out, images, args.format)
    (out / "prompts.txt").write_text("".join(" ".join(p.split()) + "\n" for p in prompts), encoding="utf-8")
    (out / "settings.json").write_text(json.dumps({**vars(args), "grid": recipe.grid, "nfe": recipe.nfe}, indent=2))
    print(f"{len(images)} images in {out}")


def check_folder(name: str) -> Path:
    """The path; UserError where no folder can be there, for a file is in its way."""
    there = next(path for path in (Path(name).absolute(), *Path(name).absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {name} cannot be a folder: {there} is a file.")
    return Path(name)


def read_timesteps(text: str) -> list[float]:
    """Numbers with commas between them; UserError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--timesteps {text!r} is not a list of numbers such as 999,749,499,249.") from None


def read_latents(file: str, count: int) -> Any:
    """Noise ``[b, c, h, w]`` from a file, as ``[b, h, w, c]`` float32; UserError where it does not fit."""
    import numpy as np

    try:
        latents = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--latents {file} is not a readable .npy file: {error}.") from None
    if not isinstance(latents, np.ndarray):
        raise UserError(f"--latents {file} holds several arrays: give a .npy file with one.")
    if latents.ndim != 4 or not np.issubdtype(latents.dtype, np.floating):
        raise UserError(f"--latents must be floats [b, c, h, w]; {file} holds {latents.dtype} {latents.shape}.")
    if len(latents) != count:
        raise UserError(f"--latents {file} holds {len(latents)} latents for {count} prompts: give one per prompt.")
    return np.ascontiguousarray(latents.transpose(0, 2, 3, 1), np.float32)


def image_size(model: Any, height: int | None, width: int | None, latents: Any) -> tuple[int, int]:
    """The image's height and width; UserError where sizes and latents do not fit the model."""
    modules = model.pipeline.modules
    denoiser, factor = modules[model.pipeline.denoiser].config, modules["vae"].config.downsampling
    unit = factor * denoiser.patch_size
    if latents is not None:
        h, w, channels = latents.shape[1:]
        if channels != denoiser.in_channels:
            raise UserError(f"--latents have {channels} channels; this model's have {denoiser.in_channels}.")
        if (height or h * factor, width or w * factor) != (h * factor, w * factor):
            asked = f"{height or h * factor} x {width or w * factor}"
            raise UserError(f"--latents are for {h * factor} x {w * factor} pixels, not {asked}.")
        height, width = h * factor, w * factor
    height, width = height or model.size[0], width or model.size[1]
    if height < unit or width < unit or height % unit or width % unit:
        raise UserError(f"--height and --width must be multiples of {unit}, not {height} and {width}.")
    return height, width


def write_images(out: Any, images: Any, file_format: str) -> None:
    """``images.npy``, or one numbered PNG per image; those that an earlier call with more prompts left are removed."""
    import numpy as np
    from PIL import Image

    if file_format == "npy":
        np.save(out / "images.npy", images)
        return
    for i, image in enumerate(images):
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(out / f"{i:05d}.png")
    for old in out.glob("[0-9][0-9][0-9][0-9][0-9].png"):
        if int(old.stem) >= len(images):
            old.unlink()


if __name__ == "__main__":
    cli.run(main, parser())
