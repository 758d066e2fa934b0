"""The main claim at the paper's lengths, for an accelerator: 4000 updates of 192 prompts, five fake updates to each.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/long.py --out=runs/long --jobs=4
          long.py:sdxl and long.py:sdxl_1step for the SDXL shape.

The jobs share the accelerator, so that one compiles or evaluates while the others train. Rates are a quarter of the
short runs', which is a guess: 8 times the updates and 6 times the prompts.
"""

from configs.shapes.experiments import main
from dmdr_jax.experiments.spec import Experiment

UPDATES, COLD = 4000, 2000
SETTINGS = {
    "batch": 192,
    "fake.updates": 5,
    "dynamics.steps": COLD,
    "dynamics.rs": "dynamic",
    "optim.generator.lr": 5e-5,
    "optim.fake.lr": 2.5e-4,
    "ema": 0.99,
    **main.rewards_from(COLD, ramp=100),
}


def get_experiment(shape: str = "sd3") -> Experiment:
    one_step = {"dynamics.dg": 0.0, "dynamics.rs": "uniform"} if shape == "sdxl_1step" else {}
    name = "long" if shape == "sd3" else f"long_{shape}"
    return main.make(name, shape, UPDATES, UPDATES // 10, SETTINGS | one_step)
