"""What is asked of the planner and what it finds: plain values, which travel between processes as JSON."""

import dataclasses
import json
from typing import Any

FAKE, GENERATOR, DRAWING, PAIRS, REGRESSION = "fake", "generator", "drawing", "pairs", "regression"
UPDATES = (FAKE, GENERATOR)
PROGRAMS = (*UPDATES, DRAWING, PAIRS, REGRESSION)
"""Grids are drawn where there are any; pairs, and a regression on them, are of the stage before a run (`ode`)."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One run on one slice.

    Attributes:
      config: a configuration file, with its argument.
      overrides: "KEY=VALUE" each.
      topology: see `dmdr_jax.planning.topology.parse`.
      images_per_chip: 0: as config.batch says.
      compiled: ask libtpu; else arithmetic alone.
    """

    config: str
    overrides: tuple[str, ...]
    topology: str
    images_per_chip: int = 0
    compiled: bool = True

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Request":
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; bytes and operations are those of one device and one run of it.

    Attributes:
      flops, traffic: see `dmdr_jax.planning.work`.
      declared: bytes gathered, by the program as it is written; the next four are those of the compiled one.
      gathered, scattered, reduced, other: bytes, by kind of collective (`dmdr_jax.planning.hlo`).
      largest_reduced: elements of the largest array that devices along `fsdp` sum whole.
      arguments, temp, peak: bytes, by the compiler; temp has what the program itself needs.
      seconds: the compilation's.
      error: what the compiler said, where it refused.
    """

    name: str
    flops: float
    traffic: float
    declared: float
    gathered: float | None = None
    scattered: float | None = None
    reduced: float | None = None
    other: float | None = None
    largest_reduced: int | None = None
    arguments: float | None = None
    temp: float | None = None
    peak: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a run on a slice before any judgement.

    Attributes:
      mesh: sizes of data and fsdp.
      split_base: the frozen denoiser is split over fsdp.
      held: bytes on a device between steps, by holder.
      fake_updates: per generator update, in the last stage.
      steps: generator updates.
      earlier: of each stage before the last, its generator updates, the operations of one on a device, and the fake
        updates with it.
      before: how often each program of the stage before the run is run.
    """

    topology: str
    chips: int
    mesh: tuple[int, int]
    split_base: bool
    batch: int
    held: dict[str, float]
    programs: dict[str, Program]
    fake_updates: int
    steps: int
    earlier: tuple[tuple[int, float, int], ...]
    before: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Facts":
        programs = {name: Program(**program) for name, program in values["programs"].items()}
        earlier = tuple((int(n), float(f), int(u)) for n, f, u in values["earlier"])
        return cls(**{**values, "programs": programs, "earlier": earlier, "mesh": tuple(values["mesh"])})
