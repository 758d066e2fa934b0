"""Reinforcement learning with and without distribution matching (the paper's Table 5), and all methods side by side.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/methods.py --out=runs/methods --jobs=2
          methods.py:all has every preset of dmdr_jax/methods.py that needs neither images nor a one-step student;
          it shows the rows of methods.py again, so run that too.

All start from the same cold start, DMD alone: as its copy where they keep no more state than it does, else by making
it again with the same seed. Equal generator updates.
"""

from typing import Any

from configs.shapes.experiments.main import CONFIG, MODEL, TEACHER, reward_weights, rewards_from
from dmdr_jax.errors import UserError
from dmdr_jax.experiments.spec import Bars, Experiment, Pareto, Row, arguments_of

COLD, UPDATES = 250, 500
TABLE = {
    "refl_only": "ReFL only",
    "dmdr_refl": "ReFL + DMD",
    "dpo_only": "DPO only",
    "dmdr_dpo": "DPO + DMD",
    "grpo_only": "GRPO only",
    "dmdr_grpo": "GRPO + DMD",
}
ALGORITHMS = ("refl", "dpo", "grpo")
COPIES = ("refl_only", "dmdr_refl", "dmdr_grpo", "dmdr_srpo", "ddmd_adv")
"""Methods whose state is that of DMD alone, so that they can go on from its checkpoint."""
OTHERS = ("dmdr_srpo", "ddmd", "ddmd_adv", "gdmd", "gndm", "gndmr", "rtdmd")
NO_REWARDS = ("ddmd", "gndm")


def trained(method: str, title: str) -> Row:
    """A row of one method."""
    overrides: dict[str, Any] = {"method": method, "steps": UPDATES}
    overrides |= {} if method in NO_REWARDS else rewards_from(COLD)
    return Row(method, title, config=CONFIG, overrides=overrides, after="cold" if method in COPIES else "")


def get_experiment(which: str = "table5") -> Experiment:
    if which not in ("table5", "all"):
        raise UserError(f"unknown choice {which!r}; choose table5 or all.")
    alone, table = reward_weights(0.0), which == "table5"
    cold = Row("cold", "cold start", config=CONFIG, overrides={"steps": COLD, **alone})
    start = [
        Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER),
        Row("distil", "DMD only", config=CONFIG, overrides={"steps": UPDATES, **alone}, after="cold"),
    ]
    rows = [trained(method, title) for method, title in TABLE.items()]
    pairs = [(row.label, "distil") for row in rows]
    if table:
        pairs += [(f"{name}_only", "cold") for name in ALGORITHMS]
        pairs += [(f"dmdr_{name}", f"{name}_only") for name in ALGORITHMS]
    else:  # the table's rows are there already
        start, rows = [[borrowed(row) for row in some] for some in (start, rows)]
        others = [trained(method, method) for method in OTHERS]
        rows += others
        pairs += [(row.label, other) for row in others for other in ("distil", "dmdr_refl")]
    return Experiment(
        name="methods" if table else "methods_all",
        rows=(start[0], cold, *start[1:], *rows),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(*pairs, ("dmdr_refl", "teacher")),
        figures=(
            Bars(("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")),
            Pareto("strict", "flops"),
        ),
    )


def borrowed(row: Row) -> Row:
    return Row(row.label, row.title, of="methods")
