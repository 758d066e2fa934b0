"""The authors' 1-step SDXL: the whole U-Net, 3000 generator updates of cold start, then 1000 with rewards.

Commands:  python -m dmdr_jax.train --config=configs/paper/sdxl_1step.py:cold --workdir=DIR --config.prompts=FILE
           python -m dmdr_jax.train --config=configs/paper/sdxl_1step.py:joint --workdir=DIR --config.prompts=FILE
               --config.rewards.clip.path=... --config.rewards.hps.path=... --config.reward_decoder=TAESDXL
Hardware:  theirs 24 accelerators of 144 GB; not run here.

They started from DMD2's weights regressed on ODE pairs, at timestep 399, under a non-commercial licence; here the stage
`ode` makes that start with DMD2's settings (10000 pairs at guidance 8, batch 256, 2000 updates, rate 1e-5), its error
taken on latents in place of LPIPS on decoded images. No DynaDG and a uniform tau from the start, as biasing to high
noise gave them artifacts. Their unconditional prompt is the encoded empty one, not the zeros of SDXL's pipeline, and
their rewards saw images of TAESDXL. Their precision was fp16, ours is bf16.
"""

from ml_collections import ConfigDict

from configs.paper import common


def get_config(stage: str = "cold") -> ConfigDict:
    c = common.get_config(stage, cold_steps=3000, reward_weight=0.3)
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.height = c.width = 1024
    c.student.steps, c.student.timesteps, c.student.shift = 1, (399,), 1.0
    c.generator.kind = "full"
    c.fake.lora.targets = "wide"
    c.guidance.scale, c.guidance.uncond = 7.0, "empty"
    c.dynamics.dg, c.dynamics.rs = 0.0, "uniform"
    c.ode.steps, c.ode.pairs, c.ode.guidance, c.ode.batch, c.ode.lr = 2000, 10_000, 8.0, 256, 1e-5
    joint = stage == "joint"
    c.steps = 4000 if joint else 3000
    c.batch = 96 if joint else 192
    c.optim.generator.lr = c.optim.fake.lr = 5e-8 if joint else 1e-7
    return c
