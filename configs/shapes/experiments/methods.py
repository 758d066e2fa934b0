"""Reinforcement learning with and without distribution matching (the paper's Table 5 and, of the reward while it
trains, Figure 10), and all methods side by side.

Command:  python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/methods.py --out=runs/methods --jobs=2
          methods.py:all has every preset of dmdr_jax/methods.py that needs no one-step student; it shows the rows of
          methods.py again, so run that too.
          methods.py:signal asks what holds GRPO, DPO, RTDMD and SRPO back, one change at a time from their rows.
          methods.py:one_step has those that are made for one step.

All start from the same cold start, DMD alone: as its copy where they keep no more state than it does, else by making
it again with the same seed. Equal generator steps; one of GDMD's is `fake.updates` student updates. DMD2 alone sees
images: its discriminator has renders of the training prompts, which no other method here is given.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from configs.shapes.experiments.main import CONFIG, MODEL, TEACHER, reward_weights, rewards_from
from dmdr_jax.errors import UserError
from dmdr_jax.experiments.spec import Bars, Experiment, Logged, Pareto, Row, arguments_of

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
COPIES = ("refl_only", "dmdr_refl", "dmdr_srpo", "dmdr_grpo", "ddmd_adv")
"""Methods whose state is that of DMD alone, so that they can go on from its checkpoint."""
OTHERS = ("dmd2", "dmdr_srpo", "ddmd", "ddmd_adv", "gdmd", "gndm", "gndmr", "rtdmd")
NO_REWARDS = ("dmd2", "ddmd", "gndm")
OWN = {"dmd2": {"gan.images": "shapes:small:train"}}
"""Settings that a method would do nothing of its own without."""
ONE_STEP = ("gdmd", "drpo")
"""Methods that want no randomness of the sampler, so that one step is enough."""
REGRESSION = {"steps": 300, "pairs": 1536, "teacher_steps": 15, "batch": 64, "lr": 1e-3}
"""Of a one-step student on the teacher's pairs, as configs/shapes/sdxl_1step.py has it."""
EQUAL_IN_ONE_STEP = {"distil": 562, "drpo": 852}
"""`EQUAL` for these rows and DMDR's cost; GDMD spends a tenth more than it at equal updates."""
TEACHER_ROW = Row("teacher", "teacher, 25 steps", model=MODEL, draw=TEACHER)
MEASURES = ("strict", "judge/shapes_judge", "reward/shapes_clip", "background_entropy")

EQUAL = {
    "distil": 540,
    "refl_only": 970,
    "dpo_only": 1040,
    "grpo_only": 640,
    "dmdr_grpo": 450,
    "dmd2": 393,
    "gndm": 360,
    "gndmr": 333,
    "rtdmd": 378,
}
"""Updates after which a method has spent what ReFL + DMD has after 500, in operations, where 500 of its own are not
within 3 % of that: a test counts again."""


def trained(method: str, title: str) -> Row:
    """A row of one method."""
    overrides: dict[str, Any] = {"method": method, "steps": UPDATES, **OWN.get(method, {})}
    overrides |= {} if method in NO_REWARDS else rewards_from(COLD)
    if method in OTHERS and method in EQUAL:
        overrides |= {"checkpoint.every": EQUAL[method] // 3, "checkpoint.keep": 9}
    return Row(method, title, config=CONFIG, overrides=overrides, after="cold" if method in COPIES else "")


def at_equal_compute(row: Row) -> Row:
    """A trained row again after as many updates as cost what those of ReFL + DMD do."""
    steps = EQUAL[row.label]
    again = until(row, steps, row.after)
    return Row(again.label, again.title, after=f"{row.label}@{steps}") if row.label in OTHERS else again


def until(row: Row, steps: int, after: str) -> Row:
    """A trained row again, to so many updates, going on from ``after``."""
    overrides = dict(row.overrides) | {"steps": steps}
    return Row(f"{row.label}_equal", f"{row.name}, {steps} updates", row.config, overrides, after)


def borrowed(row: Row) -> Row:
    return Row(row.label, row.title, of="methods")


def one_step() -> Experiment:
    """A one-step student by the methods that are made for it, beside DMD and DMDR; all begin with a regression."""
    start: dict[str, Any] = {"student.steps": 1, "dynamics.dg": 0.0}
    start |= {f"ode.{key}": value for key, value in REGRESSION.items()}
    cold, distil = distilled(start)
    rewarded = start | rewards_from(COLD) | {"steps": UPDATES}
    dmdr = Row("dmdr", "DMDR", config=CONFIG, overrides=rewarded, after="cold")
    rows = [Row(method, method, config=CONFIG, overrides={"method": method, **rewarded}) for method in ONE_STEP]
    equal = [
        until(row, EQUAL_IN_ONE_STEP[row.label], row.label) for row in (distil, *rows) if row.label in EQUAL_IN_ONE_STEP
    ]
    teacher = dict(TEACHER, steps=1)
    return Experiment(
        name="methods_one_step",
        rows=(
            borrowed(TEACHER_ROW),
            Row("teacher_one", "teacher, 1 step", model=MODEL, draw=teacher),
            cold,
            distil,
            dmdr,
            *rows,
            *equal,
        ),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(
            ("dmdr", "distil"),
            *((label, other) for label in ONE_STEP for other in ("distil", "dmdr")),
            *((row.label, "dmdr") for row in equal),
        ),
        figures=(Bars(MEASURES), Pareto("strict", "flops")),
    )


SRPO_WEIGHTS = {"rewards.shapes_clip.weight": 0.1, "rewards.shapes_hps.weight": 5.0}
SIGNAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo_free": ("grpo_only", "GRPO only, no KL", {"policy.kl": 0.0}),
    "grpo_slow": (
        "grpo_only",
        "GRPO only, no KL, a quarter of the rate",
        {"policy.kl": 0.0, "optim.generator.lr": 5e-5},
    ),
    "grpo_batch": ("grpo_only", "GRPO only, no KL, four times the batch", {"policy.kl": 0.0, "batch": 128}),
    "grpo_dm_batch": ("dmdr_grpo", "GRPO + DMD, four times the batch", {"batch": 128}),
    "dpo_refresh": ("dpo_only", "DPO only, reference renewed every 40", {"dpo.refresh": 40}),
    "srpo_weights": ("dmdr_srpo", "SRPO, the authors' weights", SRPO_WEIGHTS),
    "refl_weights": ("dmdr_refl", "ReFL + DMD, SRPO's weights", SRPO_WEIGHTS),
    "rtdmd_cold": ("rtdmd", "RTDMD, stage one alone", {"steps": COLD}),
    "rtdmd_fake": ("rtdmd", "RTDMD, stage one, 10 fake updates", {"steps": COLD, "fake.updates": 10}),
    "rtdmd_matching": ("rtdmd", "RTDMD, matching's weight 1 in stage two", {"last_step.dm_weight": 1.0}),
}
"""Label: method, title, and what is changed."""


