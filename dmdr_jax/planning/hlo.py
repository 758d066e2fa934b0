"""What a compiled program sends between devices, read from its HLO text.

Counted are bytes per device: of an all-gather its result, of a reduce-scatter and an all-reduce what goes in. An
instruction in a loop counts as often as the loop turns; the count stands as a constant in the loop's condition, or, for
a loop whose turns are drawn at random, their mean in its name (`dmdr_jax.planning.work.mean_turns`). The
compiler writes some reduce-scatters as an all-reduce inside a computation named `all-reduce-scatter`, and an all-gather
that it overlaps with several computations stands in each of them, under one `chain_id`.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dmdr_jax.planning.work import mean_turns

GATHER, SCATTER, REDUCE, OTHER = "all-gather", "reduce-scatter", "all-reduce", "other"
_KINDS = {
    "all-gather": GATHER,
    "reduce-scatter": SCATTER,
    "all-reduce": REDUCE,
    "all-to-all": OTHER,
    "ragged-all-to-all": OTHER,
    "collective-permute": OTHER,
    "collective-broadcast": OTHER,
}
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
_BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (8, 16, 32, 64)}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY, _CONDITION = re.compile(r"body=%?([\w.\-]+)"), re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= s32\[\][^=]* constant\((\d+)\)")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_NAME = re.compile(r'op_name="([^"]*)"')
_CHAIN = re.compile(r'chain_id="?(\w+)"?')


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: GATHER, SCATTER, REDUCE or OTHER.
      size: bytes per device each time.
      times: how often a run of the program does it.
      largest: elements of the largest array in it.
      members: devices of the first group that exchange with each other, as places along the flattened mesh; empty
        where the instruction does not say.
    """

    kind: str
    size: float
    times: float
    largest: int
    name: str
    members: tuple[int, ...]


class _Instruction(NamedTuple):
    name: str
    opcode: str
    result: str
    text: str


def collectives(text: str) -> list[Collective]:
    """The collective instructions of a compiled module."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found, chains = [], set()
    for name, instructions in computations.items():
        for instruction in instructions:
            kind = _kind(instruction.opcode)
            if kind is None or not times.get(name) or len(members(instruction.text)) == 1:
                continue
            chain = _CHAIN.search(instruction.text)
            if chain and (chain.group(1), kind) in chains:
                continue
            if chain:
                chains.add((chain.group(1), kind))
            if kind == REDUCE and name.startswith("all-reduce-scatter"):
                kind = SCATTER
            found.append(_measure(kind, instruction, instructions, times[name]))
    return found


def total(found: list[Collective], kind: str) -> float:
    """Bytes per device of all of a kind."""
    return sum(c.size * c.times for c in found if c.kind == kind)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header.group(2)
            computations[current] = []
            entry = current if header.group(1) else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current:
            opcode = _OPCODE.search(match.group(2))
            if opcode:
                result = match.group(2)[: opcode.start(1)]
                computations[current].append(_Instruction(match.group(1), opcode.group(1), result, match.group(2)))
    return computations, entry


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs."""
    times: dict[str, float] = {}
    todo = [(entry, 1.0)]
    while todo:
        name, count = todo.pop()
        times[name] = times.get(name, 0) + count
        for instruction in computations.get(name, ()):
            for called, turns in _calls(instruction, computations):
                todo.append((called, count * turns))
    return times


def _calls(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> Iterator[tuple[str, float]]:
    text = instruction.text
    if instruction.opcode == "while":
        body, condition = _BODY.search(text), _CONDITION.search(text)
        if body and condition:
            yield body.group(1), trip_count(condition.group(1), computations) or mean_turns(_scopes(text))
        return
    for match in _CALLED.finditer(text):
        yield match.group(1), 1
    for match in _BRANCHES.finditer(text):
        for name in match.group(1).split(","):
            yield name.strip().lstrip("%"), 1


def members(text: str) -> tuple[int, ...]:
    """The devices of the first group of an instruction; empty where it does not say."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(map(int, match.group(1).split(",")))
    if match := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", text):
        return tuple(_iota(*match.groups()[2:]).reshape(int(match.group(1)), -1)[0].tolist())
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text):
        axes, dimensions, order, named = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        chosen = re.findall(r"'(\w+)'", named)
        ids = _iota(dimensions or ",".join(map(str, sizes.values())), order).reshape(*sizes.values())
        return tuple(ids[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel().tolist())
    return ()


def _iota(dimensions: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in the shape ``dimensions``, its axes then in ``order``."""
    shape = tuple(map(int, dimensions.split(",")))
    axes = tuple(map(int, order.split(","))) if order else tuple(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def largest_whole(found: list[Collective], fsdp: int) -> int:
    """Elements of the largest array that devices along `fsdp`, the mesh's fastest axis, sum whole.

    A sum over `data` alone is of parts, but where there is nothing else.
    """
    sums = [c for c in found if c.kind == REDUCE]
    whole = [c for c in sums if fsdp == 1 or not c.members or len({place % fsdp for place in c.members}) > 1]
    return max((c.largest for c in whole), default=0)


def _scopes(text: str) -> str:
    match = _NAME.search(text)
    return match.group(1) if match else ""


def trip_count(condition: str, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop turns: the constant that its condition compares with; None where it has none, or several."""
    found = set()
    for instruction in computations.get(condition, ()):
        constant = _CONSTANT.search(f"= {instruction.text}")
        if constant:
            found.add(int(constant.group(1)))
        for called in _CALLED.findall(instruction.text):
            found |= {trip_count(called, computations)}
    found -= {0, None}
    return found.pop() if len(found) == 1 else None


def _kind(opcode: str) -> str | None:
    """Of an asynchronous pair the start alone counts."""
    return None if opcode.endswith("-done") else _KINDS.get(opcode.removesuffix("-start"))


def _measure(kind: str, instruction: _Instruction, around: list[_Instruction], times: float) -> Collective:
    results = _arrays(instruction.result)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start" and len(results) > 1:
        results = sorted(results, key=lambda pair: pair[0])[len(results) // 2 :]  # operands stand before results
    if instruction.opcode.startswith("reduce-scatter"):
        given = {i.name: i.result for i in around}
        arguments = instruction.text.split(f" {instruction.opcode}(", 1)[1].split(")")[0]
        operands = re.findall(r"%([\w.\-]+)", arguments)
        results = [array for name in operands for array in _arrays(given.get(name, ""))] or results
    size = sum(bytes_ for bytes_, _ in results)
    largest = max((elements for _, elements in results), default=0)
    return Collective(kind, size, times, largest, instruction.name, members(instruction.text))


def _arrays(text: str) -> list[tuple[float, int]]:
    """(bytes, elements) of the arrays in a type."""
    found = []
    for kind, dimensions in _ARRAY.findall(text):
        if kind in _BITS or kind.startswith("f8"):
            elements = math.prod(map(int, filter(None, dimensions.split(","))))
            found.append((elements * _BITS.get(kind, 8) / 8, elements))
    return found
