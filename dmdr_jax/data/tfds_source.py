"""Prompts in a TFDS data set: read without tensorflow, from ArrayRecord, the one format that allows it."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dmdr_jax.data.files import Record, as_record
from dmdr_jax.errors import UserError

# name[/config][:1.2.3][:split]; a split may itself hold colons, as in train[:100].
_SPEC = re.compile(r"(?P<name>[^:]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


def tfds_records(spec: str) -> Iterator[Record]:
    """The records of ``tfds:name[:split]`` in their order; ``name`` may be the data set's folder.

    Raises:
      UserError: there is no such data set, it is stored in another format, or has no prompt field.
    """
    match = _SPEC.fullmatch(spec.removeprefix("tfds:"))
    if match is None:
        raise UserError(f"cannot read {spec!r}; write tfds:name or tfds:name:split")
    name, split = match["name"], match["split"] or "train"
    source = _open(name, split)
    for i in range(len(source)):
        yield as_record(_decoded(source[i]), f"tfds:{name}, record {i}")


def _open(name: str, split: str) -> Sequence[Record]:
    """Random access to a data set."""
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


def _decoded(record: Record) -> Record:
    """Text as strings; a data set may carry images beside its captions, which are no text."""
    return {key: _text_or_none(value) if isinstance(value, bytes) else value for key, value in record.items()}


def _text_or_none(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _first_line(error: BaseException) -> Any:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
