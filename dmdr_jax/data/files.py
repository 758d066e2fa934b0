"""Prompt files, in the formats that prompts are published in.

    .txt       a prompt a line: DMDR's t2i-2m-filtered-prompts.txt, COCO's captions for FID, DrawBench, T2I-CompBench
    .json      a list of strings (HPDv2's benchmark) or of objects (ShareGPT-4o-Image, HPDv2's train.json), or COCO's
               captions_val2014.json with its list "annotations"
    .jsonl     the same, one a line: GenEval's evaluation_metadata.jsonl
    .tsv       with a header: PartiPrompts.tsv
    .parquet   with a column of prompts, such as Pick-a-Pic's "caption"

A folder stands for the published file in it, or for all its parquet files. The field of an object that holds the
prompt is one of `PROMPT_FIELDS`, in capitals or not.
"""

import csv
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dmdr_jax.errors import UserError

Record = dict[str, Any]

PROMPT_FIELDS = ("prompt", "text", "caption", "input_prompt")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".tsv")
PUBLISHED = (
    "t2i-2m-filtered-prompts.txt",
    "text_to_image.json",
    "PartiPrompts.tsv",
    "evaluation_metadata.jsonl",
    "train.json",
    "captions_val2014.json",
    "captions_val2017.json",
)
"""File names that a folder is searched for, in this order."""


def file_records(path: pathlib.Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """One record for each prompt of a file, blank ones too: its fields, and ``"prompt"``, stripped.

    Args:
      path: of the file, or of a folder, see above.
      columns: of a parquet file, the only ones to read; None for all.

    Raises:
      UserError: the file is missing, of another kind, not UTF-8, malformed, or a record has no prompt.
    """
    for file in _files(path):
        kind = file.suffix.lower()
        items = _parquet_rows(file, columns) if kind == ".parquet" else _READERS[kind](file)
        for place, item in items:
            yield as_record(item, f"{file}, {place}")


def as_record(item: Any, place: str) -> Record:
    """A string or an object as a record; UserError, naming the place, where it is neither or has no prompt."""
    if isinstance(item, str):
        return {"prompt": item.strip()}
    if not isinstance(item, dict):
        raise UserError(f"{place} is neither a string nor an object; write one of them for each prompt")
    field = prompt_field(item)
    if field is None:
        raise UserError(
            f"{place} has no prompt field; it has {', '.join(map(repr, item)) or 'none'}, "
            f"name one of {', '.join(PROMPT_FIELDS)}"
        )
    if not isinstance(item[field], str):
        raise UserError(f"{place}: the field {field!r} must be a string, not {item[field]!r}")
    prompt = item[field].strip()
    if not _is_text(prompt):
        raise UserError(f"{place}: the field {field!r} holds half of a character, {prompt!a}; mend or remove it")
    return {**item, "prompt": prompt}


def _is_text(prompt: str) -> bool:
    """Whether it can be written: JSON may spell one half of a surrogate pair without the other."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_field(names: Sequence[str] | Record) -> str | None:
    """The name that holds the prompt, or None."""
    plain = {name.lower(): name for name in reversed(list(names)) if isinstance(name, str)}
    return next((plain[field] for field in PROMPT_FIELDS if field in plain), None)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.exists():
        raise UserError(f"prompt file {path} does not exist; check the path")
    if path.is_dir():
        published = [path / name for name in PUBLISHED if (path / name).is_file()]
        found = published[:1] or sorted(path.rglob("*.parquet"))
        if found:
            return found
    if path.is_dir() or path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot read prompts from {path}; give a file that ends in one of {', '.join(SUFFIXES)}")
    return [path]


def _read_text(path: pathlib.Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte order mark is cut off before decoding starts to count.
        at = error.start + (len(data) - len(error.object))
        line = data.count(b"\n", 0, at) + 1
        raise UserError(
            f"{path} is not UTF-8: line {line}, byte {at} of the file is 0x{data[at]:02x}; save it as UTF-8"
        ) from None


def _txt_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines if lines[-1].strip() else lines[:-1], 1):
        yield f"line {number}", line


def _jsonl_items(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse_json(line, f"{path}, line {number}")


def _json_items(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    items = _parse_json(text, str(path)) if text.strip() else []
    if isinstance(items, dict) and isinstance(items.get("annotations"), list):  # COCO
        items = items["annotations"]
    if not isinstance(items, list):
        raise UserError(f"{path} must hold one JSON list of prompts; for one object per line name it .jsonl")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error}); mend or remove it") from None


def _tsv_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Rows by the header's names; quotes are ordinary characters, as in PartiPrompts."""
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, [])
    if header and prompt_field(header) is None:
        raise UserError(f"{path} has no column of prompts; name one of {', '.join(PROMPT_FIELDS)} in its first line")
    for number, row in enumerate(rows, 2):
        if row:
            yield f"line {number}", dict(zip(header, row))


def _parquet_rows(path: pathlib.Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        present = [name for name in names if columns is None or name.lower() in columns]
        rows = pyarrow.parquet.read_table(path, columns=present or None).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        why = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a readable parquet file ({why}); write it again") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


_READERS = {".txt": _txt_lines, ".jsonl": _jsonl_items, ".json": _json_items, ".tsv": _tsv_rows}
