"""Inception-v3 as the Frechet inception distance has it (Szegedy et al. 2016; Heusel et al. 2017).

The network of 2015-12-05 that TensorFlow's FID was defined with, in the layout of
``pt_inception-2015-12-05-6726825d.pth``, whose names are torchvision's. It differs from torchvision's network: average
pools leave padding out of the mean, and the last block takes a maximum where others average. Its features are the means
over the last 8 x 8 positions.

`to_input` prepares images as clean-fid does (Parmar et al. 2022: Pillow's antialiased bicubic resize of each channel in
floats) or as pytorch-fid does (bilinear without antialiasing); their distances differ, so a table names one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.rewards.weights import fill_tree, open_weights

Array = jax.Array

SIDE, WIDTH = 299, 2048
RESIZES = ("clean", "pytorch")
_EPS = 1e-3  # of the batch normalisations
_UNUSED = ("fc.", "AuxLogits.")


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics, ReLU (torchvision's ``BasicConv2d``)."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _Conv(self.features, self.size, self.stride, self.padding, name="conv")(x)
        return jax.nn.relu(_Norm(name="bn")(x))


class _Conv(nn.Module):
    features: int
    size: tuple[int, int]
    stride: int
    padding: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        pads = [(pad, pad) for pad in self.padding]
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, pads, dimension_numbers=layout)


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("running_mean", zeros, shape), self.param("running_var", ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(variance + _EPS)) + bias


def _max_pool(x: Array, stride: int, padding: int = 0) -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), [(padding, padding)] * 2)


def _mean_pool(x: Array) -> Array:
    """3 x 3 mean of what lies inside the picture."""
    return nn.avg_pool(x, (3, 3), (1, 1), [(1, 1)] * 2, count_include_pad=False)


class MixedA(nn.Module):
    """35 x 35 block."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), padding=(2, 2), name="branch5x5_2")(five)
        three = ConvNorm(64, name="branch3x3dbl_1")(x)
        three = ConvNorm(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(three)
        three = ConvNorm(96, (3, 3), padding=(1, 1), name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_features, name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([one, five, three, pool], -1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = ConvNorm(384, (3, 3), stride=2, name="branch3x3")(x)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), stride=2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _max_pool(x, 2)], -1)


class MixedC(nn.Module):
    """17 x 17 block."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, row, column = self.width, ((1, 7), (0, 3)), ((7, 1), (3, 0))
        one = ConvNorm(192, name="branch1x1")(x)
        seven, double = ConvNorm(c, name="branch7x7_1")(x), ConvNorm(c, name="branch7x7dbl_1")(x)
        for i, (features, (size, padding)) in enumerate([(c, row), (192, column)], 2):
            seven = ConvNorm(features, size, padding=padding, name=f"branch7x7_{i}")(seven)
        for i, (features, (size, padding)) in enumerate([(c, column), (c, row), (c, column), (192, row)], 2):
            double = ConvNorm(features, size, padding=padding, name=f"branch7x7dbl_{i}")(double)
        pool = ConvNorm(192, name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([one, seven, double, pool], -1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), stride=2, name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), padding=(0, 3), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), padding=(3, 0), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), stride=2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _max_pool(x, 2)], -1)


class MixedE(nn.Module):
    """8 x 8 block; the last one pools by maximum."""

    by_maximum: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def fork(x: Array, name: str) -> list[Array]:
            row = ConvNorm(384, (1, 3), padding=(0, 1), name=f"{name}a")(x)
            return [row, ConvNorm(384, (3, 1), padding=(1, 0), name=f"{name}b")(x)]

        one = ConvNorm(320, name="branch1x1")(x)
        three = ConvNorm(384, name="branch3x3_1")(x)
        double = ConvNorm(448, name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        pool = ConvNorm(192, name="branch_pool")(_max_pool(x, 1, 1) if self.by_maximum else _mean_pool(x))
        forks = [*fork(three, "branch3x3_2"), *fork(double, "branch3x3dbl_3")]
        return jnp.concatenate([one, *forks, pool], -1)


class Inception(nn.Module):
    """Pictures to features."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[b, 299, 299, 3]``, about in [-1, 1], to ``[b, 2048]``."""
        x = ConvNorm(32, (3, 3), stride=2, name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), padding=(1, 1), name="Conv2d_2b_3x3")(x)
        x = ConvNorm(80, name="Conv2d_3b_1x1")(_max_pool(x, 2))
        x = ConvNorm(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _max_pool(x, 2)
        for letter, pool_features in zip("bcd", (32, 64, 64)):
            x = MixedA(pool_features, name=f"Mixed_5{letter}")(x)
        x = MixedB(name="Mixed_6a")(x)
        for letter, width in zip("bcde", (128, 160, 160, 192)):
            x = MixedC(width, name=f"Mixed_6{letter}")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(name="Mixed_7b")(x)
        return MixedE(by_maximum=True, name="Mixed_7c")(x).mean((1, 2))


def load_inception(path: str | Path) -> Any:
    """The network's parameters from ``pt_inception-2015-12-05-6726825d.pth`` (or the same tensors in safetensors).

    Raises:
      UserError: the file is not there or not this network's.
    """
    if not Path(path).expanduser().is_file():
        raise UserError(f"there is no file {path}: give pt_inception-2015-12-05-6726825d.pth.")
    tensors = open_weights(Path(path).expanduser())
    abstract = keymap.abstract(Inception(), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))

    def unused(name: str) -> bool:
        return name.startswith(_UNUSED) or name.endswith("num_batches_tracked")

    return fill_tree(abstract, tensors, path, lambda leaf: jnp.float32, unused)


def to_input(images: Sequence[np.ndarray], resize: str = "clean") -> np.ndarray:
    """uint8 images of any sizes as the network's input ``[b, 299, 299, 3]``, resized as ``resize`` says."""
    if resize == "clean":
        return np.stack([_pillow(image) for image in images]) / np.float32(128) - 1
    return np.stack([_bilinear(image) for image in images]) / np.float32(127.5) - 1


def _pillow(image: np.ndarray) -> np.ndarray:
    """Pillow's bicubic of each channel in floats, not rounded."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels]
    return np.stack(resized, -1)


def _bilinear(image: np.ndarray) -> np.ndarray:
    """Bilinear without antialiasing, pixel centres at halves (``align_corners=False``)."""
    x = image.astype(np.float32)
    for axis in (0, 1):
        n = x.shape[axis]
        half = np.float32(0.5)  # places in fp32, as PyTorch has them
        at = np.maximum((np.arange(SIDE, dtype=np.float32) + half) * np.float32(n / SIDE) - half, 0)
        low = np.minimum(np.floor(at).astype(int), n - 1)
        share = np.expand_dims(at - low.astype(np.float32), (1, 2) if axis == 0 else (0, 2))
        high = np.minimum(low + 1, n - 1)
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x
