"""What memory a program was given, read from what the compiler writes of its assignment of buffers.

`parse` takes two of the files that XLA dumps: "buffer-assignment", which lists allocations with the values in them, and
"live-range", which says from when to when each value lives. Allocations that are marked with a color are in a chip's
small memories and do not count.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (color \d+, )?(.*)$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")
_LIVE = re.compile(r"^\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")
_LIVES, _AFTER_LIVES = "BufferLiveRange:", "Live ranges at"

Span = tuple[int, int]
"""First and last instruction of a life."""


class Buffers(NamedTuple):
    """Bytes of a device's large memory.

    Attributes:
      arguments: of what the program is given, padded as it lies there.
      results: of what it returns, but for what lies in the place of an argument.
      temp: of what it needs besides, in one piece, with what is lost between its parts.
      peak: of arguments, results, and as much of ``temp`` as is in use at one time.
    """

    arguments: int
    results: int
    temp: int
    peak: int


def parse(assignment: str, live_ranges: str) -> Buffers | None:
    """The buffers of a program; None if this is not how the compiler tells of them."""
    arguments = results = temp = 0
    shared: list[tuple[int, Iterator[tuple[str, int, int]]]] = []
    for size, kind, values in _allocations(assignment):
        if kind.startswith("parameter"):
            arguments += size
        elif "maybe-live-out" in kind:
            results += size
        else:
            temp += size
            if kind.startswith("preallocated-temp"):
                shared.append((size, _values(values)))
    lives = _lives(live_ranges)
    if not (arguments and shared and lives):
        return None
    unused = sum(size - _in_use(values, lives) for size, values in shared)
    return Buffers(arguments, results, temp, arguments + results + temp - unused)


def _allocations(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Size, kind and lines of each allocation in the large memory."""
    for block in re.split(r"^(?=allocation )", text, flags=re.MULTILINE):
        header, _, lines = block.partition("\n")
        if (match := _ALLOCATION.match(header)) and not match[2]:
            yield int(match[1]), match[3], lines.splitlines()


def _values(lines: list[str]) -> Iterator[tuple[str, int, int]]:
    """Name, size and offset of the values in the lines of an allocation."""
    for line in lines:
        if match := _VALUE.match(line):
            yield match[1] + (match[2] or "{}"), int(match[3]), int(match[4])


def _lives(text: str) -> dict[str, Span]:
    lines = text.partition(_LIVES)[2].partition(_AFTER_LIVES)[0].splitlines()
    return {match[1] + match[2]: (int(match[3]), int(match[4])) for match in map(_LIVE.match, lines) if match}


def _in_use(values: Iterator[tuple[str, int, int]], lives: dict[str, Span]) -> int:
    """Bytes of an allocation that are in use where most are; values in the same place are one."""
    places: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for name, size, offset in values:
        if name in lives:
            places[offset, size].append(lives[name])
    changes: dict[int, int] = defaultdict(int)
    for (_, size), spans in places.items():
        for first, last in _joined(spans):
            changes[first] += size
            changes[last + 1] -= size
    used = most = 0
    for moment in sorted(changes):
        used += changes[moment]
        most = max(most, used)
    return most


def _joined(spans: list[Span]) -> list[Span]:
    """The same moments as spans that do not overlap."""
    joined: list[Span] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined
