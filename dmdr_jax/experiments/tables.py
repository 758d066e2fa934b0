"""Tables of an experiment, from its records alone: Markdown, nothing typed by hand."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.results import Column, columns
from dmdr_jax.evaluation.table import MISSING, Estimate, format_estimate, format_interval, markdown_table, paired
from dmdr_jax.experiments.records import Record, read_records, values_of
from dmdr_jax.experiments.spec import Experiment, Row
from dmdr_jax.experiments.statistics import crossed, decided, over_seeds
from dmdr_jax.shapes.prompts import TAGS

SCORER_COLUMNS = ("judge/shapes_judge", "reward/shapes_clip", "reward/shapes_hps")
TESTED = ("strict", "judge/shapes_judge", "lenient", "reward/shapes_clip", "reward/shapes_hps")
"""Measures that pairs of rows are compared by, where they are stored image by image."""
MONITORS = (
    "strict",
    "judge/shapes_judge",
    "background_entropy",
    "color_entropy",
    "frechet/teacher",
    "junk",
    "reward/shapes_clip",
    "reward/shapes_hps",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A row and its records, one per finished seed."""

    row: Row
    records: tuple[Record, ...]

    @property
    def seeds(self) -> list[int | None]:
        return [record["seed"] for record in self.records]

    def first(self, *path: str) -> Any:
        """An entry of the first record; None where it is not there."""
        value: Any = self.records[0]
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def mean(self, *path: str) -> float | None:
        """A number's mean over the records that have it."""
        values = [value for record in self.records if (value := _at(record, path)) is not None]
        return float(np.mean(values)) if values else None


def _at(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def lines_of(experiment: Experiment, records: Path) -> list[Line]:
    """The experiment's rows that have records, borrowed ones from where they were made.

    Raises:
      UserError: two of them were asked different prompts, and so cannot be compared.
    """
    found = [
        Line(row, tuple(read))
        for row in experiment.rows
        if (read := read_records(records, row.of or experiment.name, row.label))
    ]
    asked = {line.first("images", "prompts"): line.row.label for line in found}
    if len(asked) > 1:
        raise UserError(
            f"experiment {experiment.name}: rows {' and '.join(list(asked.values())[:2])} were judged on different "
            "prompts or noise; evaluate them with one setting."
        )
    return found


def column_of(key: str) -> Column:
    """Title, direction and digits of a measure."""
    known = {column.key: column for column in columns(TAGS, SCORER_COLUMNS, in_world=True)}
    return known.get(key, Column(key, key, 0))


# --- numbers -------------------------------------------------------------------------------------------------------


def value(line: Line, key: str) -> Estimate | None:
    """A measure over the line's seeds, with its standard error; None where it was not measured."""
    stored = [values_of(record["images"], key) for record in line.records]
    if (measured := [x for x in stored if x is not None]) and len(measured) == len(stored):
        return crossed(np.stack(measured), line.first("images", "units"))
    found = [record["measures"][key] for record in line.records if key in record["measures"]]
    if not found or any(number is None for number, *_ in found):
        return None
    return over_seeds([n for n, *_ in found], [math.nan if se is None else se for _, se, _ in found], found[0][2])


def difference(line: Line, other: Line, key: str) -> Estimate | None:
    """``line - other`` on the same seeds, prompts and noise; None where it is not stored, or no seed is common."""
    a, b = ({record["seed"]: values_of(record["images"], key) for record in one.records} for one in (line, other))
    seeds = b if None in a else a if None in b else [seed for seed in a if seed in b]  # what is fixed meets every seed
    found = [(a.get(seed, a.get(None)), b.get(seed, b.get(None))) for seed in seeds]
    units = line.first("images", "units")
    pairs = [(x, y) for x, y in found if x is not None and y is not None]
    if not pairs or len(pairs) < len(found):
        return None
    if len(pairs) == 1:
        return paired(*pairs[0], units)
    return crossed(np.stack([x.astype(np.float64) - y for x, y in pairs]), units)


# --- tables --------------------------------------------------------------------------------------------------------


def main_table(experiment: Experiment, lines: Sequence[Line]) -> str:
    """Every row's measures over its seeds."""
    keys = [key for key in experiment.columns if any(value(line, key) for line in lines)]
    chosen = [column_of(key) for key in keys]
    header = ["", "NFE", "seeds", *(column.title for column in chosen)]
    body = [[line.row.name, _number(line.first("model", "nfe")), _seeds(line), *_cells(line, chosen)] for line in lines]
    return markdown_table(header, body)


def task_table(lines: Sequence[Line]) -> str:
    """The strict verdict by task; errors are over seeds and images."""
    chosen = [column_of(f"strict/{name}") for name in ("unseen", *TAGS)]
    return markdown_table(
        ["strict verdict", *(c.title for c in chosen)], [[line.row.name, *_cells(line, chosen)] for line in lines]
    )


def _cells(line: Line, chosen: Sequence[Column]) -> list[str]:
    return [format_estimate(value(line, column.key), column.digits) for column in chosen]


def _seeds(line: Line) -> str:
    return MISSING if line.seeds == [None] else str(len(line.seeds))


def pair_table(experiment: Experiment, lines: Sequence[Line]) -> str:
    """The experiment's pairs with 95 % confidence intervals; empty where no pair is complete."""
    by_label = {line.row.label: line for line in lines}
    complete = [(by_label[a], by_label[b]) for a, b in experiment.pairs if a in by_label and b in by_label]
    chosen = [column_of(key) for key in TESTED if any(difference(a, b, key) for a, b in complete)]
    if not complete or not chosen:
        return ""
    body = [
        [f"{a.row.name} − {b.row.name}", *(_difference_cell(difference(a, b, c.key), c) for c in chosen)]
        for a, b in complete
    ]
    return markdown_table(["difference", *(column.title for column in chosen)], body)


def _difference_cell(found: Estimate | None, column: Column) -> str:
    if found is None:
        return MISSING
    text = f"{found.mean:+.{column.digits}f} {format_interval(found, column.digits)}"
    return f"**{text}**" if decided(found) else text


def cost_table(lines: Sequence[Line]) -> str:
    """What training and drawing cost; empty where nothing was trained."""
    trained = [line for line in lines if line.first("cost", "updates")]
    if not trained:
        return ""
    header = ["", "updates", "TFLOP of training", "CPU minutes", "s/update", "images/s"]
    body = [
        [
            line.row.name,
            _number(line.first("cost", "updates")),
            _scaled(line.mean("cost", "flops_training"), 1e-12),
            _scaled(line.mean("cost", "total_cpu_seconds"), 1 / 60),
            _scaled(line.mean("cost", "seconds_per_update"), 1),
            _scaled(line.mean("model", "images_per_second"), 1),
        ]
        for line in trained
    ]
    return markdown_table(header, body)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:g}"


