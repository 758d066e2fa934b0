"""Metrics from the device to files and console, without the device ever being waited for."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from dmdr_jax.errors import UserError
from dmdr_jax.training.checkpoints import Checkpoints
from dmdr_jax.training.metrics import MetricWriter, Progress
from dmdr_jax.training.step import NOISE_BIN

Metrics = dict[str, jax.Array]

Pending = tuple[int, list[Metrics]]
"""A step and the metrics of the updates that led to it, still on the device."""

ON_NONFINITE = ("stop", "skip")
SKIPPED_AT_MOST = 10
"""Steps in a row with a number that is not finite, after which a run that skips them stops all the same."""
SKIPPED = "skipped/steps"


@dataclasses.dataclass
class Skipped:
    """Steps with a number that is not finite, in a run that goes on in spite of them.

    Attributes:
      steps: since this process began.
      in_a_row: up to the latest step.
    """

    steps: int = 0
    in_a_row: int = 0

    def count(self, bad: bool) -> bool:
        """Counts one step; whether the run may go on."""
        self.steps, self.in_a_row = self.steps + bad, self.in_a_row + 1 if bad else 0
        return self.in_a_row < SKIPPED_AT_MOST


def report(
    pending: Pending | None,
    writer: MetricWriter,
    progress: Progress,
    checkpoints: Checkpoints,
    then: Pending | None = None,
    skipped: Skipped | None = None,
    also: Mapping[str, float] | None = None,
) -> Pending | None:
    """Fetches and writes one step's metrics, a step late so that the device is never waited for; returns ``then``.

    A metric of several updates is averaged, over those that have it.

    Args:
      skipped: given, steps with a number that is not finite are counted here and in the curves; their updates with
        a gradient that is not finite were not applied.
      also: more numbers of the pending step, finite or not.

    Raises:
      UserError: a number is not finite, and has been for as many steps as may be skipped; the update that made it was
        not applied and nothing was saved since.
    """
    if pending is None:
        return then
    step, updates = pending
    numbers = _means(jax.device_get(updates))
    bad = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    bad.sort(key=lambda name: name.startswith("generator/"))  # a term's own number says more than the sum's
    go_on = not bad if skipped is None else skipped.count(bool(bad))
    if not go_on:
        raise UserError(_not_finite(bad, step, checkpoints))
    if skipped is not None:
        numbers[SKIPPED] = skipped.steps
    if bad:
        progress.note(f"step {step}: {bad[0]} is not finite; its update was skipped")
    numbers |= also or {}
    writer.scalars(step, numbers)
    progress.update(step, numbers)
    return then


def save(step: int, state: Any, meta: dict[str, Any], writer: MetricWriter, checkpoints: Checkpoints) -> None:
    """Begins to save; the curves that lead to ``step``, which a resumed run does not draw again, come first."""
    writer.flush()
    checkpoints.save(step, state, meta)


def _means(updates: list[dict[str, jax.Array]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for metrics in updates:
        for name, value in metrics.items():
            if not (name.startswith(NOISE_BIN) and math.isnan(value)):  # a noise level that no sample had
                values.setdefault(name, []).append(float(value))
    return {name: sum(several) / len(several) for name, several in values.items()}


def _not_finite(bad: list[str], step: int, checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest()
    return (
        f"{bad[0]} is not finite at step {step} (not finite: {', '.join(bad)}); the last good checkpoint "
        f"is {'none yet' if last is None else f'step {last} in {checkpoints.directory}'}: lower the learning rate "
        "or that term's weight and run the command again."
    )
