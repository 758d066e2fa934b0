"""The verifier as a reward that nothing is trained on: what a run in the embedded world is watched by.

    config.watch.rewards.verdict = base.judge("dmdr_jax.shapes.judge:verdict")

It has no gradient and reads the truth off the picture, where a learned judge may share a trained reward's mistakes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.python_reward import host_scorer
from dmdr_jax.shapes import verifier
from dmdr_jax.shapes.prompts import TAGS, all_records
from dmdr_jax.shapes.world import WORLDS, World

Record = Mapping[str, Any]


@host_scorer
def verdict(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """How much of its prompt each image shows, ``[b]`` in [0, 1]: the partial verdict, 0 where there is junk beside it.

    Args:
      images: ``[b, h, w, 3]`` in [0, 1] of one of the worlds, which their size tells.
      prompts: of that world.

    Raises:
      UserError: no world has such images or such a prompt.
    """
    world = _world_of(images.shape[1])
    known = _records(world)
    strange = next((prompt for prompt in prompts if prompt not in known), None)
    if strange is not None:
        raise UserError(
            f"the embedded world has no prompt {strange!r}, so that its verdict cannot be had: leave it out "
            "(config.watch.rewards.verdict.path=) or take prompts such as shapes:train."
        )
    found = verifier.judge(world, images, [known[prompt] for prompt in prompts])
    return np.where(found.junk_fraction < verifier.JUNK_LIMIT, found.partial, 0.0)


def _world_of(size: int) -> World:
    for world in WORLDS.values():
        if world.size == size:
            return world
    raise UserError(f"no embedded world has images of {size} pixels.")


@functools.cache
def _records(world: World) -> dict[str, Record]:
    """Every record by its prompt."""
    return {record["prompt"]: record for tag in TAGS for record in all_records(world, tag)}
