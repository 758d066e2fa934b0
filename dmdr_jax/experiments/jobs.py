"""One row with one seed: its folder, the commands that make it, and what of them is done.

A job's folder, OUT/ROW/seedN (or OUT/ROW/fixed where nothing is trained)::

    run/          the training run's workdir
    evaluation/   what `dmdr_jax.evaluate` wrote of the finished run
    along/        the same of its checkpoints
    job.json      which commands are done, with which settings, and what they cost
    log.txt       everything they printed
    lock          held while anything of the job runs, by the children too

A command is done when it ended well; a training run that was made with other settings is refused, not gone on with.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.experiments.spec import TEACHER, Experiment, Row, arguments_of, kept_steps, relative
from dmdr_jax.workdir import CHECKPOINTS, METRICS

RUN, EVALUATION, ALONG = "run", "evaluation", "along"
JOB_FILE, LOG_FILE, LOCK_FILE, COST_FILE = "job.json", "log.txt", "lock", "cost.json"

TRAIN, COST, EVALUATE, EVALUATE_ALONG = "train", "cost", "evaluate", "evaluate along"


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a job.

    Attributes:
      settings: what makes its result; a finished step with the same settings is not run again.
      product: exists when it is done.
    """

    name: str
    command: tuple[str, ...]
    settings: Any
    product: Path


@dataclasses.dataclass(frozen=True)
class Job:
    """A row with a seed (None where nothing is trained)."""

    experiment: Experiment
    row: Row
    seed: int | None
    out: Path

    @property
    def name(self) -> str:
        return self.row.label if self.seed is None else f"{self.row.label} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.row.label / ("fixed" if self.seed is None else f"seed{self.seed}")

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    @property
    def parent(self) -> "Job | None":
        """The job whose run this one goes on from or draws with."""
        if not self.row.parent:
            return None
        return dataclasses.replace(self, row=self.experiment.row(self.row.parent))

    @property
    def config(self) -> Any:
        """The locked configuration, seed included; None where nothing is trained."""
        return self.experiment.config(self.row, self.seed) if self.row.config else None

    @property
    def first_step(self) -> int:
        """The generator step of the checkpoint that the run begins with."""
        parent = self.parent
        if parent is None:
            return 0
        return parent.config.steps if self.row.parent_step is None else self.row.parent_step

    @property
    def model(self) -> str:
        """Path of what is drawn with."""
        if self.row.config:
            return relative(self.folder / RUN)
        if self.parent is not None:
            return relative(self.parent.folder / RUN / CHECKPOINTS / str(self.first_step))
        return self.row.model

    def steps(self) -> list[Step]:
        """The commands, in their order."""
        found = [self._train_step()] if self.row.config else []
        found.append(self._evaluate_step())
        if self.row.config and self.experiment.along is not None:
            found.append(self._along_step())
        return [*found, self._cost_step()] if self.stages() else found

    # --- the commands --------------------------------------------------------------------------------------------

    def _train_step(self) -> Step:
        overrides = [f"--config.{override}" for override in self.experiment.overrides(self.row, self.seed)]
        workdir = self.folder / RUN
        command = program("train", f"--config={self.row.config}", f"--workdir={relative(workdir)}", *overrides)
        config = self.config
        settings = {"config": dict(cli.config_keys(config)), "after": self.row.after}
        return Step(TRAIN, command, settings, workdir / CHECKPOINTS / str(config.steps))

    def _cost_step(self) -> Step:
        """Counted once for all seeds of the row."""
        file = self.out / self.row.label / COST_FILE
        stages = [
            argument
            for stage in self.stages()
            for argument in ("--stage", stage["config"], str(stage["first"]), str(stage["last"]), *stage["overrides"])
        ]
        return Step(COST, program("experiments.cost", f"--out={relative(file)}", *stages), stages, file)

    def stages(self) -> list[dict[str, Any]]:
        """The training that led to this row's model, its ancestors' first: config, overrides, first and last step."""
        before = self.parent.stages() if self.parent is not None else []
        if before:
            before[-1] = {**before[-1], "last": self.first_step}
        if not self.row.config:
            return before
        overrides = self.experiment.overrides(self.row)
        own = {"config": self.row.config, "overrides": overrides, "first": self.first_step, "last": self.config.steps}
        return [*before, own]

    def _evaluate_step(self) -> Step:
        out = self.folder / EVALUATION
        models = [f"{TEACHER}={self.experiment.teacher}"]
        own = arguments_of(self.model, self.row.draw)
        if own != self.experiment.teacher:
            models.append(f"{self.row.label}={own}")
        arguments = [*self.experiment.evaluation.arguments(), "--keep=16", f"--out={relative(out)}"]
        command = program("evaluate", *(f"--model={model}" for model in models), *arguments)
        drawn = arguments_of(self.row.model or self.row.after or RUN, self.row.draw)
        settings = [self.experiment.teacher, drawn, *self.experiment.evaluation.arguments()]
        return Step(EVALUATE, command, settings, out / "results.json")

    def _along_step(self) -> Step:
        along, out, config = self.experiment.along, self.folder / ALONG, self.config
        assert along is not None
        kept = kept_steps(config.steps, config.checkpoint.every, config.checkpoint.keep)
        steps = [step for step in kept if step % along.every == 0 and step > self.first_step]
        checkpoints = relative(self.folder / RUN / CHECKPOINTS)
        models = [f"{TEACHER}={self.experiment.teacher}", *(f"{step}={checkpoints}/{step}" for step in steps)]
        judged = dataclasses.replace(self.experiment.evaluation, per_tag=along.per_tag)
        arguments = [*judged.arguments(), "--keep=1", f"--out={relative(out)}"]
        command = program("evaluate", *(f"--model={model}" for model in models), *arguments)
        settings = [self.experiment.teacher, steps, *judged.arguments()]
        return Step(EVALUATE_ALONG, command, settings, out / "results.json")

    # --- what is done --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """job.json: by step its settings, whether it is done, seconds, CPU seconds, updates and attempts."""
        return read_json(self.folder / JOB_FILE) or {}

    def is_done(self, step: Step) -> bool:
        if step.name == COST:  # one for all seeds
            return (read_json(step.product) or {}).get("stages") == step.settings
        known = self.state().get(step.name, {})
        return step.product.exists() and bool(known.get("done")) and same_settings(step, known["settings"])

    def next_step(self) -> Step | None:
        """The first command that is not done."""
        return next((step for step in self.steps() if not self.is_done(step)), None)

    def note(self, step: Step, **changes: Any) -> None:
        """Writes what is known of a step to job.json; numbers are added to what is there, anything else replaces it.

        A training run that goes on makes what follows it undone.
        """
        state, settings = self.state(), plain(step.settings)
        if step.name not in state or not same_settings(step, state[step.name]["settings"]):
            state[step.name] = {}
        known = state[step.name]
        known["settings"] = settings
        for key, value in changes.items():
            is_amount = isinstance(value, int | float) and not isinstance(value, bool)
            known[key] = known.get(key, 0) + value if is_amount else value
        if step.name == TRAIN and not known.get("done"):
            for other in (EVALUATE, EVALUATE_ALONG):
                state.get(other, {}).pop("done", None)
        write_json(self.folder / JOB_FILE, state)

    def check_settings(self) -> None:
        """UserError where the job's run was begun with other settings than those of the experiment now."""
        known = self.state().get(TRAIN)
        if not self.row.config or known is None:
            return
        now, then = plain(self._train_step().settings), known["settings"]
        if differing := differences(then, now):
            key, (old, new) = next(iter(differing.items()))
            raise UserError(
                f"{self.folder} was begun with other settings: {key} was {json.dumps(old)} and is {json.dumps(new)} "
                "now. Remove that folder, or give another --out."
            )

    def prepare(self, step: Step) -> None:
        """What must be there before a command is started: the copy of the run that it goes on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        workdir = self.folder / RUN
        if step.name == TRAIN and self.parent is not None and not workdir.exists():
            fork(self.parent.folder / RUN, self.first_step, workdir)

    def prune(self) -> None:
        """Drops the checkpoints that nothing needs any more: all but the last and those that other rows begin with."""
        if not self.row.config:
            return
        rows = [row for row in self.experiment.rows if row.parent == self.row.label]
        wanted = {self.config.steps, *(dataclasses.replace(self, row=row).first_step for row in rows)}
        for folder in (self.folder / RUN / CHECKPOINTS).iterdir():
            if folder.name.isdigit() and int(folder.name) not in wanted:
                shutil.rmtree(folder)

    def progress(self) -> int:
        """Generator steps of the run so far."""
        return last_step(self.folder / RUN / METRICS, self.first_step)


def jobs_of(experiment: Experiment, pairs: list[tuple[Row, int | None]], out: Path) -> list[Job]:
    """A job for each; UserError where ``out`` cannot be named on a command line or holds other settings."""
    if "," in str(out) or "=" in str(out):
        raise UserError(f"--out {out} must not contain a comma or an equals sign: it names models to evaluate.")
    jobs = [Job(experiment, row, seed, out) for row, seed in pairs]
    for job in jobs:
        job.check_settings()
    return jobs


def program(name: str, *arguments: str) -> tuple[str, ...]:
    """The command line of one of this package's programs."""
    return (sys.executable, "-m", f"dmdr_jax.{name}", *arguments)


