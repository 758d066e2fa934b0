"""Which mesh a run gets where its configuration leaves it open: from the devices' memory and what must lie in it.

Only what lives between steps is weighed, by arithmetic; an update's own memory must find room in the rest. The rules:

* `fsdp` is the smallest that leaves enough room, preferring that every device has all of the frozen denoiser, which is
  then never gathered.
* Where all of the denoiser is trained it is at least `FULL_FSDP`, so that gradients are summed in parts: to add up
  whole ones costs twice the traffic and the memory.
* `fsdp` is a part of a slice, never a large slice whole, nor a small one of three axes (`v5p:2x2x2`): along all of such
  a torus the compiler makes of each scatter a sum of whole arrays.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmdr_jax.training import runtime
from dmdr_jax.training.layout import DENOISERS, Layout
from dmdr_jax.training.rules import SPLIT_COMPONENTS
from dmdr_jax.training.sharding import count_slices

Tree = Any

SHARE = 0.5
"""Of a device's memory, for what lives between steps."""
FULL_FSDP = 8
SMALL_SLICE = 8
"""Devices of a slice of at most two axes that fsdp may span whole."""


class Residents(NamedTuple):
    """Bytes that live between steps, each of one whole copy.

    Attributes:
      base: the frozen denoiser.
      trained: the train state.
      text: text encoders that can be split.
      whole: what every device holds; the rewards are counted here, although their towers are split with the base.
      full: all of the denoiser is trained.
    """

    base: int
    trained: int
    text: int
    whole: int
    full: bool

    def per_device(self, fsdp: int, split_base: bool) -> float:
        base = self.base / fsdp if split_base else self.base
        return base + (self.trained + self.text) / fsdp + self.whole


def size(tree: Tree) -> int:
    """Bytes of arrays or of shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def residents(state: Tree, params: dict[str, Tree], rewards: Tree, full: bool) -> Residents:
    """Of a train state, a pipeline's parameters and the rewards'."""
    base = sum(size(tree) for name, tree in params.items() if name in DENOISERS)
    text = sum(size(tree) for name, tree in params.items() if name in SPLIT_COMPONENTS and name not in DENOISERS)
    others = sum(size(tree) for name, tree in params.items() if name not in SPLIT_COMPONENTS)
    return Residents(base, size(state), text, others + size(rewards), full)


def candidates(slice_size: int, full: bool, deep: bool = False) -> list[int]:
    """Sizes of fsdp, ascending, for a slice of three axes (``deep``) or fewer."""
    sizes = [2**k for k in range(slice_size.bit_length()) if slice_size % 2**k == 0]
    parts = [n for n in sizes if n < slice_size or (slice_size <= SMALL_SLICE and not deep)]
    return [n for n in parts if n >= min(FULL_FSDP, parts[-1])] if full else parts


def choose(slice_size: int, limit: float, held: Residents, deep: bool = False) -> tuple[int, bool]:
    """The size of fsdp and whether the frozen denoiser is split over it.

    Args:
      slice_size: devices of one slice.
      limit: bytes of a device.
      deep: the slice has three axes.

    Returns:
      Where nothing leaves room: as many parts as there may be.
    """
    parts = candidates(slice_size, held.full, deep)
    for split_base in (False, True):
        for fsdp in parts:
            if held.per_device(fsdp, split_base) <= SHARE * limit:
                return fsdp, split_base and fsdp > 1
    return parts[-1], parts[-1] > 1


def has_three_axes(devices: Sequence[Any]) -> bool:
    """Whether a slice is more than one chip long in three directions; devices that say nothing of it have none."""
    places = [tuple(device.coords) for device in devices if getattr(device, "coords", None)]
    return bool(places) and sum(len(set(along)) > 1 for along in zip(*places)) == 3


def memory_limit(devices: Sequence[Any]) -> float:
    """Bytes of a device's memory, of those of this process, for others say nothing here; infinite where it does not."""
    own = next(device for device in devices if device.process_index == jax.process_index())
    return float((own.memory_stats() or {}).get("bytes_limit", math.inf)) if own.platform != "cpu" else math.inf


def make_layout(
    mesh: Any, held: Callable[[], Residents], devices: Sequence[jax.Device] | None = None, limit: float | None = None
) -> Layout:
    """The layout that ``config.mesh`` asks for; see `sizes`."""
    devices = jax.devices() if devices is None else devices
    limit = runtime.from_first(memory_limit(devices)) if limit is None else limit
    data, fsdp, split = sizes(mesh, held, devices, limit)
    return Layout.make(data, fsdp, split, devices)


def sizes(mesh: Any, held: Callable[[], Residents], devices: Sequence[Any], limit: float) -> tuple[int, int, bool]:
    """Sizes of data and fsdp, and whether the frozen denoiser is split.

    Args:
      mesh: with ``data``, ``fsdp`` (0: to be chosen) and ``base`` ("auto", "split" or "whole").
      held: gives what is to be placed; called where it is needed.
      limit: bytes of a device; infinite where that is not known, and then nothing that may be whole is split.
    """
    in_slice = len(devices) // count_slices(devices)
    fsdp, split = mesh.fsdp, mesh.base != "whole"
    if not fsdp and mesh.data > 0:
        fsdp = max(len(devices) // mesh.data, 1)  # what data leaves
    if not fsdp and (in_slice == 1 or math.isinf(limit)):
        fsdp = 1
    elif not fsdp:
        fsdp, chosen = choose(in_slice, limit, held(), has_three_axes(devices))
        split = chosen if mesh.base == "auto" else split
    elif mesh.base == "auto" and fsdp > 1 and not math.isinf(limit):
        split = held().per_device(fsdp, split_base=False) > SHARE * limit
    return mesh.data, fsdp, split
