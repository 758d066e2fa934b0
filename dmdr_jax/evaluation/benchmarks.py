"""Public benchmarks: their prompts as published, and images laid out so that their own scorers read them as they are.

A layout is a view of a gallery (hard links where the file system has them), made when all images are there. The
scorers, their questions and their networks stay theirs; `dmdr_jax.evaluation.geneval` has GenEval's verdict as well.
"""

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmdr_jax.data.prompts import read_eval_records
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.images import write_image
from dmdr_jax.evaluation.journal import write_text

Record = dict[str, Any]
Groups = Sequence[Sequence[Path]]

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
HPS_GROUP = 80  # images of which its program takes the mean before the standard deviation
COMPBENCH_SUFFIX = "_val"
_LONGEST_NAME = 255  # bytes, of a file
_GENEVAL_FILE, _DPG_FILE = "evaluation_metadata.jsonl", "dpg_bench.csv"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name: of the folder that the layout goes to.
      per_prompt: images of each prompt that its scorer wants.
      read: its prompts, from the file or folder that it publishes.
      lay_out: writes the layout into a folder, from the images of each prompt and the prompts' records; returns the
        number of files.
    """

    name: str
    per_prompt: int
    read: Callable[[str], list[Record]]
    lay_out: Callable[[Path, Groups, Sequence[Record]], int]


# --- GenEval (Ghosh et al. 2023) -------------------------------------------------------------------------------------


def read_geneval(path: str) -> list[Record]:
    """``evaluation_metadata.jsonl``, or the folder with it.

    Raises:
      UserError: a record lacks GenEval's fields.
    """
    file = Path(path).expanduser()
    records = read_eval_records(file / _GENEVAL_FILE if file.is_dir() else file)
    for number, record in enumerate(records, 1):
        absent = [field for field in ("tag", "include", "prompt") if field not in record]
        if absent:
            raise UserError(f"{file}, record {number} has no {absent[0]!r}: give GenEval's {_GENEVAL_FILE}.")
    return records


def lay_out_geneval(root: Path, groups: Groups, records: Sequence[Record]) -> int:
    """``00000/metadata.jsonl`` and ``00000/samples/00000.png`` ..., one folder per prompt."""
    for index, (files, record) in enumerate(zip(groups, records)):
        folder = root / f"{index:05d}"
        for number, file in enumerate(files):
            link(file, folder / "samples" / f"{number:05d}.png")
        write_text(folder / "metadata.jsonl", json.dumps(record))
    return sum(map(len, groups))


# --- DPG-Bench (Hu et al. 2024) --------------------------------------------------------------------------------------


def read_dpg(path: str) -> list[Record]:
    """The folder of prompts (one text file each, its stem is the id), or ``dpg_bench.csv``.

    Raises:
      UserError: neither is there, or an id has a dot, where the scorer would cut it.
    """
    place = Path(path).expanduser()
    if place.is_dir() and any(place.glob("*.txt")):
        texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(place.glob("*.txt"))}
    else:
        texts = _csv_column(place / _DPG_FILE if place.is_dir() else place, "item_id", "text")
    dotted = [key for key in texts if "." in key]
    if dotted:
        raise UserError(f"{place}: the id {dotted[0]!r} has a dot, where DPG-Bench's scorer cuts it: rename it.")
    return [{"id": key, "prompt": " ".join(text.split())} for key, text in texts.items()]


def _csv_column(file: Path, key: str, column: str) -> dict[str, str]:
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            return {row[key]: row[column] for row in csv.DictReader(stream)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} is not DPG-Bench's: give its folder prompts/ of text files or its {_DPG_FILE} ({error})."
        ) from None


def lay_out_dpg(root: Path, groups: Groups, records: Sequence[Record]) -> int:
    """``ID.png``: four images as a grid, in the order top left, top right, bottom left, bottom right.

    With one image per prompt the file is that image (the scorer's ``--pic-num 1``).

    Raises:
      UserError: more than four images per prompt, or images of several sizes.
    """
    for files, record in zip(groups, records):
        target = root / f"{record['id']}.png"
        if len(files) == 1:
            link(files[0], target)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_image(target, two_by_two(files))
    return len(groups)


def two_by_two(files: Sequence[Path]) -> Image.Image:
    """Up to four images of one size as a grid of two rows."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    width, height = pictures[0].size
    if len(files) > 4 or any(picture.size != (width, height) for picture in pictures):
        raise UserError(f"DPG-Bench's grid holds up to four images of one size; {files[0].parent} has others.")
    grid = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % 2 * width, i // 2 * height))
    return grid


# --- HPSv2's benchmark (Wu et al. 2023) ------------------------------------------------------------------------------


def read_hpsv2(path: str) -> list[Record]:
    """The folder ``benchmark`` of HPDv2 with ``anime.json``, ...; or one such file.

    Raises:
      UserError: no list of prompts there.
    """
    place = Path(path).expanduser()
    files = [place / f"{style}.json" for style in HPS_STYLES] if place.is_dir() else [place]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{place} holds none of {', '.join(f'{s}.json' for s in HPS_STYLES)}: give HPDv2's benchmark/.")
    return [
        {"prompt": record["prompt"], "style": file.stem, "index": index}
        for file in files
        for index, record in enumerate(read_eval_records(file))
    ]


def lay_out_hpsv2(root: Path, groups: Groups, records: Sequence[Record]) -> int:
    """``STYLE/00000.jpg``, as Pillow writes JPEG by default; the first image of each prompt."""
    for files, record in zip(groups, records):
        target = root / record["style"] / f"{record['index']:05d}.jpg"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_image(target, Image.open(files[0]).convert("RGB"))
    return len(groups)


def spread_by_style(scores: np.ndarray, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """The table of HPSv2's own program, by style: 100 times the mean score, and the spread over groups of 80 images.

    Args:
      scores: ``[n]``, cosines.
      records: of the same images.
    """
    table = {}
    for style in dict.fromkeys(record["style"] for record in records):
        own = np.array([score for score, record in zip(scores, records) if record["style"] == style])
        groups = [100 * own[i : i + HPS_GROUP].mean() for i in range(0, len(own), HPS_GROUP)]
        table[style] = {"mean": float(np.mean(groups)), "std": float(np.std(groups))}
    return table


# --- T2I-CompBench (Huang et al. 2023) -------------------------------------------------------------------------------


def read_compbench(path: str) -> list[Record]:
    """The folder ``examples/dataset`` with ``color_val.txt``, ..., or one such file; what follows a tab is left out.

    Raises:
      UserError: no such file there.
    """
    place = Path(path).expanduser()
    files = sorted(place.glob(f"*{COMPBENCH_SUFFIX}.txt")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{place} holds no *{COMPBENCH_SUFFIX}.txt: give T2I-CompBench's examples/dataset.")
    return [
        {"prompt": record["prompt"].split("\t")[0].strip(), "category": file.stem.removesuffix(COMPBENCH_SUFFIX)}
        for file in files
        for record in read_eval_records(file)
    ]


def lay_out_compbench(root: Path, groups: Groups, records: Sequence[Record]) -> int:
    """``CATEGORY/samples/PROMPT_000000.png``, numbered through each category: the scorers read both off the name."""
    numbers: dict[str, int] = {}
    for files, record in zip(groups, records):
        category = record["category"]
        for file in files:
            number = numbers.get(category, 0)
            link(file, root / category / "samples" / compbench_name(record["prompt"], number))
            numbers[category] = number + 1
    return sum(map(len, groups))


def compbench_name(prompt: str, number: int) -> str:
    """A file name: underlines and slashes become spaces, and a prompt that is too long is cut."""
    ending = f"_{number:06d}.png"
    text = "".join(" " if c in "_/\\\0" else c for c in prompt)
    return text.encode()[: _LONGEST_NAME - len(ending)].decode(errors="ignore").strip() + ending


# --- all of them -----------------------------------------------------------------------------------------------------


def link(source: Path, target: Path) -> None:
    """``target`` as another name of ``source``, or a copy where there are no hard links; one that is there stays."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}{target.suffix}")
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


BENCHMARKS = {
    "geneval": Benchmark("geneval", 4, read_geneval, lay_out_geneval),
    "dpg": Benchmark("dpg", 4, read_dpg, lay_out_dpg),
    "hpsv2": Benchmark("hpsv2", 1, read_hpsv2, lay_out_hpsv2),
    "compbench": Benchmark("compbench", 10, read_compbench, lay_out_compbench),
}
"""By the name of ``--benchmark``."""
