"""The authors' 4-step SD3-Medium: LoRA of rank 64, 2000 generator updates of cold start, then as many with rewards.

Commands:  python -m dmdr_jax.train --config=configs/paper/sd3_medium.py:cold --workdir=DIR --config.prompts=FILE
           python -m dmdr_jax.train --config=configs/paper/sd3_medium.py:joint --workdir=DIR --config.prompts=FILE
               --config.rewards.clip.path=... --config.rewards.hps.path=...
Hardware:  theirs 24 accelerators of 144 GB; not run here.

512 px, although their experiment's name says 1024. The simulation is `ode_final`: the final sample of the Euler
trajectory, renoised to the level of the student's call, on a grid that ends at t = 0.001. These inputs are not what
inference visits; configs/sd3_medium.py departs from it.
"""

from ml_collections import ConfigDict

from configs.paper import common


def get_config(stage: str = "cold") -> ConfigDict:
    c = common.get_config(stage, cold_steps=2000, reward_weight=0.3)
    c.model = "stabilityai/stable-diffusion-3-medium-diffusers"
    c.height = c.width = 512
    c.student.simulation, c.student.grid, c.student.shift = "ode_final", "authors", 3.0
    c.guidance.scale = 7.0
    c.dynamics.steps, c.dynamics.dg = 2000, 0.5
    joint = stage == "joint"
    c.steps = 4000 if joint else 2000
    c.batch = 96 if joint else 192
    c.optim.generator.lr, c.optim.fake.lr = (5e-7, 2e-7) if joint else (1e-6, 5e-7)
    return c
