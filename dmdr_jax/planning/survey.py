"""A run on a slice that is not here: its own programs, traced and compiled for it.

    python -m dmdr_jax.planning.survey PROGRAM < request.json > facts.json

is what the planner runs, in a process of its own for each program, as libtpu may end the process that it fails in.
"""

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from typing import Any, NamedTuple

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.planning import topology
from dmdr_jax.planning.request import DRAWING, FAKE, GENERATOR, PAIRS, REGRESSION, UPDATES, Facts, Program, Request

REFUSED = "RESOURCE_EXHAUSTED"


def survey(request: Request, names: tuple[str, ...]) -> Facts:
    """What the run needs on the slice, with those of its programs that are named.

    Raises:
      UserError: the configuration or the topology is refused.
    """
    from dmdr_jax.planning.accounting import held
    from dmdr_jax.planning.work import measure
    from dmdr_jax.training import setup
    from dmdr_jax.training.abstract import AbstractRun

    where = topology.parse(request.topology)
    config = load(request, where)
    plain = AbstractRun.of(config)
    layout = place(config, where, plain, request.compiled)
    run = plain.attending(config, layout.mesh) if request.compiled else plain
    setup.check_batches(config, layout)
    del plain
    placed, stages, before = run.placed(layout), stages_of(config, run), before_it(config)
    programs = {}
    for name in names:
        if name in UPDATES:
            traced, inputs = trace(name, placed, layout, stages[-1].terms), (placed.state, placed.frozen, placed.batch)
        elif name == DRAWING and (images := drawn(config)):
            traced, inputs = placed.trace_drawing(layout, images)
        elif name in before:
            traced, inputs = trace_before(name, config, placed, layout)
        else:
            continue
        known = examine(name, traced, are_split(inputs), where.chips)
        programs[name] = compile_program(traced, known, layout.mesh.shape["fsdp"]) if request.compiled else known
    earlier = []
    for stage in stages[:-1] if FAKE in names else ():  # where the smaller of the two programs is
        work = measure(trace(GENERATOR, placed, layout, stage.terms).jaxpr)
        earlier.append((stage.steps, work.flops / where.chips, stage.fake_updates))
    sizes = layout.mesh.shape
    return Facts(
        topology=str(where),
        chips=where.chips,
        mesh=(sizes["data"], sizes["fsdp"]),
        split_base=layout.split_base and sizes["fsdp"] > 1,
        batch=config.batch,
        held=held(placed, layout),
        programs=programs,
        fake_updates=stages[-1].fake_updates,
        steps=config.steps,
        earlier=tuple(earlier),
        before=before,
    )


def load(request: Request, where: topology.Slice) -> Any:
    """The configuration as the training program would have it on the slice."""
    from dmdr_jax import methods

    own = (f"batch={request.images_per_chip * where.chips}",) if request.images_per_chip else ()
    return methods.resolve(cli.load_config(request.config, (*request.overrides, *own)))


def place(config: Any, where: topology.Slice, run: Any, compiled: bool) -> Any:
    """The layout that training would choose there; without libtpu on a mesh that has sizes and no devices."""
    from jax.sharding import AbstractMesh, AxisType

    from dmdr_jax.training import mesh_choice, sharding
    from dmdr_jax.training.layout import Layout

    limit = float(where.chip.hbm)
    if compiled:
        return mesh_choice.make_layout(config.mesh, run.residents, topology.describe_devices(where), limit)
    places = list(itertools.product(*map(range, where.shape)))
    devices = [_Stand(i, place) for i in range(where.count) for place in places]
    data, fsdp, split = mesh_choice.sizes(config.mesh, run.residents, devices, limit)
    sizes = sharding.full_sizes(data, fsdp, 1, len(devices))
    mesh: Any = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    return Layout(mesh, split)


@dataclasses.dataclass(frozen=True)
class _Stand:
    """In place of a device that nobody describes."""

    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"


class Stage(NamedTuple):
    """Generator updates by the same terms: how many, by which, and how many fake updates each has."""

    steps: int
    terms: Any
    fake_updates: int


