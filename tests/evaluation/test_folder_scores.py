"""Scores of a folder of images, as the program gives them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation import scorers
from dmdr_jax.evaluation.run import evaluate
from tests.evaluation.scoring import scored_prompts, write_functions, write_pictures, write_prompts

ROOT = Path(__file__).parents[2]
N = 5


@pytest.fixture
def given(tmp_path):
    """The folder, with pictures, prompts and scorers in it."""
    write_pictures(tmp_path / "pictures", N)
    write_prompts(tmp_path / "prompts.txt", N)
    write_functions(tmp_path)
    return tmp_path


def run(folder, *more, rewards=("red", "words")):
    argv = ["--images", folder / "pictures", "--prompts", folder / "prompts.txt", "--out", folder / "scores.json"]
    for name in rewards:
        argv += ["--reward", f"{name}={folder / 'scorers.py'}:{name}"]
    return evaluate(parser().parse_args([*map(str, argv), *more]))


def test_raw_values_in_the_order_of_the_files(given):
    table = run(given)
    found = json.loads((given / "scores.json").read_text())
    assert found["scores"]["red"] == pytest.approx(np.arange(N) * 10 / 255, abs=1e-6)
    assert found["scores"]["words"] == [1, 2, 3, 4, 5]
    assert found["files"] == [f"{i:03d}.png" for i in range(N)]
    assert found["prompts"][1] == "word p1"
    words = found["summary"]["words"]
    assert words["mean"] == 3
    assert words["se"] == pytest.approx(np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(N))
    assert words["interval"] == pytest.approx([3 - 2.776445 * words["se"], 3 + 2.776445 * words["se"]], rel=1e-6)
    assert re.search(r"\| words +\| +3 \| +0\.71 \| +5 \|", table)
    assert sorted(f.name for f in given.iterdir() if "scores" in f.name) == ["scores.json"]  # no work is left behind


def test_a_count_that_does_not_match_is_one_sentence(given):
    write_prompts(given / "prompts.txt", N + 1)
    with pytest.raises(UserError, match=r"pictures holds 5 images and .*prompts\.txt has 6 prompts") as error:
        run(given)
    assert "\n" not in str(error.value)
    assert scored_prompts(given / "scorers.py") == []


def test_an_empty_line_is_a_prompt_where_it_is_needed_for_one(given):
    lines = write_prompts(given / "prompts.txt", N)
    (given / "prompts.txt").write_text("\n".join([*lines[:2], "", *lines[3:]]) + "\n")
    run(given, rewards=["words"])
    found = json.loads((given / "scores.json").read_text())
    assert found["scores"]["words"] == [1, 2, 0, 4, 5] and found["prompts"][2] == ""
    assert found["prompt_survey"] == "4 prompts, 1 empty"
    (given / "prompts.txt").write_text("\n\n".join(lines) + "\n")
    run(given, rewards=["words"])
    assert json.loads((given / "scores.json").read_text())["scores"]["words"] == [1, 2, 3, 4, 5]
    (given / "prompts.txt").write_text("\n\n".join(lines[:4]) + "\n")
    with pytest.raises(UserError, match=r"has 4 prompts \(and 3 empty lines\): give one prompt for each image"):
        run(given, rewards=["words"])


def test_one_picture(given):
    for file in sorted((given / "pictures").iterdir())[1:]:
        file.unlink()
    write_prompts(given / "prompts.txt", 1)
    run(given)
    found = json.loads((given / "scores.json").read_text())
    assert found["scores"]["words"] == [1] and found["summary"]["words"]["mean"] == 1
    assert found["summary"]["words"]["se"] is None  # one number has no spread


def test_a_killed_run_goes_on_where_it_was(given, monkeypatch):
    monkeypatch.setattr(scorers, "BATCH", 2)
    read = scorers.read_images

    def killed_at_the_end(files):
        if any(file.name == "004.png" for file in files):
            raise KeyboardInterrupt
        return read(files)

    monkeypatch.setattr(scorers, "read_images", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(given, rewards=["red"])
    assert len(scored_prompts(given / "scorers.py")) == 4
    assert not (given / "scores.json").exists()
    monkeypatch.setattr(scorers, "read_images", read)
    run(given, rewards=["red"])
    asked = scored_prompts(given / "scorers.py")
    assert asked[:4] == [" ".join(["word"] * i + [f"p{i}"]) for i in range(4)]
    assert asked[4:] == ["word word word word p4"]
    assert len(json.loads((given / "scores.json").read_text())["scores"]["red"]) == N


def test_processes_share_the_images(given):
    assert "3 of 5 are there" in run(given, "--shard", "0/2")
    assert not (given / "scores.json").exists()
    run(given, "--shard", "1/2")
    assert json.loads((given / "scores.json").read_text())["scores"]["words"] == [1, 2, 3, 4, 5]


def test_a_changed_picture_or_scorer_is_scored_again(given):
    run(given, "--shard", "0/1")  # keeps its work
    file = given / "scorers.py"
    file.write_text(file.read_text().replace("len(prompt.split())", "-1.0"))
    run(given, "--shard", "0/1")
    assert json.loads((given / "scores.json").read_text())["scores"]["words"] == [-1] * N


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "FOLDER"], "is a folder"),
        (["--prompts", "nowhere.txt"], "does not exist"),
        (["--images", "nowhere"], "there is no folder"),
        (["--reward", "red=x.py:red"], "two rewards are called 'red'"),
        (["--reward", "other=x.py:red"], "no file x.py"),
        (["--reward", "x="], "NAME=PATH"),
    ],
)
def test_bad_input_is_one_sentence(given, change, message):
    change = [str(given) if part == "FOLDER" else part for part in change]
    with pytest.raises(UserError, match=message):
        run(given, *change)


def test_nothing_to_measure(given):
    with pytest.raises(UserError, match="leaves nothing to measure"):
        run(given, rewards=[])


@pytest.mark.slow
def test_processes_of_one_program_share_by_themselves(given):
    """Two processes with one command, as on two hosts; the first writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    argv = ["--images", given / "pictures", "--prompts", given / "prompts.txt", "--out", given / "scores.json"]
    argv += ["--reward", f"red={given / 'scorers.py'}:red"]
    command = [sys.executable, "-m", "dmdr_jax.evaluate", *map(str, argv)]
    place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, env={**os.environ, **place, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    tables = [process.communicate(timeout=600)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("| red " in table for table in tables)
    assert json.loads((given / "scores.json").read_text())["scores"]["red"] == pytest.approx(np.arange(N) * 10 / 255)
    assert sorted(scored_prompts(given / "scorers.py")) == sorted(write_prompts(given / "prompts.txt", N))
