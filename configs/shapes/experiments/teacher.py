"""The teacher as it is drawn with: steps and guidance. Nothing is trained.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/teacher.py --out=runs/teacher
          teacher.py:sdxl for the SDXL shape.
"""

from configs.shapes.experiments.main import SHAPES, TEACHER
from dmdr_jax.experiments.spec import Bars, Experiment, Pareto, Pretraining, Row, arguments_of

STEPS = (4, 10, 50)  # with the usual guidance
GUIDANCE = (1, 2, 5)  # with the usual steps


def get_experiment(shape: str = "sd3") -> Experiment:
    _, model, _ = SHAPES[shape]
    usual = Row("teacher", "25 steps, guidance 3", model=model, draw=TEACHER)
    rows = [
        *(Row(f"steps_{n}", f"{n} steps, guidance 3", model=model, draw=TEACHER | {"steps": n}) for n in STEPS),
        *(
            Row(f"guidance_{w}", f"25 steps, guidance {w}", model=model, draw=TEACHER | {"guidance": w})
            for w in GUIDANCE
        ),
    ]
    return Experiment(
        name="teacher" if shape == "sd3" else f"teacher_{shape}",
        rows=(usual, *rows),
        teacher=arguments_of(model, TEACHER),
        pairs=tuple((row.label, "teacher") for row in rows),
        tasks=True,
        figures=(
            Bars(("strict", "judge/shapes_judge", "background_entropy")),
            Pareto("strict", "nfe"),
            Pretraining(model),
        ),
    )
