"""Whole runs: the loop, exact resume, kill -9 at any time, and what bad runs are told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import base as base_config
from dmdr_jax.errors import UserError
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.loop import train
from dmdr_jax.training.metrics import read_metrics
from dmdr_jax.training.reporting import SKIPPED, SKIPPED_AT_MOST, Skipped
from tests.training import tiny
from tests.training.conftest import leaves_equal

FIELDS = ("generator", "fake", "ema", "generator_opt", "fake_opt", "step", "inner", "key")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, prompts_file):
    """A run of 4 steps, never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny.config(teacher, prompts_file, preview__images=2)
    return workdir, config, train(config, workdir)


def test_a_run_leaves_metrics_grids_checkpoints_and_its_settings(finished):
    workdir, _, state = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["dm/score_gap"]) and np.isfinite(row["fake/loss"]) for row in rows)
    assert {p.name for p in (workdir / "samples").iterdir()} == {"prompts.txt", "teacher.png", "student_000004.png"}
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [2, 4]
    assert json.loads((workdir / "config.json").read_text())["config"]["optim"]["generator"]["lr"] == 1e-3
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert int(state.step) == 4 and int(state.inner) == 9  # 2:1, and one more before the first generator update


def test_the_teachers_grid_is_of_the_prompts_that_are_asked_for(teacher, prompts_file, tmp_path):
    def widths(images):
        train(tiny.config(teacher, prompts_file, preview__images=images), tmp_path, stop=lambda step: True)
        with Image.open(tmp_path / "samples" / "teacher.png") as grid:
            return grid.width

    first = widths(1)
    drawn = (tmp_path / "samples" / "teacher.png").stat().st_mtime_ns
    assert widths(1) == first and (tmp_path / "samples" / "teacher.png").stat().st_mtime_ns == drawn
    assert widths(2) > first


def test_stopping_and_going_on_changes_nothing(finished, tmp_path, capsys):
    _, config, whole = finished
    with config.copy_and_resolve_references().unlocked() as first:
        first.steps = 2
    train(first, tmp_path)
    told = capsys.readouterr().err
    assert f"all 2 steps are done: python -m dmdr_jax.sample --model {tmp_path} --prompts FILE draws" in told
    resumed = train(config, tmp_path)
    told = capsys.readouterr().err
    assert "not as this run had it before: steps 2 -> 4\n" in told and "all 4 steps are done" in told
    assert leaves_equal(resumed, whole)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    workdir, config, state = finished
    assert leaves_equal(train(config, workdir), state)
    told = capsys.readouterr().err
    assert "all 4 steps are done" in told and "not as this run" not in told


def test_checkpoint_of_another_model_is_refused(finished, teacher, prompts_file):
    workdir, *_ = finished
    with pytest.raises(UserError, match="rank"):
        train(tiny.config(teacher, prompts_file, generator__lora__rank=3), workdir)


