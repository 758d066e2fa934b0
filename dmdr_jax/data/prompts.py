"""Prompts: where they come from, and the order they are trained in.

DMDR is image-free, so its data set is a list of strings. `load_prompts` reads one from a file, from TFDS or from the
embedded world. `PromptStream` puts it in an order that is a pure function of (seed, batch number): resuming needs
the step and nothing else, and any number of hosts sees the same global batches.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dmdr_jax.errors import UserError

Record = dict[str, Any]

PROMPT_FIELDS = ("prompt", "text", "caption", "input_prompt")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
DEFAULT_WORLD = "small"  # what "shapes:train" means

# name[/config][:1.2.3][:split]; a split may itself hold colons, as in train[:100].
_TFDS_SPEC = re.compile(r"(?P<name>[^:]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


def load_prompts(spec: str) -> list[str]:
    """Every prompt of a source, in its own order; blank ones are left out.

    Args:
      spec: a .txt file (one prompt per line); a .jsonl, .json or .parquet file with a field of PROMPT_FIELDS;
        "tfds:name[:split]", a data set stored as array_record (`name` may be its folder); or "shapes:[world:]train",
        the embedded world's training prompts.

    Raises:
      UserError: the source is missing, empty, not UTF-8, or has no prompt field.
    """
    spec = str(spec)
    if spec.startswith("tfds:"):
        prompts = _tfds_prompts(spec)
    elif spec.startswith("shapes:"):
        prompts = _shapes_prompts(spec)
    else:
        prompts = [record["prompt"] for record in _file_records(pathlib.Path(spec), columns=PROMPT_FIELDS)]
    if not prompts:
        raise UserError(f"{spec} holds no prompts; give at least one")
    return prompts


def read_eval_records(path: str | pathlib.Path) -> list[Record]:
    """Prompts to evaluate on, with whatever else their file says about them.

    Returns:
      One record per prompt with the field "prompt"; from JSON and parquet also every other field, such as GenEval's
      "tag", "include" and "exclude" (Ghosh et al. 2023).

    Raises:
      UserError: as `load_prompts`, or GenEval's fields have the wrong type.
    """
    records = list(_file_records(pathlib.Path(path)))
    if not records:
        raise UserError(f"{path} holds no prompts; give at least one")
    for number, record in enumerate(records, 1):
        for field, kind, name in (("tag", str, "a string"), ("include", list, "a list"), ("exclude", list, "a list")):
            if not isinstance(record.get(field, kind()), kind):
                raise UserError(f"{path}, record {number}: GenEval's field {field!r} must be {name}")
    return records


class PromptStream:
    """Batches of prompts in an endless shuffled order, without state.

    Epoch e visits every prompt once, in a permutation keyed by (seed, e); batch i holds positions
    [i * batch, (i + 1) * batch) of the epochs laid end to end, so a batch may span epochs or be larger than one.
    """

    def __init__(self, prompts: Sequence[str], batch: int, seed: int):
        if batch < 1:
            raise UserError(f"the batch must be at least 1 prompt, not {batch}")
        if not prompts:
            raise UserError("the list of prompts is empty; give at least one")
        self.prompts = tuple(prompts)
        self.batch_size = batch
        self.seed = seed

    def indices(self, i: int) -> np.ndarray:
        """Indices [batch] into the prompts of batch `i`."""
        positions = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.prompts))
        n = len(self.prompts)
        return np.concatenate([epoch_order(n, self.seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def batch(self, i: int) -> list[str]:
        """The `batch` prompts of batch `i`, counted from 0."""
        return [self.prompts[index] for index in self.indices(i)]


@functools.lru_cache(maxsize=2)  # a large set is not sorted again for every batch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation [n] that depends on (seed, epoch) alone.

    It sorts raw bits of Philox (Salmon et al. 2011), whose stream numpy guarantees across versions; it guarantees no
    such thing of `Generator.permutation`.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    order.setflags(write=False)
    return order


# --- files ---------------------------------------------------------------------------------------------------------


def _file_records(path: pathlib.Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    if not path.exists():
        raise UserError(f"prompt file {path} does not exist; check the path")
    if path.is_dir() or path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot read prompts from {path}; give a file that ends in one of {', '.join(SUFFIXES)}")
    if path.suffix.lower() == ".parquet":
        items = _parquet_rows(path, columns)
    else:
        items = {".txt": _txt_lines, ".jsonl": _jsonl_items, ".json": _json_items}[path.suffix.lower()](path)
    for place, item in items:
        record = _as_record(item, f"{path}, {place}")
        if record["prompt"]:
            yield record


def _as_record(item: Any, place: str) -> Record:
    if isinstance(item, str):
        return {"prompt": item.strip()}
    if not isinstance(item, dict):
        raise UserError(f"{place} is neither a string nor an object; write one of them for each prompt")
    field = next((field for field in PROMPT_FIELDS if field in item), None)
    if field is None:
        raise UserError(
            f"{place} has no prompt field; it has {', '.join(map(repr, item)) or 'none'}, "
            f"name one of {', '.join(PROMPT_FIELDS)}"
        )
    if not isinstance(item[field], str):
        raise UserError(f"{place}: the field {field!r} must be a string, not {item[field]!r}")
    return {**item, "prompt": item[field].strip()}


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
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        yield f"line {number}", line


def _jsonl_items(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse_json(line, f"{path}, line {number}")


def _json_items(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    items = _parse_json(text, str(path)) if text.strip() else []
    if not isinstance(items, list):
        raise UserError(f"{path} must hold one JSON list of prompts; for one object per line name it .jsonl")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error}); mend or remove it") from None


def _parquet_rows(path: pathlib.Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        present = [name for name in columns or names if name in names]
        rows = pyarrow.parquet.read_table(path, columns=present or None).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({_first_line(error)}); write it again") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


# --- data sets -----------------------------------------------------------------------------------------------------


def _tfds_prompts(spec: str) -> list[str]:
    match = _TFDS_SPEC.fullmatch(spec.removeprefix("tfds:"))
    if match is None:
        raise UserError(f"cannot read {spec!r}; write tfds:name or tfds:name:split")
    name, split = match["name"], match["split"] or "train"
    source = _tfds_source(name, split)
    records = (_as_record(_decode_bytes(source[i], name, i), f"tfds:{name}, record {i}") for i in range(len(source)))
    return [record["prompt"] for record in records if record["prompt"]]


def _tfds_source(name: str, split: str) -> Sequence[Record]:
    """Random access to a data set stored as array_record, the one format TFDS reads without tensorflow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"tfds:{name} needs tensorflow-datasets; pip install tensorflow-datasets") from None
    try:
        if pathlib.Path(name).is_dir():
            return tfds.builder_from_directory(name).as_data_source(split)
        return tfds.data_source(name, split=split, download=False)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{name} is not stored as array_record; prepare it with file_format='array_record' "
            f"({_first_line(error)})"
        ) from None
    except Exception as error:  # TFDS raises a type of its own for nearly every cause
        raise UserError(f"cannot open tfds:{name}, split {split!r}: {_first_line(error)}") from error


def _decode_bytes(record: Record, name: str, index: int) -> Record:
    try:
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}
    except UnicodeDecodeError:
        # A data set may carry images beside its captions: only what is text is decoded.
        return {key: _text_or_none(value) if isinstance(value, bytes) else value for key, value in record.items()}


def _text_or_none(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _shapes_prompts(spec: str) -> list[str]:
    from dmdr_jax.shapes.prompts import balanced_train_prompts
    from dmdr_jax.shapes.world import get_world

    parts = spec.split(":")[1:]
    if len(parts) not in (1, 2) or parts[-1] != "train":
        raise UserError(f"cannot read {spec!r}; write shapes:train or shapes:WORLD:train")
    return balanced_train_prompts(get_world(parts[0] if len(parts) == 2 else DEFAULT_WORLD))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
