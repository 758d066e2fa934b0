"""The watch over a whole run: what it writes, the checkpoint it marks, the alarm that ends the run."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import canaries
from dmdr_jax.model import open_model
from dmdr_jax.training import loop
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.metrics import read_metrics
from tests.rewards.test_clip_reward import make_folder
from tests.training import tiny

# What the student is made to be worth, by step: the gap opens after step 2 and the alarm is due at step 4.
TRAINED = [0.0, 0.1, 0.2, 2.0, 3.0, 3.0, 3.0]
HELD_OUT = [0.0, 0.1, 0.2, -0.5, -1.0, 0.2, 0.2]


@pytest.fixture(scope="module")
def config(teacher, prompts_file, reward_folder, tmp_path_factory):
    judge = tmp_path_factory.mktemp("judge")
    make_folder(judge, image_size=24)
    c = tiny.config(teacher, prompts_file, steps=6, checkpoint__every=1, checkpoint__keep=1, fake__updates=1)
    with c.unlocked():
        c.rewards.clip = base.reward(str(reward_folder), weight=0.3)
        c.watch.rewards.judge = base.judge(str(judge))
        c.watch.update(dict(every=1, count=2, per_prompt=2, stop=True))
    return c


@pytest.fixture
def scripted(monkeypatch):
    """Everything is drawn and measured; then the z's are those above."""
    measured, real = [], canaries.compare

    def compare(student, teacher):
        step = len(measured)
        measured.append(real(student, teacher))
        z = {canaries.Z_TRAINED: TRAINED[step], canaries.Z_HELD_OUT: HELD_OUT[step]}
        return measured[-1] | z | {canaries.GAP: TRAINED[step] - HELD_OUT[step], canaries.DIVERSITY: 1.0}

    monkeypatch.setattr(canaries, "compare", compare)
    return measured


def test_the_alarm_keeps_the_checkpoint_from_before_and_ends_the_run(config, scripted, tmp_path, capsys):
    state = loop.train(config, tmp_path)
    assert int(state.step) == 4
    document = json.loads((tmp_path / "best.json").read_text())
    assert document["step"] == 2 and document["alarm"]["step"] == 4
    assert sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir()) == [2, 4]  # one is the latest
    assert load_trained(tmp_path / "best")[1]["step"] == 2 and load_trained(tmp_path)[1]["step"] == 4
    assert open_model(str(tmp_path / "best")).meta["step"] == 2  # to draw with, where a run may be named
    with pytest.raises(UserError, match="names no best checkpoint"):
        (tmp_path / "unwatched" / "checkpoints").mkdir(parents=True)
        open_model(str(tmp_path / "unwatched" / "best"))
    said = capsys.readouterr().err
    assert "over-optimised at step 4: held-out rewards fell by 1.20 standard deviations from their best" in said
    assert f"the checkpoint from before is {tmp_path / 'best'}; the run ends here" in said

    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["watch/alarm"] for row in rows] == [0, 0, 0, 0, 1]
    assert all(np.isfinite(row["fake/loss"]) for row in rows[1:])  # one line for a step, watched or not
    assert rows[0]["watch/reward/clip"] == scripted[0]["watch/reward/clip"]
    assert {"watch/judge/judge", "watch/saturation_share", "watch/clipped_more", "watch/chroma"} <= set(rows[3])
    with (
        Image.open(tmp_path / "samples" / "canary_000003.png") as grid,
        Image.open(tmp_path / "samples" / "canary_teacher.png") as teachers,
    ):
        assert grid.size == teachers.size

    loop.train(config, tmp_path)  # it has ended
    assert len(scripted) == 5
    with config.copy_and_resolve_references().unlocked() as on:
        on.watch.stop = False
    assert int(loop.train(on, tmp_path).step) == 6
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2  # whatever comes after the alarm
    assert sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir()) == [2, 6]
    assert len(scripted) == 7  # the teacher and the steps from before are remembered


@pytest.mark.slow
def test_a_resumed_run_sees_what_the_whole_one_saw(config, tmp_path):
    """With true measurements: the same numbers, the same best, whether it was stopped in between or not."""
    with config.copy_and_resolve_references().unlocked() as first:
        first.steps, first.watch.every, first.checkpoint.every = 4, 2, 2
    loop.train(first, tmp_path / "whole")
    loop.train(first, tmp_path / "parts", stop=lambda step: step == 2)
    loop.train(first, tmp_path / "parts")
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4] and parts == whole
    assert [row["step"] for row in whole if "watch/alarm" in row] == [0, 2, 4]
    files = [(tmp_path / name / "best.json").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_is_trained_on_is_not_held_out(config, tmp_path):
    with config.copy_and_resolve_references().unlocked() as wrong:
        wrong.watch.rewards.judge.path = wrong.rewards.clip.path
    with pytest.raises(UserError, match=r"config\.watch\.rewards\.judge is .*, which the run trains on"):
        loop.train(wrong, tmp_path)