def test_a_corrupt_latest_checkpoint_ends_the_run(finished, tmp_path):
    import shutil

    workdir, config, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    largest = max((tmp_path / "run" / "checkpoints" / "4" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(UserError, match="4"):
        train(config, tmp_path / "run")


@pytest.fixture
def endless_reward(teacher, prompts_file, reward_folder):
    """A run whose reward's loss is infinite."""
    config = tiny.config(teacher, prompts_file, steps=3, checkpoint__every=1, dm__weight=0.0)
    with config.unlocked():
        config.rewards.clip = base_config.reward(str(reward_folder), weight=float("inf"), margin=1e30)
    return config


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_term(endless_reward, tmp_path):
    with pytest.raises(UserError, match=r"reward/.* not finite"):
        train(endless_reward, tmp_path)


def test_a_loss_that_is_not_finite_is_skipped_where_asked(endless_reward, tmp_path, capsys):
    endless_reward.on_nonfinite = "skip"
    state = train(endless_reward, tmp_path)
    rows = read_metrics(tmp_path)
    assert [row[SKIPPED] for row in rows] == [1, 2, 3]
    assert all(row["reward/loss"] is None for row in rows)
    assert int(state.step) == 3 and not any(np.asarray(leaf).any() for leaf in tree_of_b(state.generator))
    assert "step 1: reward/" in capsys.readouterr().err
    endless_reward.on_nonfinite = "ignore"
    with pytest.raises(UserError, match=r"config\.on_nonfinite is 'ignore'; choose one of: stop, skip"):
        train(endless_reward, tmp_path)


def tree_of_b(delta):
    """The factors of a LoRA that are zero until an update is applied."""
    import jax

    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(delta) if path[-1].key == "b"]


def test_skipping_ends_when_it_does_not_end():
    skipped = Skipped()
    assert [skipped.count(bad) for bad in (True, False, True)] == [True] * 3
    assert [skipped.count(True) for _ in range(SKIPPED_AT_MOST - 1)] == [True] * (SKIPPED_AT_MOST - 2) + [False]
    assert skipped.steps == SKIPPED_AT_MOST + 1


def command(teacher, prompts, workdir):
    config = f"--config=tests/training/tiny_config.py:{teacher},{prompts}"
    return [sys.executable, "-m", "dmdr_jax.train", config, f"--workdir={workdir}"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_sigterm_saves_and_the_same_command_goes_on(teacher, prompts_file, tmp_path):
    """And again while it is being obeyed; Ctrl-C after that saves nothing. As if nothing had happened."""
    workdir, done = tmp_path / "run", 0
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        changes = ["--config.steps=100000", "--config.checkpoint.every=100000"]
        process = subprocess.Popen(
            [*command(teacher, prompts_file, workdir), *changes],
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < done + 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        while number == signal.SIGTERM and process.poll() is None:
            process.send_signal(number)
            time.sleep(0.05)
        told = process.communicate()[1]
        assert process.returncode == status, told
        if number == signal.SIGTERM:
            done = load_trained(workdir)[1]["step"]
            assert f"stopped by SIGTERM after step {done}" in told
            assert [row["step"] for row in read_metrics(workdir)] == list(range(1, done + 1))
        lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (workdir / "metrics.jsonl").write_text("".join(lines[:done]))  # for the next turn to wait for more
    # A stop may have come between two fake updates: what is saved is then ahead of where a run of so many steps ends.
    changes = [f"--config.steps={done + 1}", "--config.checkpoint.every=100000"]
    subprocess.run([*command(teacher, prompts_file, workdir), *changes], check=True, cwd=ROOT, env=ENVIRONMENT)
    train(tiny.config(teacher, prompts_file, steps=done + 1, checkpoint__every=100_000), tmp_path / "whole")
    assert leaves_equal(load_trained(workdir, FIELDS)[0], load_trained(tmp_path / "whole", FIELDS)[0])


def test_a_run_that_is_stopped_before_its_first_step_saves_nothing(teacher, prompts_file, tmp_path):
    state = train(tiny.config(teacher, prompts_file), tmp_path, stop=lambda step: True)
    assert int(state.step) == 0 and not any((tmp_path / "checkpoints").iterdir())


def test_kill_9_and_the_same_command_again_give_the_same_parameters(finished, teacher, prompts_file, tmp_path):
    options = dict(cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    program = [*command(teacher, prompts_file, tmp_path), "--config.steps=4"]
    process = subprocess.Popen(program, **options)
    while process.poll() is None and not (tmp_path / "checkpoints" / "2").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(program, check=True, **options)
    expected, _ = load_trained(finished[0], FIELDS)
    got, meta = load_trained(tmp_path, FIELDS)
    assert meta["step"] == 4
    assert leaves_equal(got, expected)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.optim.generator.lrr=1", "lr"),
        ("--config.prompts=/nowhere/prompts.txt", "/nowhere/prompts.txt"),
        ("--config.model=/nowhere/model", "/nowhere/model"),
        ("--config.mesh.data=7", "7"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(teacher, prompts_file, tmp_path, argument, message):
    done = subprocess.run(
        [*command(teacher, prompts_file, tmp_path / "run"), argument],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
