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

from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.evaluation.canaries import BATCH, apart
from dmdr_jax.evaluation.journal import key_of
from dmdr_jax.rewards.base import Reward, calibrated
from dmdr_jax.training import disk, runtime, setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import Progress
from dmdr_jax.training.preview import Preview

FILE = "calibration.json"


def in_teacher_units(
    config: Any,
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    layout: Layout,
    workdir: epath.Path,
) -> tuple[Reward, ...]:
    """The rewards, each with the teacher's mean and standard deviation where it is counted in them; all processes call.

    Raises:
      UserError: all of the teacher's images have the same score.
    """
    unknown = [reward for reward in rewards if reward.spec.units == "z" and not reward.spec.std]
    if not unknown:
        return tuple(rewards)
    count = min(config.calibration, len(prompts))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    drawing = Preview.make(config, pipeline, setup.make_plan(config, pipeline, tuple(rewards)), chosen, workdir, layout)
    drawing = drawing.of(chosen)
    scorers = [[r.spec.name, r.spec.path, r.spec.kind, r.spec.prompt_prefix] for r in unknown]
    known_as = key_of(chosen, str(drawing.teacher_recipe), scorers, config.model, list(drawing.noise.shape))
    scores = _recall(workdir / FILE, known_as) or _measure(drawing, unknown, workdir / FILE, known_as)
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
    scores = {}
    if runtime.is_first():
        scores = {r.spec.name: apart(r).score_prompts(images, drawing.prompts, BATCH).tolist() for r in rewards}
        document = {"known_as": known_as, "prompts": drawing.prompts, "scores": scores}
        disk.write_file(file, json.dumps(document).encode())
    return runtime.from_first(scores)
