"""The main claim: is the few-step student better than its teacher at 50 evaluations, and what of DMDR makes it so?

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/main.py --out=runs/main --jobs=2
          main.py:sdxl and main.py:sdxl_1step are the same for the SDXL-shaped teacher, with 4 steps and with 1.

Equal generator updates for all; DMD then reward spends half of them on each. The paper's Table 1 and Figure 10. DMDR,
which still learns after 500 updates, is trained for twice as long as well, the SD3 shape's for four times as long.
In one step, where the configuration's renoise times are uniform, DMD and DMDR have rows with high ones beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dmdr_jax.experiments.spec import Along, Bars, Curves, Experiment, Pareto, Row, arguments_of

TEACHER = dict(steps=25, guidance=3)  # 50 network evaluations
UPDATES = 500
EVERY = 50  # updates between checkpoints, each of which is evaluated
RAMP = 20  # updates over which a reward sets in
LONGER = (("dmdr_twice", "DMDR, twice as long", 2), ("dmdr_four_times", "DMDR, four times as long", 4))

REWARDS = {"shapes_clip": 1.0, "shapes_hps": 0.3}  # and their weights, as configs/shapes/sd3.py has them
SHAPES = {
    "sd3": ("configs/shapes/sd3.py", "shapes:sd3", 4),
    "sdxl": ("configs/shapes/sdxl.py", "shapes:sdxl", 4),
    "sdxl_1step": ("configs/shapes/sdxl_1step.py", "shapes:sdxl", 1),
}
CONFIG, MODEL, _ = SHAPES["sd3"]


def reward_weights(factor: float) -> dict[str, float]:
    """All rewards' weights times a factor; 0 leaves them out."""
    return {f"rewards.{name}.weight": factor * weight for name, weight in REWARDS.items()}


def rewards_from(step: int, ramp: int = RAMP) -> dict[str, int]:
    """All rewards set in at ``step``."""
    return {f"rewards.{name}.{key}": value for name in REWARDS for key, value in dict(start=step, ramp=ramp).items()}


def get_experiment(shape: str = "sd3") -> Experiment:
    longer = LONGER if shape == "sd3" else LONGER[:1]
    made = make("main" if shape == "sd3" else f"main_{shape}", shape, UPDATES, EVERY, {}, longer)
    if shape == "sdxl_1step":
        return replace(made, rows=(*made.rows, *held(shape)), pairs=(*made.pairs, *HELD_PAIRS))
    if shape != "sdxl":
        return made
    # The best of the guidances that teacher.py:sdxl tries: to draw with, and to be matched.
    best = Row("guidance_2", "teacher, 25 steps, guidance 2", of="teacher_sdxl")
    twice = made.rows[-1]
    lower = {**twice.overrides, "guidance.scale": 2.0}
    matched = Row("dmdr_guidance_2", f"{twice.title}, guidance 2", config=twice.config, overrides=lower)
    pairs = [(label, best.label) for label in ("dmdr", twice.label, matched.label)]
    pairs += [(matched.label, other) for other in ("teacher", twice.label)]
    return replace(made, rows=(made.rows[0], best, *made.rows[1:], matched), pairs=(*made.pairs, *pairs))


HELD_PAIRS = (("dmd_held", "dmd"), ("dmdr_held", "dmdr"), ("dmdr_held", "dmd_held"), ("dmdr_held", "teacher"))


def held(shape: str) -> tuple[Row, ...]:
    """DMD and DMDR with renoise times that stay high, where the configuration has them uniform."""
    common = {"steps": UPDATES, "dynamics.rs": "hold"}
    return (
        Row("dmd_held", "DMD only, high noise", config=SHAPES[shape][0], overrides=common | reward_weights(0.0)),
        Row("dmdr_held", "DMDR, high noise", config=SHAPES[shape][0], overrides=common),
    )


def make(
    name: str,
    shape: str,
    updates: int,
    every: int,
    settings: Mapping[str, Any],
    longer: Sequence[tuple[str, str, int]] = (),
) -> Experiment:
    """The experiment at a length of one's own.

    Args:
      settings: of every trained row.
      longer: rows of DMDR that each go on from the one before: label, title, and how many times ``updates`` in all.
    """
    config, model, steps = SHAPES[shape]
    switch = updates // 2
    common = {"steps": updates, **settings}
    reward_only = common | {"method": "refl_only"}
    rows = (
        Row("teacher", "teacher, 25 steps", model=model, draw=TEACHER),
        Row("teacher_few", f"teacher, {steps} step{'s' * (steps > 1)}", model=model, draw=TEACHER | {"steps": steps}),
        Row("dmd", "DMD only", config=config, overrides=common | reward_weights(0.0)),
        Row("reward", "reward only", config=config, overrides=reward_only | rewards_from(0)),
        Row(
            "dmd_then_reward",
            "DMD, then reward",
            config=config,
            overrides=reward_only | rewards_from(switch),
            after=f"dmd@{switch}",
        ),
        Row("dmdr", "DMDR", config=config, overrides=common),
    )
    for label, title, times in longer:
        more = common | {"steps": times * updates}
        rows += (Row(label, title, config=config, overrides=more, after=rows[-1].label),)
    measures = ("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")
    return Experiment(
        name=name,
        rows=rows,
        teacher=arguments_of(model, TEACHER),
        along=Along(every),
        pairs=(
            ("dmdr", "teacher"),
            ("dmdr", "teacher_few"),
            ("dmdr", "dmd"),
            ("dmdr", "dmd_then_reward"),
            ("dmdr", "reward"),
            ("dmd", "teacher"),
            ("dmd_then_reward", "dmd"),
            ("reward", "teacher"),
            *((label, other) for label, _, _ in longer for other in ("teacher", "dmdr")),
        ),
        tasks=True,
        figures=(
            Bars(measures),
            Curves(measures, tuple(row.label for row in rows if row.config)),
            Pareto("strict", "nfe"),
        ),
    )
