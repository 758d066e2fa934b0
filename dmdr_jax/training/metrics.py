"""Curves and pictures of a run: metrics.jsonl, TensorBoard, and a line on the console.

On a disk every line is there as soon as it is written. An object store has no files that grow: there metrics.jsonl is
written anew, and TensorBoard gets another file, at every `MetricWriter.flush`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from etils import epath
from tqdm import tqdm

from dmdr_jax.errors import UserError
from dmdr_jax.training import disk
from dmdr_jax.training.names import short
from dmdr_jax.workdir import EVENTS, METRICS


class MetricWriter:
    """Writes a run's metrics under its workdir; of several processes every one but the first writes nothing.

    Args:
      workdir: a local folder or a gs:// one; gets metrics.jsonl, one JSON object per line with "step" and the scalars
        (null where one is not finite), and tensorboard/.
      resume_step: the step that was restored; lines of later steps, which will be written anew, are dropped. None
        starts both files afresh.
      primary: whether this process writes; None: where it is the first.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int | None = None, primary: bool | None = None):
        # Imported here, so that reading metrics back costs nothing.
        from dmdr_jax.training import runtime
        from dmdr_jax.training.events import EventWriter, metric_writers

        self._primary = runtime.is_first() if primary is None else primary
        if not self._primary:
            return
        self._workdir = workdir = epath.Path(workdir)
        first = 0 if resume_step is None else resume_step + 1
        with self._writing():
            disk.make_folder(workdir)
            self._lines = Lines(workdir / METRICS, first)
            self._events = metric_writers.AsyncMultiWriter([EventWriter(workdir / EVENTS, first)])
        self._closed = False

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers (or arrays of one element) of one step. Raises UserError when the disk is full."""
        if not self._primary:
            return
        numbers = {name: float(np.asarray(value).item()) for name, value in values.items()}
        line = json.dumps({"step": int(step), **{k: v if math.isfinite(v) else None for k, v in numbers.items()}})
        with self._writing():
            self._lines.append(line)
            self._events.write_scalars(int(step), numbers)

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Write pictures, uint8 [h, w, 3] each, for TensorBoard."""
        if not self._primary:
            return
        arrays = {name: np.asarray(value) for name, value in values.items()}
        for name, array in arrays.items():
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
                raise ValueError(f"image {name!r} must be uint8 [h, w, 3], not {array.dtype} {list(array.shape)}")
        with self._writing():
            self._events.write_images(int(step), arrays)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Write Markdown for TensorBoard."""
        if self._primary:
            with self._writing():
                self._events.write_texts(int(step), dict(values))

    def flush(self) -> None:
        """Return when everything is handed to the file system or object store."""
        if self._primary:
            with self._writing():
                self._lines.flush()
                self._events.flush()

    def close(self) -> None:
        """Flush and close both files; a second call does nothing."""
        if self._primary and not self._closed:
            self._closed = True
            with self._writing():
                self._lines.close()
                self._events.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return disk.writing(f"write metrics in {self._workdir}")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Lines:
    """A file of lines that grows.

    Args:
      path: of metrics.jsonl; made if absent.
      first: lines of this step and later ones are dropped.
    """

    def __init__(self, path: epath.Path, first: int):
        self._path, self._remote = path, disk.is_remote(path)
        kept = [json.dumps(row) for row in _whole_lines(path) if row["step"] < first] if path.exists() else []
        self._kept = kept  # only an object store needs them again
        disk.write_file(path, _text(kept))
        self._file = None if self._remote else path.open("a")

    def append(self, line: str) -> None:
        """One more line, on the disk when this returns."""
        if self._file is None:
            self._kept.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def flush(self) -> None:
        """To an object store, the whole file anew."""
        if self._remote:
            disk.write_file(self._path, _text(self._kept))

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _text(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one cut short by a kill is left out."""
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        raise UserError(f"{path} does not exist; give the workdir of a run")
    return _whole_lines(path)


def _whole_lines(path: epath.Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


class Progress:
    """Where a run is, on the console: a bar on a terminal, elsewhere a line now and then.

    The first step of a stage, in which its program is compiled, says nothing of the rate and is left out of it.

    Args:
      total: steps of the whole run.
      initial: steps done before this start, when resuming.
      show: keys of the metrics to print, in this order; by their names in `dmdr_jax.training.names`.
      every: seconds between lines where there is no terminal.
      unit: what is counted.
      stage: what the run is about after so many steps.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        show: Sequence[str] = (),
        every: float = 15.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "step",
        stage: Callable[[int], str] | None = None,
    ):
        self._unit, self._stage = unit, stage or (lambda step: "")
        self._total, self._show, self._every, self._clock = total, tuple(show), every, clock
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, file=self._stream, unit=unit, dynamic_ncols=True)
        self._step = self._printed_step = initial
        self._printed_at = clock()
        self._known_stage: str | None = None

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; `metrics` are the latest numbers, on the host already."""
        metrics, stage = metrics or {}, self._stage(step)
        shown = "  ".join(f"{short(name)} {metrics[name]:.4g}" for name in self._show if name in metrics)
        if self._bar is not None:
            self._bar.set_description(stage or None, refresh=False)
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._step)
        elif stage != self._known_stage and step != self._total:
            self._first(step, stage, shown)
        elif self._clock() - self._printed_at >= self._every or step == self._total:
            self._print(step, stage, shown)
        self._step, self._known_stage = step, stage

    def advance(self, steps: int) -> None:
        """So many more steps are done."""
        self.update(self._step + steps)

    def note(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _first(self, step: int, stage: str, shown: str) -> None:
        seconds = self._clock() - self._printed_at
        if seconds >= self._every:
            self._line(stage, step, f"{seconds:.0f} s with compiling", shown)
        self._printed_step, self._printed_at = step, self._clock()

    def _print(self, step: int, stage: str, shown: str) -> None:
        seconds = self._clock() - self._printed_at
        rate = (step - self._printed_step) / seconds if seconds > 0 else 0.0
        eta = tqdm.format_interval((self._total - step) / rate) if rate > 0 else "?"
        self._line(stage, step, _format_rate(rate, self._unit), f"ETA {eta}", shown)
        self._printed_step, self._printed_at = step, self._clock()

    def _line(self, stage: str, step: int, *parts: str) -> None:
        self.note("  ".join(filter(None, [stage, f"{self._unit} {step}/{self._total}", *parts])))


def _format_rate(rate: float, unit: str) -> str:
    return f"{rate:.2f} {unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.2f} s/{unit}"
