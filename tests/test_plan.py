"""`python -m dmdr_jax.plan`: its answers by arithmetic, and those of libtpu's compiler where it is installed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dmdr_jax import cli, methods
from dmdr_jax.accelerators import has_libtpu
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.errors import UserError
from dmdr_jax.planning import command, judge, runner, sweep, table, topology
from dmdr_jax.planning.request import DRAWING, FAKE, GENERATOR, PAIRS, PROGRAMS, REGRESSION, Facts, Program, Request
from dmdr_jax.planning.work import count
from dmdr_jax.training.abstract import AbstractRun

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")

SD3_FULL = ("generator.kind=full", "height=512", "width=512")
SD3_SIZE = 2_028_328_000  # trained parameters of SD3-Medium's transformer
GB = 1e9


def plan(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "dmdr_jax.plan", *arguments]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_help_is_quick():
    start = time.perf_counter()
    result = plan("--help")
    assert result.returncode == 0 and "--topology" in result.stdout
    assert time.perf_counter() - start < 5  # without jax; the machine may be busy


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config"),
        (["--config=configs/sd3_medium.py"], "nothing to plan for"),
        (["--config=configs/sd3_medium.py", "--topology=v9:2x2"], "no chip 'v9'"),
        (["--config=configs/sd3_medium.py", "--topology=v5e-8", "--images_per_chip=none"], "whole numbers"),
        (["--config=configs/sd3_medium.py", "--topology=v5e-8", "--config.bach=8"], "did you mean 'batch'"),
        (["--config=configs/sd3_medium.py", "--sweep", "--topology=v5e:2x4"], "kinds of chip"),
        (["--config=configs/sd3_medium.py", "--sweep", "--prices=v5e=much"], "KIND=PRICE"),
    ],
)
def test_bad_requests_are_one_sentence(arguments, message):
    result = plan(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# --- judging -------------------------------------------------------------------------------------------------------


def facts(gathered=10e9, temp=2e9, peak=9e9, error=None, held=8e9, **changes):
    programs = {
        name: Program(name, 100e12, 50e9, gathered, gathered, 4e9, 1e9, 0.0, 1000, held, temp, peak, 1.0, error)
        for name in (FAKE, GENERATOR)
    }
    known = dict.fromkeys(("base", "trained", "optimiser", "ema", "kept", "vae", "rewards", "text", "batch"), 0.0)
    values = dict(
        topology="v5e:4x4",
        chips=16,
        mesh=(2, 8),
        split_base=True,
        batch=32,
        held=known | {"base": held},
        programs=programs,
        fake_updates=5,
        steps=100,
        earlier=(),
    )
    return Facts(**values | changes)


def judged(**changes):
    return judge.judge(facts(**changes), topology.parse("v5e:4x4"), True)


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, judge.GREEN),
        ({"temp": 12e9, "peak": 15e9}, judge.AMBER),
        ({"temp": 12e9, "peak": 18e9}, judge.RED),
        ({"held": 20e9, "peak": 21e9}, judge.RED),
        ({"error": "RESOURCE_EXHAUSTED"}, judge.RED),
    ],
)
def test_verdicts(changes, verdict):
    assert judged(**changes).verdict == verdict


def test_the_roofline():
    answer = judged()
    time_ = answer.times[GENERATOR]
    assert time_.compute == pytest.approx(100 / 197)
    assert time_.links == pytest.approx((10 + 4 + 2 * 1) * 7 / 8 / 90)
    assert time_.by == "compute" and time_.bound == time_.compute
    assert answer.seconds == pytest.approx(6 * 100 / 197)
    assert answer.images_per_second == pytest.approx(2 / answer.seconds)
    assert answer.chip_hours == pytest.approx(100 * answer.seconds * 16 / 3600)
    staged = judged(earlier=((40, 20e12, 1),))  # its gathers take longer than its operations
    hours = (60 * answer.seconds + 40 * (time_.links + 100 / 197)) * 16 / 3600
    assert time_.links > 20 / 197 and staged.chip_hours == pytest.approx(hours)


def test_what_one_would_want_to_know():
    notes = judged(mesh=(1, 16)).warnings
    assert "spans the whole slice" in notes[0]
    program = dataclasses.replace(facts().programs[FAKE], largest_reduced=2**24)
    assert "16,777,216 elements whole" in judged(programs={FAKE: program, GENERATOR: program}).warnings[0]


def test_the_table_has_what_holds_memory():
    text = table.report([judged()])
    assert "frozen denoiser" in text and "v5e:4x4" in text and "chip-hours" in text and "roofline" in text
    assert "arithmetic" in table.report([dataclasses.replace(judged(), compiled=False)])


def test_a_sweep_takes_the_cheapest_that_fits():
    """The more chips, the less of each; a slice of four has too little."""
    tried = []

    def ask(request):
        where = topology.parse(request.topology)
        tried.append((str(where), request.images_per_chip, request.compiled))
        found = facts(held=100e9 / where.chips, topology=str(where), chips=where.chips)
        temp = 4e9 * request.images_per_chip
        programs = {n: dataclasses.replace(p, temp=temp, peak=30e9) for n, p in found.programs.items()}
        if not request.compiled:
            programs = {n: dataclasses.replace(p, temp=None) for n, p in programs.items()}
        batch = where.chips * request.images_per_chip
        known = dataclasses.replace(found, programs=programs, batch=batch)
        return judge.judge(known, where, request.compiled)

    request = Request("x.py", (), "", 0, True)
    answers = sweep.sweep(request, ["v5e"], [1, 2], ask, True, {})
    assert answers[0].verdict == judge.GREEN and answers[0].facts.topology == "v5e:2x4"
    assert answers[0].images_per_chip == 1
    assert [t for t in tried if t[2]] == [("v5e:2x4", 2, True), ("v5e:2x4", 1, True)]
    tried.clear()  # of many counts the most, then the fewest, then those between
    answers = sweep.sweep(request, ["v5e"], [1, 2, 3, 4, 8], ask, True, {})
    assert [t for t in tried if t[2]] == [("v5e:2x4", n, True) for n in (8, 1, 4, 3, 2)]
    assert answers[0].verdict == judge.GREEN and answers[0].images_per_chip == 1
    with pytest.raises(UserError, match="fits no slice"):
        none = lambda request: judged(held=1e12, peak=1e12)
        sweep.sweep(request, ["v5e"], [1], none, True, {})


# --- arithmetic ----------------------------------------------------------------------------------------------------


def hand_count(name):
    """Operations for one image of 512 px, as docs/tpu.md derives them."""
    d, layers, tokens = 1536, 24, 32**2 + 77 + 256
    linear, attention = layers * 24 * d**2 * tokens, layers * 4 * tokens**2 * d
    passes = {GENERATOR: (3 + 1 + 1 + 2 + 3, 3 + 1 + 1 + 2 + 3), FAKE: (4 + 1 + 2 / 3 + 1, 4 + 1 + 1 + 2)}[name]
    return passes[0] * linear + passes[1] * attention


def test_without_libtpu(tmp_path, capsys):
    """Base, moments and gathers of SD3-Medium against counts by hand."""
    file = tmp_path / "plan.json"
    command.run("configs/sd3_medium.py", SD3_FULL, ["v5litepod-8"], ["1"], str(file), False, (), False)
    assert "libtpu is not installed" in capsys.readouterr().out
    (answer,) = json.loads(file.read_text())
    facts, held = answer["facts"], answer["facts"]["held"]
    assert (facts["mesh"], facts["split_base"], facts["batch"]) == ([1, 8], True, 8)
    # Split, but for what is small and for the position table, and the fake score's LoRA beside it.
    assert held["ema"] == pytest.approx(4 * SD3_SIZE / 8, rel=0.01)
    assert held["base"] == pytest.approx(2 * SD3_SIZE / 8 + 2 * 192**2 * 1536, rel=0.02)
    assert held["optimiser"] == pytest.approx(2 * held["trained"], rel=1e-3)
    # Generator: three steps of the rollout, the student's call forward and back, one scoring pass of the base.
    # Fake score: four calls of the student, its own forward and back.
    for name, passes in ((GENERATOR, 3 + 2 + 1), (FAKE, 4 + 2)):
        program = facts["programs"][name]
        assert program["declared"] == pytest.approx(passes * 2 * SD3_SIZE, rel=0.03), name
        assert program["gathered"] is None
        assert program["flops"] == pytest.approx(hand_count(name), rel=0.02), name
    # Drawing: 16 images over 8 chips in four steps, which gather the student, and the text encoders once.
    drawing, forward = facts["programs"][DRAWING], hand_count(GENERATOR) / 10
    assert drawing["declared"] == pytest.approx(4 * 2 * SD3_SIZE + 8 * held["text"], rel=0.03)
    assert 1.0 < drawing["flops"] / (2 * 4 * forward) < 1.6
    assert answer["verdict"] == "green" and answer["memory"]["temp"] is None


def test_the_stage_before_the_run_is_counted(tmp_path):
    """Pairs of a teacher with guidance, a regression on them: work by hand, time in the cost of the run."""
    file = tmp_path / "plan.json"
    steps, pairs, rows, teacher = 10, 100, 16, 3
    before = (f"ode.steps={steps}", f"ode.pairs={pairs}", f"ode.batch={rows}", f"ode.teacher_steps={teacher}")
    stages = ("method=dmd", "generator.kind=full", "preview.images=0", "watch.every=0", "remat=none")
    for given in ((), before):
        command.run("configs/shapes/sd3.py", (*stages, *given), ["v5e:2x4"], ["1"], str(file), False, (), False)
        (answer,) = json.loads(file.read_text())
        if not given:
            without = answer
    facts, times = answer["facts"], answer["times"]
    assert without["facts"]["before"] == {} and set(without["facts"]["programs"]) == {FAKE, GENERATOR}
    assert facts["before"] == {PAIRS: 7, REGRESSION: steps}
    programs = facts["programs"]
    assert programs[PAIRS]["flops"] * 8 == pytest.approx(2 * teacher * forward(rows, stages), rel=0.02)
    assert programs[REGRESSION]["flops"] * 8 == pytest.approx(3 * forward(rows, stages), rel=0.05)
    extra = 7 * times[PAIRS]["bound"] + steps * times[REGRESSION]["bound"]
    assert answer["chip_hours"] - without["chip_hours"] == pytest.approx(extra * 8 / 3600)


def forward(rows, overrides):
    """Operations of one forward pass of the embedded world's denoiser."""
    run = AbstractRun.of(methods.resolve(cli.load_config("configs/shapes/sd3.py", (*overrides, f"batch={rows}"))))
    latents = jax.ShapeDtypeStruct((rows, *run.plan.latent_shape), jnp.float32)
    times = jax.ShapeDtypeStruct((rows,), jnp.float32)
    output = lambda base, z, t, cond: run.plan.denoiser.output(Weights(base), z, t, cond)
    return count(jax.make_jaxpr(output)(run.frozen.base, latents, times, run.batch.cond))


