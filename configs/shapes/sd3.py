"""DMDR in the embedded world: the SD3-shaped teacher becomes a 4-step generator.

Command:   python -m dmdr_jax.train --config=configs/shapes/sd3.py --workdir=runs/shapes_sd3
Departures from the paper's settings, and why, are in docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model = "shapes:sd3"
    c.prompts = "shapes:small:train"
    c.steps = 300
    c.batch = 32

    c.student.simulation = "renoise"
    c.student.steps = 4
    c.student.shift = 3.0

    c.generator.kind = "full"
    c.fake.lora.rank = 32
    c.fake.lora.alpha = 32.0
    c.fake.lora.targets = "wide"
    c.fake.updates = 3

    c.guidance.scale = 3.0
    c.dynamics.steps = 100

    c.rewards.shapes_clip = base.reward("shapes:rewards/shapes_clip", weight=0.5, start=100, ramp=20)
    c.rewards.shapes_hps = base.reward("shapes:rewards/shapes_hps", weight=0.2, start=100, ramp=20)

    c.optim.generator.lr = 1e-4
    c.optim.fake.lr = 6e-4
    c.optim.b1 = 0.5
    c.optim.b2 = 0.98
    c.ema = 0.98

    c.preview.every = 50
    c.checkpoint.every = 50
    return c
