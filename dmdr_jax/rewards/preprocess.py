"""From pixels to what an image tower takes: each reward's own way to a square, then mean and standard deviation.

Two paths that agree up to the rounding of 8-bit images. `Preprocessing.__call__` is differentiable and works on
the images of one batch; `Preprocessing.published` does what the reward's own program does with image files of any
size, Pillow's rounding included, and is what tables are made with.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import clamp_images

Array = jax.Array

# OpenAI's, which open_clip, transformers, HPSv2 and ImageReward share.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RESIZES = ("squash", "crop", "pad")
CROPS = ("floor", "round")


_OPEN_CLIP_RESIZES = {"squash": "squash", "shortest": "crop", "longest": "pad"}


def stated_resize(settings: Mapping[str, Any]) -> str:
    """The way to a square that an `open_clip_config.json` or a `preprocessor_config.json` says; "squash" if none."""
    if "resize_mode" in settings:
        return _OPEN_CLIP_RESIZES.get(settings["resize_mode"], "squash")
    return "crop" if settings.get("do_center_crop") else "squash"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become the tower's input; every resize is bicubic with antialiasing, Keys' a = -0.5.

    Attributes:
      size: side of the tower's square input, pixels.
      mean, std: of each channel.
      resize: "squash" to the square (DFN, DMDR's training), "crop" the centre after the short side has become
        `size` (OpenAI, PickScore, ImageReward), or "pad" with black after the long side has (HPSv2).
      crop: where an odd rest goes: "floor" as transformers' processor, "round" as torchvision's CenterCrop.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: str = "squash"
    crop: str = "floor"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UserError(f"a reward's resize must be one of {', '.join(RESIZES)}, not {self.resize!r}.")
        if self.crop not in CROPS:
            raise UserError(f"a reward's crop must be one of {', '.join(CROPS)}, not {self.crop!r}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int, **how: str) -> "Preprocessing":
        """Reads mean and std of a `preprocessor_config.json`; `size` is the tower's, `how` are resize and crop."""
        return cls(size, tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD)), **how)

    def __call__(self, images: Array) -> Array:
        """Clamps, resizes and normalises images `[b, h, w, 3]` in [0, 1]: `[b, size, size, 3]`, fp32."""
        return self.normalise(self._to_square(clamp_images(images.astype(jnp.float32))))

    def normalise(self, pixels: Array) -> Array:
        """Subtracts the mean and divides by the standard deviation of each channel."""
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def published(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What the reward's own program makes of 8-bit images.

        Args:
          images: uint8 `[h, w, 3]` each, of any sizes.

        Returns:
          Normalised pixels `[b, size, size, 3]`, fp32, on the host.

        Raises:
          UserError: an image is not uint8 with three channels.
        """
        rows = []
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(f"an image to score must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}.")
            rows.append(self._published_square(image))
        pixels = np.stack(rows) if rows else np.zeros((0, self.size, self.size, 3), np.float32)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before cropping or padding."""
        if self.resize == "squash":
            return self.size, self.size
        if self.resize == "crop":
            short, long = sorted((height, width))
            longer = int(self.size * long / short)
            return (self.size, longer) if height <= width else (longer, self.size)
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _to_square(self, images: Array) -> Array:
        height, width = self.resized_shape(*images.shape[1:3])
        shape = (images.shape[0], height, width, images.shape[3])
        if images.shape != shape:
            images = jax.image.resize(images, shape, "cubic", antialias=True)
        if self.resize == "pad":
            return jnp.pad(images, ((0, 0), self._margins(height), self._margins(width), (0, 0)))
        top, left = self._offset(height), self._offset(width)
        return images[:, top : top + self.size, left : left + self.size]

    def _published_square(self, image: np.ndarray) -> np.ndarray:
        if self.resize == "pad":  # HPSv2 resizes tensors, not 8-bit images
            return np.asarray(self._to_square(jnp.asarray(image, jnp.float32)[None] / 255.0)[0])
        from PIL import Image

        height, width = self.resized_shape(*image.shape[:2])
        if image.shape[:2] != (height, width):
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        top, left = self._offset(height), self._offset(width)
        return image[top : top + self.size, left : left + self.size].astype(np.float32) / np.float32(255)

    def _offset(self, side: int) -> int:
        """Where the centre crop begins."""
        rest = side - self.size
        return rest // 2 if self.crop == "floor" else round(rest / 2)

    def _margins(self, side: int) -> tuple[int, int]:
        before = (self.size - side) // 2
        return before, self.size - side - before
