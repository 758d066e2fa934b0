"""From what is known of a run on a slice to answers: does it fit, how fast at best, what does it cost."""

import dataclasses
from typing import Any

from dmdr_jax.planning.request import FAKE, GENERATOR, UPDATES, Facts, Program
from dmdr_jax.planning.topology import Chip, Slice

GREEN, AMBER, RED = "green", "amber", "red"
FULL_SIZE = 2**20
"""Elements of a gradient that one would not want summed whole."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device.

    Attributes:
      held: between steps, by holder.
      temp: what the largest program needs besides; None without a compiler.
      total: of both.
      peak: the compiler's estimate of what is in use at one time, with what the program does not touch; None likewise.
      limit: what the chip has.
    """

    held: dict[str, float]
    temp: float | None
    total: float
    peak: float | None
    limit: float

    @property
    def verdict(self) -> str:
        """Green: all of it fits. Amber: it fits only if what is not in use at one time shares its place. Red: not."""
        if self.total <= self.limit:
            return GREEN
        return AMBER if self.peak is not None and self.peak <= self.limit else RED


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one program at the best, by what bounds it."""

    compute: float
    links: float
    memory: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.links, self.memory)

    @property
    def by(self) -> str:
        names = {"compute": self.compute, "links": self.links, "memory": self.memory}
        return max(names, key=lambda name: names[name])


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is said of one run on one slice.

    Attributes:
      verdict: "green", "amber" or "red" (`Memory.verdict`); red too where the compiler refused a program.
      times: of each program, a roofline: no step is faster, and every real one is slower.
      seconds: of a generator update with its fake updates.
      images_per_second: per chip: images whose prompts a generator update has seen, per second.
      chip_hours: of the whole run.
    """

    facts: Facts
    compiled: bool
    images_per_chip: float
    memory: Memory
    verdict: str
    times: dict[str, Time]
    seconds: float
    images_per_second: float
    chip_hours: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for name, time in self.times.items():
            values["times"][name] |= {"bound": time.bound, "by": time.by}
        return values


def judge(facts: Facts, where: Slice, compiled: bool) -> Answer:
    """The answers for one run."""
    memory = memory_of(facts, where.chip)
    refused = [program.error for program in facts.programs.values() if program.error]
    times = {name: time_of(program, facts, where.chip) for name, program in facts.programs.items()}
    fake = times[FAKE].bound if FAKE in times else 0.0
    seconds = times[GENERATOR].bound + facts.fake_updates * fake
    per_chip = facts.batch / facts.chips
    return Answer(
        facts=facts,
        compiled=compiled,
        images_per_chip=per_chip,
        memory=memory,
        verdict=RED if refused else memory.verdict,
        times=times,
        seconds=seconds,
        images_per_second=per_chip / seconds,
        chip_hours=chip_hours(facts, times, where.chip),
        warnings=(*refused, *warnings(facts, where)),
    )


def memory_of(facts: Facts, chip: Chip) -> Memory:
    held = sum(facts.held.values())
    known = [p for p in facts.programs.values() if p.temp is not None]
    if not known:
        return Memory(facts.held, None, held, None, chip.hbm)
    totals = [held + _padding(p, facts) + p.temp for p in known]  # type: ignore[operator]
    # What a program does not read stays where it is beside it.
    peaks = [held - min(p.arguments, held) + p.peak for p in known]  # type: ignore[type-var, operator]
    temp = max(totals) - held
    return Memory(facts.held, temp, max(totals), max(peaks), chip.hbm)


def _padding(program: Program, facts: Facts) -> float:
    """By how much the arguments are larger on the device than their elements are."""
    return max(0.0, (program.arguments or 0.0) - sum(facts.held.values()))


def time_of(program: Program, facts: Facts, chip: Chip) -> Time:
    """The roofline of a program: operations, bytes over one axis of the torus, bytes of products to and from memory."""
    fsdp = facts.mesh[1]
    gathered = program.declared if program.gathered is None else program.gathered
    summed = (program.scattered or 0.0) + 2 * (program.reduced or 0.0) + (program.other or 0.0)
    sent = (gathered + summed) * (1 - 1 / fsdp) if fsdp > 1 else summed
    return Time(program.flops / chip.flops, sent / chip.link, program.traffic / chip.bandwidth)


def chip_hours(facts: Facts, times: dict[str, Time], chip: Chip) -> float:
    """Of all stages, that before the run too: an earlier stage's update is taken to send as much as the last one's."""
    last, fake = times[GENERATOR], times[FAKE].bound if FAKE in times else 0.0
    seconds, left = sum(count * times[name].bound for name, count in facts.before.items()), facts.steps
    for steps, flops, fakes in facts.earlier:
        seconds += steps * (max(flops / chip.flops, last.links) + fakes * fake)
        left -= steps
    return (seconds + left * (last.bound + facts.fake_updates * fake)) * facts.chips / 3600


def warnings(facts: Facts, where: Slice) -> tuple[str, ...]:
    """What one would want to know before renting."""
    found = []
    fsdp = facts.mesh[1]
    if fsdp == where.in_slice > 8:
        found.append(f"fsdp {fsdp} spans the whole slice: gradients are summed whole; take a part of it")
    for name, program in facts.programs.items():
        if name in UPDATES and (program.largest_reduced or 0) >= FULL_SIZE:
            found.append(f"the {name} update sums an array of {program.largest_reduced:,} elements whole")
    return tuple(found)
