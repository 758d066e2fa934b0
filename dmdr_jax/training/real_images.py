"""Real images for the discriminator of `dmd2`: read once, kept as latents with their captions' features.

A folder has images and, beside each, its caption in a .txt file of the same name; a .npy file has an array of images
and beside it a .txt with one caption per line; ``shapes:[WORLD:]train`` is renders of the embedded world's training
prompts. Where there are no captions the empty one is taken, which the discriminator will notice: give captions that
read like the run's prompts. All of it lies on the devices (an SD3 caption takes some MB), so this is for hundreds of
images, not for a data set.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.data.prompts import world_of
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import encode, text_params, tokenize
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.images import to_uint8
from dmdr_jax.models.autoencoder import latents_from_raw
from dmdr_jax.models.conditioning import concatenate
from dmdr_jax.training.plan import Plan, RealImages

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 16
RENDERS = 1024
"""Images of the embedded world."""


def load_real(config: Any, pipeline: Pipeline, plan: Plan) -> RealImages | None:
    """The images of ``config.gan.images`` as latents of the run's size; None where there is no discriminator.

    Raises:
      UserError: there are none, or captions and images do not match.
    """
    if plan.method.gan is None:
        return None
    if pipeline.encoded is not None:
        raise UserError("captions of config.gan.images want the text encoders: set config.encode_once=False.")
    images, captions = read_images(config.gan.images, plan.image_size)
    vae, params = pipeline.modules["vae"], pipeline.params
    encode_image = jax.jit(lambda p, x: latents_from_raw(vae.apply({"params": p}, x, method="encode")[0], vae.config))
    fixed: dict[str, Any] = dict(size=plan.image_size, max_sequence_length=pipeline.t5_length)
    encode_text = jax.jit(partial(encode, pipeline.modules, **fixed))
    towers = text_params(pipeline)
    latents, features = [], []
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        latents.append(encode_image(params["vae"], images[part].astype(np.float32) / 127.5 - 1.0))
        features.append(encode_text(towers, tokenize(pipeline, captions[part])))
    return RealImages(jnp.concatenate(latents), concatenate(features))


def read_images(path: str, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Images ``[n, h, w, 3]`` uint8, cut to the proportions of ``size`` and resized, with their captions."""
    if path.startswith("shapes:"):
        return _renders(path, size)
    place = Path(path).expanduser()
    if _is_array(place):
        return _read_array(place, size)
    files = _image_files(place)
    texts = [file.with_suffix(".txt") for file in files]
    captions = [text.read_text(encoding="utf-8").strip() if text.is_file() else "" for text in texts]
    return np.stack([_fit(_open(file), size) for file in files]), captions


def count_images(path: str) -> int:
    """How many images `read_images` would find; no image is read.

    Raises:
      UserError: there are none.
    """
    if path.startswith("shapes:"):
        world_of(path)
        return RENDERS
    place = Path(path).expanduser()
    return len(_open_array(place)) if _is_array(place) else len(_image_files(place))


def _is_array(place: Path) -> bool:
    return place.suffix == ".npy" and place.is_file()


def _image_files(place: Path) -> list[Path]:
    if not place.is_dir():
        raise UserError(f"config.gan.images: there is no folder {place}, nor a .npy file.")
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"config.gan.images: {place} holds no image ({', '.join(SUFFIXES)}).")
    return files


def _renders(spec: str, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    from dmdr_jax.shapes.prompts import sample_batch
    from dmdr_jax.shapes.render import render

    world = world_of(spec)
    scenes, captions = sample_batch(world, RENDERS, seed=0)
    return np.stack([_fit(image, size) for image in to_uint8(render(world, scenes))]), captions


def _open_array(place: Path) -> np.ndarray:
    try:
        images = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"config.gan.images: {place} is not a readable .npy file: {error}.") from None
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        found = f"{images.dtype}{list(images.shape)}"
        raise UserError(f"config.gan.images: {place} must be uint8 [n, h, w, 3], not {found}.")
    return images


def _read_array(place: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    images = _open_array(place)
    text = place.with_suffix(".txt")
    captions = [""] * len(images)
    if text.is_file():
        captions = text.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    if len(captions) != len(images):
        raise UserError(f"config.gan.images: {text} has {len(captions)} lines for {len(images)} images.")
    return np.stack([_fit(image, size) for image in images]), captions


def _open(file: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"config.gan.images: {file} cannot be read as an image: {error}") from error


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part with the proportions of ``size``, resized to it."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(fitted)
