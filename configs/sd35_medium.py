"""DMDR for Stable Diffusion 3.5 Medium at 512 px: a LoRA that draws in 4 steps.

Command:   python -m dmdr_jax.train --config=configs/sd35_medium.py --workdir=DIR --config.prompts=FILE
Hardware:  not yet run at this size; nothing here is a measured recommendation.

The paper does not treat this model. The settings are those of configs/sd3_medium.py; the LoRA adapts the second,
image-only attention of its first blocks too.
"""

from ml_collections import ConfigDict

from configs import sd3_medium


def get_config() -> ConfigDict:
    c = sd3_medium.get_config()
    c.model = "stabilityai/stable-diffusion-3.5-medium"
    c.generator.lora.targets = c.fake.lora.targets = "wide"
    return c
