"""Pictures on disk: found in the order of their names, read as scorers read them, written whole or not at all."""

import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmdr_jax.errors import UserError

READERS = 8  # threads that decode files
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_TO_8_BIT = 257  # 65535 / 255


def image_files(folder: str | Path) -> list[Path]:
    """The images that lie in a folder (not in folders inside it), in the order of their file names.

    Args:
      folder: of images in any format that Pillow reads; other files in it are passed over.

    Raises:
      UserError: there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder of images {folder}: check the path.")
    Image.init()
    readable = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    files = [f for f in folder.iterdir() if f.suffix.lower() in readable and not f.name.startswith(".")]
    if not files:
        raise UserError(f"{folder} holds no image that Pillow can read: give the folder that the images lie in.")
    return sorted(files, key=lambda file: file.name)


def read_image(file: str | Path) -> np.ndarray:
    """An image as uint8 ``[h, w, 3]``, the way scorers do it: ``Image.open(file).convert("RGB")``.

    Transparency is dropped, of an animation the first picture is taken, 16-bit grey is reduced to 8 bits.

    Raises:
      UserError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(file) as image:
            if image.mode in _DEEP:
                grey = np.asarray(image).astype(np.float64) / _TO_8_BIT
                return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"{file} is no image that can be read ({error}): mend or remove it.") from None


def read_images(files: Sequence[str | Path]) -> list[np.ndarray]:
    """Several images, decoded at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read_image, files))


def digest(file: str | Path) -> str:
    """What the bytes of a file are known by; a file that did not change is read once."""
    stat = os.stat(file)
    return _digest(os.fspath(file), stat.st_mtime_ns, stat.st_size)


@functools.cache
def _digest(file: str, changed: int, size: int) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def digests(files: Sequence[str | Path]) -> list[str]:
    """`digest` of several files."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, files))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as diffusers writes them: rounded to 8 bits."""
    return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def write_image(file: Path, image: np.ndarray | Image.Image, **options) -> None:
    """Writes uint8 ``[h, w, 3]`` (or a Pillow image) so that the file is there whole or not at all."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    kind = Image.registered_extensions()[file.suffix.lower()]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    picture.save(partial, format=kind, **options)
    partial.replace(file)
