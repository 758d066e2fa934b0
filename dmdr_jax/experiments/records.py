"""The record of one row with one seed: everything a table or a figure needs, small enough to be committed.

RECORDS/EXPERIMENT/ROW.seedN.json (ROW.json where nothing is trained). A record says what was run (row, seed, settings
that differ from `configs/base.py`, commands), where (versions, commit, processor), what it cost, and what came out:

    measures     by key [number, standard error, images]: means and distribution measures of `dmdr_jax.evaluate`
    teacher      by key [difference, standard error] from the experiment's teacher, image by image
    images       the measures that rows are compared by, image by image: verdicts as a string of 0 and 1, scores in
                 thousandths; ``units`` tells which images share a prompt, ``prompts`` is a checksum of what was asked
    curves       the run's metrics, each point the mean of its neighbours
    watch        the run's best.json: the step to keep, and its alarm where there was one
    along        evaluations of the checkpoints: by key [number, standard error, difference from the teacher, its error]
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.experiments.jobs import (
    ALONG,
    COST,
    EVALUATE,
    EVALUATION,
    RUN,
    TRAIN,
    Job,
    Step,
    plain,
    read_json,
)
from dmdr_jax.workdir import BEST_FILE, METRICS

FORMAT = 1
POINTS = 60
METRIC_GROUPS = ("dm/", "fake/", "reward/", "policy/", "dpo/", "generator/gradient_norm")
VERDICTS = ("strict", "lenient")
SCORES = ("judge/", "reward/")
SCORE_UNITS = 1000  # a score of .617 is stored as 617

Record = dict[str, Any]


def record_file(records: Path, experiment: str, label: str, seed: int | None) -> Path:
    return records / experiment / (f"{label}.json" if seed is None else f"{label}.seed{seed}.json")


def write_record(job: Job, records: Path) -> Path:
    """Makes the record of a finished job and writes it; the file changes only where the record does."""
    file = record_file(records, job.experiment.name, job.row.label, job.seed)
    text = as_text(make_record(job))
    if not (file.exists() and file.read_text(encoding="utf-8") == text):
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".tmp")
        half.write_text(text, encoding="utf-8")
        os.replace(half, file)
    return file


def as_text(record: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and for each entry of its objects: short, and a change is seen where it is."""
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"  {json.dumps(k)}: {_short(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {_short(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_records(records: Path, experiment: str, label: str) -> list[Record]:
    """All records of a row, in the order of their seeds.

    Raises:
      UserError: one is damaged, or of a newer format.
    """
    found = [*records.glob(f"{experiment}/{label}.json"), *records.glob(f"{experiment}/{label}.seed*.json")]
    read = [_read(file) for file in found]
    return sorted(read, key=lambda record: -1 if record["seed"] is None else record["seed"])


def _read(file: Path) -> Record:
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{file} is no record of format {FORMAT}: write it again with python -m dmdr_jax.sweep.")
    return record


# --- making one ----------------------------------------------------------------------------------------------------


def make_record(job: Job) -> Record:
    """The record of a job whose commands are all done."""
    results = _results(job.folder / EVALUATION)
    own = results["models"][-1]
    record: Record = {
        "format": FORMAT,
        "experiment": job.experiment.name,
        "file": job.experiment.spec,
        "row": job.row.label,
        "title": job.row.name,
        "seed": job.seed,
        "config": job.row.config,
        "after": job.row.after,
        "overrides": plain(dict(job.row.overrides)),
        "settings": settings_of(job),
        "commands": {step.name: anywhere(shown(step), job) for step in job.steps()},
        "environment": results["environment"],
        "cost": cost_of(job),
        "evaluation": {key: results["settings"].get(key) for key in ("world", "per_tag", "per_prompt", "seed")},
        "model": {key: own.get(key) for key in ("nfe", "grid", "kernel", "guidance", "images_per_second")},
        "measures": {key: [*_pair(value), value["n"]] for key, value in own["summary"].items()},
        "teacher": {key: _pair(value) for other in own["differences"].values() for key, value in other.items()},
        "images": per_image(results["prompts"], own["images"]),
    }
    if job.row.config:
        record["curves"] = thin_curves(_metrics(job.folder / RUN / METRICS))
        record["watch"] = read_json(job.folder / RUN / BEST_FILE)
    if (job.folder / ALONG / "results.json").is_file() and job.experiment.along is not None and job.row.config:
        record["along"] = along_of(_results(job.folder / ALONG))
    return record


def shown(step: Step) -> str:
    """A command as a reader types it."""
    return shlex.join(["python", *step.command[1:]])


def anywhere(command: str, job: Job) -> str:
    """The command with the folder of the documented sweep in the place of this one's."""
    return command.replace(str(job.out), f"runs/{job.experiment.name}")


def _results(folder: Path) -> dict[str, Any]:
    results = read_json(folder / "results.json")
    if results is None:
        raise UserError(f"{folder} holds no evaluation: remove the folder and run the sweep again.")
    return results


