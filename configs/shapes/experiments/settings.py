"""What DMDR's settings do: one change at a time from configs/shapes/sd3.py.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/settings.py --out=runs/settings --jobs=2

Judged on prompts and noise of their own: this is where settings are chosen.
"""

from collections.abc import Mapping
from typing import Any

from configs.shapes.experiments.main import CONFIG, MODEL, TEACHER, UPDATES, reward_weights
from dmdr_jax.experiments.spec import Bars, Evaluation, Experiment, Row, arguments_of

CHANGES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "default": ("as it is", {}),
    "shift_3": ("grid shifted by 3", {"student.shift": 3.0}),
    "reward_3": ("rewards x 3", reward_weights(3.0)),
    "ttur_5": ("5 fake updates", {"fake.updates": 5}),
    "lr_half": ("generator's rate / 2", {"optim.generator.lr": 1e-4}),
    "uniform": ("tau uniform", {"dynamics.rs": "uniform"}),
    "decay": ("tau decays to uniform", {"dynamics.rs": "dynamic"}),
    "guidance_5": ("guidance 5", {"guidance.scale": 5.0}),
    "ode": ("from a regression on pairs", {"ode.steps": 300, "ode.pairs": 1536, "ode.batch": 64, "ode.lr": 1e-3}),
    "batch_64": ("batch 64", {"batch": 64}),
    "long": ("twice as long", {"steps": 2 * UPDATES}),
}


def get_experiment() -> Experiment:
    rows = [
        Row(label, title, config=CONFIG, overrides={"steps": UPDATES, **own}) for label, (title, own) in CHANGES.items()
    ]
    return Experiment(
        name="settings",
        rows=(Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER), *rows),
        teacher=arguments_of(MODEL, TEACHER),
        evaluation=Evaluation(seed=0),
        pairs=(*((label, "default") for label in CHANGES if label != "default"), ("default", "teacher")),
        figures=(Bars(("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")),),
    )
