"""Figures of an experiment, from its records."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.experiments import charts
from dmdr_jax.experiments.records import Record
from dmdr_jax.experiments.spec import TEACHER, Bars, Curves, Experiment, Figure, Logged, Pareto, Pretraining, Sweep
from dmdr_jax.experiments.statistics import over_seeds
from dmdr_jax.experiments.tables import Line, column_of, value
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.shapes.prompts import TAGS

X_NAMES = {
    "step": "generator updates",
    "flops": "TFLOP of training",
    "cpu": "CPU minutes of training",
    "nfe": "network evaluations per image",
}

Drawer = Callable[[Any, Sequence[Line]], list[charts.Panel]]


def draw(figure: Figure, experiment: Experiment, lines: Sequence[Line]) -> str | None:
    """The text of an SVG file; None where there is nothing to show yet."""
    chosen = [line for line in lines if line.row.label in (figure.rows or experiment.labels)]
    panels = _DRAWERS[type(figure)](figure, chosen)
    return charts.write_svg(panels, describe(figure)) if panels else None


def describe(figure: Figure) -> str:
    """What the figure shows, in a line."""
    if isinstance(figure, Pareto):
        return f"{column_of(figure.measure).title} against {X_NAMES[figure.x]}"
    if isinstance(figure, Logged):
        return f"{column_of(figure.metric).title} of the batches of training, over {X_NAMES['step']}"
    if isinstance(figure, Pretraining):
        return f"strict verdict by task and loss of {figure.model} as it was trained, over its updates"
    names = ", ".join(column_of(key).title for key in figure.measures)
    if isinstance(figure, Curves):
        return f"{names} along training, over {X_NAMES[figure.x]}"
    return f"{names} against {figure.axis}" if isinstance(figure, Sweep) else names


def stem(figure: Figure, index: int) -> str:
    """The figure's file name in its experiment, without ending."""
    return f"{type(figure).__name__.lower()}_{index}"


def _bars(figure: Bars, lines: Sequence[Line]) -> list[charts.Panel]:
    panels = []
    for key in figure.measures:
        found = [(line, estimate) for line in lines if (estimate := value(line, key))]
        bars = [charts.Bar(line.row.name, e.mean, e.se, _by_seed(line, key)) for line, e in found]
        panels += [charts.bar_panel(column_of(key).title, bars)] if bars else []
    return panels


def _by_seed(line: Line, key: str) -> tuple[float, ...]:
    return tuple(record["measures"][key][0] for record in line.records if key in record["measures"])


def _curves(figure: Curves, lines: Sequence[Line]) -> list[charts.Panel]:
    panels: list[charts.Panel] = []
    for key in figure.measures:
        series = [charts.Series(line.row.name, _along(line, key, figure.x)) for line in lines]
        series = [one for one in series if one.points]
        if series:
            title, level = column_of(key).title, _teacher_level(lines, key)
            panels.append(charts.xy_panel(title, series, X_NAMES[figure.x], key=not panels, level=level))
    return panels


LOGS = 3
"""Log entries that make a point: one is of a few batches."""


def _logged(figure: Logged, lines: Sequence[Line]) -> list[charts.Panel]:
    panels = []
    for group in figure.groups:
        chosen = [line for line in lines if line.row.label in group]
        series = [charts.Series(line.row.name, _as_logged(line, figure.metric)) for line in chosen]
        series = [one for one in series if one.points]
        if series:
            panels.append(charts.xy_panel(column_of(figure.metric).title, series, X_NAMES["step"]))
    return panels


