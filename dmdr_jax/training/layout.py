"""Where a run's arrays live: the mesh and the placements, in one object that the loop asks."""

import dataclasses
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
        """Arrays ``[b, ...]`` that every process holds whole, split over the devices."""

        def put(x):
            return jax.device_put(np.asarray(x), sharding.batch_sharding(self.mesh, len(x)))

        return jax.tree.map(put, tree)

    def replicate(self, tree: Tree) -> Tree:
        """One copy of each array on every device."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

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
        return f"{self.mesh.size} {self.mesh.devices.flat[0].platform} device(s) ({sizes})"
