"""DMDR in the embedded world: the SDXL-shaped teacher becomes a 4-step generator.

Command:   python -m dmdr_jax.train --config=configs/shapes/sdxl.py --workdir=runs/shapes_sdxl
Result:    three seeds, 480 prompts (docs/results.md): strict verdict .744 +- .037 at 4 NFE, where the teacher has .671
           at 50 NFE and .575 at 8; .689 after 500 updates. 54 CPU minutes on an AMD EPYC, shared.
`bash launch/demo.sh sdxl` trains it and measures it. Settings of configs/shapes/sd3.py where nothing is said.
"""

from ml_collections import ConfigDict

from configs.shapes import sd3


def get_config() -> ConfigDict:
    c = sd3.get_config()
    c.steps = 1000  # level with its teacher after 500, above it after 1000
    c.model = "shapes:sdxl"  # the grid has timesteps 999, 749, 499, 249
    return c