def fork(source: Path, step: int, target: Path) -> None:
    """A run's workdir that goes on from ``step`` of another: its checkpoint and its metrics.

    Raises:
      UserError: there is no such checkpoint.
    """
    checkpoint = source / CHECKPOINTS / str(step)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not there: run the row that makes it first.")
    half = target.with_name(target.name + ".half")
    shutil.rmtree(half, ignore_errors=True)  # what a kill left
    shutil.copytree(checkpoint, half / CHECKPOINTS / str(step))
    with contextlib.suppress(FileNotFoundError):
        lines = (source / METRICS).read_bytes().splitlines(keepends=True)
        (half / METRICS).write_bytes(b"".join(line for line in lines if step_of(line, default=step + 1) <= step))
    os.replace(half, target)


def last_step(metrics: Path, default: int = 0) -> int:
    """The step of the last whole line of a metrics.jsonl."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            lines = file.read().splitlines()
    except OSError:
        return default
    return next((step for line in reversed(lines) if (step := step_of(line, -1)) >= 0), default)


def step_of(line: bytes, default: int) -> int:
    """The step of a line of a metrics.jsonl; the default where it is no whole line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return default


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that both have and that differ; a key that only one version of the program knows is none."""
    old, new = then["config"], now["config"]
    found = {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}
    if then["after"] != now["after"]:
        found["after"] = (then["after"], now["after"])
    return found


def same_settings(step: Step, then: Any) -> bool:
    """Whether settings noted before are the step's; a training run's as `differences` compares them."""
    now = plain(step.settings)
    return not differences(then, now) if step.name == TRAIN else then == now


def plain(value: Any) -> Any:
    """As it is when it is read back from JSON."""
    return json.loads(json.dumps(value, default=str))


def read_json(file: Path) -> Any:
    """None where there is no such file; UserError where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{file} is damaged: remove it and run again.") from None


def write_json(file: Path, value: Any) -> None:
    """A kill leaves the old file or the new one."""
    half = file.with_suffix(".tmp")
    half.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(half, file)
