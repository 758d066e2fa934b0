"""Several runs side by side: in what their settings differ, and their curves in one chart for each metric."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dmdr_jax.evaluation.canaries import DIVERSITY, GAP
from dmdr_jax.evaluation.curves import Series, line_chart, series_of
from dmdr_jax.evaluation.runs import Run, active_rewards, flat
from dmdr_jax.evaluation.sections import section, series_key
from dmdr_jax.evaluation.watched import sentence, state

METRICS = {"dm/score_gap": "Score gap", "fake/loss": "Loss of the fake score"}
WATCHED = {GAP: "Reward gap of the canaries, z", DIVERSITY: "Diversity of the canaries, share of the teacher's"}
MISSING = "–"


def compare_runs(runs: Sequence[Run]) -> list[str]:
    """The sections about the runs; none without runs."""
    if not runs:
        return []
    names = run_names(runs)
    alarms = [f"<h3>{escape(name)}</h3>{sentence(run)}" for name, run in zip(names, runs) if state(run.folder)]
    return [
        section("What differs", differences_table(names, runs)),
        section("Training", curves(names, runs)),
        section("Over-optimisation", "".join(alarms)),
    ]


def run_names(runs: Sequence[Run]) -> list[str]:
    """The last parts of the runs' folders, as many as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """How far each run is, and every setting and version in which not all of them agree: a text for each run."""
    rows = [("steps done", [f"{run.step} / {run.config['steps']}" for run in runs])]
    for tables in ([flat(run.config) for run in runs], [flat(_circumstances(run)) for run in runs]):
        for key in dict.fromkeys(key for table in tables for key in table):
            values = [table.get(key) for table in tables]
            if any(value != values[0] for value in values):
                rows.append((key, [_text(value) for value in values]))
    return rows


def _circumstances(run: Run) -> dict[str, Any]:
    """Versions, commit and number of devices."""
    known = {key: run.document[key] for key in ("versions", "commit", "processes") if key in run.document}
    return known | {"devices": len(run.document.get("devices", []))}


def differences_text(runs: Sequence[Run]) -> str:
    """`differences` for the console: a column for each run."""
    rows = [["", *run_names(runs)], *([key, *values] for key, values in differences(runs))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)


def differences_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    """`differences` as HTML."""
    rows = differences(runs)
    head = "".join(f"<th>{escape(name)}</th>" for name in ["setting", *names])
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in (key, *row))}</tr>" for key, row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)


def curves(names: Sequence[str], runs: Sequence[Run]) -> str:
    """A chart for each metric that a run has, with a curve for each run that has it."""
    rewards = dict.fromkeys(name for run in runs for name in active_rewards(run.config))
    metrics = {f"reward/{name}": f"Reward {name}" for name in rewards} | METRICS | WATCHED
    figures = [_chart(key, title, names, runs) for key, title in metrics.items()]
    note = "Over generator steps; faint as measured, bold averaged."
    drawn = "".join(figures)
    return f'<div class="charts">{drawn}</div><p class="note">{note}</p>' if drawn else ""


def _chart(key: str, title: str, names: Sequence[str], runs: Sequence[Run]) -> str:
    series: list[Series] = []
    for name, run in zip(names, runs):
        series += series_of(run.rows, {key: name})
    if not series:
        return ""
    last = max(s.steps.max() for s in series)
    chart = line_chart(series, title, last)
    caption = f"<figcaption>{escape(title)}<div>{series_key(s.name for s in series)}</div></figcaption>"
    return f'<figure class="chart">{caption}{chart}</figure>'
