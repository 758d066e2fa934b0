"""What an experiment is: rows that are trained or only drawn with, how they are judged, and what is shown of them.

An experiment file defines ``get_experiment() -> Experiment`` (or ``get_experiment(ARG)``, asked for as FILE.py:ARG).
`python -m dmdr_jax.sweep` runs it, `python -m dmdr_jax.experiments.results` writes its part of docs/results.md.
"""

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_jax import cli
from dmdr_jax.errors import UserError

TEACHER = "teacher"
"""What every evaluation calls the model that the others are compared with."""
_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")

COLUMNS = (
    "strict",
    "judge/shapes_judge",
    "lenient",
    "reward/shapes_clip",
    "reward/shapes_hps",
    "background_entropy",
    "color_entropy",
    "frechet/renders",
    "frechet/teacher",
)
"""Measures of a table: what was never trained on first, then the trained rewards, then diversity and distances."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of an experiment's table; exactly one of the three kinds:

    * trained: ``config``, and with ``after`` it goes on from a copy of another row's run under its own overrides;
    * drawn with as it is: ``model`` (the teacher), or ``after="ROW@STEP"`` without ``config``: a checkpoint of ROW;
    * borrowed: ``of`` names the experiment that has a row of this label; it is shown here and never run here.

    Attributes:
      label: a plain word: the row's folder, its records, and what others call it.
      title: how tables name it; the label by default.
      overrides: dotted keys of the configuration and their values.
      after: ``ROW`` (its last checkpoint) or ``ROW@STEP``.
      draw: ``steps``, ``kernel``, ``guidance``, where they are not the model's own.
      at: where the row stands on the axis of a sweep over one number.
    """

    label: str
    title: str = ""
    config: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: str = ""
    model: str = ""
    draw: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str = ""
    at: float | None = None

    @property
    def name(self) -> str:
        return self.title or self.label

    @property
    def parent(self) -> str:
        """Label of the row this one goes on from, or empty."""
        return self.after.partition("@")[0]

    @property
    def parent_step(self) -> int | None:
        """Generator step of the checkpoint it begins with; None: the last one."""
        step = self.after.partition("@")[2]
        return int(step) if step else None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How every row is judged: ``per_tag`` prompts of each of the world's six tasks, ``per_prompt`` images of each."""

    world: str = "small"
    per_tag: int = 80
    per_prompt: int = 1
    seed: int = 1  # of prompts and noise; 0 is what settings were looked at with
    batch: int = 48

    def arguments(self) -> list[str]:
        """For `python -m dmdr_jax.evaluate`."""
        return [f"--{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Along:
    """A smaller evaluation of every trained row's checkpoints, ``every`` so many generator steps."""

    every: int
    per_tag: int = 16


@dataclasses.dataclass(frozen=True)
class Bars:
    """Every row's measures as bars over training seeds."""

    measures: tuple[str, ...]
    rows: tuple[str, ...] = ()  # labels; empty: all


@dataclasses.dataclass(frozen=True)
class Curves:
    """Measures along training: over generator steps, or over ``x="flops"`` spent."""

    measures: tuple[str, ...]
    rows: tuple[str, ...] = ()
    x: str = "step"


@dataclasses.dataclass(frozen=True)
class Logged:
    """A metric as training logged it, over generator steps: a panel for each group of rows."""

    metric: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(label for group in self.groups for label in group)


@dataclasses.dataclass(frozen=True)
class Pareto:
    """A measure against what it cost: ``x`` is ``flops`` or ``cpu`` (of training) or ``nfe`` (of drawing)."""

    measure: str
    x: str = "flops"
    rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Measures over the rows' ``at``, named ``axis``."""

    measures: tuple[str, ...]
    axis: str
    rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """How a model of the embedded world came to be: its loss and its verdicts by task, from its ``training.jsonl``."""

    model: str
    rows: tuple[str, ...] = ()


Figure = Bars | Curves | Logged | Pareto | Pretraining | Sweep


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Rows, seeds, judgement and presentation.

    Attributes:
      name: a plain word; the folder of its records.
      teacher: what all rows are compared with, ``PATH[,steps=N,guidance=G]`` as `dmdr_jax.evaluate` reads it.
      seeds: training seeds of every trained row.
      pairs: (row, other): differences that are tested image by image.
      columns: measures of the table, by key.
      tasks: whether the strict verdict is shown task by task as well.
    """

    name: str
    rows: tuple[Row, ...]
    teacher: str
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluation: Evaluation = Evaluation()
    along: Along | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = COLUMNS
    tasks: bool = False
    figures: tuple[Figure, ...] = ()
    spec: str = ""  # FILE.py[:ARG], filled in by `load`

    def row(self, label: str) -> Row:
        """The row of this label; UserError where there is none."""
        for row in self.rows:
            if row.label == label:
                return row
        raise UserError(f"experiment {self.name} has no row {label!r}; its rows are: {', '.join(self.labels)}.")

    @property
    def labels(self) -> list[str]:
        return [row.label for row in self.rows]

    def ancestors(self, row: Row) -> list[Row]:
        """The rows this one goes on from, nearest first."""
        found: list[Row] = []
        while row.parent:
            row = self.row(row.parent)
            if row in found:
                raise UserError(f"experiment {self.name}: {row.label} comes after itself.")
            found.append(row)
        return found

    def seeds_of(self, row: Row) -> tuple[int | None, ...]:
        """Training seeds of a row; (None,) where nothing is trained."""
        trained = row.config or any(ancestor.config for ancestor in self.ancestors(row))
        return self.seeds if trained else (None,)

    def config(self, row: Row, seed: int | None = None) -> Any:
        """The locked configuration of a trained row; UserError where an override does not fit."""
        return _config(row.config, tuple(self.overrides(row, seed)))

    def overrides(self, row: Row, seed: int | None = None) -> list[str]:
        """``KEY=VALUE`` of everything the row changes, the seed and the checkpoints it must keep included."""
        settings = dict(row.overrides)
        if self.along is not None:
            settings.setdefault("checkpoint.every", self.along.every)
            settings.setdefault("checkpoint.keep", KEEP_ALL)
        if seed is not None:
            settings["seed"] = seed
        return [f"{key}={value}" for key, value in settings.items()]


@functools.lru_cache(maxsize=256)
def _config(file: str, overrides: tuple[str, ...]) -> Any:
    return cli.load_config(file, overrides)


KEEP_ALL = 1000
"""Checkpoints, where all are evaluated."""


def load(spec: str) -> Experiment:
    """The experiment of ``FILE.py`` or ``FILE.py:ARG``, checked.

    Raises:
      UserError: the file cannot be loaded, or what it says cannot be run.
    """
    file, _, argument = spec.partition(":")
    path = _find(file)
    module_spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        make = module.get_experiment
        experiment = make(argument) if argument else make()
    except UserError:
        raise
    except Exception as error:  # whatever the file itself raises
        raise UserError(f"cannot load experiment {spec}: {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"cannot load experiment {spec}: get_experiment() gave no Experiment.")
    experiment = dataclasses.replace(experiment, spec=spec)
    check(experiment)
    return experiment


def _find(file: str) -> Path:
    for path in (Path(file), Path(__file__).parents[2] / file):
        if path.is_file() and path.suffix == ".py":
            return path
    raise UserError(f"experiment file {file} does not exist or is no .py file; check the path.")


def check(experiment: Experiment) -> None:
    """Refuses what could not be run or shown, before anything is started."""
    for label in (experiment.name, *experiment.labels):
        if not _LABEL.fullmatch(label):
            raise UserError(f"experiment {experiment.name}: {label!r} must be a plain word, without spaces or slashes.")
    repeated = sorted({label for label in experiment.labels if experiment.labels.count(label) > 1})
    if repeated:
        raise UserError(f"experiment {experiment.name} has two rows {repeated[0]!r}: give each its own label.")
    for row in experiment.rows:
        _check_row(experiment, row)
    for labels in (*experiment.pairs, *(figure.rows for figure in experiment.figures)):
        for label in labels:
            experiment.row(label)


def _check_row(experiment: Experiment, row: Row) -> None:
    where = f"experiment {experiment.name}, row {row.label}"
    kinds = [bool(row.config), bool(row.model), bool(row.of), bool(row.after and not row.config)]
    if sum(kinds) != 1:
        raise UserError(f"{where}: it needs exactly one of config, model, of, or after alone.")
    if row.after and not re.fullmatch(r"[^@]+(@\d+)?", row.after):
        raise UserError(f"{where}: after={row.after!r} is not ROW or ROW@STEP.")
    unknown = sorted(set(row.draw) - {"steps", "kernel", "guidance"})
    if unknown:
        raise UserError(f"{where}: draw has {unknown[0]!r}, and knows steps, kernel and guidance.")
    if row.label == TEACHER and not row.of and arguments_of(row.model, row.draw) != experiment.teacher:
        raise UserError(f"{where}: this label is for the experiment's teacher, {experiment.teacher}.")
    if row.config:
        experiment.config(row, experiment.seeds[0])
    if row.after:
        _check_parent(experiment, row, where)


def _check_parent(experiment: Experiment, row: Row, where: str) -> None:
    """The checkpoint it begins with must be one that the other row makes and keeps."""
    parent = experiment.row(row.parent)
    experiment.ancestors(row)
    if not parent.config:
        raise UserError(f"{where}: it goes on from {parent.label}, which trains nothing.")
    config = experiment.config(parent, experiment.seeds[0])
    step = config.steps if row.parent_step is None else row.parent_step
    if step not in kept_steps(config.steps, config.checkpoint.every, config.checkpoint.keep):
        raise UserError(
            f"{where}: {parent.label} keeps no checkpoint of step {step}; set its checkpoint.every and checkpoint.keep."
        )
    if row.config and experiment.config(row, experiment.seeds[0]).steps <= step:
        raise UserError(f"{where}: its steps count from the very beginning and must be more than {step}.")


def kept_steps(steps: int, every: int, keep: int) -> list[int]:
    """The generator steps whose checkpoints are there when a run of ``steps`` has ended."""
    saved = sorted({*range(every, steps + 1, every), steps})
    return saved[-keep:]


def arguments_of(model: str, draw: Mapping[str, Any]) -> str:
    """A model and how to draw with it, as `dmdr_jax.evaluate` reads it after ``NAME=``."""
    return ",".join([model, *(f"{key}={value}" for key, value in draw.items())])


def relative(path: str | os.PathLike) -> str:
    """A path below the working directory without that directory, for commands that others may type."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def chosen(experiment: Experiment, rows: Sequence[str], seeds: Sequence[int]) -> list[tuple[Row, int | None]]:
    """What to run: every (row, seed), or those asked for with all that they go on from; borrowed rows never.

    Order: rows that others go on from come before them, and one seed of everything before the next seed.
    """
    wanted = [experiment.row(label) for label in rows] or list(experiment.rows)
    closure = [row for row in experiment.rows if any(row is w or row in experiment.ancestors(w) for w in wanted)]
    runnable = [row for row in closure if not row.of]
    runnable.sort(key=lambda row: len(experiment.ancestors(row)))
    numbers = tuple(seeds) or experiment.seeds
    pairs: list[tuple[Row, int | None]] = [(row, None) for row in runnable if experiment.seeds_of(row) == (None,)]
    trained = [row for row in runnable if experiment.seeds_of(row) != (None,)]
    return pairs + [(row, seed) for seed in numbers for row in trained]
