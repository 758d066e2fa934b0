"""DMDR in the embedded world: the SDXL-shaped teacher becomes a 1-step generator.

Command:   python -m dmdr_jax.train --config=configs/shapes/sdxl_1step.py --workdir=runs/shapes_sdxl_1step

Pure noise in, timestep 399 told, as DMD2 and DMDR do at full size: the student first regresses on pairs that the
teacher makes (`ode`), then as configs/shapes/sdxl.py without a dynamic cold start.

Result:    three seeds, 480 prompts (docs/results.md): strict verdict .445 +- .037 in 1 evaluation, where the teacher
           has .671 in 50 and .000 in one step, and distribution matching alone .347. 25 CPU minutes on an AMD EPYC.
"""

from ml_collections import ConfigDict

from configs.shapes import sdxl


def get_config() -> ConfigDict:
    c = sdxl.get_config()
    c.steps = 500
    c.student.steps = 1
    c.student.timesteps = (399,)
    c.ode.steps = 300
    c.ode.pairs = 1536
    c.ode.teacher_steps = 15
    c.ode.batch = 64
    c.ode.lr = 1e-3
    c.dynamics.dg = 0.0
    c.dynamics.rs = "uniform"
    return c
