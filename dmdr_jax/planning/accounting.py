"""What lies in a device's memory between steps, by what it is for: arithmetic on shapes and placements."""

import math
from typing import Any

import jax
import numpy as np

from dmdr_jax.training.abstract import AbstractRun
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.text import text_params

Tree = Any

HOLDERS = ("base", "trained", "optimiser", "ema", "kept", "vae", "rewards", "text", "batch")
"""In the order of the table; ``kept`` is what only some methods keep, such as a reference student."""


def held(run: AbstractRun, layout: Layout) -> dict[str, float]:
    """Bytes on one device by holder, of a placed run (`AbstractRun.placed`)."""
    state, frozen = run.state, run.frozen
    text = text_params(run.pipeline).items()
    placed_text = {name: layout.abstract_component(name, tree) for name, tree in text}
    reward_text = [layout.whole(reward.text_params) for reward in run.plan.rewards if hasattr(reward, "text_params")]
    trees: dict[str, Tree] = {
        "base": frozen.base,
        "trained": (state.generator, state.fake),
        "optimiser": (state.generator_opt, state.fake_opt),
        "ema": state.ema,
        "kept": (state.extra, frozen.real),
        "vae": frozen.vae,
        "rewards": frozen.rewards,
        "text": (placed_text, reward_text),
        "batch": (run.batch, frozen.uncond, state.step, state.inner, state.key),
    }
    return {name: on_device(trees[name]) for name in HOLDERS}


def on_device(tree: Tree) -> float:
    """Bytes on one device of shapes with shardings."""
    return float(sum(_bytes(leaf) for leaf in jax.tree.leaves(tree)))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
