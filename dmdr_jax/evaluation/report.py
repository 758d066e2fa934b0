"""The report: one HTML page that needs nothing beside itself.

About one run, its evaluation or both; or about several runs side by side. The page forbids itself every load from
elsewhere by a content security policy.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from etils import epath

from dmdr_jax import __version__
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import results as evaluations
from dmdr_jax.evaluation.comparison import compare_runs
from dmdr_jax.evaluation.curves import Series, line_chart, series_of
from dmdr_jax.evaluation.journal import write_text
from dmdr_jax.evaluation.pictures import previews
from dmdr_jax.evaluation.runs import Run, active_rewards, flat
from dmdr_jax.evaluation.sections import Results, details, page, section, sections_of, series_key
from dmdr_jax.evaluation.watched import watched
from dmdr_jax.workdir import SAMPLES


def write_report(runs: epath.PathLike | Sequence[epath.PathLike], evaluation: Path | None, out: Path) -> list[Run]:
    """Writes the page about ``runs`` (any number), with the evaluation's pictures, table and verdict if there is one.

    Returns:
      The runs as they were read.

    Raises:
      UserError: a run or the evaluation is not there, or neither is named.
    """
    read = map(Run.read, [runs] if isinstance(runs, str | os.PathLike) else runs)
    opened = list({run.folder.resolve(): run for run in read}.values())  # each once
    results = evaluations.read(evaluation) if evaluation else None
    if not opened and results is None:
        raise UserError("name a run, or an evaluation with --evaluation, or both.")
    if len(opened) == 1:
        title, sections = about_run(opened[0], evaluation, results, out)
    else:
        title, sections = about_several(opened, evaluation, results)
    written = datetime.now().astimezone()
    footer = f"<footer>Written by dmdr_jax {__version__} on {written:%Y-%m-%d %H:%M %Z}.</footer>"
    write_text(out, page(title, [*sections, footer]))
    return opened


def about_run(run: Run, evaluation: Path | None, results: Results | None, out: Path) -> tuple[str, list[str]]:
    """Title and sections of the page about one run."""
    config = run.config
    title = f"A {config['student']['steps']}-step generator from {config['model']}"
    return title, [
        header(title, run.folder, config, run.rows, results),
        *sections_of(evaluation, results),
        section("Training", charts(config, run.rows)),
        section("Over-optimisation", watched(run)),
        section("As it learned", previews(run.folder / SAMPLES)),
        section("Going on", commands(run.folder, run.document, evaluation, results, out)),
        section("Settings", settings(run.document, results)),
    ]


def about_several(runs: Sequence[Run], evaluation: Path | None, results: Results | None) -> tuple[str, list[str]]:
    """Title and sections of the page about several runs, or about an evaluation alone."""
    title = f"{len(runs)} runs side by side" if runs else f"{len(results['models'])} models side by side"
    lead = ", ".join(escape(str(run.folder)) for run in runs) or escape(str(evaluation))
    return title, [
        f'<h1>{escape(title)}</h1><p class="lead">{lead}</p>',
        *sections_of(evaluation, results),
        *compare_runs(runs),
        section("Settings", evaluation_settings(results) if results else ""),
    ]


def header(
    title: str, run: epath.Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], results: Results | None
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
        "Loss of the fake score": series_of(rows, {"fake/loss": "all noise levels"}),
        "Loss of the fake score by noise level": series_of(rows, _by_noise(rows)),
    }
    last = rows[-1]["step"]
    figures = [_chart(title, series, last, mark) for title, series in curves.items() if series]
    note = (
        "Over generator steps; faint as measured, bold averaged. The score gap is mean |x0 fake - x0 real|, the signal "
        "of distribution matching: its guidance part remains when the two distributions meet."
    )
    return f'<div class="charts">{"".join(figures)}</div><p class="note">{note}</p>'


def _by_noise(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The keys of the fake score's loss by noise level, from low to high, with the levels."""
    found = sorted({key for row in rows for key in row if key.startswith("fake_by_noise/tau_")})
    return {key: key.removeprefix("fake_by_noise/tau_").replace("_", " to ") for key in found}


def _chart(title: str, series: Sequence[Series], last: float, mark: tuple[float, str] | None) -> str:
    key, chart = series_key(s.name for s in series), line_chart(series, title, last, mark)
    return f'<figure class="chart"><figcaption>{escape(title)}<div>{key}</div></figcaption>{chart}</figure>'


# --- commands and settings -----------------------------------------------------------------------------------------


def commands(
    run: epath.Path, document: Mapping[str, Any], evaluation: Path | None, results: Results | None, out: Path
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
    parts = [details("Configuration of the run", flat(document["config"]))]
    trained = {**document.get("versions", {}), "devices": ", ".join(document.get("devices", []))}
    parts.append(details("Versions of the training", trained))
    return "".join(parts) + (evaluation_settings(results) if results else "")


def evaluation_settings(results: Results) -> str:
    """Versions, machine and command of an evaluation, folded away."""
    environment = {**flat(results["environment"]), "seconds": results["seconds"], "command": results["command"]}
    return details("The evaluation", environment)
