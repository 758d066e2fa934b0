"""Scoring within memory: in micro-batches, each recomputed in the backward pass.

The pixels of one 1024 x 1024 image and what its decoder and a ViT-H keep for the gradient are gigabytes; a batch
of latents is not. `in_microbatches` runs a function on a few rows at a time and keeps their inputs alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


def in_microbatches(fn: Callable[..., Tree], size: int, *, remat: bool = True) -> Callable[..., Tree]:
    """A function of batches as a function of the same batches that works on ``size`` rows at a time.

    Args:
      fn: maps arrays (or trees of arrays) `[b, ...]` to arrays `[b, ...]`, each row from its own row alone. What it
        closes over is the same for all rows and may be differentiated too.
      size: rows at a time; 0 means all at once. A batch that does not divide is filled up with its last row, whose
        results are dropped.
      remat: recompute ``fn`` in the backward pass, so that one micro-batch's activations exist at a time.

    Returns:
      A function with the results and gradients of ``fn``. Rows are dealt out in strides, so that where the batch is
      split over devices every device works on every micro-batch.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, and is {size}")

    def run(*args: Tree) -> Tree:
        rows = jax.tree.leaves(args)[0].shape[0]
        if not 0 < size < rows:
            return jax.checkpoint(fn)(*args) if remat else fn(*args)
        inner = jax.checkpoint(fn, prevent_cse=False) if remat else fn  # a loop's body is not merged with another
        lots = -(-rows // size)
        dealt = jax.tree.map(lambda x: _deal(_filled(x, lots * size), size), args)
        found = jax.lax.map(lambda lot: inner(*lot), dealt)
        return jax.tree.map(lambda x: _collect(x)[:rows], found)

    return run


def _filled(x: Array, rows: int) -> Array:
    missing = rows - x.shape[0]
    return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else x


def _deal(x: Array, size: int) -> Array:
    """`[size * lots, ...]` to `[lots, size, ...]`; lot j has the rows j, j + lots, j + 2 lots, ..."""
    return jnp.moveaxis(x.reshape(size, -1, *x.shape[1:]), 1, 0)


def _collect(x: Array) -> Array:
    """The inverse of `_deal`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
