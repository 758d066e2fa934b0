"""Sections of a page that come from an evaluation alone, whatever runs it compares."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dmdr_jax.evaluation.bars import COLORS, bar_chart
from dmdr_jax.evaluation.page_style import STYLE
from dmdr_jax.evaluation.pictures import Pictures, card, side_by_side
from dmdr_jax.evaluation.results import Column
from dmdr_jax.evaluation.table import MISSING, Estimate, decide, format_estimate
from dmdr_jax.evaluation.verdict import Finding, caution, describe, findings, primary_column

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
EXTREMES = 6  # prompts shown at either end

Results = Mapping[str, Any]


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page, which needs nothing beside itself."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"\n<section><h2>{title}</h2>{body}</section>" if body else ""


def sections_of(folder: Path | None, results: Results | None) -> list[str]:
    """Everything that an evaluation has to say; nothing without one."""
    if folder is None or results is None:
        return []
    return [
        section("Verdict", verdict(results)),
        section("Side by side", pictures(folder, results)),
        section("Table", tables(results)),
        section("Task by task", tasks(results)),
        section("Best and worst", extremes(folder, results)),
    ]


# --- verdict, pictures, table --------------------------------------------------------------------------------------


def verdict(results: Results) -> str:
    """The findings, each with its outcome."""
    boxes = [
        f'<div class="verdict {f.outcome}"><span class="tag">{escape(heading(f))}</span><p>{escape(f.text)}</p></div>'
        for f in findings(results)
    ]
    warning = caution(results)
    note = (
        "Computed from paired differences, image by image, on the same prompts and noise; a difference counts beyond "
        "two standard errors. One run is one draw of the training seed: these errors are those of the evaluation alone."
    )
    warned = f"<p><b>{escape(warning)}</b></p>" if warning else ""
    return "".join(boxes) + warned + f'<p class="note">{note}</p>' if boxes else ""


def heading(f: Finding) -> str:
    return f"{f.model}: {f.outcome} {'against' if f.outcome == 'undecided' else 'than'} {f.other}"


def pictures(folder: Path, results: Results) -> str:
    """The cards with a word on what stands where."""
    cards = side_by_side(folder, results)
    models = "; ".join(", ".join(filter(None, [describe(m), guidance(m)])) for m in results["models"])
    has_verdict = any(c.key == "strict" for c in results["columns"])
    marks = " ✓ passes the strict verdict, ✗ fails it." if has_verdict else ""
    text = f"Same prompt, same noise; the first prompts of each task as they came.{marks} {models}."
    return f'<p class="note">{escape(text)}</p>{cards}' if cards else ""


def guidance(model: Mapping[str, Any]) -> str:
    if model["guidance"] is None:
        return ""
    return f"guidance {model['guidance']:g}" if model["guidance"] > 1 else "no guidance"


def tables(results: Results) -> str:
    """The table in its groups; differences from the last reference that are decided are marked."""
    reference = results["compared_with"][-1]
    groups = list(dict.fromkeys(c.group for c in results["columns"]))
    parts = [_table(results, group, reference, with_speed=group == groups[0]) for group in groups]
    legend = (
        f'<b class="good">▲</b> better, <b class="bad">▼</b> worse than {escape(reference)} beyond two standard errors '
        "of the paired difference; no mark: undecided, or a measure without a better side."
    )
    text = re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(results["caption"]).replace("`", ""))
    return f'<p class="note">{text}</p>{"".join(parts)}<p class="note">{legend}</p>'


def _table(results: Results, group: str, reference: str, with_speed: bool) -> str:
    columns = [column for column in results["columns"] if column.group == group]
    titles = ["model", "NFE", *["images/s"] * with_speed, *(column.title for column in columns)]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(_table_row(model, columns, reference, with_speed) for model in results["models"])
    if results["floor"]:
        body += _table_row(results["floor"], columns, reference, with_speed, kind=' class="floor"')
    return f'<h3>{escape(group.capitalize())}</h3><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _table_row(
    model: Mapping[str, Any], columns: Sequence[Column], reference: str, with_speed: bool, kind: str = ""
) -> str:
    nfe = MISSING if model["nfe"] is None else model["nfe"]
    speed = MISSING if model["images_per_second"] is None else f"{model['images_per_second']:.3g}"
    differences = model["differences"].get(reference, {})
    cells = [f"<td>{cell}</td>" for cell in [escape(model["name"]), nfe, *[speed] * with_speed]]
    cells += [_cell(c, model["summary"].get(c.key), differences.get(c.key)) for c in columns]
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _cell(column: Column, value: Estimate | None, difference: Estimate | None) -> str:
    outcome = decide(difference, column.better) if difference else "undecided"
    mark = {"better": '<b class="good">▲</b> ', "worse": '<b class="bad">▼</b> '}.get(outcome, "")
    mean, plus_minus, se = format_estimate(value, column.digits, times=column.times).partition(" ± ")
    return f"<td>{mark}{mean}{f'<small>±{se}</small>' if plus_minus else ''}</td>"


# --- tasks and extremes ----------------------------------------------------------------------------------------------


def tasks(results: Results) -> str:
    """Bars of every measure that is known task by task."""
    figures = []
    for title, columns in by_task(results["columns"]).items():
        names = [column.title for column in columns]
        models = [(m["name"], [_shown(m["summary"].get(c.key), c) for c in columns]) for m in results["models"]]
        caption = f"<figcaption>{escape(title)}<div>{series_key(name for name, _ in models)}</div></figcaption>"
        chart = bar_chart(names, [values for _, values in models], title)
        figures.append(f'<figure class="chart wide">{caption}{chart}</figure>')
    note = '<p class="note">Bars are means, whiskers one standard error.</p>'
    return "".join(figures) + note if figures else ""


def by_task(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """The columns that are one measure on single tasks, by the measure's title."""
    found: dict[str, list[Column]] = {}
    titles = {column.key: column.title for column in columns}
    for column in columns:
        whole = column.key.partition("@")[0] if "@" in column.key else column.key.partition("/")[0]
        if whole != column.key and ("@" in column.key or whole == "strict"):
            found.setdefault(titles.get(whole, whole), []).append(column)
    return found


