"""Reinforcement learning with and without distribution matching (the paper's Table 5), and all methods side by side.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/methods.py --out=runs/methods --jobs=2
          methods.py:all has every preset of dmdr_jax/methods.py that needs neither images nor a one-step student.

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
    alone = reward_weights(0.0)
    start = (
        Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER),
        Row("cold", "cold start", config=CONFIG, overrides={"steps": COLD, **alone}),
        Row("distil", "DMD only", config=CONFIG, overrides={"steps": UPDATES, **alone}, after="cold"),
    )
    chosen = TABLE | ({method: method for method in OTHERS} if which == "all" else {})
    rows = [trained(method, title) for method, title in chosen.items()]
    alone_since = [(f"{name}_only", "cold") for name in ("refl", "dpo", "grpo")]
    together = [(f"dmdr_{name}", f"{name}_only") for name in ("refl", "dpo", "grpo")]
    return Experiment(
        name="methods" if which == "table5" else f"methods_{which}",
        rows=(*start, *rows),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(*((row.label, "distil") for row in rows), *alone_since, *together, ("dmdr_refl", "teacher")),
        figures=(
            Bars(("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")),
            Pareto("strict", "flops"),
        ),
    )
