"""Answers as text."""

from collections.abc import Sequence

from dmdr_jax.planning.accounting import HOLDERS
from dmdr_jax.planning.judge import Answer
from dmdr_jax.planning.request import GENERATOR, UPDATES

NAMES = {
    "base": "frozen denoiser",
    "trained": "trained (generator, fake score)",
    "optimiser": "optimiser moments",
    "ema": "average of the generator",
    "kept": "kept by the method",
    "vae": "autoencoder",
    "rewards": "rewards, image side",
    "text": "text encoders, rewards' too",
    "batch": "prompts of a batch, unconditional one",
}
COMPILED = "HBM as libtpu's compiler assigns it; times are a roofline: bounds that no real step reaches."
ARITHMETIC = (
    "Not compiled (--nocompile, or libtpu is not installed): this is arithmetic on shapes. What a program itself needs"
    " is not counted, so that green may not fit, and gathers are those that the program asks for. pip install libtpu"
    " compiles it."
)


def summary(answers: Sequence[Answer]) -> str:
    """One line per slice."""
    head = (
        "topology", "chips", "data x fsdp", "base", "img/chip", "verdict", "HBM total", "peak", "limit", "TF/chip",
        "gathered", "reduced", "s/step", "by", "img/s/chip", "chip-hours",
    )  # fmt: skip
    return _columns([head, *(_line(answer) for answer in answers)])


def _line(a: Answer) -> tuple[str, ...]:
    programs = {name: program for name, program in a.facts.programs.items() if name in UPDATES}
    times = {name: 1 if name == GENERATOR else a.facts.fake_updates for name in programs}
    gathered = sum(times[n] * (p.declared if p.gathered is None else p.gathered) for n, p in programs.items())
    reduced = sum(times[n] * ((p.scattered or 0) + (p.reduced or 0)) for n, p in programs.items())
    flops = sum(times[n] * p.flops for n, p in programs.items())
    slowest = max((a.times[name] for name in programs), key=lambda time: time.bound)
    return (
        a.facts.topology,
        str(a.facts.chips),
        f"{a.facts.mesh[0]} x {a.facts.mesh[1]}",
        "split" if a.facts.split_base else "whole",
        f"{a.images_per_chip:g}",
        a.verdict.upper() if a.verdict != "green" else "green",
        _gb(a.memory.total),
        "-" if a.memory.peak is None else _gb(a.memory.peak),
        _gb(a.memory.limit),
        f"{flops / 1e12:.1f}",
        _gb(gathered),
        _gb(reduced) if a.compiled else "-",
        f"{a.seconds:.3f}",
        slowest.by,
        f"{a.images_per_second:.2f}",
        f"{a.chip_hours:,.1f}",
    )


def details(answer: Answer) -> str:
    """The memory and the programs of one slice."""
    memory = answer.memory
    rows = [(NAMES[name], _gb(memory.held[name])) for name in HOLDERS if memory.held[name]]
    if memory.temp is not None:
        rows.append(("the largest program itself", _gb(memory.temp)))
    lines = [f"{answer.facts.topology}: HBM of one chip", _indent(_columns(rows))]
    titles = ("program", "TF", "gathered", "scattered", "all-reduced", "other", "compute s", "links s", "memory s")
    programs: list[tuple[str, ...]] = [titles]
    for name, p in answer.facts.programs.items():
        time = answer.times[name]
        sent = (p.declared if p.gathered is None else p.gathered, p.scattered, p.reduced, p.other)
        shown = ["-" if size is None else _gb(size) for size in sent]
        seconds = [f"{s:.3f}" for s in (time.compute, time.links, time.memory)]
        programs.append((name, f"{p.flops / 1e12:.2f}", *shown, *seconds))
    lines.append(_indent(_columns(programs)))
    lines += [f"  note: {text}" for text in answer.warnings]
    return "\n".join(lines)


def report(answers: Sequence[Answer]) -> str:
    """All of it."""
    foot = COMPILED if all(answer.compiled for answer in answers) else ARITHMETIC
    updates = answers[0].facts.fake_updates
    step = f"A step is one generator update with {updates} fake update{'s' if updates != 1 else ''}."
    return "\n\n".join([summary(answers), *(details(answer) for answer in answers), f"{step} {foot}"])


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
