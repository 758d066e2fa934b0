"""LPIPS (Zhang et al. 2018), version 0.1: how far two pictures are apart in a classification network's features.

    sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2

a and b are a trunk's activations at five ReLUs, divided by their length over channels; w are learned. The trunk's
weights are torchvision's (``vgg16-397923af.pth``, ``alexnet-owt-7be5be79.pth``), the linear ones lie in the lpips
package (``lpips/weights/v0.1/vgg.pth``, ``alex.pth``).

Diversity is the mean distance of the images of one prompt to each other, drawn from different noise. It rises with
noise and artefacts too: read it beside measures of quality.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.models.layers import Conv
from dmdr_jax.rewards.weights import Tensors, fill_tree, open_weights

Array = jax.Array

SIDE = 512  # pixels; what diversity is measured at
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
_NORM_EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution with its ReLU: its number in torchvision's ``features``, its sizes, and what stands around it.

    Attributes:
      pooled: whether a maximum pool comes before it.
      seen: whether LPIPS reads its activations.
    """

    number: int
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pooled: bool = False
    seen: bool = False


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A network's convolutions, and the window of its pools (of stride 2)."""

    layers: tuple[Layer, ...]
    window: int


def _vgg() -> Trunk:
    layers, number = [], 0
    for stage, (count, features) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        for i in range(count):
            layers.append(Layer(number, features, pooled=stage > 0 and i == 0, seen=i == count - 1))
            number += 2
        number += 1
    return Trunk(tuple(layers), 2)


TRUNKS = {
    "vgg": _vgg(),
    "alex": Trunk(
        (
            Layer(0, 64, 11, 4, 2, seen=True),
            Layer(3, 192, 5, 1, 2, pooled=True, seen=True),
            Layer(6, 384, pooled=True, seen=True),
            Layer(8, 256, seen=True),
            Layer(10, 256, seen=True),
        ),
        3,
    ),
}


class TrunkFeatures(nn.Module):
    """A trunk's activations, of unit length over channels."""

    trunk: Trunk

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Pictures ``[b, h, w, 3]`` in [-1, 1] to a list of ``[b, h', w', c]``."""
        x = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        found, window = [], (self.trunk.window,) * 2
        for layer in self.trunk.layers:
            if layer.pooled:
                x = nn.max_pool(x, window, (2, 2))
            conv = Conv(layer.features, layer.size, layer.stride, layer.padding, name=f"features.{layer.number}")
            x = jax.nn.relu(conv(x))
            if layer.seen:
                found.append(x / (jnp.sqrt((x * x).sum(-1, keepdims=True)) + _NORM_EPS))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Lpips:
    """The metric, made by `load_lpips`.

    Attributes:
      params: the trunk's.
      weights: five arrays ``[c]``.
    """

    network: TrunkFeatures
    params: Any
    weights: list[Array]

    def features(self, images: Array | np.ndarray) -> list[Array]:
        """What distances are taken of, from pictures ``[b, h, w, 3]`` in [0, 1]."""
        return self._features(self.params, jnp.asarray(images, jnp.float32))

    def distance(self, a: list[Array], b: list[Array]) -> Array:
        """LPIPS ``[b]`` between the pictures that two lists of `features` are of."""
        return self._distance(self.weights, a, b)

    @functools.cached_property
    def _features(self) -> Callable:
        return jax.jit(lambda params, images: self.network.apply({"params": params}, 2 * images - 1))

    @functools.cached_property
    def _distance(self) -> Callable:
        def distance(weights: list[Array], a: list[Array], b: list[Array]) -> Array:
            parts = [(w * (x - y) ** 2).sum(-1).mean((1, 2)) for w, x, y in zip(weights, a, b)]
            return jnp.stack(parts).sum(0)

        return jax.jit(distance)

    def spread(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Mean LPIPS ``[k]`` of each of k images (uint8) to the others; their mean is the diversity.

        Images of another size are made `SIDE` x `SIDE` by Lanczos.
        """
        seen = [self.features(square(image)[None]) for image in images]
        table = np.zeros((len(seen), len(seen)))
        for i, a in enumerate(seen):
            for j, b in enumerate(seen[:i]):
                table[i, j] = table[j, i] = float(self.distance(a, b)[0])
        return table.sum(1) / (len(seen) - 1)


def square(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A uint8 picture as ``[side, side, 3]`` float32 in [0, 1]."""
    if image.shape[:2] != (side, side):
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    return image.astype(np.float32) / np.float32(255)


def load_lpips(trunk: str | Path, linear: str | Path) -> Lpips:
    """Reads torchvision's weights of VGG-16 or AlexNet, and LPIPS' own of the same trunk.

    Raises:
      UserError: a file is not there, of another network, or the two do not belong together.
    """
    for file in (trunk, linear):
        if not Path(file).expanduser().is_file():
            raise UserError(
                f"there is no file {file}: --lpips takes torchvision's weights and lpips' own, TRUNK,LINEAR."
            )
    tensors, own = open_weights(Path(trunk).expanduser()), open_weights(Path(linear).expanduser())
    network = TrunkFeatures(TRUNKS[_which(tensors, trunk)])
    abstract = keymap.abstract(network, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    params = fill_tree(abstract, tensors, trunk, lambda leaf: jnp.float32, lambda name: name.startswith("classifier."))
    return Lpips(network, params, _linear(own, linear, network.trunk))


def _which(tensors: Tensors, source: str | Path) -> str:
    """The trunk that weights are of, by its first kernel."""
    first = tensors.get("features.0.weight")
    for name, trunk in TRUNKS.items():
        layer = trunk.layers[0]
        if first is not None and first.shape == (layer.features, 3, layer.size, layer.size):
            return name
    raise UserError(f"{source} is neither torchvision's VGG-16 nor its AlexNet: LPIPS needs one of them.")


def _linear(tensors: Tensors, source: str | Path, trunk: Trunk) -> list[Array]:
    widths = [layer.features for layer in trunk.layers if layer.seen]
    names = [f"lin{i}.model.1.weight" for i in range(len(widths))]
    if any(name not in tensors or tensors[name].shape != (1, c, 1, 1) for name, c in zip(names, widths)):
        raise UserError(f"{source} does not hold LPIPS' weights for this trunk: give the vgg.pth or alex.pth of lpips.")
    return [jnp.asarray(np.array(tensors[name].load(), np.float32).reshape(-1)) for name in names]
