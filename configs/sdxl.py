"""DMDR for Stable Diffusion XL at 1024 px: a LoRA that draws in 4 steps, at timesteps 999, 749, 499 and 249.

Command:   python -m dmdr_jax.train --config=configs/sdxl.py --workdir=DIR --config.prompts=FILE
Hardware:  not yet run at this size; nothing here is a measured recommendation.

The authors report this model but published no settings for it. The grid is DMD2's (arXiv 2405.14867), the guidance and
the reward weights are those of their 1-step model, the cold start that of their SD3 models. As in DMD2 the simulation
renoises (the released code renoised the x0 of step i to level i, one step off what inference does), the unconditional
prompt is zeros as in SDXL's own pipeline, and the LoRA adapts the convolutions as well. Learning rates are DMD2's for
its LoRA. Rewards see images of the full autoencoder; `--config.reward_decoder=FOLDER` takes TAESDXL in its place, as
the authors did, in a fraction of the memory.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model = "stabilityai/stable-diffusion-xl-base-1.0"
    c.variant = "fp16"
    c.height = c.width = 1024
    c.compute_dtype = c.base_dtype = "bfloat16"
    c.remat = "full"
    c.steps = 4000
    c.batch = 96
    c.student.shift = 1.0
    c.generator.lora.targets = c.fake.lora.targets = "wide"
    c.optim.generator.lr = c.optim.fake.lr = 5e-5
    c.rewards.clip = base.reward("", weight=0.0, kind="dfn", start=2000)  # DFN5B-CLIP H/14 in the paper, weight 0.3
    c.rewards.hps = base.reward("", weight=0.0, kind="hps", start=2000)  # HPSv2.1, weight 0.3
    c.watch.rewards.pick = base.judge("", kind="pickscore")  # held out: PickScore_v1, watched where its path is given
    return c
