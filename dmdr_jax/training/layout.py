"""Where a run's arrays live: the mesh and the placements, in one object that the loop asks."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dmdr_jax.rewards.base import Reward
from dmdr_jax.rewards.scoring import gathers_layers
from dmdr_jax.training import sharding
from dmdr_jax.training.rules import FROZEN, SPLIT_COMPONENTS, WHOLE

Tree = Any

DENOISERS = ("transformer", "unet")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with axes data, fsdp and tensor, and what is placed how on it.

    Attributes:
      split_base: the frozen denoiser is split over fsdp; else every device has all of it.
    """

    mesh: jax.sharding.Mesh
    split_base: bool = True

    @classmethod
    def make(
        cls, data: int, fsdp: int, split_base: bool = True, devices: Sequence[jax.Device] | None = None
    ) -> "Layout":
        return cls(sharding.make_mesh(data, fsdp, devices=devices), split_base)

    def scope(self) -> contextlib.AbstractContextManager:
        """Around the tracing of a program on this mesh: its layers then gather what is split, and say what is a batch.

        See `dmdr_jax.models.placement`.
        """
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def on_mesh(self, function: Callable) -> Callable:
        """The function in that scope, to be compiled."""

        def on_mesh(*arguments: Any) -> Any:
            with self.scope():
                return function(*arguments)

        return on_mesh

    def check_batch(self, batch: int) -> None:
        """UserError where the batch does not divide over the mesh."""
        sharding.batch_sharding(self.mesh, batch)

    def put_batch(self, tree: Tree) -> Tree:
        """Arrays ``[b, ...]`` that every process holds whole, split over the devices; each feeds its own."""

        def put(x):
            rows = np.asarray(x)
            return _place(rows, sharding.batch_sharding(self.mesh, len(rows)))

        return jax.tree.map(put, tree)

    def put_rows(self, tree: Tree) -> Tree:
        """The same, where what has one axis is for all rows and whole."""
        return jax.tree.map(_place, tree, self.batch_shardings(tree))

    def replicate(self, tree: Tree) -> Tree:
        """One copy of each array on every device."""
        return jax.tree.map(lambda x: _place(x, sharding.replicated(self.mesh)), tree)

    def drawing(self, images: int) -> tuple[int, jax.sharding.NamedSharding | None]:
        """How many of so many images to draw at a time, and how they are split: evenly over all devices."""
        devices = sharding.batch_parts(self.mesh)
        if devices == 1:
            return images, None
        batch = -(-images // devices) * devices
        return batch, sharding.batch_sharding(self.mesh, batch)

    def component_shardings(self, component: str, abstract: Tree) -> Tree:
        """Where a frozen network's tensors go as they are read (`dmdr_jax.training.rules`)."""
        split = component in SPLIT_COMPONENTS and (self.split_base or component not in DENOISERS)
        return sharding.parameter_shardings(self.mesh, abstract, rules=FROZEN if split else WHOLE)

    def abstract_component(self, component: str, abstract: Tree) -> Tree:
        """Shapes of a frozen network's tensors, placed so."""
        return self.with_shardings(abstract, self.component_shardings(component, abstract))

    def place_reward(self, reward: Reward) -> Tree:
        """A reward's parameters on the devices."""
        return jax.tree.map(_place, reward.params, self.reward_shardings(reward))

    def reward_shardings(self, reward: Reward) -> Tree:
        """Where a reward's parameters go: a tower of ours is split where the denoiser is, for it gathers its layers."""
        split = self.split_base and gathers_layers(reward)
        return sharding.parameter_shardings(self.mesh, reward.params, rules=FROZEN if split else WHOLE)

    def batch_shardings(self, abstract: Tree) -> Tree:
        """Of an encoded batch: arrays ``[b, ...]`` split over the devices; what has one axis is for all rows, whole."""

        def where(leaf: Any) -> jax.sharding.Sharding:
            rows = leaf.ndim > 1
            return sharding.batch_sharding(self.mesh, leaf.shape[0]) if rows else sharding.replicated(self.mesh)

        return jax.tree.map(where, abstract)

    def abstract_state(self, state: Tree) -> Any:
        """Shapes with shardings: a moment is placed like the parameter it follows, scalars on every device."""
        return self.with_shardings(state, sharding.parameter_shardings(self.mesh, state))

    def whole(self, tree: Tree) -> Tree:
        """Shapes of what has one copy on every device."""
        return self.with_shardings(tree, jax.tree.map(lambda _: sharding.replicated(self.mesh), tree))

    @staticmethod
    def with_shardings(tree: Tree, shardings: Tree) -> Tree:
        """Shapes with shardings."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

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
