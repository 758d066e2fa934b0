"""Experiments: what they may say, and how a sweep runs them past kills and failures."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from configs.shapes.experiments import methods as presets
from dmdr_jax import cli, methods, sweep
from dmdr_jax.errors import UserError
from dmdr_jax.experiments import jobs, records, runner
from dmdr_jax.experiments.cost import stage_cost
from dmdr_jax.experiments.display import Display, seconds_left
from dmdr_jax.experiments.spec import Along, Bars, Experiment, Row, check, chosen, load

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs/shapes/experiments").glob("[!_]*.py"))
CHOICES = {
    "main": ["sdxl", "sdxl_1step"],
    "long": ["sdxl", "sdxl_1step"],
    "fake_score": ["dmdr"],
    "methods": ["all", "signal", "one_step"],
    "teacher": ["sdxl"],
}
EXPERIMENTS = [f"configs/shapes/experiments/{file.name}{choice}" for file in FILES
               for choice in ("", *(f":{c}" for c in CHOICES.get(file.stem, [])))]  # fmt: skip

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    c = ConfigDict(dict(seed=0, steps=6, lr=1.0, nap=0.0, fail=False))
    c.checkpoint = ConfigDict(dict(every=2, keep=2))
    return c
"""

PROGRAMS = str(ROOT / "tests/sweep_programs.py")
TEACHER = "shapes:sd3,steps=25"


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture
def programs(monkeypatch):
    """Stands for the programs; a sweep of one core polls fast."""
    monkeypatch.setattr(jobs, "program", lambda name, *rest: (sys.executable, PROGRAMS, name, *rest))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def experiment_of(config, *rows, **more):
    given = rows or (Row("a", config=config), Row("b", config=config, overrides={"steps": 9, "lr": 2.0}, after="a@4"))
    experiment = Experiment(
        "toy", (Row("teacher", model="shapes:sd3", draw={"steps": 25}), *given), TEACHER, (0, 1), **more
    )
    check(experiment)
    return experiment


def run(experiment, tmp_path, parallel=1):
    """One sweep; returns the jobs by name, what failed, and what happened."""
    todo = jobs.jobs_of(experiment, chosen(experiment, [], []), tmp_path / "out")
    events = []
    found = runner.Runner(
        todo, parallel, lambda job: records.write_record(job, tmp_path / "records"), lambda _, e: events.append(e)
    )
    failures = found.run()
    return {job.name: job for job in todo}, failures, [event for event in events if event]


# --- experiments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", EXPERIMENTS)
def test_every_experiment_can_be_run(spec):
    """Loading checks every key of every row; the borrowed rows are there where they are said to be."""
    experiment = load(spec)
    others = {other.name: other for other in map(load, EXPERIMENTS)} if any(r.of for r in experiment.rows) else {}
    for row in experiment.rows:
        if row.config:
            methods.resolve(experiment.config(row))  # refuses settings that the method does not read
        assert not row.of or row.label in others[row.of].labels
    assert len(experiment.seeds) >= 3 or all(experiment.seeds_of(row) == (None,) for row in experiment.rows)
    assert 6 * experiment.evaluation.per_tag >= 400
    assert experiment.row("teacher") is experiment.rows[0]


def training_cost(folder, experiment, label):
    """Operations of a row, with all that led to it."""
    stages = jobs.Job(experiment, experiment.row(label), 0, folder).stages()
    found = [(cli.load_config(s["config"], s["overrides"]), s["first"], s["last"]) for s in stages]
    return sum(stage_cost(*stage)["training"] for stage in found)


@pytest.mark.slow
def test_rows_at_equal_compute_cost_the_same(tmp_path):
    """pytest -m slow tests/test_sweep.py: two minutes of one core."""
    experiment = load("configs/shapes/experiments/methods.py:all")
    table = load("configs/shapes/experiments/methods.py")

    cost = partial(training_cost, tmp_path)
    expected = cost(table, "dmdr_refl")
    (labels,) = (f.rows for f in experiment.figures if isinstance(f, Bars) and "distil_equal" in f.rows)
    rows = [(table if experiment.row(label).of == "methods" else experiment, label) for label in labels[1:]]
    assert [label.removesuffix("_equal") for _, label in rows] == ["distil", *presets.TABLE, *presets.OTHERS]
    assert {label: cost(owner, label) / expected for owner, label in rows} == {
        label: pytest.approx(1.0, abs=0.03) for _, label in rows
    }


