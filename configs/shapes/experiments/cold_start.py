"""The cold start (the paper's Table 4): what DynaDG and DynaRS each add to plain DMD, at two budgets.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/cold_start.py --out=runs/cold_start --jobs=2

As in the paper the dynamics last for the larger budget, the smaller is the same runs half-way, and there is no reward.
Beside the table's rows: renoise times that stay where they start (`hold`), and plain DMD kept away from low noise,
which tell whether renoising down to low noise is what destabilises a small model.
"""

from typing import Any

from configs.shapes.experiments.main import CONFIG, EVERY, MODEL, TEACHER, reward_weights
from dmdr_jax.experiments.spec import Along, Bars, Curves, Experiment, Row, arguments_of

HALF, FULL = 200, 400
NO_DECAY = 10**9  # updates: the cosine of both schedules stays at its start

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("vanilla DMD", {"dynamics.dg": 0.0, "dynamics.rs": "uniform"}),
    "dg": ("+ DynaDG", {"dynamics.dg": 0.5, "dynamics.rs": "uniform"}),
    "rs": ("+ DynaRS", {"dynamics.dg": 0.0, "dynamics.rs": "dynamic"}),
    "both": ("+ both", {"dynamics.dg": 0.5, "dynamics.rs": "dynamic"}),
    "no_decay": ("both, no decay", {"dynamics.dg": 0.5, "dynamics.rs": "dynamic", "dynamics.steps": NO_DECAY}),
    "hold": ("high noise held", {"dynamics.dg": 0.0, "dynamics.rs": "hold"}),
    "dg_hold": ("DynaDG, high noise held", {"dynamics.dg": 0.5, "dynamics.rs": "hold"}),
    "above_20": ("vanilla, tau ≥ .2", {"dynamics.dg": 0.0, "dynamics.rs": "uniform", "dynamics.tau_low": 0.2}),
    "above_40": ("vanilla, tau ≥ .4", {"dynamics.dg": 0.0, "dynamics.rs": "uniform", "dynamics.tau_low": 0.4}),
}


def get_experiment() -> Experiment:
    common = {"steps": FULL, "dynamics.steps": FULL, **reward_weights(0.0)}
    halves = [Row(f"{label}_half", f"{title}, {HALF}", after=f"{label}@{HALF}") for label, (title, _) in KINDS.items()]
    fulls = [
        Row(label, f"{title}, {FULL}", config=CONFIG, overrides=common | own) for label, (title, own) in KINDS.items()
    ]
    dynamic = ("dg", "rs", "both", "no_decay")
    return Experiment(
        name="cold_start",
        rows=(Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER), *halves, *fulls),
        teacher=arguments_of(MODEL, TEACHER),
        along=Along(EVERY),
        pairs=(
            *((f"{label}_half", "vanilla_half") for label in dynamic),
            *((label, "vanilla") for label in (*dynamic, "hold", "above_20", "above_40")),
            ("both", "no_decay"),
            ("dg_hold", "both"),
            ("hold", "rs"),
            ("dg_hold", "hold"),
        ),
        figures=(
            Bars(("strict", "judge/shapes_judge", "background_entropy"), tuple(KINDS)),
            Curves(("strict", "background_entropy"), tuple(KINDS)),
        ),
    )
