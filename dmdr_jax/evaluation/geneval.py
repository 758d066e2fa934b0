"""GenEval's verdict (Ghosh et al. 2023) on what any detector saw, and its summary.

Detections come as JSON lines, one for each image::

    {"filename": "geneval/student/00012/samples/00000.png", "detections": [
        {"label": "bench", "score": 0.97, "box": [x0, y0, x1, y1], "color": "red"}, ...]}

``filename`` names the prompt by its folder of five digits, as GenEval's layout has it; in its place may stand
``"index"`` (of the prompt, from 0), or ``"metadata"``, GenEval's record itself. ``color`` is the one of `COLORS` that a
classifier gave the object; it is needed where the prompt names a colour. Labels are COCO's, or GenEval's own names.

The rule, for an image and the record of its prompt: of each class the most confident detections count, those above 0.3
(0.9 in the task *counting*), at most 16. Every item of ``include`` needs its ``count`` objects; where it has a
``color`` the ``count`` most confident ones must have it; where it has a ``position`` each of them must stand so to each
of the other item's. An item of ``exclude`` fails where there are ``count`` of its class or more. The score is the mean
over the six tasks of the share of right images.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.benchmarks import read_geneval
from dmdr_jax.evaluation.environment import command
from dmdr_jax.evaluation.journal import write_text
from dmdr_jax.evaluation.results import plain
from dmdr_jax.evaluation.table import Estimate, estimate, markdown_table

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class
POSITION_SHRINK = 0.1  # of the two objects' sizes, taken off their distance
POSITION_SHARE = 0.5  # of the distance that must lie along an axis
COUNTING = "counting"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "tvmonitor": "tv",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
}
"""GenEval's names of classes that COCO, or an old spelling of it, calls otherwise."""

Record = Mapping[str, Any]
_FOLDER = re.compile(r"(?:^|[/\\])(\d{5,})(?=[/\\])")


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object that a detector saw.

    Attributes:
      label: its class.
      score: the detector's confidence in [0, 1].
      box: left, top, right, bottom in pixels.
      color: one of `COLORS`, or None.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


# --- the rule --------------------------------------------------------------------------------------------------------


def verdict(detections: Sequence[Detection], record: Record) -> tuple[bool, str]:
    """Whether an image shows what its record asks for, and where it does not, why."""
    objects = confident(detections, record["tag"])
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for item in record.get("include", ()):
        group = objects.get(item["class"], [])[: item["count"]]
        reason = _missing(group, item) or _wrong_color(group, item) or _wrong_place(group, item, groups)
        groups.append(None if reason else group)
        reasons += [reason] * bool(reason)
    for item in record.get("exclude", ()):
        found = len(objects.get(item["class"], []))
        if found >= item["count"]:
            reasons.append(f"expected {item['class']}<{item['count']}, found {found}")
    return not reasons, "\n".join(reasons)


def confident(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first."""
    threshold = COUNTING_THRESHOLD if tag == COUNTING else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        if found.score > threshold and len(objects.setdefault(found.label, [])) < MAX_OBJECTS:
            objects[found.label].append(found)
    return objects


def _missing(group: Sequence[Detection], item: Record) -> str:
    return f"expected {item['class']}>={item['count']}, found {len(group)}" if len(group) < item["count"] else ""


def _wrong_color(group: Sequence[Detection], item: Record) -> str:
    if "color" not in item:
        return ""
    colors = [found.color for found in group]
    right = colors.count(item["color"])
    if right >= item["count"]:
        return ""
    seen = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
    return f"expected {item['color']} {item['class']}>={item['count']}, found {right} {item['color']}; and {seen}"


def _wrong_place(group: Sequence[Detection], item: Record, groups: Sequence[list[Detection] | None]) -> str:
    if "position" not in item:
        return ""
    relation, reference = item["position"]
    others = groups[reference]
    if others is None:
        return f"no target for {item['class']} to be {relation}"
    for found in group:
        for other in others:
            seen = relations(found.box, other.box)
            if relation not in seen:
                return f"expected {item['class']} {relation} target, found {' and '.join(sorted(seen))} target"
    return ""


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How a box stands to another; a diagonal may give two relations, boxes that overlap much give none.

    The offset of the centres is shrunk along each axis by a tenth of the two sizes there and divided by the length of
    the unshrunk offset; beyond 0.5 along an axis the relation holds.
    """
    a, b = np.asarray(box, np.float64).reshape(2, 2), np.asarray(other, np.float64).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.maximum(np.abs(offset) - POSITION_SHRINK * sizes, 0) * np.sign(offset)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    held = {"left of": x < -POSITION_SHARE, "right of": x > POSITION_SHARE}
    held |= {"above": y < -POSITION_SHARE, "below": y > POSITION_SHARE}
    return {name for name, holds in held.items() if holds}


# --- the summary -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """GenEval's numbers.

    Attributes:
      tasks: share of right images by task, in the order they come.
      overall: mean of the tasks.
      images, prompts: their numbers.
      right_images: share of right images.
      right_prompts: share of prompts with at least one right image.
    """

    tasks: dict[str, Estimate]
    overall: Estimate
    images: int
    prompts: int
    right_images: float
    right_prompts: float


def summarise(correct: Sequence[bool], records: Sequence[Record]) -> Summary:
    """The summary of verdicts on images, each with the record of its prompt.

    Standard errors take the prompt as the unit; the overall score's assumes that tasks share no prompts.
    """
    right, tags = np.asarray(correct, bool), np.array([record["tag"] for record in records])
    # Two prompts may read alike and ask for different things.
    prompts = np.array([json.dumps(record, sort_keys=True) for record in records])
    tasks = {}
    for tag in dict.fromkeys(tags.tolist()):
        rows = tags == tag
        tasks[tag] = estimate(right[rows], prompts[rows])
    errors = np.array([e.se for e in tasks.values()])
    overall = Estimate(
        float(np.mean([e.mean for e in tasks.values()])), float(np.sqrt((errors**2).sum()) / len(tasks)), len(right)
    )
    by_prompt: dict[str, bool] = {}
    for prompt, good in zip(prompts.tolist(), right.tolist()):
        by_prompt[prompt] = by_prompt.get(prompt, False) or good
    return Summary(
        tasks, overall, len(right), len(by_prompt), float(right.mean()), float(np.mean(list(by_prompt.values())))
    )


def table(summary: Summary) -> str:
    """The summary in Markdown."""
    rows = [[tag, f"{e.mean:.4f}", f"{e.se:.4f}", str(e.n)] for tag, e in summary.tasks.items()]
    rows.append(["**overall**", f"{summary.overall.mean:.5f}", f"{summary.overall.se:.4f}", str(summary.images)])
    text = (
        f"{summary.images} images of {summary.prompts} prompts; right images {summary.right_images:.2%}, "
        f"prompts with a right image {summary.right_prompts:.2%}.\n\n"
    )
    return text + markdown_table(["task", "score", "standard error", "images"], rows)


# --- files -----------------------------------------------------------------------------------------------------------


def read_detections(file: str | Path, records: Sequence[Record]) -> list[tuple[str, list[Detection], Record]]:
    """Reads a file of detections, see the head of this module.

    Returns:
      For each image its name, its detections and the record of its prompt.

    Raises:
      UserError: a line is malformed, or does not say which prompt it belongs to.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: give the detections as JSON lines.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_read_line(line, f"{path}, line {number}", records))
    if not found:
        raise UserError(f"{path} holds no detections: there is one line for each image, detected objects or not.")
    return found


