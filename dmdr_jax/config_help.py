"""What the keys of a configuration mean: the comments beside them in the file that sets them.

A configuration file says `c.group.key = default  # meaning`, with `c` made by ConfigDict. A meaning that does not fit
beside its key stands on the lines above. A group that a function of the same file makes, as in `c.lora = _lora(64)`,
has that function's keys; a file that begins with another's, `c = sd3.get_config()`, has that one's meanings.
"""

from __future__ import annotations

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
BASE = ROOT / "configs" / "base.py"
WIDTH = 44
"""Columns up to the meaning."""
NAMED = {"rewards": "reward", "watch.rewards": "reward"}
"""Groups whose entries the user names, and the function of configs/base.py that makes one."""


def listing(file: pathlib.Path, keys: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """A line for each (key, value) of the configuration in ``file``: the flag that sets it, and what it means.

    First what is in no group, then the groups in the order of configs/base.py, each with what it is.
    """
    known = all_meanings(file)
    place = {name: i for i, name in enumerate(known)}

    def order(item: tuple[str, Any]) -> tuple[int, str, int]:
        group, reward = item[0].rpartition(".")[0].partition(".")[0], re.match(r"rewards\.[^.]+\.", item[0])
        first = place.get(group, len(place)) if group else -1
        return first, reward[0] if reward else "", place.get(_general(item[0]), len(place))

    last = ""
    for key, value in sorted(keys, key=order):
        group = key.rpartition(".")[0].partition(".")[0]
        if group != last:
            yield f"\n  {group}: {known.get(group, '')}".rstrip(" :")
            last = group
        flag, meaning = f"  --config.{key}={value!r}", meaning_of(key, known)
        yield f"{flag:<{WIDTH}}  {meaning if meaning != known.get(group) else ''}".rstrip()


def all_meanings(file: pathlib.Path) -> dict[str, str]:
    """The meanings in configs/base.py, and after them those of the keys of the file and of what it begins with."""
    base = meanings(BASE)
    return {**base, **meanings(file), **base}


def meaning_of(key: str, known: dict[str, str]) -> str:
    """The key's own meaning, or that of the nearest group around it that has one; "" where there is none."""
    name = _general(key)
    while name and not known.get(name):
        name = name.rpartition(".")[0]
    return known.get(name, "")


def _general(key: str) -> str:
    """The key with NAME in place of what the user named."""
    return re.sub(rf"^({'|'.join(map(re.escape, NAMED))})\.[^.]+\.", r"\1.NAME.", key)


def meanings(file: pathlib.Path) -> dict[str, str]:
    """Keys (and groups) that a configuration file sets, with the comments that explain them, "" where there is none.

    The keys of what the user names, which the functions of `NAMED` make, stand under NAME. A key that the file leaves
    without a comment has the meaning of the configuration that the file begins with.
    """
    reader = _Reader(file.read_text(encoding="utf-8"))
    own = dict(reader.keys("get_config"))
    for group, function in NAMED.items():
        own |= {f"{group}.NAME.{key}": text for key, text in reader.keys(function)}
    first = reader.begins_with()
    found = meanings(first) if first else {}
    return found | {key: text for key, text in own.items() if text or key not in found}


class _Reader:
    """A configuration file's source.

    Attributes:
      functions: those at its top level, by name.
    """

    def __init__(self, source: str):
        body = ast.parse(source).body
        self.functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        self._imported = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self._beside, self._alone = _comments(source)

    def begins_with(self) -> pathlib.Path | None:
        """The file here whose `get_config` this one's calls, imported as in `from configs.shapes import sd3`."""
        for node in ast.walk(self.functions["get_config"]) if "get_config" in self.functions else ():
            if isinstance(node, ast.Attribute) and node.attr == "get_config" and isinstance(node.value, ast.Name):
                module = self._imported.get(node.value.id)
                file = ROOT.joinpath(*module.split(".")).with_suffix(".py") if module else None
                return file if file and file.is_file() else None
        return None

    def keys(self, function: str) -> Iterator[tuple[str, str]]:
        """(key, meaning) of all that the function sets on ``c``, and of what it has other functions of the file set."""
        body = self.functions[function].body if function in self.functions else []
        for node in body:
            called = self._called(node)
            if isinstance(node, ast.Assign):
                for key in filter(None, map(_key, node.targets)):
                    yield key, self._meaning(node)
                    yield from ((f"{key}.{inner}", text) for inner, text in (self.keys(called) if called else ()))
            elif called:
                yield from self.keys(called)

    def _called(self, node: ast.AST) -> str | None:
        value = getattr(node, "value", None)
        named = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id
        return named if named in self.functions else None

    def _meaning(self, node: ast.stmt) -> str:
        if node.lineno in self._beside or node.end_lineno in self._beside:
            return self._beside.get(node.lineno) or self._beside[node.end_lineno or node.lineno]
        above, line = [], node.lineno - 1
        while line in self._alone:
            above.append(self._alone[line])
            line -= 1
        return " ".join(reversed(above))


def _key(target: ast.expr) -> str:
    """``a.b`` of the target ``c.a.b``; "" of any other."""
    names = []
    while isinstance(target, ast.Attribute):
        names.append(target.attr)
        target = target.value
    return ".".join(reversed(names)) if isinstance(target, ast.Name) and target.id == "c" else ""


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those beside code, and those that have the line to themselves."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = beside if token.line[: token.start[1]].strip() else alone
            where[token.start[0]] = token.string.lstrip("# ")
    return beside, alone