def test_pairs_that_do_not_divide_over_the_slice_are_refused():
    result = plan("--config=configs/shapes/sd3.py", "--topology=v5e:2x4", "--images_per_chip=1", "--nocompile",
                  "--config.ode.steps=5", "--config.ode.batch=12")  # fmt: skip
    assert result.returncode == 2 and "config.ode.batch" in result.stderr


# --- compiled ------------------------------------------------------------------------------------------------------


@needs_libtpu
def test_sd3_medium_full_compiles_for_eight_chips():
    """The row of docs/tpu.md at a quarter of its pixels; gathers as by hand, no gradient summed whole."""
    answer = runner.answer(Request("configs/sd3_medium.py", SD3_FULL, "v5e:2x4", 1))
    assert answer.verdict == judge.GREEN
    for name, passes in ((GENERATOR, 6), (FAKE, 6)):
        program = answer.facts.programs[name]
        assert program.gathered == pytest.approx(passes * 2 * SD3_SIZE, rel=0.05), name
        assert program.largest_reduced < judge.FULL_SIZE
    assert answer.facts.programs[GENERATOR].scattered == pytest.approx(2 * SD3_SIZE, rel=0.05)


@needs_libtpu
def test_sd3_medium_lora_fits_one_chip():
    """A LoRA at 512 px with two rewards on one v5e chip, without T5."""
    overrides = ("t5=false", "rewards.clip.weight=0.3", "rewards.hps.weight=0.3", "reward_microbatch=1")
    answer = runner.answer(Request("configs/sd3_medium.py", overrides, "v5e-1", 1))
    assert answer.verdict == judge.GREEN and answer.facts.mesh == (1, 1)


