"""Results that outlive a kill: one line for each finished piece of work, read again at the next start.

Several processes may write to one journal at a time, each to a file of its own; all of them read all files. A piece
is known by a key that says everything its result depends on, so that nothing stale is ever found.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEY_BYTES = 12


def key_of(*parts: Any) -> str:
    """A short name for what can be written as JSON: equal parts, equal names."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


class Journal:
    """Results by key.

    Args:
      folder: of the journal's files; made when something is added.
      writer: this process among those that write at a time.
    """

    def __init__(self, folder: Path, writer: str | int = 0):
        self.folder = folder
        self.file = folder / f"{writer}.jsonl"

    def read(self) -> dict[str, Any]:
        """Everything that any process has added; a line that a kill has cut off is left out."""
        found: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    found |= json.loads(line)
                except (ValueError, TypeError):
                    continue
        return found

    def add(self, results: Mapping[str, Any]) -> None:
        """Adds results, on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as stream:
            if stream.tell() and not self._ends_a_line():
                stream.write(b"\n")
            stream.write(json.dumps(dict(results)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def fill(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Sequence[Any]],
        lot: int,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> None:
        """Makes the results that are missing.

        Args:
          keys: of the results that are wanted.
          compute: gives the results of some of them, by their places in ``keys``; at most ``lot`` at a time, which
            are then kept.
          progress: called with the number that is done, those known from before at once.
        """
        known = self.read()
        missing = [i for i, key in enumerate(keys) if key not in known]
        progress(len(keys) - len(missing))
        for start in range(0, len(missing), lot):
            rows = missing[start : start + lot]
            self.add({keys[i]: result for i, result in zip(rows, compute(rows), strict=True)})
            progress(len(rows))

    def _ends_a_line(self) -> bool:
        with open(self.file, "rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
