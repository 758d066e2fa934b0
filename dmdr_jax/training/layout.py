"""Where a run's arrays live: the mesh and the placements, in one object that the loop asks."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from dmdr_jax.training import sharding
from dmdr_jax.training.state import TrainState

Tree = Any

SPLIT = ("transformer", "unet", "text_encoder_3")
"""Components large enough to be split over fsdp."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with axes data, fsdp and tensor, and what is placed how on it."""

    mesh: jax.sharding.Mesh

    @classmethod
    def make(cls, data: int, fsdp: int) -> "Layout":
        return cls(sharding.make_mesh(data, fsdp))

    def check_batch(self, batch: int) -> None:
        """UserError where the batch does not divide over the mesh."""
        sharding.batch_sharding(self.mesh, batch)

    def put_batch(self, tree: Tree) -> Tree:
        """Arrays ``[b, ...]`` that every process holds whole, split over the devices; each feeds its own."""

        def put(x):
            rows = np.asarray(x)
            return _place(rows, sharding.batch_sharding(self.mesh, len(rows)))

        return jax.tree.map(put, tree)

    def replicate(self, tree: Tree) -> Tree:
        """One copy of each array on every device."""
        return jax.tree.map(lambda x: _place(x, sharding.replicated(self.mesh)), tree)

    def drawing(self, images: int) -> tuple[int, jax.sharding.Sharding | None]:
        """How many of so many images to draw at a time, and how they are split: evenly over all devices."""
        devices = math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES)
        if devices == 1:
            return images, None
        batch = -(-images // devices) * devices
        return batch, sharding.batch_sharding(self.mesh, batch)

    def component_shardings(self, component: str, abstract: Tree) -> Tree:
        """Where a frozen network's tensors go as they are read: the denoiser and T5 split, the rest whole."""
        if component in SPLIT:
            return sharding.parameter_shardings(self.mesh, abstract)
        return jax.tree.map(lambda _: sharding.replicated(self.mesh), abstract)

    def abstract_state(self, state: TrainState) -> TrainState:
        """Shapes with shardings: a moment is placed like the parameter it follows, scalars on every device."""
        shardings = sharding.parameter_shardings(self.mesh, state)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        where = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{self.mesh.size} {self.mesh.devices.flat[0].platform} device(s){where} ({sizes})"


def _place(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array where it belongs; of several processes each hands over what its own devices hold.

    (`jax.device_put` would first compare what all of them hold, which waits for all of them.)
    """
    if where.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