@pytest.mark.slow
def test_rows_of_one_step_at_equal_compute_cost_the_same(tmp_path):
    experiment = load("configs/shapes/experiments/methods.py:one_step")

    cost = partial(training_cost, tmp_path, experiment)
    expected = cost("dmdr")
    equal = {row.label: cost(row.label) / expected for row in experiment.rows if row.label.endswith("_equal")}
    assert equal == {label: pytest.approx(1.0, abs=0.01) for label in ("distil_equal", "drpo_equal")}
    assert cost("gdmd") / expected == pytest.approx(1.1, abs=0.01)


def test_names_of_experiments_differ():
    names = [load(spec).name for spec in EXPERIMENTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "row, why",
    [
        (Row("a b", model="m"), "'a b' must be a plain word"),
        (Row("a"), "exactly one of"),
        (Row("a", model="m", of="x"), "exactly one of"),
        (Row("a", config="CONFIG", overrides={"lrr": 1}), "unknown config key 'lrr'; did you mean 'lr'"),
        (Row("a", config="CONFIG", after="b"), "no row 'b'"),
        (Row("a", config="CONFIG", after="a"), "a comes after itself"),
        (Row("a", config="CONFIG", after="teacher"), "teacher, which trains nothing"),
        (Row("a", after="c@2"), "c keeps no checkpoint of step 2"),
        (Row("a", config="CONFIG", after="c@6"), "must be more than 6"),
        (Row("a", model="m", draw={"step": 3}), "draw has 'step'"),
        (Row("c", model="m"), "two rows 'c'"),
    ],
)
def test_what_cannot_be_run_is_refused(config, row, why):
    row = dataclasses.replace(row, config=config if row.config else "")
    with pytest.raises(UserError, match=re.escape(why)):
        experiment_of(config, Row("c", config=config), row)


