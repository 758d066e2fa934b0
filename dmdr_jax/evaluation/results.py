"""The result of an evaluation: measurements summarised, compared, written and read back."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.journal import write_text
from dmdr_jax.evaluation.table import (
    LEVEL,
    MISSING,
    Estimate,
    Statistic,
    estimate,
    format_estimate,
    format_interval,
    jackknife,
    markdown_table,
    paired,
)

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
IMAGES_FILE = "images.npz"

Summary = dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's images, measured.

    Attributes:
      per_image: by name, ``[n]`` numbers or verdicts.
      statistics: by name, functions of a set of the images.
    """

    per_image: dict[str, np.ndarray]
    statistics: dict[str, Statistic]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
      key: in summaries.
      title: the header.
      better: 1 where more is better, -1 where less is, 0 where neither.
      digits: behind the point.
      group: the part of the table it stands in.
      times: the factor with which the table shows the number.
    """

    key: str
    title: str
    better: int
    digits: int = 3
    group: str = "verdicts"
    times: float = 1.0


_SCORER_KINDS = {"reward": "trained", "judge": "held out"}


def columns(tags: Sequence[str], scorers: Sequence[str], in_world: bool) -> list[Column]:
    """The table's columns in their order.

    Args:
      scorers: ``reward/NAME`` for what was trained on, ``judge/NAME`` for what was held out.
      in_world: whether the embedded world's verifier and distances are there.
    """
    verdicts = [Column("lenient", "lenient", 1), Column("strict", "strict", 1), Column("strict/unseen", "unseen", 1)]
    verdicts += [Column(f"strict/{tag}", tag.replace("_", " "), 1) for tag in tags]
    kinds = [(key, *key.split("/", 1)) for key in scorers]
    scores = [Column(key, f"{name} ({_SCORER_KINDS[kind]})", 1, 4, "scores") for key, kind, name in kinds]
    spread = [
        Column("frechet/renders", "Fréchet to renders", -1, 2, "distribution"),
        Column("frechet/teacher", "Fréchet to teacher", -1, 2, "distribution"),
        Column("background_entropy", "background entropy", 1, 3, "distribution"),
        Column("color_entropy", "color entropy", 1, 3, "distribution"),
        Column("position_std", "position spread", 0, 2, "distribution"),
        Column("junk", "junk", -1, 4, "distribution"),
        Column("chroma", "chroma", 0, 4, "distribution"),
    ]
    return [*verdicts, *scores, *spread] if in_world else scores


# --- numbers -------------------------------------------------------------------------------------------------------


def summarise(measured: Measured, units: np.ndarray, subsets: Mapping[str, np.ndarray], together: int = 1) -> Summary:
    """Every measure with its standard error, and the strict verdict on each subset as ``strict/NAME``.

    Args:
      together: see `jackknife`.
    """
    summary = {key: estimate(values, units) for key, values in measured.per_image.items()}
    if "strict" in measured.per_image:
        strict = measured.per_image["strict"]
        summary |= {f"strict/{name}": estimate(strict[rows], units[rows]) for name, rows in subsets.items()}
    return summary | {key: jackknife(f, len(units), together=together) for key, f in measured.statistics.items()}


def compare(
    measured: Measured, other: Measured, units: np.ndarray, subsets: Mapping[str, np.ndarray], together: int = 1
) -> Summary:
    """As `summarise`, of the differences ``measured - other`` image by image; what only one has is left out."""
    shared = [key for key in measured.per_image if key in other.per_image]
    pairs = {key: (measured.per_image[key], other.per_image[key]) for key in shared}
    result = {key: paired(a, b, units) for key, (a, b) in pairs.items()}
    if "strict" in pairs:
        a, b = pairs["strict"]
        result |= {f"strict/{name}": paired(a[rows], b[rows], units[rows]) for name, rows in subsets.items()}
    for key in (key for key in measured.statistics if key in other.statistics):
        difference = _difference(measured.statistics[key], other.statistics[key])
        result[key] = jackknife(difference, len(units), together=together)
    return result


def _difference(f: Statistic, g: Statistic) -> Statistic:
    return lambda index: f(index) - g(index)


# --- files ---------------------------------------------------------------------------------------------------------


def write(out: Path, results: Mapping[str, Any]) -> None:
    """``results.json`` and ``table.md``."""
    text = json.dumps(plain(results), indent=1, allow_nan=False)
    write_text(out / RESULTS_FILE, text)
    write_text(out / TABLE_FILE, as_markdown(read(out)))


def read(folder: str | Path) -> dict[str, Any]:
    """What `write` wrote, summaries as `Estimate`.

    Raises:
      UserError: there is no evaluation in the folder.
    """
    file = Path(folder) / RESULTS_FILE
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} is missing or damaged: give the --out folder of dmdr_jax.evaluate.") from None
    results["columns"] = [Column(**column) for column in results["columns"]]
    for model in (*results["models"], *filter(None, [results["floor"]])):
        model["summary"] = _estimates(model["summary"])
        model["differences"] = {name: _estimates(d) for name, d in model["differences"].items()}
    return results


def _estimates(fields: Mapping[str, Mapping[str, Any]]) -> Summary:
    def one(e: Mapping[str, Any]) -> Estimate:
        mean, se = (math.nan if e[k] is None else e[k] for k in ("mean", "se"))
        return Estimate(mean, se, e["n"], math.inf if e.get("freedom") is None else e["freedom"])

    return {key: one(e) for key, e in fields.items()}


def plain(value: Any) -> Any:
    """JSON's types; what is not finite becomes null."""
    if isinstance(value, Estimate):
        return plain({**dataclasses.asdict(value), "interval": value.interval()})
    if isinstance(value, Column):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the table -----------------------------------------------------------------------------------------------------


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table, in parts that fit a page, then the paired differences."""
    rows = [*results["models"], *filter(None, [results["floor"]])]
    parts = [f"# {results['title']}\n", results["caption"] + "\n"]
    groups = list(dict.fromkeys(column.group for column in results["columns"]))
    for group in groups:
        chosen = [c for c in results["columns"] if c.group == group]
        header = ["model", "NFE", *(["images/s"] if group == groups[0] else []), *(c.title for c in chosen)]
        body = [_row(model, chosen, group == groups[0]) for model in rows]
        parts += [f"## {group.capitalize()}\n", markdown_table(header, body)]
    for other in results["compared_with"]:
        models = [m for m in results["models"] if other in m["differences"]]
        if not models:
            continue
        parts.append(f"## Differences from {other}, image by image\n")
        parts.append(f"In brackets the {100 * LEVEL:g} % confidence interval.\n")
        for group in groups:
            chosen = [c for c in results["columns"] if c.group == group]
            body = [
                [m["name"], *(format_difference(m["differences"][other].get(c.key), c) for c in chosen)] for m in models
            ]
            parts.append(markdown_table(["model", *(c.title for c in chosen)], body))
    parts.append(f"    {results['command']}\n")
    return "\n".join(parts)


def _row(model: Mapping[str, Any], chosen: Sequence[Column], with_speed: bool) -> list[str]:
    nfe = MISSING if model["nfe"] is None else str(model["nfe"])
    speed = MISSING if model["images_per_second"] is None else f"{model['images_per_second']:.3g}"
    cells = [format_estimate(model["summary"].get(column.key), column.digits, times=column.times) for column in chosen]
    return [model["name"], nfe, *([speed] if with_speed else []), *cells]


def format_difference(value: Estimate | None, column: Column) -> str:
    """``+0.212 [+0.132, +0.292]``: a difference with its confidence interval."""
    if value is None or not math.isfinite(value.mean):
        return MISSING
    mean = f"{column.times * value.mean:+.{column.digits}f}"
    interval = format_interval(value, column.digits, column.times)
    return mean if interval == MISSING else f"{mean} {interval}"