def _shown(value: Estimate | None, column: Column) -> tuple[float, float] | None:
    """Mean and standard error as the table shows them; None where there is no number."""
    if value is None or value.mean != value.mean:
        return None
    return column.times * value.mean, column.times * value.se


def extremes(folder: Path, results: Results) -> str:
    """The prompts on which the last model gained and lost most against the first, by the measure that decides."""
    main = primary_column(results["columns"])
    models = results["models"]
    if main is None or len(models) < 2 or main.key not in models[-1]["images"][0]:
        return ""
    found = Pictures(folder, results)
    gains = [_gain(models, main, i) for i in range(len(results["prompts"]))]
    order = [i for i in sorted(range(len(gains)), key=lambda i: gains[i]) if i in found]
    if not order:
        return ""
    ends = {"gained most": order[::-1][:EXTREMES], "lost most": order[:EXTREMES]}
    parts = [f"<p>Where {escape(models[-1]['name'])} {what} against {escape(models[0]['name'])}:</p>" for what in ends]
    cards = [
        f'<div class="cards" style="--card-width: {found.card_width}px">'
        + "".join(card(results, found, i, f"{main.times * gains[i]:+.{main.digits}f}") for i in rows)
        + "</div>"
        for rows in ends.values()
    ]
    note = f'<p class="note">By {escape(main.title)}, image by image; these are picked by that number.</p>'
    return note + "".join(text + group for text, group in zip(parts, cards))


def _gain(models: Sequence[Mapping[str, Any]], main: Column, i: int) -> float:
    """The last model's advantage over the first on an image; 0 where there is no number."""
    a, b = (models[k]["images"][i].get(main.key) for k in (-1, 0))
    return 0.0 if a is None or b is None else float(a) - float(b)


# --- small parts -----------------------------------------------------------------------------------------------------


def series_key(names: Iterable[str]) -> str:
    """Which colour is which."""
    marks = [f'<i style="background: var(--s{i % COLORS})"></i>{escape(name)}' for i, name in enumerate(names)]
    return "".join(f'<span class="key">{mark}</span>' for mark in marks)


def details(title: str, items: Mapping[str, Any]) -> str:
    """Settings, a line each, folded away."""
    text = "\n".join(f"{key} = {value}" for key, value in items.items())
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