@needs_libtpu
def test_a_small_run_compiles_for_eight_chips(monkeypatch):
    """The embedded world's student, trained whole on a slice, with its parameters split."""
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")  # else what is as small as this is kept for the next pass
    overrides = ("generator.kind=full", "mesh.fsdp=8", "mesh.base=split", "remat=full", "ode.steps=9", "method=dmd")
    overrides += ("ode.batch=8", "ode.teacher_steps=2")
    answer = runner.answer(Request("configs/shapes/sd3.py", overrides, "v5e:2x4", 1))
    assert answer.verdict == judge.GREEN and answer.compiled
    assert tuple(answer.facts.programs) == PROGRAMS
    for name, program in answer.facts.programs.items():
        assert program.gathered == pytest.approx(program.declared, rel=0.05), name
        # Of what is small enough to be whole on every device, the sums are whole: of a stack, in one array.
        assert program.largest_reduced < 2**17
        assert program.peak > 0 and program.temp > 0
    held = sum(answer.facts.held.values())
    assert answer.facts.programs[GENERATOR].arguments <= held
    assert answer.memory.total >= held


@needs_libtpu
def test_gradients_are_summed_in_parts_whatever_their_shape():
    """Kernels of SDXL whose parts are not whole tiles, or that are 1 x 1, and LoRA factors."""
    shapes = ["3,3,960,640", "3,3,320,640", "1,1,2560,1280", "3,3,1920,64", "1536,64", "64,1536"]
    line = [sys.executable, "-m", "tests.models.placement_program", *shapes]
    result = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert max(json.loads(result.stdout)) <= 1  # the loss
