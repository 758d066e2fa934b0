"""An evaluation on prompts from outside the embedded world: drawn, measured and compared through files.

Every piece of work is kept when it is done (images in galleries, numbers in journals), processes share it by rows,
and whoever finds everything there writes the results.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation.benchmarks import spread_by_style
from dmdr_jax.evaluation.contestants import Contestant, check_complete, enter
from dmdr_jax.evaluation.entries import Entry
from dmdr_jax.evaluation.environment import command, describe_environment
from dmdr_jax.evaluation.measures import Measures
from dmdr_jax.evaluation.overoptimisation import HELD_OUT, TRAINED, reward_gap
from dmdr_jax.evaluation.prompt_columns import columns
from dmdr_jax.evaluation.questions import Questions
from dmdr_jax.evaluation.results import Measured, Summary
from dmdr_jax.evaluation.shards import Shard, wait_for_others
from dmdr_jax.evaluation.table import estimate, paired

WORK = "work"
"""Folder of the journals, in that of the results."""


def evaluate_prompts(args: Any, entries: Sequence[Entry], ask: Questions) -> str:
    """Runs the evaluation and writes it; returns the table.

    Raises:
      UserError: something that is named cannot be read, or nothing is to be measured.
      OthersAtWork: other processes have not done their part yet.
    """
    started = time.time()
    out, shard = Path(args.out), Shard.make(args.shard)
    measures = Measures.make(args, len(ask.records), ask.per_prompt, out / WORK, shard)
    if not (measures or ask.benchmark):
        raise UserError("--prompts without --reward leaves nothing to measure: name at least one score.")
    names = [scorer.spec.name for scorer in measures.rewards]
    reward_keys(args.trained, [], names)  # says what is wrong before anything is drawn
    contestants = enter(args, entries, ask, shard)
    measures.fill(contestants, ask.prompts)
    measures.fill_references()
    wait_for_others("measured")
    for contestant in contestants:
        check_complete(contestant.name, contestant.gallery)
    # Who was told its part by --shard and finds all images there is the last, and does the rest alone.
    measures.fill_prompts(contestants, Shard() if args.shard else shard)
    wait_for_others("measured whole prompts")
    results = gather(args, contestants, measures, ask, out)
    results["seconds"] = round(time.time() - started, 1)
    if shard.index == 0 or args.shard:
        files.write(out, results)
    wait_for_others("written")
    return (out / files.TABLE_FILE).read_text(encoding="utf-8")


def gather(
    args: Any, contestants: Sequence[Contestant], measures: Measures, ask: Questions, out: Path
) -> dict[str, Any]:
    """The results, of what all processes have kept.

    Raises:
      OthersAtWork: something is missing.
    """
    keys = reward_keys(args.trained, contestants, [scorer.spec.name for scorer in measures.rewards])
    measured = {c.name: measures.collect(c, ask.prompts, keys) for c in contestants}
    for name, statistics in measures.distances(contestants).items():
        measured[name].statistics.update(statistics)
    teacher = measured[contestants[0].name]
    for one in measured.values():
        one.per_image.update(reward_gap(one.per_image, teacher.per_image))
    compared_with = list(dict.fromkeys([contestants[0].name, args.baseline or contestants[0].name]))
    rows = [row_of(contestant, measured, compared_with, ask, out) for contestant in contestants]
    return {
        "title": "Evaluation",
        "caption": caption(args, contestants, measures, keys, ask),
        "command": command(),
        "settings": vars(args),
        "environment": describe_environment(),
        "columns": columns(measured, measures.rewards, keys, ask.tasks),
        "compared_with": compared_with,
        "prompts": [{**record, "noise_seed": seed} for record, seed in zip(ask.records, ask.seeds)],
        "prompt_survey": str(ask.survey),
        "measures": measures.describe(ask.prompts),
        "benchmark": lay_out(contestants, measured, keys, ask, out),
        "models": rows,
        "floor": None,
    }


def reward_keys(trained: str | None, contestants: Sequence[Contestant], names: Sequence[str]) -> dict[str, str]:
    """Where each reward stands in the results: ``reward/NAME`` if it was trained on, ``judge/NAME`` if held out.

    Args:
      trained: names, as the command line says them; None: what the runs among the models say.

    Raises:
      UserError: a name is none of the rewards.
    """
    said = [name for name in (trained or "").split(",") if name]
    unknown = sorted(set(said) - set(names))
    if unknown:
        raise UserError(f"--trained {unknown[0]!r} is none of the rewards; they are: {', '.join(names)}.")
    pushed = set(said) if trained is not None else {name for c in contestants for name in c.trained}
    return {name: (TRAINED if name in pushed else HELD_OUT) + name for name in names}


def row_of(
    contestant: Contestant, measured: Mapping[str, Measured], compared_with: Sequence[str], ask: Questions, out: Path
) -> dict[str, Any]:
    """A model's part of the results."""
    own, gallery = measured[contestant.name], contestant.gallery
    others = [name for name in compared_with if name != contestant.name]
    return contestant.row | {
        "images_per_second": gallery.images_per_second(),
        "drawn": gallery.about,
        "gallery": os.path.relpath(gallery.folder, out),
        "files": [file.name for file in gallery.files],
        "summary": summarise(own, ask),
        "differences": {other: compare(own, measured[other], ask) for other in others},
        "images": [dict(zip(own.per_image, values)) for values in zip(*own.per_image.values())],
    }


