"""DMDR in the embedded world: the SDXL-shaped teacher becomes a 4-step generator.

Command:   python -m dmdr_jax.train --config=configs/shapes/sdxl.py --workdir=runs/shapes_sdxl
`bash launch/demo.sh sdxl` trains it and measures it. Settings of configs/shapes/sd3.py where nothing is said.
"""

from ml_collections import ConfigDict

from configs.shapes import sd3


def get_config() -> ConfigDict:
    c = sd3.get_config()
    c.model = "shapes:sdxl"  # the grid has timesteps 999, 749, 499, 249
    return c
