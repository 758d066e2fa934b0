"""Watches a run for over-optimisation: held-out rewards and the looks of a fixed set of canary images, and an alarm.

Every `config.watch.every` generator updates the averaged student answers the same prompts from the same noise. What is
measured (`dmdr_jax.evaluation.canaries`) goes into the run's metrics, the images into a grid in samples/. The rule of
`dmdr_jax.evaluation.overoptimisation` says which checkpoint is the best so far: ``best.json`` names it, it is kept
whatever `config.checkpoint.keep` says, and ``WORKDIR/best`` stands for it wherever a checkpoint can be named. Once the
alarm is raised the best stays what it is, and with `config.watch.stop` the run ends.

All of it is a function of the metrics that are on disk, so that a resumed run knows what the killed one knew.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dmdr_jax.data.prompts import evenly, load_prompts
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import canaries
from dmdr_jax.evaluation.journal import key_of
from dmdr_jax.evaluation.overoptimisation import (
    HELD_OUT,
    TRAINED,
    Alarm,
    Observation,
    Thresholds,
    best_step,
    find_alarm,
)
from dmdr_jax.rewards.base import Reward
from dmdr_jax.training import disk, runtime
from dmdr_jax.training.checkpoints import Checkpoints
from dmdr_jax.training.metrics import MetricWriter, Progress, read_metrics
from dmdr_jax.training.preview import Preview
from dmdr_jax.workdir import BEST, BEST_FILE, METRICS

Tree = Any

TEACHER_FILE = "watch.json"
"""What was measured of the teacher's canaries, in the workdir."""
ALARM = "watch/alarm"


