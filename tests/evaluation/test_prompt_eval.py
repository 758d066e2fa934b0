"""An evaluation on prompts, from the command line to its files; the networks are left out."""

import json
import re

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation.images import image_files, read_image
from dmdr_jax.evaluation.run import evaluate
from tests.evaluation.fake_models import FakeModel, install
from tests.evaluation.scoring import scored_prompts, write_functions, write_pictures, write_prompts

N = 7
TEACHER, STUDENT = FakeModel(0.2), FakeModel(0.3)


@pytest.fixture
def drawn(monkeypatch):
    return install(monkeypatch, {"a": TEACHER, "b": STUDENT})


@pytest.fixture
def ask(tmp_path, drawn):
    """Runs an evaluation of the teacher and the student; returns what it prints."""
    write_prompts(tmp_path / "p.txt", N)
    functions = write_functions(tmp_path)

    def run(*more, models=("teacher=a", "student=b,steps=2"), rewards=("red",)):
        argv = ["--out", tmp_path / "out", "--prompts", tmp_path / "p.txt", "--batch", "3"]
        argv += [part for model in models for part in ("--model", model)]
        argv += [part for name in rewards for part in ("--reward", f"{name}={functions}:{name}")]
        return evaluate(parser().parse_args([*map(str, argv), *map(str, more)]))

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_teacher_against_student_on_the_same_noise(ask, out):
    table = ask(rewards=["red", "words"])
    found = files.read(out)
    teacher, student = found["models"]
    assert (teacher["nfe"], student["nfe"]) == (4, 2)
    assert teacher["images_per_second"] > 0
    gain = student["differences"]["teacher"]["judge/red"]
    assert gain.mean == pytest.approx(0.1, abs=0.002)  # noise and prompts are the same, up to rounding to 8 bits
    assert gain.se < 0.002 < teacher["summary"]["judge/red"].se
    assert gain.interval()[0] < 0.1 < gain.interval()[1]
    assert student["differences"]["teacher"]["judge/words"].mean == 0
    assert re.search(r"\| student \| +\+0\.\d+ \[\+0\.\d+, \+0\.\d+\] \|", table)
    drawn = read_image(image_files(out / student["gallery"])[3])
    assert student["images"][3]["judge/red"] == pytest.approx(drawn[0, 0, 0] / 255)


def test_everything_needed_to_repeat_it_is_in_one_file(ask, out):
    ask("--seed", "3", "--trained", "red", rewards=["red", "words"])
    found = json.loads((out / "results.json").read_text())
    assert [p["noise_seed"] for p in found["prompts"][:2]] == [300000, 300001]
    assert found["settings"]["model"] == ["teacher=a", "student=b,steps=2"]
    assert found["measures"]["rewards"]["red"]["path"].endswith("scorers.py:red")
    assert found["models"][1]["grid"] == [1.0, 0.5, 0.0]
    assert found["models"][1]["drawn"]["kernel"] == "ode"
    assert found["prompt_survey"] == "7 prompts"
    assert found["environment"]["versions"]["jax"]
    assert "judge/words" in found["models"][0]["summary"]
    assert "reward/red" in found["models"][0]["summary"]


def test_the_gap_of_trained_over_held_out_rewards(ask, out):
    ask("--trained", "red", rewards=["red", "words"])
    teacher, student = files.read(out)["models"]
    reds = [image["reward/red"] for image in teacher["images"]]
    assert teacher["summary"]["reward_gap"].mean == pytest.approx(0, abs=1e-9)
    assert student["summary"]["reward_gap"].mean == pytest.approx(0.1 / np.std(reds), rel=0.03)


def test_a_run_says_what_it_was_trained_on(ask, out, monkeypatch):
    rewards = {"red": {"weight": 0.5}, "words": {"weight": 0.0}}
    monkeypatch.setattr(STUDENT, "meta", {"step": 12, "config": {"rewards": rewards}})
    ask(rewards=["red", "words"])
    found = files.read(out)
    assert [c.title for c in found["columns"][:2]] == ["red (trained)", "words (held out)"]
    assert found["models"][1]["trained_steps"] == 12