def settings_of(job: Job) -> dict[str, Any]:
    """Every key of the run's configuration that is not as in `configs/base.py`; a reward's beside `base.reward`'s."""
    if not job.row.config:
        return {}
    from configs import base

    config, defaults = job.config, dict(cli.config_keys(base.get_config()))
    for name in config.get("rewards", {}):
        defaults |= dict(cli.config_keys(base.reward("", math.nan), f"rewards.{name}."))
    return plain({key: value for key, value in cli.config_keys(config) if defaults.get(key) != value})


def cost_of(job: Job) -> dict[str, Any]:
    """Seconds, CPU seconds, updates and operations; of the whole training also what the row went on from.

    What a training run took is left out where nobody was there to note all of it, as after a kill.
    """
    state, chain = job.state(), _chain(job)
    costs: dict[str, Any] = {"interruptions": sum(max(0, s.get("attempts", 1) - 1) for s in state.values())}
    for name, step in (("training", TRAIN), ("evaluation", EVALUATE)):
        if step in state and (step != TRAIN or _is_noted(job)):
            costs |= {f"{name}_{key}": round(state[step].get(key, 0.0), 1) for key in ("seconds", "cpu_seconds")}
    timed = state.get(TRAIN, {})
    if timed.get("timed_updates"):
        costs["seconds_per_update"] = round(timed["timed_seconds"] / timed["timed_updates"], 4)
    if chain:
        costs["updates"] = job.config.steps if job.row.config else job.first_step
        if all(_is_noted(link) for link, _ in chain):
            spent = sum(share * link.state().get(TRAIN, {}).get("cpu_seconds", 0.0) for link, share in chain)
            costs["total_cpu_seconds"] = round(spent, 1)
    counted = next((read_json(step.product) for step in job.steps() if step.name == COST), None) or {}
    return costs | {f"flops_{key}": counted[key] for key in _COUNTED if key in counted}


_COUNTED = ("fake_update", "generator_update", "training")


def _is_noted(job: Job) -> bool:
    """Whether the attempts at a training run whose costs were noted made all of its updates."""
    updates = job.config.steps - job.first_step
    return bool(job.state().get(TRAIN, {}).get("updates", updates) >= updates)


def _chain(job: Job) -> list[tuple[Job, float]]:
    """The runs that led to the model, each with the share of its own updates that did."""
    found: list[tuple[Job, float]] = []
    last: int | None = None
    link: Job | None = job
    while link is not None:
        if link.row.config:
            first, end = link.first_step, link.config.steps
            found.append((link, ((end if last is None else last) - first) / (end - first)))
        last, link = link.first_step, link.parent
    return found


def _pair(value: Mapping[str, Any]) -> list[float | None]:
    return [_rounded(value["mean"]), _rounded(value["se"])]


def _rounded(value: float | None, digits: int = 5) -> float | None:
    """To so many significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def per_image(prompts: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Verdicts and scores image by image, what shares a prompt, and a checksum of prompts and noise."""
    texts = [prompt["prompt"] for prompt in prompts]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    asked = json.dumps([[prompt["prompt"], prompt.get("noise_seed")] for prompt in prompts])
    found: dict[str, Any] = {
        "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "units": [numbers[text] for text in texts],
    }
    for key in images[0] if images else ():
        if key in VERDICTS:
            found[key] = "".join("1" if image[key] else "0" for image in images)
        elif key.startswith(SCORES):
            found[key] = [round(SCORE_UNITS * image[key]) for image in images]
    return found


def values_of(images: Mapping[str, Any], key: str) -> np.ndarray | None:
    """``[n]`` of a measure image by image, verdicts as bool; None where it was not stored."""
    stored = images.get(key)
    if stored is None or key in ("prompts", "units"):
        return None
    return np.array([c == "1" for c in stored]) if isinstance(stored, str) else np.array(stored) / SCORE_UNITS


def thin_curves(rows: Sequence[Mapping[str, Any]], points: int = POINTS) -> dict[str, list[float | None]]:
    """At most ``points`` of each metric, each the mean of its neighbours (of those that have a number)."""
    if not rows:
        return {}
    keys = sorted({key for row in rows for key in row if key.startswith(METRIC_GROUPS)})
    chunks = np.array_split(np.arange(len(rows)), min(points, len(rows)))

    def mean(key: str, chunk: np.ndarray) -> float | None:
        values = [rows[i][key] for i in chunk if rows[i].get(key) is not None]
        return _rounded(float(np.mean(values)), 4) if values else None

    return {"step": [mean("step", c) for c in chunks]} | {key: [mean(key, c) for c in chunks] for key in keys}


def _metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def along_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """By key, one entry per checkpoint: number, its error, difference from the teacher, its error."""
    teacher, *checkpoints = results["models"]
    found: dict[str, Any] = {"steps": [int(model["name"]) for model in checkpoints]}
    unknown = {"mean": None, "se": None}  # a distance to the teacher's images: it has none of its own
    for key in checkpoints[0]["summary"]:
        if not key.startswith("strict/"):
            differences = [model["differences"][teacher["name"]].get(key, unknown) for model in checkpoints]
            found[key] = [[*_pair(model["summary"][key]), *_pair(d)] for model, d in zip(checkpoints, differences)]
    return found
