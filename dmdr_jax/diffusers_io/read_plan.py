"""Which stored tensor fills which leaf: decided from names, shapes and types alone, before any data is read.

`safetensors_io.read_tree` follows such a plan to the letter, so what a plan says of a checkpoint's list of keys is
what the reader does with the checkpoint.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.diffusers_io.keymap import Entry
from dmdr_jax.diffusers_io.tensor_file import FLOATS, not_a_float
from dmdr_jax.errors import UserError

_NAMED_AT_MOST = 5


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Attributes:
      file: where it lies.
      dtype: safetensors' name of its type.
      shape: its shape there.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """One tensor to read.

    Attributes:
      key: its name in the checkpoint.
      stored: the tensor there.
      entry: its place in the parameter tree.
    """

    key: str
    stored: Stored
    entry: Entry


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How a checkpoint fills a parameter tree.

    Attributes:
      reads: the tensors of each leaf, in the tree's order.
      absent: entries that the checkpoint lacks and that are computed in its place.
    """

    reads: dict[keymap.Path, tuple[Read, ...]]
    absent: tuple[Entry, ...] = ()


def make_plan(
    abstract: Any, stored: Mapping[str, Stored], folder: str | Path, computable: Collection[str] = ()
) -> ReadPlan:
    """Matches a checkpoint's tensors with a parameter tree, one to one.

    Args:
      abstract: the tree, as ``jax.ShapeDtypeStruct`` or arrays; paths name the checkpoint keys.
      stored: the checkpoint's tensors by key.
      folder: what the checkpoint is called in messages.
      computable: keys of buffers that may be absent.

    Raises:
      UserError: a tensor is missing, has no place, or is of another shape or of no floating-point type.
    """
    wanted = keymap.entries(abstract)
    names, missing, unexpected = keymap.resolve(wanted, stored)
    lacking = set(missing)
    absent = tuple(entry for entry in wanted if entry.key in lacking and entry.key in computable)
    missing = [key for key in missing if key not in computable]
    if missing:
        raise UserError(_lacks(folder, missing, unexpected) if names else _another(folder, missing, unexpected))
    if unexpected:
        raise UserError(_has_no_place(stored, unexpected, wanted))
    reads: dict[keymap.Path, list[Read]] = {}
    for entry in wanted:
        if entry.key in names:
            read = Read(names[entry.key], stored[names[entry.key]], entry)
            _check(read)
            reads.setdefault(entry.path, []).append(read)
    return ReadPlan({path: tuple(parts) for path, parts in reads.items()}, absent)


def _check(read: Read) -> None:
    """UserError unless the stored tensor can fill its place."""
    stored, entry = read.stored, read.entry
    if stored.dtype not in FLOATS:
        raise UserError(not_a_float(stored.file, read.key, stored.dtype))
    if not entry.fits(stored.shape):
        raise UserError(
            f"{stored.file}: the tensor {read.key!r} has shape {list(stored.shape)}, "
            f"but its config.json asks for {list(entry.shape)}; the two are not of one model."
        )


def _another(folder: str | Path, missing: list[str], unexpected: list[str]) -> str:
    held = f"{unexpected[0]!r} and others like it" if unexpected else "none at all"
    return (
        f"{folder} holds the weights of another network: none of the {len(missing)} tensors that its config.json asks "
        f"for, such as {missing[0]!r}, but {held}."
    )


def _lacks(folder: str | Path, missing: list[str], unexpected: list[str]) -> str:
    key = missing[0]
    more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    nearest = keymap.closest(key, unexpected)
    return f"{folder} lacks the tensor {key!r}{more} that its config.json asks for; closest in the file: {nearest}."


def _has_no_place(stored: Mapping[str, Stored], unexpected: list[str], wanted: list[Entry]) -> str:
    key, rest = unexpected[0], unexpected[_NAMED_AT_MOST:]
    listed = ", ".join(map(repr, unexpected[:_NAMED_AT_MOST])) + (", ..." if rest else "")
    nearest = keymap.closest(key, [entry.key for entry in wanted])
    return (
        f"{stored[key].file} holds {len(unexpected)} tensors that the model of config.json has no place for: {listed}; "
        f"closest in the model to the first: {nearest}."
    )
