"""Rewards in the teacher's units: measured once, kept, and the same for a run that goes on."""

import json

import numpy as np
import pytest

from configs import base
from dmdr_jax.data.prompts import load_prompts
from dmdr_jax.errors import UserError
from dmdr_jax.training import calibration, loop
from dmdr_jax.training.metrics import read_metrics
from tests.training import tiny


@pytest.fixture
def config(teacher, prompts_file, reward_folder):
    c = tiny.config(teacher, prompts_file, steps=2, fake__updates=1, calibration=4)
    with c.unlocked():
        c.rewards.clip = base.reward(str(reward_folder), weight=0.3)
        c.rewards.clip.update(units="z", margin=100.0)
        c.watch.every = 0
    return c


def test_what_is_trained_on_is_the_teachers_z_score(config, tmp_path):
    with config.unlocked():
        config.steps, config.checkpoint.every = 1, 1
    loop.train(config, tmp_path)
    document = json.loads((tmp_path / calibration.FILE).read_text())
    scores = np.array(document["scores"]["clip"])
    assert len(scores) == len(document["prompts"]) == 4 and scores.std() > 0
    row = read_metrics(tmp_path)[0]
    # One reward, no score beyond the margin: the loss is weight * (margin - z of the mean score).
    assert row["reward/clip/beyond_margin"] == 0
    z = (row["reward/clip"] - scores.mean()) / scores.std(ddof=1)
    assert row["reward/loss"] == pytest.approx(0.3 * (100.0 - z), rel=1e-5)


def test_a_run_that_goes_on_counts_as_it_did(config, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(config, whole)
    with config.copy_and_resolve_references().unlocked() as first:
        first.steps, first.checkpoint.every = 1, 1
    loop.train(first, parts)
    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured again"))
    loop.train(config, parts)
    assert [row["reward/loss"] for row in read_metrics(whole)] == [row["reward/loss"] for row in read_metrics(parts)]


def test_numbers_that_are_given_are_not_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured"))
    config.rewards.clip.update(mean=0.1, std=0.05)
    loop.train(config, tmp_path)
    row = read_metrics(tmp_path)[0]
    assert row["reward/clip/beyond_margin"] in (0, 1) and not (tmp_path / calibration.FILE).exists()


def test_a_reward_that_tells_no_images_apart_is_refused(config, tmp_path):
    (tmp_path / "flat.py").write_text("def score(images, prompts):\n    return 0.0 * images.mean((1, 2, 3))\n")
    config.rewards.clip.update(path=f"{tmp_path / 'flat.py'}:score", kind="python")
    with pytest.raises(UserError, match="'clip' cannot be calibrated"):
        loop.train(config, tmp_path / "run")


def test_prompts_are_spread_and_every_image_has_noise_of_its_own(config, tmp_path, monkeypatch):
    seen = {}

    def look(drawing, *rest):
        seen["prompts"], seen["images"] = drawing.prompts, drawing.draw_teacher()
        return real(drawing, *rest)

    real = calibration._measure
    monkeypatch.setattr(calibration, "_measure", look)
    loop.train(config, tmp_path)
    prompts = load_prompts(config.prompts)
    assert seen["prompts"] == [prompts[i * len(prompts) // 4] for i in range(4)]
    assert len({image.tobytes() for image in seen["images"]}) == 4
