"""Metrics from the device to files and console, without the device ever being waited for."""

import math

import jax

from dmdr_jax.errors import UserError
from dmdr_jax.training.checkpoints import Checkpoints
from dmdr_jax.training.metrics import MetricWriter, Progress
from dmdr_jax.training.step import NOISE_BIN

Metrics = dict[str, jax.Array]

Pending = tuple[int, list[Metrics]]
"""A step and the metrics of the updates that led to it, still on the device."""


def report(
    pending: Pending | None,
    writer: MetricWriter,
    progress: Progress,
    checkpoints: Checkpoints,
    then: Pending | None = None,
) -> Pending | None:
    """Fetches and writes one step's metrics, a step late so that the device is never waited for; returns ``then``.

    A metric of several updates is averaged, over those that have it.

    Raises:
      UserError: a number is not finite; the update that made it was not applied and nothing was saved since.
    """
    if pending is None:
        return then
    step, updates = pending
    values: dict[str, list[float]] = {}
    for metrics in jax.device_get(updates):
        for name, value in metrics.items():
            if not (name.startswith(NOISE_BIN) and math.isnan(value)):  # a noise level that no sample had
                values.setdefault(name, []).append(float(value))
    numbers = {name: sum(several) / len(several) for name, several in values.items()}
    bad = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    bad.sort(key=lambda name: name.startswith("generator/"))  # a term's own number says more than the sum's
    if bad:
        checkpoints.wait()
        last = checkpoints.latest()
        raise UserError(
            f"{bad[0]} is not finite at step {step} (not finite: {', '.join(bad)}); the last good checkpoint "
            f"is {'none yet' if last is None else f'step {last} in {checkpoints.directory}'}: lower the learning rate "
            "or that term's weight and run the command again."
        )
    writer.scalars(step, numbers)
    progress.update(step, numbers)
    return then
