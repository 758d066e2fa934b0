"""The device mesh, and which array lies where on it.

Mesh axes: `data` (replicas of the parameters), `fsdp` (parameters and batch split), `tensor` (spare, 1 today). Several
TPU slices, which have a slow network between them, are parts of `data` alone. A batch is split over data and fsdp
together. Which parameters are split over fsdp is said in `dmdr_jax.training.rules`, along which axis in
`dmdr_jax.models.placement`; what is small or does not divide is kept whole on every device. Optimiser moments and EMA
have their parameter's shape and path, so the same rule puts them where their parameter is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmdr_jax.errors import UserError
from dmdr_jax.models.placement import BATCH_AXES, MIN_SIZE, split_spec
from dmdr_jax.training.rules import TRAINED, Rules, is_split

Tree = Any

AXES = (*BATCH_AXES, "tensor")

_STACK = re.compile(r".*\.\d+:\d+")  # a path component such as transformer_blocks.0:24


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes AXES of the given sizes; one of them may be -1, which means all devices that are left.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or a slice does not hold whole parts of `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = full_sizes(data, fsdp, tensor, len(devices))
    kinds = (AxisType.Auto,) * len(AXES)
    if count_slices(devices) > 1:
        return Mesh(slice_grid(sizes, devices), AXES, axis_types=kinds)
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def full_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The sizes of the axes, with what is left in place of -1; UserError where they do not fit."""
    sizes = [data, fsdp, tensor]
    text = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"a mesh of {text} has no meaning; sizes are at least 1, and one may be -1 for what is left")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != devices:
        raise UserError(f"a mesh of {text} does not fit {devices} device(s); their product must be that number")
    return sizes[0], sizes[1], sizes[2]


def count_slices(devices: Sequence[Any]) -> int:
    """TPU slices among devices; other devices are of one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def slice_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of several slices as an array of the given sizes, neighbours along `fsdp` and `tensor` in one slice.

    The slices are the outermost part of `data`, so that only what is reduced over `data` crosses between them.

    Raises:
      UserError: `data` is not a multiple of the number of slices.
    """
    slices = count_slices(devices)
    if sizes[0] % slices:
        inside = math.prod(sizes[1:])
        raise UserError(
            f"data {sizes[0]} does not divide over {slices} slices, and nothing else may cross between them: with "
            f"{len(devices)} devices, fsdp times tensor, {inside}, must divide the {len(devices) // slices} of a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Arrays [batch, ...] split on their first axis over data and fsdp.

    Raises:
      UserError: `batch` does not divide evenly.
    """
    parts = batch_parts(mesh)
    if batch % parts:
        below, above = batch - batch % parts, batch - batch % parts + parts
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"a batch of {batch} does not divide over {parts} devices "
            f"({', '.join(f'{axis} {mesh.shape[axis]}' for axis in BATCH_AXES)}); take {near}"
        )
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def parameter_spec(
    path: Sequence[str], shape: Sequence[int], fsdp: int, min_size: int = MIN_SIZE, rules: Rules = TRAINED
) -> PartitionSpec:
    """Where one parameter (or moment, or delta) is split.

    The leading axis of a stack of blocks is not: the scan over blocks takes one slice at a time, which would then lie
    on one device. Each slice is split as a layer of its own would be.

    Args:
      path: names from the root to the leaf.
      fsdp: size of the mesh axis.
      min_size: layers' arrays with fewer elements stay whole.
    """
    if fsdp == 1 or not is_split(path, rules):
        return PartitionSpec()
    stacked = any(_STACK.fullmatch(name) for name in path) and len(shape) > 0
    spec = split_spec(shape[1:] if stacked else shape, fsdp, min_size)
    return PartitionSpec(None, *spec) if stacked and spec != PartitionSpec() else spec


def parameter_shardings(mesh: Mesh, tree: Tree, min_size: int = MIN_SIZE, rules: Rules = TRAINED) -> Tree:
    """`parameter_spec` for every leaf of a tree of arrays or ShapeDtypeStructs, whatever its containers.

    Works alike on parameters, LoRA deltas, `jax.eval_shape(tx.init, params)` and whole train states.
    """

    def one(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(_names(path), leaf.shape, mesh.shape["fsdp"], min_size, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


class Report(NamedTuple):
    """How a tree lies on a mesh, in bytes.

    Attributes:
      total: of one whole copy.
      per_device: on each device.
      whole: of the part that every device holds whole.
      largest_whole: path and bytes of the largest leaf among them; None when there is none.
    """

    total: int
    per_device: int
    whole: int
    largest_whole: tuple[str, int] | None

    def __str__(self) -> str:
        text = f"{_mib(self.total)} in all, {_mib(self.per_device)} per device, {_mib(self.whole)} kept whole"
        if self.largest_whole is None:
            return text
        name, size = self.largest_whole
        return f"{text} (largest: {name}, {_mib(size)})"


def report(tree: Tree, shardings: Tree) -> Report:
    """Bytes of `tree` (arrays or ShapeDtypeStructs) under `shardings`, a tree of the same structure."""
    total = per_device = whole = 0
    largest: tuple[str, int] | None = None
    leaves, placements = jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings)
    for (path, leaf), sharding in zip(leaves, placements, strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        per_device += math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if sharding.is_fully_replicated:
            whole += size
            if largest is None or size > largest[1]:
                largest = (".".join(_names(path)), size)
    return Report(total, per_device, whole, largest)


def _names(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