def summarise(measured: Measured, ask: Questions) -> Summary:
    """Every measure with its standard error; ``KEY@TASK`` is a reward on the images of one task."""
    units = np.array(ask.prompts)
    summary = files.summarise(measured, units, {}, ask.per_prompt)
    for key in filter(_is_score, measured.per_image):
        values = measured.per_image[key]
        summary |= {f"{key}@{task}": estimate(values[rows], units[rows]) for task, rows in ask.tasks.items()}
    return summary


def compare(measured: Measured, other: Measured, ask: Questions) -> Summary:
    """As `summarise`, of the differences ``measured - other`` image by image."""
    units = np.array(ask.prompts)
    summary = files.compare(measured, other, units, {}, ask.per_prompt)
    for key in filter(_is_score, measured.per_image):
        a, b = measured.per_image[key], other.per_image[key]
        summary |= {f"{key}@{task}": paired(a[rows], b[rows], units[rows]) for task, rows in ask.tasks.items()}
    return summary


def _is_score(key: str) -> bool:
    return key.startswith((TRAINED, HELD_OUT))


def lay_out(
    contestants: Sequence[Contestant],
    measured: Mapping[str, Measured],
    keys: Mapping[str, str],
    ask: Questions,
    out: Path,
) -> dict[str, Any] | None:
    """Lays the images out as the benchmark's own scorer reads them; returns where, and how many files."""
    if ask.benchmark is None:
        return None
    records, n = ask.records[:: ask.per_prompt], ask.per_prompt
    found: dict[str, Any] = {"name": ask.benchmark.name, "folders": {}, "files": {}}
    for contestant in contestants:
        pictures = contestant.gallery.files
        root = out / ask.benchmark.name / contestant.gallery.folder.name
        groups = [pictures[i : i + n] for i in range(0, len(pictures), n)]
        found["files"][contestant.name] = ask.benchmark.lay_out(root, groups, records)
        found["folders"][contestant.name] = os.path.relpath(root, out)
    if ask.benchmark.name == "hpsv2":
        scores = {c.name: measured[c.name].per_image for c in contestants}
        found["by_style"] = {
            name: {k: spread_by_style(per_image[key], ask.records) for k, key in keys.items()}
            for name, per_image in scores.items()
        }
    return found


def caption(
    args: Any, contestants: Sequence[Contestant], measures: Measures, keys: Mapping[str, str], ask: Questions
) -> str:
    """What the table shows, in a few sentences."""
    teacher = contestants[0].name
    parts = [
        f"{len(ask.records)} images per model ({ask.survey}; {ask.per_prompt} per prompt), all models on the same "
        f"prompts and the same noise (seed {args.seed}), measured on 8-bit images. "
        "± is one standard error, prompts being the unit where several images share one."
    ]
    cut = {c.name: {k: v for k, v in (c.row.get("cut_prompts") or {}).items() if v} for c in contestants}
    parts += [f"`{name}` does not read all of {_counts(found)}." for name, found in cut.items() if found]
    unread = {scorer.spec.name: scorer.cut_prompts(ask.prompts) for scorer in measures.rewards}
    parts += [f"The reward `{name}` does not read all of {count} prompts." for name, count in unread.items() if count]
    if measures.features:
        parts.append(f"Distances to `teacher` are to the images of `{teacher}`; they shrink with the number of images.")
    if {key.partition("/")[0] for key in keys.values()} == {"reward", "judge"}:
        parts.append(f"The reward gap is that of trained over held-out rewards in standard deviations of `{teacher}`.")
    return " ".join(parts)


def _counts(cut: Mapping[str, int]) -> str:
    return " and ".join(f"{count} prompts ({name})" for name, count in cut.items())
