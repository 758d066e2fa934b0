"""What a sweep shows while it runs: a table that is redrawn on a terminal, a line per event elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from dmdr_jax.experiments.jobs import EVALUATE, TRAIN, Job
from dmdr_jax.experiments.records import shown
from dmdr_jax.experiments.runner import Runner

REDRAW_SECONDS = 2.0
MARKS = {"done": "done", "failed": "FAILED", "waiting": "·", "held": "elsewhere", "blocked": "needs a failed row"}


class Display:
    """Shows a runner's state.

    Args:
      parallel: jobs at a time, for the estimate of what is left.
    """

    def __init__(self, jobs: Sequence[Job], parallel: int, stream: TextIO | None = None):
        self._jobs, self._parallel, self._stream = list(jobs), parallel, stream or sys.stderr
        self._redraws = self._stream.isatty()
        self._lines, self._drawn_at = 0, 0.0

    def show(self, runner: Runner, event: str) -> None:
        """Called by the runner after every event, and often with none."""
        if not self._redraws:
            if event:
                left = self._left(runner)
                print(f"{len(runner.done)}/{len(self._jobs)}  left {left}  {event}", file=self._stream, flush=True)
        elif event or time.monotonic() - self._drawn_at > REDRAW_SECONDS:
            self._redraw(runner)

    def _redraw(self, runner: Runner) -> None:
        lines = [*self.table(runner), f"{len(runner.done)}/{len(self._jobs)} done, left {self._left(runner)}"]
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        print(up + "\n".join(lines), file=self._stream, flush=True)
        self._lines, self._drawn_at = len(lines), time.monotonic()

    def table(self, runner: Runner) -> list[str]:
        """A line per row: its label, then every seed's state."""
        rows: dict[str, list[str]] = {}
        for job in self._jobs:
            name = "" if job.seed is None else f"{job.seed}: "
            rows.setdefault(job.row.label, []).append(name + self._state(runner, job))
        width = max(map(len, rows), default=0)
        return [f"{label.ljust(width)}  {'   '.join(states)}" for label, states in rows.items()]

    def _state(self, runner: Runner, job: Job) -> str:
        state = runner.state(job)
        if state != "running":
            return MARKS[state]
        step = next(active.step for active in runner.active if active.job.folder == job.folder)
        return f"{step.name} {job.progress()}/{job.config.steps}" if step.name == TRAIN else step.name

    def _left(self, runner: Runner) -> str:
        seconds = seconds_left(runner, self._parallel)
        return "?" if seconds is None else _duration(seconds)


def seconds_left(runner: Runner, parallel: int) -> float | None:
    """Until all is done, by what updates and evaluations have cost so far; None while too little is known."""
    jobs = [job for job in runner.jobs if runner.state(job) != "done"]
    updates = sum(job.config.steps - max(job.progress(), job.first_step) for job in jobs if job.row.config)
    states = [job.state() for job in runner.jobs]
    trained = [s[TRAIN] for s in states if "timed_updates" in s.get(TRAIN, {})]
    timed = [(s["timed_seconds"], s["timed_updates"]) for s in trained]
    for active in runner.active:
        if active.steady is not None:
            since, first = active.steady
            timed.append((time.monotonic() - since, active.job.progress() - first))
    counted = sum(count for _, count in timed)
    evaluations = [s[EVALUATE]["seconds"] for s in states if s.get(EVALUATE, {}).get("done")]
    if (updates and not counted) or not (counted or evaluations):
        return None
    per_update = sum(seconds for seconds, _ in timed) / counted if counted else 0.0
    per_evaluation = sum(evaluations) / len(evaluations) if evaluations else 0.0
    return (updates * per_update + len(jobs) * per_evaluation) / parallel


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def listing(jobs: Sequence[Job]) -> str:
    """Every command with what is known of it."""
    lines = []
    for job in jobs:
        after = f", after {job.parent.name} at step {job.first_step}" if job.parent is not None else ""
        lines.append(f"# {job.name}{after}")
        for step in job.steps():
            done = "   # done" if job.is_done(step) else ""
            lines.append(f"{shown(step)}{done}")
    return "\n".join(lines)
