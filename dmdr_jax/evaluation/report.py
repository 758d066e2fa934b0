"""The report: one HTML page that needs nothing beside itself.

The page forbids itself every load from elsewhere by a content security policy.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from dmdr_jax import __version__
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import results as evaluations
from dmdr_jax.evaluation.curves import Series, line_chart, series_of
from dmdr_jax.evaluation.page_style import STYLE
from dmdr_jax.evaluation.pictures import previews, side_by_side
from dmdr_jax.evaluation.results import Column
from dmdr_jax.evaluation.table import MISSING, Estimate, decide, format_estimate
from dmdr_jax.evaluation.verdict import Finding, caution, describe, findings
from dmdr_jax.training.metrics import METRICS_FILE, read_metrics

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SAMPLES = "samples"

Results = Mapping[str, Any]


def write_report(run: Path, evaluation: Path | None, out: Path) -> None:
    """Writes the page about ``run``, with the evaluation's pictures, table and verdict if there is one.

    Raises:
      UserError: the run or the evaluation is not there.
    """
    document = read_run(run)
    rows = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    results = evaluations.read(evaluation) if evaluation else None
    page = render_page(run, document, rows, evaluation, results, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def read_run(run: Path) -> dict[str, Any]:
    """The run's config.json."""
    file = run / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} is missing or damaged: give the workdir of python -m dmdr_jax.train.") from None


def render_page(
    run: Path,
    document: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluation: Path | None,
    results: Results | None,
    out: Path,
) -> str:
    """The whole page."""
    config = document["config"]
    title = f"A {config['student']['steps']}-step generator from {config['model']}"
    sections = [
        header(title, run, config, rows, results),
        section("Verdict", verdict(results)) if results else "",
        section("Side by side", pictures(evaluation, results)) if evaluation and results else "",
        section("Table", tables(results)) if results else "",
        section("Training", charts(config, rows)),
        section("As it learned", previews(run / SAMPLES)),
        section("Going on", commands(run, document, evaluation, results, out)),
        section("Settings", settings(document, results)),
        f"<footer>Written by dmdr_jax {__version__} on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"\n<section><h2>{title}</h2>{body}</section>" if body else ""


def header(
    title: str, run: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], results: Results | None
) -> str:
    """What this is, and how far it is."""
    rewards = active_rewards(config)
    done = max((row["step"] for row in rows), default=0)
    facts = {
        "generator steps": f"{done} / {config['steps']}",
        "prompts a step": config["batch"],
        "student steps": config["student"]["steps"],
        "generator": config["generator"]["kind"],
        "rewards": ", ".join(rewards) or "none",
        "seed": config["seed"],
    }
    if results:
        facts["images evaluated, each model"] = len(results["prompts"])
    items = "".join(f"<li><b>{escape(str(v))}</b><span>{escape(k)}</span></li>" for k, v in facts.items())
    with_rewards = ", while rewards pull it towards better images" if rewards else ""
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="lead">The run <b>{escape(str(run))}</b> trains a few-step generator from a diffusion model by DMDR '
        "(arXiv 2511.13649): the difference between the teacher's score and that of a second network, which follows "
        f"the student, keeps the student's images likely under the teacher{with_rewards}. It uses no images.</p>"
        f'<ul class="facts">{items}</ul>'
    )


def active_rewards(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: reward for name, reward in config["rewards"].items() if reward["weight"]}


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
    models = "; ".join(f"{describe(m)}, {guidance(m)}" for m in results["models"])
    has_verdict = any(c.key == "strict" for c in results["columns"])
    marks = " ✓ passes the strict verdict, ✗ fails it." if has_verdict else ""
    text = f"Same prompt, same noise; the first prompts of each task as they came.{marks} {models}."
    return f'<p class="note">{escape(text)}</p>{cards}' if cards else ""


def guidance(model: Mapping[str, Any]) -> str:
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
    mean, plus_minus, se = format_estimate(value, column.digits).partition(" ± ")
    return f"<td>{mark}{mean}{f'<small>±{se}</small>' if plus_minus else ''}</td>"