@dataclasses.dataclass
class Watch:
    """The watch over one run; every process draws, the first one measures and writes.

    Attributes:
      drawing: prompts and noise of the canaries, and how they are drawn.
      trained, held_out: the rewards that are trained on, and those that are not.
      history: what was seen so far.
      teacher: what was measured of its canaries.
      best: the checkpoint that was marked last.
    """

    every: int
    stop: bool
    thresholds: Thresholds
    drawing: Preview
    trained: list[Reward]
    held_out: list[Reward]
    workdir: epath.Path
    known_as: str
    history: list[Observation] = dataclasses.field(default_factory=list)
    teacher: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    best: int | None = None

    @classmethod
    def make(
        cls, config: Any, preview: Preview, prompts: list[str], rewards: Sequence[Reward], held_out: Sequence[Reward]
    ) -> "Watch":
        """The watch that the configuration asks for; one that is never due where there is no reward.

        Args:
          preview: how the run draws.
          prompts: of training, of which the canaries are some unless ``config.watch.prompts`` names others.
        """
        settings = config.watch
        every = settings.every if rewards or held_out else 0
        source = load_prompts(settings.prompts) if settings.prompts else prompts
        drawing = preview.of(spread(source, settings)) if every else preview
        scorers = [[r.spec.scorer for r in some] for some in (rewards, held_out)]
        asked = [*scorers, *canaries.LOOKS, config.model]
        known_as = key_of(drawing.prompts, str(drawing.teacher_recipe), asked, list(drawing.noise.shape))
        trained = list(map(canaries.apart, rewards))
        thresholds = Thresholds(**{f.name: settings[f.name] for f in dataclasses.fields(Thresholds)})
        workdir = preview.folder.parent
        return cls(every, settings.stop, thresholds, drawing, trained, list(held_out), workdir, known_as)

    @property
    def alarm(self) -> Alarm | None:
        """The alarm, once there is one."""
        return find_alarm(self.history, self.thresholds)

    def due(self, step: int, last: int) -> bool:
        """Whether the student is to be looked at after this step."""
        return self.every > 0 and (step % self.every == 0 or step == last)

    def begin(self, step: int, average: Tree, frozen: Any, writer: MetricWriter, checkpoints: Checkpoints) -> None:
        """Recalls what was seen up to the step that the run goes on from; looks at the student that starts."""
        if not self.every:
            return
        file = self.workdir / METRICS
        seen = canaries.observations(read_metrics(self.workdir)) if file.exists() else []
        self.history = [one for one in seen if one.step <= step]
        if step == 0 and not self.history:
            writer.scalars(0, self.look(0, average, frozen, writer))
        self._keep_best(checkpoints)

    def look(self, step: int, average: Tree, frozen: Any, writer: MetricWriter) -> dict[str, float]:
        """Draws and measures the averaged student's canaries; returns the metrics of this step.

        Args:
          average, frozen: see `dmdr_jax.training.preview.Preview.student`.
        """
        if not self.teacher:
            self.teacher = self._measure_teacher(writer, step)
        images = self.drawing.draw_student(average, frozen)
        metrics = canaries.compare(self._measure(images), self.teacher)
        self.drawing.write(writer, step, "canary", images, f"canary_{step:06d}")
        self.history = [one for one in self.history if one.step < step] + [canaries.observation(step, metrics)]
        return metrics | {ALARM: float(self.alarm is not None)}

    def mark(self, checkpoints: Checkpoints, progress: Progress) -> None:
        """Names the best checkpoint so far, which is then kept; says so when the alarm is raised."""
        self._keep_best(checkpoints)
        if self.alarm is not None and self.alarm.step == self.history[-1].step:
            progress.note(self.sentence())

    def _keep_best(self, checkpoints: Checkpoints) -> None:
        step, alarm = best_step(self.history, self.thresholds), self.alarm
        self.best = max((saved for saved in checkpoints.steps() if step is not None and saved <= step), default=None)
        checkpoints.preserve(self.best)
        document = {"step": self.best, "alarm": None if alarm is None else dataclasses.asdict(alarm)}
        if runtime.is_first():
            disk.write_file(self.workdir / BEST_FILE, json.dumps(document, indent=1).encode())

    def sentence(self) -> str:
        """What the alarm says."""
        alarm = self.alarm
        assert alarm is not None
        where = f"the checkpoint from before is {self.workdir / BEST}"
        keep = where if self.best is not None else "no checkpoint was saved before"
        return f"over-optimised at step {alarm.step}: {alarm.reason[:-1]}; {keep}"

    @property
    def ends_the_run(self) -> bool:
        """Whether the alarm was raised and the run is to end with it."""
        return self.stop and self.alarm is not None

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _measure(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """By the first process; the others get its numbers, so that all decide alike."""
        found = {}
        if runtime.is_first():
            measured = canaries.measure(images, self.drawing.prompts, self.trained, self.held_out)
            found = {name: values.tolist() for name, values in measured.items()}
        return _as_arrays(runtime.from_first(found))

    def _measure_teacher(self, writer: MetricWriter, step: int) -> dict[str, np.ndarray]:
        """What was measured of the teacher once, or is now."""
        file = self.workdir / TEACHER_FILE
        if file.exists():
            document = json.loads(file.read_text())
            if document["known_as"] == self.known_as:
                return _as_arrays(document["teacher"])
        images = self.drawing.draw_teacher()
        measured = self._measure(images)
        self.drawing.write(writer, step, "canary_teacher", images, "canary_teacher")
        document = {
            "known_as": self.known_as,
            "prompts": self.drawing.prompts,
            "scores": {
                name: {"mean": float(values.mean()), "std": float(values.std(ddof=1))}
                for name, values in measured.items()
                if name.startswith((TRAINED, HELD_OUT)) and values.size > 1
            },
            "teacher": {name: values.tolist() for name, values in measured.items()},
        }
        if runtime.is_first():
            disk.write_file(file, json.dumps(document).encode())
        return measured


def spread(prompts: Sequence[str], settings: Any) -> list[str]:
    """As many prompts as are asked for, taken evenly, each ``per_prompt`` times in a row."""
    chosen = evenly(prompts, min(settings.count, len(prompts)))
    return [prompt for prompt in chosen for _ in range(settings.per_prompt)]


def check_held_out(rewards: Sequence[Reward], held_out: Sequence[Reward]) -> None:
    """UserError where a reward that is trained on is called held out."""
    trained = {(reward.spec.path, reward.spec.kind) for reward in rewards}
    for reward in held_out:
        if (reward.spec.path, reward.spec.kind) in trained:
            raise UserError(
                f"config.watch.rewards.{reward.spec.name} is {reward.spec.path}, which the run trains on: a held-out"
                " reward must be another one."
            )


def _as_arrays(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, np.float64) for name, values in numbers.items()}