def signal() -> Experiment:
    """GRPO and DPO with less noise in their gradient, or less in their way; SRPO's weights; RTDMD's first stage."""

    def changed(label: str) -> Row:
        method, title, own = SIGNAL[label]
        settings = {"method": method, "steps": UPDATES, **rewards_from(COLD), **own}
        after = "cold" if method in (*COPIES, "grpo_only") else ""  # GRPO without its KL term keeps no reference
        return Row(label, title, config=CONFIG, overrides=settings, after=after)

    cold, distil = distilled()
    compared = ("dmdr_refl", "grpo_only", "dmdr_grpo", "dpo_only")
    known = (distil, *(trained(method, TABLE[method]) for method in compared))
    return Experiment(
        name="methods_signal",
        rows=(
            borrowed(TEACHER_ROW),
            cold,
            *map(borrowed, known),
            Row("rtdmd", "RTDMD", of="methods_all"),
            Row("dmdr_srpo", "SRPO", of="methods_all"),
            *map(changed, SIGNAL),
        ),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(
            *((label, "cold") for label in SIGNAL),
            *((label, method) for label, (method, _, _) in SIGNAL.items()),
            ("grpo_slow", "grpo_free"),
            ("grpo_batch", "grpo_free"),
            ("rtdmd_fake", "rtdmd_cold"),
            ("srpo_weights", "refl_weights"),
            ("srpo_weights", "distil"),
            ("srpo_weights", "dmdr_refl"),
        ),
        figures=(Bars(MEASURES), Logged("reward/shapes_clip", (("grpo_only", *list(SIGNAL)[:3]),))),
    )


def get_experiment(which: str = "table5") -> Experiment:
    if which not in QUESTIONS:
        *most, last = QUESTIONS
        raise UserError(f"unknown choice {which!r}; choose {', '.join(most)} or {last}.")
    return QUESTIONS[which]()


def distilled(settings: Mapping[str, Any] = MappingProxyType({})) -> tuple[Row, Row]:
    """The cold start, and DMD alone that goes on from it."""
    alone = {**settings, **reward_weights(0.0)}
    cold = Row("cold", "cold start", config=CONFIG, overrides={"steps": COLD, **alone})
    return cold, Row("distil", "DMD only", config=CONFIG, overrides={"steps": UPDATES, **alone}, after="cold")


def table5() -> Experiment:
    cold, distil = distilled()
    rows = [trained(method, title) for method, title in TABLE.items()]
    pairs = [(row.label, "distil") for row in rows]
    pairs += [(f"{name}_only", "cold") for name in ALGORITHMS]
    pairs += [(f"dmdr_{name}", f"{name}_only") for name in ALGORITHMS]
    logged = Logged("reward/shapes_clip", tuple((f"{name}_only", f"dmdr_{name}") for name in ALGORITHMS))
    return Experiment(
        name="methods",
        rows=(TEACHER_ROW, cold, distil, *rows),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(*pairs, ("dmdr_refl", "teacher")),
        figures=(Bars(MEASURES), Pareto("strict", "flops"), logged),
    )


def side_by_side() -> Experiment:
    """All methods, at equal updates and at equal compute."""
    cold, distil = distilled()
    table = [distil, *(trained(method, title) for method, title in TABLE.items())]
    others = [trained(method, method) for method in OTHERS]
    equal = [at_equal_compute(row) for row in (*table, *others) if row.label in EQUAL]
    pairs = [(row.label, other) for row in others for other in ("distil", "dmdr_refl")]
    updates = tuple(row.label for row in (*table, *others))
    compute = tuple(f"{label}_equal" if label in EQUAL else label for label in updates)
    return Experiment(
        name="methods_all",
        rows=(borrowed(TEACHER_ROW), cold, *map(borrowed, table), *others, *equal),
        teacher=arguments_of(MODEL, TEACHER),
        pairs=(*pairs, *((row.label, "dmdr_refl") for row in equal)),
        figures=(Bars(MEASURES, ("teacher", "cold", *updates)), Bars(MEASURES, ("teacher", *compute))),
    )


QUESTIONS = {"table5": table5, "all": side_by_side, "signal": signal, "one_step": one_step}