def _as_logged(line: Line, metric: str) -> tuple[charts.Point, ...]:
    """Means over `LOGS` log entries and over the seeds, with the standard error between seeds."""
    curves = [record["curves"] for record in line.records if metric in record.get("curves", {})]
    by_step = [{s: x for s, x in zip(curve["step"], curve[metric]) if x is not None} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    points = []
    for start in range(0, len(steps) - LOGS + 1, LOGS):
        part = steps[start : start + LOGS]
        e = over_seeds([np.mean([of[step] for step in part]) for of in by_step], [0.0] * len(by_step), 0)
        points.append(charts.Point(float(np.mean(part)), e.mean, e.se if len(by_step) > 1 else math.nan))
    return tuple(points)


def _teacher_level(lines: Sequence[Line], key: str) -> tuple[str, float] | None:
    """What the teacher has in the evaluations along training."""
    for record in (record for line in lines for record in line.records):
        for number, _, difference, _ in record.get("along", {}).get(key, ()):
            if number is not None and difference is not None:
                return TEACHER, number - difference
    return None


def _along(line: Line, key: str, x: str) -> tuple[charts.Point, ...]:
    """Over the checkpoints that all seeds have: means over seeds, errors as `over_seeds` has them."""
    records = [record for record in line.records if key in record.get("along", {})]
    if not records:
        return ()
    by_step = [dict(zip(record["along"]["steps"], record["along"][key])) for record in records]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        numbers, errors = zip(*((entries[step][0], entries[step][1]) for entries in by_step))
        where = _place(records[0], step, x)
        if None not in numbers and where is not None:
            e = over_seeds(numbers, [math.nan if error is None else error for error in errors], 0)
            points.append(charts.Point(where, e.mean, e.se))
    return tuple(points)


def _place(record: Record, step: int, x: str) -> float | None:
    """A step on the axis; what a run costs is taken to grow evenly with its updates."""
    if x == "step":
        return float(step)
    cost = record["cost"]
    total = cost.get({"flops": "flops_training", "cpu": "total_cpu_seconds"}[x])
    return None if total is None else total * _SCALES[x] * step / cost["updates"]


_SCALES = {"flops": 1e-12, "cpu": 1 / 60, "nfe": 1.0}


def _pareto(figure: Pareto, lines: Sequence[Line]) -> list[charts.Panel]:
    points = []
    for line in lines:
        estimate, x = value(line, figure.measure), _cost(line, figure.x)
        if estimate is not None and x is not None and x > 0:
            points.append(charts.Point(x, estimate.mean, estimate.se, line.row.name))
    if not points:
        return []
    best = _front(points, column_of(figure.measure).better)
    series = [charts.Series("", tuple(points), joined=False)]
    title = describe(figure)
    return [charts.xy_panel(title, [*series, charts.Series("", tuple(best))], X_NAMES[figure.x], log_x=True, key=False)]


def _cost(line: Line, x: str) -> float | None:
    paths = {"flops": ("cost", "flops_training"), "cpu": ("cost", "total_cpu_seconds"), "nfe": ("model", "nfe")}
    found = line.mean(*paths[x])
    return None if found is None else found * _SCALES[x]


def _front(points: Sequence[charts.Point], better: int) -> list[charts.Point]:
    """What no cheaper point equals, from the cheapest on."""
    front: list[charts.Point] = []
    for point in sorted(points, key=lambda p: (p.x, -(better or 1) * p.y)):
        if not front or (better or 1) * (point.y - front[-1].y) > 0:
            front.append(charts.Point(point.x, point.y))
    return front


def _sweep(figure: Sweep, lines: Sequence[Line]) -> list[charts.Panel]:
    placed = sorted((line for line in lines if line.row.at is not None), key=lambda line: line.row.at or 0.0)
    log_x = bool(placed) and all((line.row.at or 0.0) > 0 for line in placed)
    spread = log_x and np.ptp(np.log10([line.row.at or 0.0 for line in placed])) > 1
    panels = []
    for key in figure.measures:
        found = [(line, estimate) for line in placed if (estimate := value(line, key))]
        points = tuple(charts.Point(float(line.row.at or 0.0), e.mean, e.se) for line, e in found)
        if points:
            series = [charts.Series("", points)]
            panels.append(charts.xy_panel(column_of(key).title, series, figure.axis, log_x=bool(spread)))
    return panels


def _pretraining(figure: Pretraining, lines: Sequence[Line]) -> list[charts.Panel]:
    del lines
    text = Path(resolve(figure.model), "training.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]

    def series(key: str, name: str) -> charts.Series:
        return charts.Series(name, tuple(charts.Point(row["step"], row[key]) for row in rows))

    verdicts = [series("strict", "all tasks"), *(series(tag, tag.replace("_", " ")) for tag in TAGS)]
    loss = [series("loss", "")]
    return [charts.xy_panel("strict", verdicts, "updates"), charts.xy_panel("loss", loss, "updates")]


_DRAWERS: dict[type, Drawer] = {
    Bars: _bars,
    Curves: _curves,
    Logged: _logged,
    Pareto: _pareto,
    Pretraining: _pretraining,
    Sweep: _sweep,
}