def _scaled(value: float | None, factor: float) -> str:
    return MISSING if value is None else f"{value * factor:.3g}"


# --- what saw it first ---------------------------------------------------------------------------------------------


def monitor_table(lines: Sequence[Line]) -> str:
    """For each row evaluated along training: when its own watch raised the alarm, and each measure fell for good."""
    watched = [line for line in lines if line.first("along")]
    keys = [key for key in MONITORS if any(key in line.first("along") for line in watched)]
    if not keys:
        return ""
    body = [
        [column_of(key).title, *(", ".join(_fall(record, key) for record in line.records) for line in watched)]
        for key in keys
    ]
    if any(record.get("watch") for line in watched for record in line.records):
        body.insert(0, ["alarm while it trained", *(", ".join(map(_alarm, line.records)) for line in watched)])
    return markdown_table(["worse for good from step", *(line.row.name for line in watched)], body)


def _alarm(record: Record) -> str:
    watch = record.get("watch")
    if not watch:
        return MISSING
    return "never" if watch["alarm"] is None else str(watch["alarm"]["step"])


def _fall(record: Record, key: str) -> str:
    along = record.get("along", {})
    if key not in along:
        return MISSING
    numbers, errors = ([entry[i] for entry in along[key]] for i in (0, 1))
    if any(x is None for x in (*numbers, *errors)):
        return MISSING
    fallen = first_fall(numbers, errors, column_of(key).better)
    return "never" if fallen is None else str(along["steps"][fallen])


def first_fall(numbers: Sequence[float], errors: Sequence[float], better: int) -> int | None:
    """The first index from which on every number is worse than the best before it by over two standard errors.

    The errors of the two are added as if they were independent; on the same prompts they are not, which is cautious.
    """
    fallen = None
    for i in range(len(numbers) - 1, 0, -1):
        best = max(range(i), key=lambda j: better * numbers[j])
        drop = better * (numbers[best] - numbers[i])
        if drop <= 2 * math.hypot(errors[best], errors[i]):
            break
        fallen = i
    return fallen