def _read_line(line: str, place: str, records: Sequence[Record]) -> tuple[str, list[Detection], Record]:
    try:
        item = json.loads(line)
        record = _record_of(item, place, records)
        detections = [_detection(d) for d in item["detections"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f'{place} is not {{"filename": ..., "detections": [{{"label", "score", "box"}}, ...]}}: {error!r}.'
        ) from None
    _check_colors(detections, record, place)
    return str(item.get("filename", item.get("index", ""))), detections, record


def _detection(item: Mapping[str, Any]) -> Detection:
    left, top, right, bottom = map(float, item["box"])
    label = str(item["label"])
    return Detection(NAMES.get(label, label), float(item["score"]), (left, top, right, bottom), item.get("color"))


def _record_of(item: Mapping[str, Any], place: str, records: Sequence[Record]) -> Record:
    if "metadata" in item:
        given = item["metadata"]
        return json.loads(given) if isinstance(given, str) else given
    index = item.get("index")
    if index is None:
        folders = _FOLDER.findall(str(item["filename"]))
        index = int(folders[-1]) if folders else None
    if index is None or not 0 <= index < len(records):
        raise UserError(
            f"{place}: which prompt is it? Its filename must lie in a folder such as 00012, below {len(records):05d}; "
            'or give its "index".'
        )
    return records[index]


def _check_colors(detections: Sequence[Detection], record: Record, place: str) -> None:
    """UserError where a colour is asked for and an object that counts has none."""
    objects = confident(detections, record["tag"])
    wanted = [item for item in record.get("include", ()) if "color" in item]
    for found in (d for item in wanted for d in objects.get(item["class"], [])[: item["count"]]):
        if found.color is None:
            raise UserError(f'{place}: the prompt asks for a colour, and a {found.label} has no "color".')


def judge_detections_file(args: Any) -> str:
    """Runs ``--detections``: writes verdicts and summary, returns the table.

    Raises:
      UserError: there are no prompts, or the detections are malformed.
    """
    if not args.prompts:
        raise UserError("--detections needs --prompts: GenEval's evaluation_metadata.jsonl.")
    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: with --detections give a file, such as {out / 'geneval.json'}.")
    images = read_detections(args.detections, read_geneval(args.prompts))
    verdicts = [verdict(detections, record) for _, detections, record in images]
    records = [record for _, _, record in images]
    summary = summarise([good for good, _ in verdicts], records)
    document = {
        "summary": dataclasses.asdict(summary)
        | {"tasks": summary.tasks, "overall": summary.overall},  # with their intervals
        "results": [
            {"filename": name, "tag": r["tag"], "prompt": r["prompt"], "correct": good, "reason": reason}
            for (name, _, r), (good, reason) in zip(images, verdicts)
        ],
        "rule": {"threshold": THRESHOLD, "counting_threshold": COUNTING_THRESHOLD, "max_objects": MAX_OBJECTS},
        "detections": str(args.detections),
        "prompts": str(args.prompts),
        "command": command(),
    }
    write_text(out, json.dumps(plain(document), indent=1, allow_nan=False))
    return table(summary)