def test_a_killed_evaluation_goes_on_where_it_was(ask, out, drawn, tmp_path, monkeypatch):
    from dmdr_jax.evaluation import gallery

    write, count = gallery.write_image, []

    def killed_at_the_fifth(file, image):
        count.append(file)
        if len(count) == 5:
            raise KeyboardInterrupt
        write(file, image)

    monkeypatch.setattr(gallery, "write_image", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        ask()
    monkeypatch.setattr(gallery, "write_image", write)
    drawn.clear()
    ask()
    places = [place for lot in drawn for place in lot]
    assert places[:3] == [4, 5, 6]  # of the teacher
    whole = files.read(out)["models"]
    drawn.clear()
    scored = len(scored_prompts(tmp_path / "scorers.py"))
    ask()
    assert drawn == []
    assert len(scored_prompts(tmp_path / "scorers.py")) == scored
    assert files.read(out)["models"][1]["images"] == whole[1]["images"]


def test_another_model_finds_what_is_there(ask, out, drawn):
    ask()
    drawn.clear()
    ask(models=["teacher=a", "student=b,steps=2", "more=b,steps=3"])
    assert sum(map(len, drawn)) >= N
    assert [m["name"] for m in files.read(out)["models"]] == ["teacher", "student", "more"]
    drawn.clear()
    ask("--seed", "1")  # other noise: nothing old is taken for it
    assert {place for lot in drawn for place in lot} == set(range(N))


def test_processes_share_the_work_and_the_last_writes(ask, out, drawn):
    first = ask("--shard", "1/2")
    assert "are there" in first
    assert not (out / "results.json").exists()
    assert {place for lot in drawn for place in lot} == {1, 3, 5}
    table = ask("--shard", "0/2")
    shared = files.read(out)["models"]
    assert "| student |" in table
    ask()
    alone = files.read(out)["models"]
    assert [m["images"] for m in alone] == [m["images"] for m in shared]


def test_images_drawn_elsewhere_are_a_row(ask, out, tmp_path):
    reds = write_pictures(tmp_path / "theirs", N, ".bmp")
    ask(models=["teacher=a", f"theirs=images:{tmp_path / 'theirs'}"])
    theirs = files.read(out)["models"][1]
    assert theirs["summary"]["judge/red"].mean == pytest.approx(reds.mean(), abs=1e-6)
    assert theirs["nfe"] is None
    assert len(theirs["differences"]["teacher"]) > 0
    write_pictures(tmp_path / "fewer", N - 1)
    with pytest.raises(UserError, match="holds 6 images, and the other models are asked for 7"):
        ask(models=["teacher=a", f"theirs=images:{tmp_path / 'fewer'}"])


def test_several_images_of_a_prompt_and_fewer_prompts(ask, out):
    ask("--per_prompt", "2", "--limit", "3", "--size", "16x24")
    found = files.read(out)
    prompts = [p["prompt"] for p in found["prompts"]]
    assert len(prompts) == 6
    assert prompts[::2] == prompts[1::2]
    assert found["models"][0]["size"] == [16, 24]
    assert "(7 prompts; 2 per prompt)" in found["caption"]


def test_tasks_of_the_prompts_file_are_columns(ask, out, tmp_path):
    records = [{"prompt": f"p{i}", "tag": ("odd", "even")[i % 2 == 0]} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    ask("--prompts", tmp_path / "p.jsonl")
    found = files.read(out)
    summary, images = found["models"][0]["summary"], found["models"][0]["images"]
    assert summary["judge/red@odd"].mean == pytest.approx(np.mean([images[i]["judge/red"] for i in (1, 3, 5)]))
    assert [c.key for c in found["columns"] if c.group == "red by task"] == ["judge/red@even", "judge/red@odd"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trained", "blue"], "--trained 'blue' is none of the rewards; they are: red"),
        (["--baseline", "x"], "--baseline 'x' is none of the models"),
        (["--size", "big"], "--size 'big' is neither"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--features", "x"], "--features 'x'"),
        (["--reference", "coco=nowhere"], "--reference without --features"),
        (["--lpips", "a.pth"], "takes two files"),
        (["--lpips", "a.pth,b.pth"], "--per_prompt 2 or more"),
        (["--shard", "2/2"], "--shard '2/2'"),
    ],
)
def test_bad_input_is_said_before_anything_is_drawn(ask, drawn, more, message):
    with pytest.raises(UserError, match=message):
        ask(*more)
    assert drawn == []


def test_nothing_to_compare_and_nothing_to_measure(ask):
    with pytest.raises(UserError, match="give --model"):
        ask(models=[])
    with pytest.raises(UserError, match="nothing to measure"):
        ask(rewards=[])
