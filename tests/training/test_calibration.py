"""Rewards in the teacher's units: measured once, kept, and the same for a run that goes on."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from configs import base
from dmdr_jax.data.prompts import load_prompts
from dmdr_jax.errors import UserError
from dmdr_jax.training import calibration, loop, setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.metrics import read_metrics
from dmdr_jax.training.preview import Preview
from tests.training import tiny


@pytest.fixture
def config(teacher, prompts_file, reward_folder):
    c = tiny.config(teacher, prompts_file, steps=1, fake__updates=1, calibration=4)
    with c.unlocked():
        c.rewards.clip = base.reward(str(reward_folder), weight=0.3)
        c.rewards.clip.update(units="z", margin=100.0)
        c.watch.every = 0
    return c


def calibrate(config, workdir):
    """What a run does before its first step; the rewards' specs."""
    layout = Layout.make(-1, 1)
    pipeline, rewards = setup.load_teacher(config, layout), setup.load_rewards(config)
    prompts = load_prompts(config.prompts)
    plan = setup.make_plan(config, pipeline, rewards)
    preview = Preview.make(config, pipeline, plan, prompts, epath.Path(workdir), layout)
    return [reward.spec for reward in calibration.in_teacher_units(config, preview, prompts, rewards)]


def test_what_is_trained_on_is_the_teachers_z_score(config, tmp_path, monkeypatch):
    loop.train(config, tmp_path)
    document = json.loads((tmp_path / calibration.FILE).read_text())
    scores = np.array(document["scores"]["clip"])
    assert len(scores) == len(document["prompts"]) == 4 and scores.std() > 0
    row = read_metrics(tmp_path)[0]
    # One reward, no score beyond the margin: the loss is weight * (margin - z of the mean score).
    assert row["reward/clip/beyond_margin"] == 0
    z = (row["reward/clip"] - scores.mean()) / scores.std(ddof=1)
    assert row["reward/loss"] == pytest.approx(0.3 * (100.0 - z), rel=1e-5)

    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured again"))
    [spec] = calibrate(config, tmp_path)  # of a run that goes on
    assert (spec.mean, spec.std) == (scores.mean(), scores.std(ddof=1))


def test_numbers_that_are_given_are_not_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured"))
    config.rewards.clip.update(mean=0.1, std=0.05)
    [spec] = calibrate(config, tmp_path)
    assert (spec.mean, spec.std) == (0.1, 0.05) and not (tmp_path / calibration.FILE).exists()
    config.rewards.clip.update(units="raw", std=0.0)
    assert calibrate(config, tmp_path)[0].units == "raw"


def test_other_questions_are_measured_anew(config, tmp_path, monkeypatch):
    asked = []

    def measure(drawing, rewards, file, known_as):
        asked.append((drawing.prompts, known_as))
        file.write_text(json.dumps({"known_as": known_as, "scores": {"clip": [1.0, 3.0]}}))
        return {"clip": [1.0, 3.0]}

    monkeypatch.setattr(calibration, "_measure", measure)
    first, again = calibrate(config, tmp_path), calibrate(config, tmp_path)
    assert first == again and len(asked) == 1
    assert dataclasses.replace(first[0], mean=0.0, std=0.0) == setup.load_rewards(config)[0].spec
    prompts = load_prompts(config.prompts)
    assert asked[0][0] == [prompts[i * len(prompts) // 4] for i in range(4)]  # spread over the source
    config.rewards.clip.prompt_prefix = "a photo of "
    calibrate(config, tmp_path)
    config.calibration = 2
    calibrate(config, tmp_path)
    assert len({known_as for _, known_as in asked}) == 3


def test_a_reward_that_tells_no_images_apart_is_refused(config, tmp_path):
    (tmp_path / "flat.py").write_text("def score(images, prompts):\n    return 0.0 * images.mean((1, 2, 3))\n")
    config.rewards.clip.update(path=f"{tmp_path / 'flat.py'}:score", kind="python")
    with pytest.raises(UserError, match="'clip' cannot be calibrated"):
        calibrate(config, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / calibration.FILE).read_text())["scores"]["clip"]
    assert scores == [0.0] * 4
