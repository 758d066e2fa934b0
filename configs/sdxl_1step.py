"""DMDR for Stable Diffusion XL at 1024 px in one step: the whole U-Net, from pure noise at timestep 399.

Command:   python -m dmdr_jax.train --config=configs/sdxl_1step.py --workdir=DIR --config.prompts=FILE
Hardware:  not yet run at this size; nothing here is a measured recommendation.

One step from k = 999 leaves block noise in SDXL, so DMD2 and DMDR condition the network on k = 399 while its input is
pure noise. That asks for another start than the teacher: the stage `ode` first regresses on pairs that the teacher
makes (the authors started from DMD2's regressed weights, whose licence is non-commercial). Then as
configs/paper/sdxl_1step.py (uniform tau, no DynaDG: high noise first brought artifacts there), with DMD2's learning
rate 5e-7, tau within [0.02, 0.98], zeros as the unconditional prompt, and an averaged generator.
"""

from ml_collections import ConfigDict

from configs import sdxl


def get_config() -> ConfigDict:
    c = sdxl.get_config()
    c.student.steps = 1
    c.student.timesteps = (399,)
    c.generator.kind = "full"
    c.ode.steps = 2000
    c.ode.pairs = 10_000
    c.ode.guidance = 8.0
    c.ode.lr = 1e-5
    c.dynamics.dg = 0.0
    c.dynamics.rs = "uniform"
    c.optim.generator.lr = c.optim.fake.lr = 5e-7
    for reward in c.rewards.values():
        reward.start = 3000
    return c
