"""Where a network's parameters are split over devices, and how a layer gets one whole.

A parameter is stored split along one axis over the mesh axis `fsdp` and gathered where it is used, in the type in which
it is used: once per layer call, inside the loop over blocks, so that one block's weights are whole at a time. Its
gradient goes the same way back: each device keeps the sum of its part alone, and no gradient is whole anywhere.

Without a mesh about it (`jax.sharding.use_abstract_mesh`), or with one device along `fsdp`, nothing of this happens.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, PartitionSpec

Array = jax.Array
Product = Callable[[Array, Array], Array]

FSDP = "fsdp"
BATCH_AXES = ("data", FSDP)
"""Mesh axes that split the batch."""
GATHER_NAME = "gathered"
"""Of a parameter that was made whole, for those who read a program."""
MIN_SIZE = 2**16
"""Elements; gathering a smaller array costs more time than keeping it whole costs memory."""
MIN_PART = 32
TILE = (16, 128)
"""Of a bfloat16 array in a TPU's memory."""


def split_spec(shape: Sequence[int], parts: int, min_size: int = MIN_SIZE) -> PartitionSpec:
    """Which axis of a parameter of one layer is split, of those that ``parts`` divides.

    It is the first whose parts are `MIN_PART` long, where the parts of a sum lie together in memory; where a sum was to
    be split along its last axis, a compiler may add up the whole. Where there is none it is the largest.

    Args:
      shape: of one layer, without the axis of a stack.
      min_size: arrays with fewer elements stay whole.
    """
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    long = [axis for axis in divisible if shape[axis] >= MIN_PART * parts]
    split = long[0] if long else max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[FSDP if axis == split else None for axis in range(split + 1)])


def product(function: Product, x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """``function(x, kernel)`` with the kernel whole and in ``dtype``; its gradient comes back split.

    Args:
      function: linear in either argument; of rows ``[b, ...]``, each by itself.
      kernel: of one layer, split over devices or not.
    """
    spec = split_spec(kernel.shape, axis_size(FSDP))
    if spec == PartitionSpec():
        return function(x, kernel.astype(dtype))
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    return _split_product(_Split(function, dtype, spec, *shapes), x, kernel)


class _Split(NamedTuple):
    """What is static about the product with a split kernel."""

    function: Product
    dtype: jnp.dtype
    spec: PartitionSpec
    x: jax.ShapeDtypeStruct
    kernel: jax.ShapeDtypeStruct

    def gather(self, kernel: Array) -> Array:
        if self.dtype != self.kernel.dtype:  # what is sent is what is used
            kernel = jax.lax.with_sharding_constraint(kernel.astype(self.dtype), self.spec)
        return checkpoint_name(jax.lax.with_sharding_constraint(kernel, PartitionSpec()), GATHER_NAME)

    def of_x(self, kernel: Array, gradient: Array) -> Array:
        (found,) = jax.linear_transpose(lambda x: self.function(x, kernel), self.x)(gradient)
        return found

    def of_kernel(self, x: Array, gradient: Array) -> Array:
        """The sum over all rows: each device's own, and then of each part on the device that has it.

        Left to itself the compiler sums whole arrays where there are few rows.
        """

        def own(x: Array, gradient: Array) -> Array:
            like = jax.ShapeDtypeStruct(self.kernel.shape, self.dtype)
            (found,) = jax.linear_transpose(lambda kernel: self.function(x, kernel), like)(gradient)
            return found

        def summed(x: Array, gradient: Array) -> Array:
            return sum_of_parts(own(x, gradient), len(self.spec) - 1)

        if self.x.shape[0] % batch_parts():
            return jax.lax.with_sharding_constraint(own(x, gradient), self.spec).astype(self.kernel.dtype)
        mesh, rows = jax.sharding.get_abstract_mesh(), PartitionSpec(BATCH_AXES)
        on_rows = jax.shard_map(summed, mesh=mesh, in_specs=(rows, rows), out_specs=self.spec, check_vma=False)
        return on_rows(x, gradient).astype(self.kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split_product(split: _Split, x: Array, kernel: Array) -> Array:
    return split.function(x, split.gather(kernel))


def _forward(split: _Split, x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    whole = split.gather(kernel.value)
    kept = x.value if kernel.perturbed else None, whole if x.perturbed else None
    return split.function(x.value, whole), kept


def _backward(split: _Split, kept: tuple[Array | None, Array | None], gradient: Any) -> tuple[Any, Any]:
    x, whole = kept
    if isinstance(gradient, SymbolicZero):
        return None, None
    return (
        None if whole is None else split.of_x(whole, gradient),
        None if x is None else split.of_kernel(x, gradient),
    )


_split_product.defvjp(_forward, _backward, symbolic_zeros=True)


def sum_of_parts(array: Array, axis: int) -> Array:
    """Each device's part along ``axis`` of the sum over all devices; inside `jax.shard_map`.

    A TPU keeps arrays in tiles of the last two axes. Where the parts are not whole tiles its compiler would sum all of
    the array on every device; there the parts are first laid out one after the other, each filled up to whole tiles.
    """
    if axis and array.shape[0] == 1:  # a convolution of one pixel is summed as the matrix that it is
        return sum_of_parts(array[0], axis - 1)[None]
    parts = axis_size(FSDP)
    rows, lanes = TILE
    if axis < array.ndim - 1 and array.shape[axis] // parts % rows == 0 and array.shape[-1] % lanes == 0:
        return _over_data(jax.lax.psum_scatter(array, FSDP, scatter_dimension=axis, tiled=True))
    first = jnp.moveaxis(array, axis, 0)
    blocks = first.reshape(parts, -1)
    size = blocks.shape[1]
    tiles = jnp.pad(blocks, ((0, 0), (0, -size % (rows * lanes)))).reshape(-1, lanes)
    part = _over_data(jax.lax.psum_scatter(tiles, FSDP, scatter_dimension=0, tiled=True))
    return jnp.moveaxis(part.reshape(-1)[:size].reshape(-1, *first.shape[1:]), 0, axis)


def _over_data(part: Array) -> Array:
    return jax.lax.psum(part, "data") if axis_size("data") > 1 else part


def unsplit() -> contextlib.AbstractContextManager:
    """Around calls of networks that every device holds whole: nothing about them is gathered."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def batch_parts() -> int:
    """Over how many devices the mesh about this code splits a batch; 1 without a mesh."""
    return math.prod(axis_size(axis) for axis in BATCH_AXES)


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh about this code; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(name, 1)
