"""What the numbers say, in words: nothing here is true unless a paired difference exceeds two standard errors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dmdr_jax.evaluation.overoptimisation import GAP, HELD_OUT, TRAINED
from dmdr_jax.evaluation.results import Column
from dmdr_jax.evaluation.table import DECISIVE, Estimate, decide, format_estimate

PRIMARY = ("strict", "judge/", "reward/")
"""The measure that decides, by the beginning of its key: the first of these that the table has."""

USABLE = 0.5  # strict verdict of a teacher below which a comparison says little
COLLAPSED = 0.6  # share of the teacher's entropy below which diversity counts as lost
ENTROPIES = ("color_entropy", "background_entropy")
WIDE_GAP = 1.0  # standard deviations between trained and held-out rewards that are worth a word


@dataclasses.dataclass(frozen=True)
class Finding:
    """One model against another.

    Attributes:
      model, other: their names.
      outcome: ``better``, ``worse`` or ``undecided`` on the primary measure.
      text: a few sentences.
    """

    model: str
    other: str
    outcome: str
    text: str


def primary_column(columns: Sequence[Column]) -> Column | None:
    """The column that decides; None where there is none to decide by."""
    for start in PRIMARY:
        for column in columns:
            if column.key == start or (start.endswith("/") and column.key.startswith(start)):
                return column
    return None


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """Every model against the baseline and the teacher, as far as they were compared; the baseline comes last."""
    references = results["compared_with"]
    students = [m for m in results["models"] if m["name"] not in references]
    models = students or results["models"][1:]
    by_name = {m["name"]: m for m in results["models"]}
    return [
        finding(results["columns"], model, by_name[other])
        for model in models
        for other in reversed(references)
        if other in model["differences"]
    ]


def finding(columns: Sequence[Column], model: Mapping[str, Any], other: Mapping[str, Any]) -> Finding:
    """One comparison, computed from the paired differences of ``model`` to ``other``."""
    main = primary_column(columns)
    if main is None:
        return Finding(model["name"], other["name"], "undecided", "There is no measure to decide by.")
    differences = model["differences"][other["name"]]
    outcome = decide(differences[main.key], main.better)
    names = f"{describe(model)} against {describe(other)}"
    values = " against ".join(f"{main.times * m['summary'][main.key].mean:.{main.digits}f}" for m in (model, other))
    change = format_estimate(differences[main.key], main.digits, signed=True, times=main.times)
    sentences = [
        f"{names}: {_WORDS[outcome]} on the {_measure(main)}, {values}, a paired difference of {change}.",
        *_others(columns, main, differences),
        *_alarms(columns, model, other, differences),
    ]
    return Finding(model["name"], other["name"], outcome, " ".join(sentences))


_WORDS = {
    "better": f"better, beyond {DECISIVE:g} standard errors,",
    "worse": f"worse, beyond {DECISIVE:g} standard errors,",
    "undecided": f"undecided within {DECISIVE:g} standard errors",
}


def describe(model: Mapping[str, Any]) -> str:
    """Name, steps and network evaluations; of images drawn elsewhere the name alone."""
    if model["grid"] is None:
        return model["name"]
    steps = len(model["grid"]) - 1
    return f"{model['name']} ({steps} {'step' if steps == 1 else 'steps'}, {model['nfe']} NFE)"


def _measure(column: Column) -> str:
    return "strict verdict" if column.key == "strict" else f"score {column.title}"


def _others(columns: Sequence[Column], main: Column, differences: Mapping[str, Any]) -> list[str]:
    """What the other measures say, the single tasks left out."""
    outcomes: dict[str, list[str]] = {}
    for column in columns:
        single_task = column.key.startswith("strict/") or "@" in column.key
        if column.key != main.key and not single_task and column.key in differences:
            outcomes.setdefault(decide(differences[column.key], column.better), []).append(column.title)
    parts = [f"{word}: {', '.join(outcomes[word])}" for word in _ORDER if word in outcomes]
    return [f"Of the other measures, {'; '.join(parts)}."] if parts else []


_ORDER = ("better", "worse", "undecided", "higher", "lower")


def _alarms(
    columns: Sequence[Column], model: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Any]
) -> list[str]:
    """Reward hacking, as far as the table can see it."""
    better = {c.key: c.better for c in columns}
    whole = [k for k in differences if "@" not in k]
    rose = [k for k in whole if k.startswith(TRAINED) and decide(differences[k], better.get(k, 1)) == "better"]
    fell = ["the strict verdict fell"] * ("strict" in whole and decide(differences["strict"], 1) == "worse")
    fell += ["held-out rewards fell"] * any(k.startswith(HELD_OUT) and _worse(differences[k]) for k in whole)
    lost = [
        key
        for key in ENTROPIES
        if key in differences
        and decide(differences[key], 1) == "worse"
        and model["summary"][key].mean < COLLAPSED * other["summary"][key].mean
    ]
    alarms = []
    if rose and (fell or lost):
        signs = fell + ["diversity collapsed"] * bool(lost)
        alarms.append(f"A trained reward rose while {' and '.join(signs)}: this is what reward hacking looks like.")
    elif lost:
        alarms.append("Diversity collapsed.")
    gap = differences.get(GAP)
    if gap is not None and gap.mean > WIDE_GAP and _worse(gap, -1):
        alarms.append(f"Trained rewards are {gap.mean:.2f} standard deviations further ahead of held-out ones.")
    return alarms


def _worse(difference: Estimate, better: int = 1) -> bool:
    return decide(difference, better) == "worse"


def caution(results: Mapping[str, Any]) -> str:
    """A warning where the teacher is too weak for the comparison to mean much; else empty."""
    teacher = results["models"][0]
    strict = teacher["summary"].get("strict")
    if strict is None or strict.mean >= USABLE:
        return ""
    return (
        f"The teacher itself passes only {strict.mean:.3f} of the strict verdicts; "
        f"below {USABLE:g} such numbers say little about the method."
    )