def test_rows_bring_what_they_go_on_from(config):
    experiment = experiment_of(config)
    names = lambda *args: [(row.label, seed) for row, seed in chosen(experiment, *args)]
    assert names(["b"], [1]) == [("a", 1), ("b", 1)]
    assert names(["teacher"], []) == [("teacher", None)]
    assert names([], []) == [("teacher", None), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_everything_once(config, programs, tmp_path):
    experiment = experiment_of(config, along=Along(2, per_tag=1))
    found, failures, events = run(experiment, tmp_path, parallel=2)
    assert not failures and sum(event.endswith("done") for event in events) == 5
    b = found["b seed 1"]
    assert "begins at 4" in b.log.read_text() and b.progress() == 9
    steps = [json.loads(line)["step"] for line in (b.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[-5:] == [5, 6, 7, 8, 9]

    record = records.read_records(tmp_path / "records", "toy", "b")[1]
    assert (record["seed"], record["after"], record["overrides"]) == (1, "a@4", {"steps": 9, "lr": 2.0})
    assert record["settings"]["seed"] == 1 and record["settings"]["lr"] == 2.0
    assert record["cost"]["updates"] == 9 and record["cost"]["flops_training"] == 5e12
    train = f"python {PROGRAMS} train --config={config} --workdir=runs/toy/b/seed1/run "
    assert record["commands"]["train"].startswith(train) and str(tmp_path / "out") not in json.dumps(record["commands"])
    assert record["along"]["steps"] == [6, 8]
    assert record["along"]["strict"][0] == [0.25, 0.1, -0.5, 0.1]
    assert records.values_of(record["images"], "strict").tolist() == [(i + 1) % 3 == 0 for i in range(8)]
    assert record["images"]["units"] == [0, 0, 1, 1, 2, 2, 3, 3]

    _, failures, events = run(experiment, tmp_path)
    assert not failures and [event.rsplit(": ")[-1] for event in events] == ["done"] * 5  # nothing is started


def test_a_record_says_what_is_not_as_everywhere(tmp_path):
    row = Row("dmdr", config="configs/shapes/sd3.py", overrides={"rewards.shapes_hps.weight": 0.5})
    settings = records.settings_of(jobs.Job(Experiment("toy", (row,), TEACHER), row, 7, tmp_path))
    assert (settings["seed"], settings["batch"], settings["rewards.shapes_hps.weight"]) == (7, 32, 0.5)
    assert settings["rewards.shapes_clip.weight"] == 1.0
    assert not {"rewards.shapes_clip.margin", "fake.lora.rank", "dpo.form"} & set(settings)


def test_a_kill_costs_only_what_was_not_saved(config, programs, tmp_path):
    """Interrupted inside a run, a sweep stops it in good order and later goes on from its checkpoint."""
    experiment = experiment_of(config, Row("a", config=config, overrides={"nap": 0.3}))
    [job] = jobs.jobs_of(experiment, chosen(experiment, ["a"], [0]), tmp_path / "out")

    def show(found, _):
        if job.progress() >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.Runner([job], show=show).run()
    state = job.state()["train"]
    assert not state.get("done") and state["seconds"] > 0.5 and job.next_step().name == "train"
    assert not runner.Runner([job]).run()
    state = job.state()["train"]
    assert state["done"] and state["attempts"] == 2 and "begins at 2" in job.log.read_text()
    cost = records.make_record(job)["cost"]
    assert cost["interruptions"] == 1 and cost["total_cpu_seconds"] == cost["training_cpu_seconds"]
    assert state["updates"] >= 6 and cost["training_seconds"] == round(state["seconds"], 1)


def test_a_cost_that_nobody_noted_in_full_is_not_told(config, programs, tmp_path):
    """Of a run killed together with its sweep only what came after is known, and of what goes on from it too."""
    experiment = experiment_of(config)
    found, failures, _ = run(experiment, tmp_path)
    a, b = found["a seed 0"], found["b seed 0"]
    assert not failures and {"training_cpu_seconds", "total_cpu_seconds"} <= set(records.make_record(b)["cost"])
    assert (a.state()["train"]["updates"], b.state()["train"]["updates"]) == (6, 5)
    state = a.state()
    state["train"]["updates"] -= 1
    jobs.write_json(a.folder / jobs.JOB_FILE, state)
    assert not {"training_cpu_seconds", "total_cpu_seconds"} & set(records.make_record(a)["cost"])
    cost = records.make_record(b)["cost"]
    assert "training_cpu_seconds" in cost and "total_cpu_seconds" not in cost


def test_a_key_that_a_newer_version_knows_makes_nothing_undone(config, programs, tmp_path):
    """Neither is the run trained again, nor is what it took forgotten."""
    found, _, _ = run(experiment_of(config), tmp_path)
    job = found["a seed 0"]
    state = job.state()
    before = state["train"]["cpu_seconds"]
    del state["train"]["settings"]["config"]["lr"]
    jobs.write_json(job.folder / jobs.JOB_FILE, state)
    assert job.next_step() is None
    step = job.steps()[0]
    job.note(step, done=True, cpu_seconds=1.0)
    assert job.state()["train"]["cpu_seconds"] == before + 1.0
    state["train"]["settings"]["config"]["lr"] = 77.0
    jobs.write_json(job.folder / jobs.JOB_FILE, state)
    assert job.next_step().name == "train"
    job.note(step, cpu_seconds=1.0)
    assert job.state()["train"]["cpu_seconds"] == 1.0


def test_a_run_that_goes_on_begins_with_the_metrics_up_to_there(tmp_path):
    (tmp_path / "a/checkpoints/4").mkdir(parents=True)
    lines = [json.dumps({"step": i}) for i in range(1, 7)]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    jobs.fork(tmp_path / "a", 4, tmp_path / "b")
    assert (tmp_path / "b/metrics.jsonl").read_text() == "\n".join(lines[:4]) + "\n"
    assert jobs.last_step(tmp_path / "b/metrics.jsonl") == 4 and jobs.last_step(tmp_path / "a/metrics.jsonl") == 6


def test_what_an_earlier_sweep_left_running_is_waited_for(config, programs, tmp_path):
    experiment = experiment_of(config, Row("a", config=config))
    [job] = jobs.jobs_of(experiment, chosen(experiment, ["a"], [0]), tmp_path / "out")
    job.folder.mkdir(parents=True)
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(1)"
    other = subprocess.Popen([sys.executable, "-c", code, job.folder / "lock"], stdout=subprocess.PIPE)
    other.stdout.readline()
    states, started = [], time.monotonic()
    assert not runner.Runner([job], show=lambda found, _: states.append(found.state(job))).run()
    assert states[0] == "held" and states[-1] == "done" and time.monotonic() - started > 0.8
    other.wait()


def test_a_row_that_fails_stops_nothing_but_what_needs_it(config, programs, tmp_path):
    rows = (
        Row("bad", config=config, overrides={"fail": True}),
        Row("after_bad", config=config, overrides={"steps": 9}, after="bad"),
        Row("good", config=config),
    )
    found, failures, _ = run(experiment_of(config, *rows), tmp_path)
    assert [failure.job.name for failure in failures] == ["bad seed 0", "bad seed 1"]
    assert failures[0].why == "train ended with 2: step 4 does not want to"
    assert found["good seed 1"].next_step() is None
    assert not found["after_bad seed 0"].folder.exists()
    assert not (tmp_path / "records/toy/bad.seed0.json").exists()


def test_the_program_reports_and_says_how_it_ended(config, programs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "toy.py"
    file.write_text(
        "from dmdr_jax.experiments.spec import Experiment, Row\n"
        "def get_experiment(fail='no'):\n"
        f"    rows = (Row('a', config={config!r}, overrides={{'fail': fail == 'yes'}}), Row('half', after='a@4'))\n"
        f"    return Experiment('toy', rows, {TEACHER!r}, seeds=(0,))\n"
    )
    program = lambda *more: sweep.main(sweep.parser().parse_args(["--out=out", "--records=records", *more]))
    assert program("--experiment=toy.py:yes") == 1
    text = capsys.readouterr().out
    assert "a seed 0 failed: train ended with 2" in text and "log: out/a/seed0/log.txt" in text
    assert "half seed 0 was not run" in text
    with pytest.raises(UserError, match="begun with other settings: fail was true and is false now"):
        program("--experiment=toy.py")
    assert program("--experiment=toy.py", "--out=again") == 0
    assert "2 of 2 done; records under records/toy" in capsys.readouterr().out
    kept = sorted(path.name for path in Path("again/a/seed0/run/checkpoints").iterdir())
    assert kept == ["4", "6"]  # the last, and what half is drawn with
    assert program("--experiment=toy.py", "--out=again", "--dry_run") == 0
    assert capsys.readouterr().out.count("# done") == 5
    for wrong, why in ((["--jobs=0"], "--jobs"), (["--seeds=x"], "--seeds"), (["--rows=c"], "no row 'c'")):
        with pytest.raises(UserError, match=why):
            program("--experiment=toy.py", *wrong)


def test_sigterm_is_an_interrupt(config, tmp_path):
    """The whole program as a process: it passes the signal on, so that no child stays behind."""
    file = tmp_path / "toy.py"
    file.write_text(
        "from dmdr_jax.experiments import jobs\n"
        "from dmdr_jax.experiments.spec import Experiment, Row\n"
        f"jobs.program = lambda name, *rest: ({sys.executable!r}, {PROGRAMS!r}, name, *rest)\n"
        "def get_experiment():\n"
        f"    row = Row('a', config={config!r}, overrides={{'nap': 0.2}})\n"
        f"    return Experiment('toy', (row,), {TEACHER!r}, seeds=(0,))\n"
    )
    command = [sys.executable, "-m", "dmdr_jax.sweep", f"--experiment={file}", f"--out={tmp_path / 'out'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/a/seed0/run/metrics.jsonl"
    deadline = time.monotonic() + 30
    while jobs.last_step(metrics) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip().endswith("interrupted")
    before = jobs.last_step(metrics)
    time.sleep(0.5)
    assert 2 <= before == jobs.last_step(metrics) < 6


def test_the_table_shows_every_seed_and_what_is_left(config, programs, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    experiment, screen = experiment_of(config), Terminal()
    todo = jobs.jobs_of(experiment, chosen(experiment, ["a"], []), tmp_path / "out")
    found = runner.Runner(todo, show=Display(todo, 1, screen).show)
    assert seconds_left(found, 1) is None
    found.run()
    first, *_, last = screen.getvalue().split("\x1b[2F\x1b[J")
    assert first == "a  0: train 0/6   1: ·\n0/2 done, left ?\n"
    assert last == "a  0: done   1: done\n2/2 done, left 0 min\n"
    [job] = jobs.jobs_of(experiment, chosen(experiment, ["a"], [0]), tmp_path / "more")
    state = {"train": {"timed_seconds": 4.0, "timed_updates": 2}, "evaluate": {"done": True, "seconds": 7.0}}
    job.folder.mkdir(parents=True)
    jobs.write_json(job.folder / "job.json", state)
    assert seconds_left(runner.Runner([job]), 1) == 6 * 2.0 + 7.0


def test_cores_are_shared_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert runner.core_shares(2) == [{0, 1}, {2, 3}]
    assert runner.core_shares(4) == [{0}, {1}, {2}, {3}]
    assert [len(share) for share in runner.core_shares(6)] == [1] * 6


def test_help_answers_without_the_slow_libraries():
    for program in ("sweep", "experiments.results", "experiments.cost"):
        command = [sys.executable, "-X", "importtime", "-m", f"dmdr_jax.{program}", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "import time:" in line}
        assert f"dmdr_jax.{program}" in done.stdout
        assert not imported & {"jax", "transformers", "orbax"}
