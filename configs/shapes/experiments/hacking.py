"""Reward hacking: how much reward is too much, with distribution matching there to hold it?

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/hacking.py --out=runs/hacking --jobs=2

Both rewards' weights are multiplied by lambda. DMD only is lambda = 0, DMDR is 1, reward only is the limit: those are
rows of main.py (run that too), where they are evaluated along training as these are. The paper's Figure 10, Table 6.
"""

from configs.shapes.experiments.main import CONFIG, EVERY, MODEL, TEACHER, UPDATES, reward_weights
from dmdr_jax.experiments.spec import Along, Curves, Experiment, Row, Sweep, arguments_of

LAMBDAS = (0.1, 0.3, 3.0, 10.0)


def swept(factor: float) -> Row:
    overrides = {"steps": UPDATES, **reward_weights(factor)}
    return Row(f"lambda_{factor:g}", f"lambda {factor:g}", config=CONFIG, overrides=overrides, at=factor)


def get_experiment() -> Experiment:
    rows = [*map(swept, LAMBDAS), Row("dmdr", "lambda 1: DMDR", of="main", at=1.0)]
    rows.sort(key=lambda row: row.at)
    teacher, none = Row("teacher", "teacher, 25 steps", of="main"), Row("dmd", "lambda 0: DMD only", of="main")
    limit = Row("reward", "reward only", of="main")
    measures = ("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")
    return Experiment(
        name="hacking",
        rows=(teacher, none, *rows, limit),
        teacher=arguments_of(MODEL, TEACHER),
        along=Along(EVERY),
        pairs=tuple((row.label, "dmdr") for row in (none, *rows, limit) if row.label != "dmdr"),
        figures=(
            Sweep(measures, "lambda, the factor of the rewards' weights"),
            Curves(("reward/shapes_clip", "strict", "background_entropy", "junk")),
        ),
    )
