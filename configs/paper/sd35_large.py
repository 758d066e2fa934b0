"""The authors' 4-step SD3.5-Large: LoRA of rank 64, 2000 generator updates of cold start, then 1000 with rewards.

Commands:  python -m dmdr_jax.train --config=configs/paper/sd35_large.py:cold --workdir=DIR --config.prompts=FILE
           python -m dmdr_jax.train --config=configs/paper/sd35_large.py:joint --workdir=DIR --config.prompts=FILE
               --config.rewards.clip.path=... --config.rewards.hps.path=...
Hardware:  theirs 24 accelerators of 144 GB; not run here.

Their rate of 2e-8 for the fake score moves its LoRA so little that it stays nearly the teacher: the score difference is
then almost the guidance term alone. Simulation and grid as in configs/paper/sd3_medium.py.
"""

from ml_collections import ConfigDict

from configs.paper import common


def get_config(stage: str = "cold") -> ConfigDict:
    c = common.get_config(stage, cold_steps=2000, reward_weight=0.1)
    c.model = "stabilityai/stable-diffusion-3.5-large"
    c.height = c.width = 1024
    c.student.simulation, c.student.grid, c.student.shift = "ode_final", "authors", 5.0
    c.guidance.scale = 4.0
    c.dynamics.steps, c.dynamics.dg = 2000, 0.5
    joint = stage == "joint"
    c.steps = 3000 if joint else 2000
    c.batch = 48 if joint else 96
    c.optim.generator.lr, c.optim.fake.lr = (1e-7, 5e-9) if joint else (1e-6, 2e-8)
    return c