def stages_of(config: Any, run: Any) -> list[Stage]:
    """The stages of a run, in their order."""
    from dmdr_jax.objectives.base import active_terms, separate_fake_updates

    lengths: dict[Any, int] = {}
    for step in range(config.steps):
        terms = active_terms(run.terms, step)
        lengths[terms] = lengths.get(terms, 0) + 1
    return [Stage(n, terms, separate_fake_updates(terms, config.fake.updates)) for terms, n in lengths.items()]


def trace(name: str, run: Any, layout: Any, terms: Any) -> Any:
    """One update of a placed run, traced."""
    from dmdr_jax.training import programs

    if name == FAKE:
        jitted = programs.fake_program(run.plan, layout, run.state)
    else:
        jitted = programs.generator_program(run.plan, terms, layout, run.state)
    return jitted.trace(run.state, run.frozen, run.batch)


def before_it(config: Any) -> dict[str, int]:
    """How often each program runs in the stage before the run, if there is one."""
    if not config.ode.steps:
        return {}
    return {PAIRS: math.ceil(config.ode.pairs / config.ode.batch), REGRESSION: config.ode.steps}


def trace_before(name: str, config: Any, run: Any, layout: Any) -> tuple[Any, Any]:
    """A program of the stage before a placed run, traced, and its inputs."""
    from dmdr_jax.training import ode
    from dmdr_jax.training.abstract import AbstractOde

    first = AbstractOde.of(config, run).placed(layout)
    if name == PAIRS:
        return ode.pairs_program(first.stage, layout).trace(*first.pairs), first.pairs
    return ode.regression_program(first.stage, layout, first.state).trace(*first.regression), first.regression


def drawn(config: Any) -> int:
    """How many images a run draws at once: a grid, or the watch's canaries."""
    return max(config.preview.images, config.watch.count if config.watch.every else 0)


def are_split(inputs: Any) -> list[bool]:
    """Of each array that a program is given, whether its parts lie on several devices."""
    import jax

    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(inputs)]
    return [place is not None and not place.is_fully_replicated for place in places]


def examine(name: str, traced: Any, split: list[bool], chips: int) -> Program:
    """What a traced program does."""
    from dmdr_jax.planning.work import measure

    work = measure(traced.jaxpr, split)
    return Program(name, work.flops / chips, work.traffic / chips, work.gathered)


def compile_program(traced: Any, known: Program, fsdp: int) -> Program:
    """And what the compiler makes of it."""
    from dmdr_jax.planning import compiler, hlo

    start = time.perf_counter()
    try:
        compiled = compiler.ask(traced)
    except RuntimeError as error:  # of XLA, as one kind with a message
        if REFUSED not in str(error):
            raise
        return dataclasses.replace(known, error=first_sentence(str(error)), seconds=time.perf_counter() - start)
    found = hlo.collectives(compiled.text)
    return dataclasses.replace(
        known,
        gathered=hlo.total(found, hlo.GATHER),
        scattered=hlo.total(found, hlo.SCATTER),
        reduced=hlo.total(found, hlo.REDUCE),
        other=hlo.total(found, hlo.OTHER),
        largest_reduced=hlo.largest_whole(found, fsdp),
        arguments=compiled.arguments,
        temp=compiled.temp,
        peak=compiled.peak,
        seconds=time.perf_counter() - start,
    )


def first_sentence(text: str) -> str:
    line = text.strip().splitlines()[0]
    return line if len(line) < 300 else f"{line[:300]}..."


def main() -> None:
    request = Request.from_json(sys.stdin.read())
    try:
        answer: dict[str, Any] = {"facts": dataclasses.asdict(survey(request, tuple(sys.argv[1:])))}
    except UserError as error:
        answer = {"refused": str(error)}
    answer = json.loads(json.dumps(answer, default=float))
    assert all(math.isfinite(x) for x in answer.get("facts", {}).get("held", {}).values())
    print(json.dumps(answer), flush=True)
    os._exit(0)  # the compiler may still be writing machine code


if __name__ == "__main__":
    main()
