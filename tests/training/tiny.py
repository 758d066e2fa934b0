"""A run small enough for tests: a random SD3 folder, a random CLIP reward, a handful of prompts, no pictures."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base

PROMPTS = ["a red circle", "a blue square", "two crosses", "a cross and a square", "a green triangle"]


def config(folder: str | Path, prompts: str | Path, **changes) -> ConfigDict:
    """The default configuration at toy size; ``changes`` are dotted keys with ``__`` for the dot."""
    c = base.get_config()
    c.model, c.prompts = str(folder), str(prompts)
    c.steps, c.batch = 4, 3
    c.fake.updates = 2
    c.generator.lora.rank, c.generator.lora.alpha = 4, 8.0
    c.fake.lora.rank, c.fake.lora.alpha = 2, 2.0
    c.optim.generator.lr = c.optim.fake.lr = 1e-3
    c.dynamics.steps = 2
    c.preview.update(dict(every=100, images=0, teacher_steps=2))
    c.checkpoint.every = 2
    c.watch.every = 0
    with c.unlocked():
        for key, value in changes.items():
            *groups, last = key.split("__")
            node = c
            for group in groups:
                node = node[group]
            node[last] = value
    return c
