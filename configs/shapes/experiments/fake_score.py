"""What the fake score must do: how often, how large, on which samples. One change at a time, quality against cost.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/fake_score.py --out=runs/fake_score --jobs=2
          fake_score.py:dmdr is the same with rewards.

Equal generator updates; every checkpoint is evaluated, so that equal operations can be read off too. The network is
128 wide: a LoRA of rank 128 on all its matrices is as free as full matrices are.
"""

from typing import Any

from configs.shapes.experiments.main import CONFIG, EVERY, MODEL, TEACHER, reward_weights
from dmdr_jax.errors import UserError
from dmdr_jax.experiments.spec import Along, Bars, Curves, Experiment, Pareto, Row, arguments_of

UPDATES = 400
SIMULATED = {"student.simulation": "ode_final", "fake.data": "simulated"}

CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("2 to 1, rank 32, renoise", {}),
    "ttur_1": ("1 to 1", {"fake.updates": 1}),
    "ttur_3": ("3 to 1", {"fake.updates": 3}),
    "ttur_5": ("5 to 1", {"fake.updates": 5}),
    "rank_8": ("rank 8", {"fake.lora.rank": 8, "fake.lora.alpha": 8.0}),
    "rank_128": ("rank 128: full", {"fake.lora.rank": 128, "fake.lora.alpha": 128.0}),
    "ode_final": ("ode_final, fake on student's x0", {"student.simulation": "ode_final"}),
    "simulated": ("ode_final, fake on simulated", SIMULATED),
    "shared_index": ("one grid index per batch", {"student.shared_index": True}),
    "reuse": ("one rollout for all updates", {"rollout.reuse": True}),
    "reuse_5": ("one rollout, 5 to 1", {"rollout.reuse": True, "fake.updates": 5}),
}


def get_experiment(kind: str = "dmd") -> Experiment:
    if kind not in ("dmd", "dmdr"):
        raise UserError(f"unknown kind {kind!r}; choose dmd or dmdr.")
    common = {"steps": UPDATES, **(reward_weights(0.0) if kind == "dmd" else {})}
    rows = [Row(label, title, config=CONFIG, overrides=common | own) for label, (title, own) in CHANGES.items()]
    return Experiment(
        name="fake_score" if kind == "dmd" else f"fake_score_{kind}",
        rows=(Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER), *rows),
        teacher=arguments_of(MODEL, TEACHER),
        along=Along(EVERY),
        pairs=(*((label, "default") for label in CHANGES if label != "default"), ("ode_final", "simulated")),
        figures=(
            Bars(("strict", "background_entropy"), tuple(CHANGES)),
            Pareto("strict", "flops"),
            Curves(("strict",), ("ttur_1", "default", "ttur_3", "ttur_5"), x="flops"),
        ),
    )
