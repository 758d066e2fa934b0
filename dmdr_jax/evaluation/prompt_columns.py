"""The columns of an evaluation on prompts."""

from collections.abc import Iterable, Mapping, Sequence

from dmdr_jax.evaluation.appearance import MEASURES
from dmdr_jax.evaluation.measures import DIVERSITY
from dmdr_jax.evaluation.overoptimisation import GAP, TRAINED
from dmdr_jax.evaluation.results import Column, Measured
from dmdr_jax.evaluation.scorers import Scorer, kind
from dmdr_jax.rewards.kinds import KINDS, Kind

MAX_TASKS = 16  # more are shown in the report alone
_DIGITS: dict[str, int] = {"imagereward": 3, "python": 4}  # behind the point; others show two
_SETS = {
    "frechet": ("Fréchet", -1, 2),
    "cmmd": ("CMMD", -1, 3),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
}


def columns(
    measured: Mapping[str, Measured], scorers: Sequence[Scorer], keys: Mapping[str, str], tasks: Iterable[str]
) -> list[Column]:
    """All columns, those of the rewards in the order they were named."""
    found = [_score(scorer, keys) for scorer in scorers]
    for scorer, whole in zip(scorers, list(found)):
        some = list(tasks)[:MAX_TASKS]
        group = f"{scorer.spec.name} by task"
        found += [Column(f"{whole.key}@{t}", t, 1, whole.digits, group, whole.times) for t in some]
    return found + _of_sets(measured) + _watched(measured)


def _score(scorer: Scorer, keys: Mapping[str, str]) -> Column:
    name, what = scorer.spec.name, kind(scorer.spec)
    key = keys[name]
    times = f" ×{what.shown_times:g}" if what.shown_times != 1 else ""
    note = ""
    if any(k.startswith(TRAINED) for k in keys.values()):
        note = " (trained)" if key.startswith(TRAINED) else " (held out)"
    return Column(key, f"{name}{times}{note}", 1, _digits(what), "scores", what.shown_times)


def _digits(what: Kind) -> int:
    return next((digits for name, digits in _DIGITS.items() if KINDS[name] == what), 2)


def _of_sets(measured: Mapping[str, Measured]) -> list[Column]:
    keys = dict.fromkeys(key for one in measured.values() for key in one.statistics)
    found = []
    for key in keys:
        measure, features, reference = key.split("/")
        title, better, digits = _SETS[measure]
        found.append(Column(key, f"{title} to {reference} ({features})", better, digits, "distribution"))
    return found


def _watched(measured: Mapping[str, Measured]) -> list[Column]:
    keys = {key for one in measured.values() for key in one.per_image}
    first = [Column(DIVERSITY, "LPIPS diversity", 1, 3, "distribution")] if DIVERSITY in keys else []
    gap = [Column(GAP, "reward gap, z", -1, 2, "over-optimisation")] if GAP in keys else []
    return first + gap + [Column(name, name, 0, 3, "over-optimisation") for name in MEASURES]
