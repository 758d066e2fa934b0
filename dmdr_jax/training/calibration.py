"""The teacher's scores: what a reward with `units="z"` is counted in, where the configuration does not say it.

Before the first step the teacher answers `config.calibration` of the run's prompts, one image each. Mean and standard
deviation of each reward on them are kept in ``WORKDIR/calibration.json``: a run that goes on counts as it did.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dmdr_jax.data.prompts import evenly
from dmdr_jax.evaluation.canaries import BATCH, apart
from dmdr_jax.evaluation.journal import key_of
from dmdr_jax.rewards.base import Reward, calibrated
from dmdr_jax.training import disk, runtime
from dmdr_jax.training.metrics import Progress
from dmdr_jax.training.preview import Preview

FILE = "calibration.json"


def in_teacher_units(
    config: Any, preview: Preview, prompts: Sequence[str], rewards: tuple[Reward, ...]
) -> tuple[Reward, ...]:
    """The rewards, each with the teacher's mean and standard deviation where it is counted in them; all processes call.

    Args:
      preview: how the run draws.
      prompts: of training, of which some are answered.

    Raises:
      UserError: all of the teacher's images have the same score.
    """
    unknown = [reward for reward in rewards if reward.spec.units == "z" and not reward.spec.std]
    if not unknown:
        return rewards
    drawing = preview.of(evenly(prompts, min(config.calibration, len(prompts))))
    scorers = [r.spec.scorer for r in unknown]
    known_as = key_of(drawing.prompts, str(drawing.teacher_recipe), scorers, config.model, list(drawing.noise.shape))
    file = preview.folder.parent / FILE
    scores = _recall(file, known_as) or _measure(drawing, unknown, file, known_as)
    return tuple(_counted(reward, scores) for reward in rewards)


def _counted(reward: Reward, scores: dict[str, list[float]]) -> Reward:
    if reward.spec.name not in scores:
        return reward
    spec = calibrated(reward.spec, np.array(scores[reward.spec.name]))
    return dataclasses.replace(reward, spec=spec)  # type: ignore[type-var]


def _recall(file: epath.Path, known_as: str) -> dict[str, list[float]] | None:
    """The scores that were measured for the same question; None where there are none."""
    text = file.read_text() if file.exists() else ""
    document = json.loads(text) if text else {}
    return document["scores"] if document.get("known_as") == known_as else None


def _measure(drawing: Preview, rewards: Sequence[Reward], file: epath.Path, known_as: str) -> dict[str, list[float]]:
    """All processes draw the teacher's images, the first one scores them, and all get its numbers."""
    with Progress(len(drawing.prompts), unit="image", stage=lambda _: "teacher's scores") as progress:
        images = drawing.draw_teacher(progress.advance)
    scores, scorers = {}, list(map(apart, rewards))
    if runtime.is_first():
        scores = {r.spec.name: r.score_prompts(images, drawing.prompts, BATCH).tolist() for r in scorers}
        document = {"known_as": known_as, "prompts": drawing.prompts, "scores": scores}
        disk.write_file(file, json.dumps(document).encode())
    return runtime.from_first(scores)