# --- training ------------------------------------------------------------------------------------------------------


def joint_start(config: Mapping[str, Any]) -> int | None:
    """The generator step at which the first reward sets in; None without rewards."""
    return min((reward["start"] for reward in active_rewards(config).values()), default=None)


def charts(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rewards, score gap and fake loss over generator steps."""
    if not rows:
        return '<p class="note">No step is written yet.</p>'
    start = joint_start(config)
    mark = (start, "rewards set in") if start else None
    names = {f"reward/{name}": name for name in active_rewards(config)}
    gaps = {"dm/score_gap": "with guidance", "dm/distribution_gap": "without"}
    curves = {
        "Rewards of the student's x0": series_of(rows, names),
        "Score gap": series_of(rows, gaps),
        "Loss of the fake score": series_of(rows, {"fake/loss": "flow matching"}),
    }
    last = rows[-1]["step"]
    figures = [_chart(title, series, last, mark) for title, series in curves.items() if series]
    note = (
        "Over generator steps; faint as measured, bold averaged. The score gap is mean |x0 fake - x0 real|, the signal "
        "of distribution matching: its guidance part remains when the two distributions meet."
    )
    return f'<div class="charts">{"".join(figures)}</div><p class="note">{note}</p>'


def _chart(title: str, series: Sequence[Series], last: float, mark: tuple[float, str] | None) -> str:
    names = [f'<i style="background: var(--s{i})"></i>{escape(s.name)}' for i, s in enumerate(series)]
    key = "".join(f'<span class="key">{name}</span>' for name in names)
    chart = line_chart(series, title, last, mark)
    return f'<figure class="chart"><figcaption>{escape(title)}<div>{key}</div></figcaption>{chart}</figure>'


# --- commands and settings -----------------------------------------------------------------------------------------


def commands(
    run: Path, document: Mapping[str, Any], evaluation: Path | None, results: Results | None, out: Path
) -> str:
    """What to type next."""
    config, workdir = document["config"], shlex.quote(str(run))
    program = "python -m dmdr_jax."
    longer = f"--config.steps={2 * config['steps']}"
    train = document.get("command", f"{program}train --config=CONFIG.py --workdir={workdir}")
    blocks = [
        ("Train twice as long: the run goes on where it stopped.", f"{train} {longer}"),
        ("Draw from your own prompts.", f"{program}sample --model {workdir} --prompts prompts.txt --out images"),
        ("Write a folder that diffusers loads.", f"{program}export --checkpoint {workdir} --out student"),
    ]
    if results:
        seed = results["settings"]["seed"] + 1
        again = f"{results['command']} --seed {seed} --out {shlex.quote(f'{evaluation}_{seed}')}"
        blocks.append(("Evaluate again on other prompts and noise.", again))
    given = f" --evaluation {shlex.quote(str(evaluation))}" if evaluation else ""
    blocks += [
        ("Watch the curves.", f"tensorboard --logdir {workdir}"),
        ("Write this page again.", f"{program}report {workdir}{given} --out {shlex.quote(str(out))}"),
    ]
    return "".join(f"<p>{escape(text)}</p><pre>{escape(command)}</pre>" for text, command in blocks)


def settings(document: Mapping[str, Any], results: Results | None) -> str:
    """Configuration, versions and machines, folded away."""
    parts = [_details("Configuration of the run", _flat(document["config"]))]
    trained = {**document.get("versions", {}), "devices": ", ".join(document.get("devices", []))}
    parts.append(_details("Versions of the training", trained))
    if results:
        environment = {**_flat(results["environment"]), "seconds": results["seconds"], "command": results["command"]}
        parts.append(_details("The evaluation", environment))
    return "".join(parts)


def _details(title: str, items: Mapping[str, Any]) -> str:
    text = "\n".join(f"{key} = {value}" for key, value in items.items())
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
