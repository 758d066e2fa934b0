"""The section about over-optimisation: what was watched while a run trained, the alarm, and the canaries."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from dmdr_jax import workdir
from dmdr_jax.evaluation.canaries import PREFIX, SHARES, Z_HELD_OUT, Z_TRAINED
from dmdr_jax.evaluation.curves import Series, line_chart, series_of
from dmdr_jax.evaluation.pictures import strip
from dmdr_jax.evaluation.runs import Run
from dmdr_jax.evaluation.sections import series_key

CANARY = "canary_"  # how the names of their grids begin
CURVES = {
    "Rewards of the canaries, z": {Z_TRAINED: "trained", Z_HELD_OUT: "held out"},
    "Share of the teacher's": {f"{PREFIX}{name}_share": name for name in SHARES},
    "Clipped pixels beyond the teacher's": {f"{PREFIX}clipped_more": "clipped"},
}


def watched(run: Run) -> str:
    """The body of the section; empty for a run that was not watched."""
    figures = [_chart(title, series_of(run.rows, names), run.step, mark(run)) for title, names in CURVES.items()]
    if not any(figures):
        return ""
    note = (
        "On canaries, prompts and noise that never change. z is in standard deviations of the teacher's scores on "
        "them: where trained rewards rise and held-out ones fall, the student pleases the reward and nobody else."
    )
    charts = f'<div class="charts">{"".join(figures)}</div><p class="note">{note}</p>'
    return f"{sentence(run)}{charts}{strip(grids(run))}"


def state(folder: epath.Path) -> Mapping[str, Any]:
    """What a run's best.json says; empty where there is none."""
    try:
        return json.loads((folder / workdir.BEST_FILE).read_text())
    except (OSError, ValueError):
        return {}


def sentence(run: Run) -> str:
    """The alarm, or that there is none, and the checkpoint to keep."""
    found = state(run.folder)
    alarm, best = found.get("alarm"), found.get("step")
    keep = "" if best is None else f" The best checkpoint is that of step {best}."
    if alarm is None:
        return f"<p>No alarm up to step {run.step}.{keep}</p>"
    text = f"Over-optimised at step {alarm['step']}: {alarm['reason']}{keep}"
    return f'<div class="verdict worse"><span class="tag">alarm</span><p>{escape(text)}</p></div>'


def mark(run: Run) -> tuple[float, str] | None:
    """Where the alarm was raised, for a chart."""
    alarm = state(run.folder).get("alarm")
    return None if alarm is None else (alarm["step"], "alarm")


def grids(run: Run) -> list[tuple[epath.Path, str]]:
    """The teacher's canaries, those of the best step and the latest, with what they are."""
    samples = run.folder / workdir.SAMPLES
    drawn = {int(f.stem.removeprefix(CANARY)): f for f in samples.glob(f"{CANARY}[0-9]*.png")}
    steps = {state(run.folder).get("step"): "the best step", max(drawn, default=None): "the latest step"}
    named = [(drawn[step], f"canaries at {what}, {step}") for step, what in steps.items() if step in drawn]
    return [(samples / f"{CANARY}teacher.png", "the teacher's canaries"), *named]


def _chart(title: str, series: Sequence[Series], last: float, mark: tuple[float, str] | None) -> str:
    if not series:
        return ""
    key, chart = series_key(s.name for s in series), line_chart(series, title, last, mark)
    return f'<figure class="chart"><figcaption>{escape(title)}<div>{key}</div></figcaption>{chart}</figure>'
