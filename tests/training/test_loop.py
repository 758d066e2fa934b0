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

from configs import base as base_config
from dmdr_jax.errors import UserError
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.loop import train
from tests.training import tiny
from tests.training.conftest import leaves_equal

FIELDS = ("generator", "fake", "ema", "generator_opt", "fake_opt", "step", "inner", "key")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, prompts_file):
    """A run of 4 steps, never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny.config(teacher, prompts_file)
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


def test_stopping_and_going_on_changes_nothing(finished, tmp_path):
    _, config, whole = finished
    with config.copy_and_resolve_references().unlocked() as first:
        first.steps = 2
    train(first, tmp_path)
    resumed = train(config, tmp_path)
    assert leaves_equal(resumed, whole)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]


def test_a_finished_run_is_left_as_it_is(finished):
    workdir, config, state = finished
    assert leaves_equal(train(config, workdir), state)


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


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_term(teacher, prompts_file, reward_folder, tmp_path):
    config = tiny.config(teacher, prompts_file, steps=6, checkpoint__every=1, dm__weight=0.0)
    with config.unlocked():
        config.rewards.clip = base_config.reward(str(reward_folder), weight=float("inf"), margin=1e30)
    with pytest.raises(UserError, match=r"reward/.* not finite"):
        train(config, tmp_path)


def command(teacher, prompts, workdir):
    config = f"--config=tests/training/tiny_config.py:{teacher},{prompts}"
    return [sys.executable, "-m", "dmdr_jax.train", config, f"--workdir={workdir}"]


def test_kill_9_and_the_same_command_again_give_the_same_parameters(teacher, prompts_file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(teacher, prompts_file, whole), check=True, **options)
    process = subprocess.Popen(command(teacher, prompts_file, killed), **options)
    while process.poll() is None and not (killed / "checkpoints" / "2").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(teacher, prompts_file, killed), check=True, **options)
    expected, _ = load_trained(whole, FIELDS)
    got, meta = load_trained(killed, FIELDS)
    assert meta["step"] == 6
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command(teacher, prompts_file, tmp_path / "run"), argument],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
