"""Any number of runs and models on one page."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation.bars import bar_chart
from dmdr_jax.evaluation.comparison import run_names
from dmdr_jax.evaluation.pictures import Pictures, shortened
from dmdr_jax.evaluation.report import write_report
from dmdr_jax.evaluation.results import Column
from dmdr_jax.evaluation.runs import Run
from dmdr_jax.evaluation.sections import by_task, extremes
from dmdr_jax.evaluation.table import Estimate
from dmdr_jax.report import main, parser

REWARD = {"path": "r", "weight": 0.5, "start": 0, "ramp": 0}


def make_run(folder, seed, values):
    folder.mkdir(parents=True)
    config = {"model": "m", "steps": 9, "seed": seed, "rewards": {"clip": REWARD}, "student": {"steps": 4}}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rows = [{"step": i + 1, "reward/clip": value, "dm/score_gap": 0.1} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page(runs, evaluation, tmp_path):
    write_report(runs, evaluation, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_three_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name / "run", seed, [0.1, 0.2]) for name, seed in (("a", 1), ("b", 2), ("c", 2))]
    html = page(runs, None, tmp_path)
    assert "3 runs side by side" in html
    assert re.search(r"<td>seed</td><td>1</td><td>2</td><td>2</td>", html)
    assert "<td>steps</td>" not in html  # they agree
    assert html.count("<svg") == 2  # the reward, the gap
    assert html.count('class="line s2"') == 2
    assert not re.search(r"https?://|<script|<link", html)


def test_the_program_prints_in_what_runs_differ(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, seed, [0.1])) for name, seed in (("a", 1), ("b", 20))]
    document = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**document, "versions": {"jax": "0.9"}, "commit": "abc"}))
    main(parser().parse_args([*runs, "--out", str(tmp_path / "report.html")]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["a", "b"] and lines[-1] == [str(tmp_path / "report.html")]
    assert lines[1:-1] == [
        ["steps", "done", "1", "/", "9", "1", "/", "9"],
        ["seed", "1", "20"],
        ["versions.jax", "–", "0.9"],
        ["commit", "–", "abc"],
    ]


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    runs = [Run.read(make_run(tmp_path / name, 0, [])) for name in ("a/run", "b/run")]
    assert run_names(runs) == ["a/run", "b/run"]
    assert run_names(runs[:1]) == ["run"]


def test_runs_with_an_evaluation(evaluation, tmp_path):
    runs = [make_run(tmp_path / name, i, [0.1]) for i, name in enumerate("ab")]
    html = page(runs, evaluation, tmp_path)
    for heading in ("Verdict", "Side by side", "Table", "Task by task", "Best and worst", "What differs", "Training"):
        assert f"<h2>{heading}</h2>" in html


def test_an_evaluation_alone(evaluation, tmp_path):
    html = page([], evaluation, tmp_path)
    assert "3 models side by side" in html
    assert "What differs" not in html
    with pytest.raises(UserError, match="name a run, or an evaluation"):
        page([], None, tmp_path)


def test_command_line():
    assert parser().parse_args(["a", "b"]).runs == ["a", "b"]
    assert parser().parse_args(["--evaluation", "e"]).runs == []


# --- pictures out of galleries -----------------------------------------------------------------------------------


def estimates(values):
    return Estimate(float(np.mean(values)), 0.1, len(values))


@pytest.fixture
def galleries(tmp_path):
    """Folder and results of two models on six prompts, whose images lie in galleries; one image is gone."""
    scores = {"teacher": [1.0] * 6, "student": [1.5, 0.0, 1.0, 9.0, 1.0, -3.0]}
    models = []
    for name, values in scores.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (300, 300), (i * 40, 0, 0)).save(tmp_path / "images" / name / f"{i:05d}.png")
        row = {"name": name, "grid": [1.0, 0.0], "nfe": 1, "guidance": 1.0, "images_per_second": None}
        row |= {"gallery": f"images/{name}", "files": [f"{i:05d}.png" for i in range(6)]}
        row |= {"summary": {"judge/p": estimates(values)}, "differences": {}}
        models.append(row | {"images": [{"judge/p": value} for value in values]})
    models[1]["differences"] = {"teacher": {"judge/p": estimates(np.subtract(*scores.values()) * -1)}}
    (tmp_path / "images" / "teacher" / "00003.png").unlink()
    results = {
        "title": "Evaluation",
        "caption": "c",
        "command": "python",
        "settings": {"seed": 0},
        "environment": {},
        "seconds": 1.0,
        "columns": [Column("judge/p", "pick", 1, 2, "scores")],
        "compared_with": ["teacher"],
        "prompts": [{"prompt": f"prompt {i}"} for i in range(6)],
        "models": models,
        "floor": None,
    }
    files.write(tmp_path, results)
    return tmp_path, files.read(tmp_path)


def test_pictures_come_from_galleries(galleries):
    folder, results = galleries
    found = Pictures(folder, results)
    assert found.index == [0, 1, 2, 4, 5]
    assert found.get(1, 4).getpixel((5, 5)) == (160, 0, 0)
    assert 3 not in found


def test_best_and_worst_prompts_by_the_difference(galleries):
    folder, results = galleries
    html = extremes(folder, results)
    order = re.findall(r"<figcaption><b>([^<]*)</b> prompt (\d)</figcaption>", html)
    assert order[0] == ("+0.50", "0")  # prompt 3 gained more, but its picture is gone
    assert order[5] == ("-4.00", "5")
    assert order[6] == ("-1.00", "1")
    assert "data:image/jpeg;base64," in html  # large pictures are reduced
    assert "picked by that number" in html


def test_page_of_galleries(galleries, tmp_path):
    html = page([], galleries[0], tmp_path)
    assert html.count('class="card"') == 5 + 2 * 5


def test_a_long_prompt_is_cut():
    assert len(shortened("word " * 100)) <= 240
    assert shortened("short") == "short"


# --- bars --------------------------------------------------------------------------------------------------------


def test_columns_of_single_tasks_are_gathered():
    columns = [Column("strict", "strict", 1), Column("strict/colors", "colors", 1), Column("judge/p", "pick", 1)]
    columns += [Column("judge/p@anime", "anime", 1), Column("frechet/f/teacher", "F", -1)]
    assert {k: [c.key for c in v] for k, v in by_task(columns).items()} == {
        "strict": ["strict/colors"],
        "pick": ["judge/p@anime"],
    }


def test_bars_stand_on_zero_unless_all_are_far_from_it():
    svg = bar_chart(["a", "b"], [[(1.0, 0.1), (2.0, float("nan"))], [(0.5, 0.0), None]], "x")
    heights = [float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', svg)]
    assert heights == pytest.approx([heights[2] / 2, heights[2] / 4, heights[2]], abs=0.1)
    assert svg.count("whisker") == 2
    far = bar_chart(["a"], [[(22.0, 0.1)], [(22.4, 0.1)]], "x")
    low, high = (float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', far))
    assert high > 1.5 * low > 0
    below = bar_chart(["a"], [[(-1.0, 0.1)], [(1.0, 0.1)]], "x")
    down, up = (float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', below))
    assert down == pytest.approx(up, abs=0.2)
    assert "nan" not in svg + far + below
