"""The page: it loads nothing, says what the numbers say, and is there at any time of a run."""

import json
import re
from html import escape

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.curves import Series, line_chart, series_of, smooth, thin, ticks
from dmdr_jax.evaluation.report import joint_start, write_report
from dmdr_jax.evaluation.results import Column, read
from dmdr_jax.evaluation.table import Estimate
from dmdr_jax.evaluation.verdict import caution, finding, findings, primary_column

REWARD = {"path": "shapes:rewards/shapes_clip", "weight": 0.5, "start": 100, "ramp": 20}
CONFIG = {
    "model": "shapes:sd3",
    "steps": 300,
    "batch": 32,
    "seed": 30,
    "student": {"steps": 4},
    "generator": {"kind": "full"},
    "rewards": {"shapes_clip": REWARD, "unused": {**REWARD, "weight": 0.0, "start": 0}},
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run <1>"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": CONFIG, "versions": {"jax": "1"}, "devices": ["cpu:0"]}))
    rows = [
        {"step": i, "dm/score_gap": 1 / i, "fake/loss": 0.5, **({"reward/shapes_clip": i / 300} if i > 100 else {})}
        for i in range(1, 201)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("teacher", "student_000050", "student_000100"):
        Image.fromarray(np.zeros((34, 34, 3), np.uint8)).save(folder / "samples" / f"{name}.png")
    return folder


def page(run, evaluation, tmp_path):
    write_report(run, evaluation, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_loads_nothing_from_elsewhere(run, evaluation, tmp_path):
    html = page(run, evaluation, tmp_path)
    loads = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']([^"']*)""", html)
    assert loads
    assert all(load.startswith("data:image/png;base64,") for load in loads)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", html)
    assert "default-src 'none'" in html


def test_page_shows_pictures_curves_table_and_commands(run, evaluation, tmp_path):
    html = page(run, evaluation, tmp_path)
    assert html.count('class="card"') > 15  # up to four prompts of each of six tasks; some have fewer
    assert html.count('class="small') >= 3 * html.count('class="card"')
    assert html.count("<svg") == 4  # three curves, and bars of the tasks
    assert html.count("rewards set in") == 3
    assert re.search(r"<td>student</td><td>2</td>.*0\.\d+<small>±0\.\d+</small>", html)
    for program in ("train", "sample", "export", "evaluate", "report"):
        assert f"python -m dmdr_jax.{program}" in html
    assert "run &lt;1&gt;" in html
    assert "run <1>" not in html


def test_page_marks_decided_differences(run, evaluation, tmp_path):
    html = page(run, evaluation, tmp_path)
    student = re.search(r"<td>student</td>.*?</tr>", html)[0]
    assert "▲" in student
    assert "▼" not in student
    assert "▲" not in re.search(r"<td>teacher4</td>.*?</tr>", html)[0]


def test_page_without_evaluation(run, tmp_path):
    html = page(run, None, tmp_path)
    assert "200 / 300" in html
    assert "<h2>Verdict" not in html
    assert "<h2>Table" not in html
    assert "student at step 100" in html


def test_page_of_a_run_that_just_began(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": CONFIG}))
    html = page(tmp_path, None, tmp_path)
    assert "0 / 300" in html
    assert "No step is written yet" in html


def test_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        write_report(tmp_path, None, tmp_path / "report.html")


def test_half_written_preview_is_left_out(run, tmp_path):
    (run / "samples" / "student_000100.png").write_bytes(b"\x89PNG")
    assert "student at step 100" not in page(run, None, tmp_path)


# --- the verdict ---------------------------------------------------------------------------------------------------


def test_findings_start_with_the_baseline_and_name_the_cost(evaluation):
    first, second = findings(read(evaluation))
    assert (first.other, second.other) == ("teacher4", "teacher")
    assert first.text.startswith("student (2 steps, 2 NFE) against teacher4 (2 steps, 2 NFE): better")


def model(name="m", strict=0.6, reward=0.0, entropy=1.0, gains=()):
    """A model with standard errors of 0.01 on everything; ``gains`` are its differences from model "o"."""
    summary = {"strict": strict, "reward/r": reward, "color_entropy": entropy}
    return {
        "name": name,
        "grid": [1.0, 0.0],
        "nfe": 1,
        "summary": {k: Estimate(v, 0.01, 9) for k, v in summary.items()},
        "differences": {"o": {k: Estimate(v, 0.01, 9) for k, v in zip(summary, gains)}},
    }


COLUMNS = [Column("strict", "strict", 1), Column("reward/r", "r", 1), Column("color_entropy", "color", 1)]
OTHER = model("o")


@pytest.mark.parametrize(
    ("gain", "outcome"), [(0.03, "better"), (-0.03, "worse"), (0.015, "undecided"), (0, "undecided")]
)
def test_verdict_goes_both_ways(gain, outcome):
    got = finding(COLUMNS, model(strict=0.6 + gain, gains=(gain, 0, 0)), OTHER)
    assert got.outcome == outcome
    assert f"m (1 step, 1 NFE) against o (1 step, 1 NFE): {outcome}" in got.text
    assert f"{gain:+.3f} ± 0.010" in got.text


@pytest.mark.parametrize(
    ("strict", "reward", "entropy", "hacked"),
    [(-0.1, 0.1, 1.0, True), (0.1, 0.1, 1.0, False), (0.0, 0.1, 0.3, True), (-0.1, 0.0, 1.0, False)],
)
def test_reward_hacking_is_called_by_its_name(strict, reward, entropy, hacked):
    student = model("m", 0.6 + strict, reward, entropy, gains=(strict, reward, entropy - 1))
    assert ("reward hacking" in finding(COLUMNS, student, OTHER).text) == hacked


@pytest.mark.parametrize(("change", "collapsed"), [(-0.7, True), (-0.01, False)])
def test_collapse_must_exceed_its_error(change, collapsed):
    student = model("m", entropy=0.3, gains=(0, 0, change))
    assert ("Diversity collapsed" in finding(COLUMNS, student, OTHER).text) == collapsed


def test_a_weak_teacher_is_a_caution():
    assert "0.300" in caution({"models": [model(strict=0.3)]})
    assert caution({"models": [model(strict=0.6)]}) == ""


def test_what_decides_where_there_is_no_verifier():
    reward, judge = Column("reward/a", "a", 1), Column("judge/b", "b", 1)
    assert primary_column([reward, judge]) is judge
    assert primary_column([reward]) is reward
    assert primary_column([]) is None


# --- curves --------------------------------------------------------------------------------------------------------


def test_series_leave_out_what_was_not_logged():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": None, "b": 5.0}, {"step": 3, "a": 2.0}]
    a, b = series_of(rows, {"a": "A", "b": "B", "c": "C"})
    assert (a.name, a.steps.tolist(), a.values.tolist()) == ("A", [1, 3], [1, 2])
    assert b.steps.tolist() == [2]


def test_smoothing_keeps_straight_lines_and_levels_noise():
    line = np.linspace(0, 1, 200)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    assert smooth(line)[0] > line[0]  # half a window at the end: no last point stands alone
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise).std() < 0.2 * noise.std()


def test_thinning_keeps_the_mean():
    x = np.arange(10_000.0)
    thinned = thin(Series("x", x, x))
    assert len(thinned.steps) == 400
    assert thinned.values.mean() == pytest.approx(x.mean())


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-3, 307, 6) == [0, 100, 200, 300]
    assert all(0.013 <= t <= 0.019 for t in ticks(0.013, 0.019, 6))
    assert len(ticks(0.013, 0.019, 6)) > 2


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1.0, -1.0]])
def test_chart_of_any_curve_is_finite(values):
    svg = line_chart([Series("x", np.arange(len(values)) + 1.0, np.array(values))], "x", len(values), (1, "here"))
    assert "nan" not in svg
    assert "inf" not in svg
    assert "here" in svg


def test_joint_stage_starts_with_the_first_reward_that_counts():
    assert joint_start(CONFIG) == 100
    assert joint_start({"rewards": {}}) is None


# --- what was watched ----------------------------------------------------------------------------------------------


def watch(run, alarm):
    rows = [
        {"step": i, "watch/z_trained": i / 50, "watch/z_held_out": -i / 90, "watch/diversity_share": 1.0}
        for i in range(0, 201, 50)
    ]
    with (run / "metrics.jsonl").open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    (run / "best.json").write_text(json.dumps({"step": 50, "alarm": alarm}))
    for name in ("teacher", "000050", "000150", "000200"):
        Image.fromarray(np.zeros((34, 34, 3), np.uint8)).save(run / "samples" / f"canary_{name}.png")


def test_page_shows_the_alarm_and_the_canaries(run, tmp_path):
    assert "<h2>Over-optimisation" not in page(run, None, tmp_path)
    watch(run, {"step": 150, "best": 50, "reason": "trained rewards are <ahead>."})
    html = page(run, None, tmp_path)
    assert (
        "Over-optimised at step 150: trained rewards are &lt;ahead&gt;. The best checkpoint is that of step 50" in html
    )
    assert html.count(">alarm</text>") == 2  # the gap's curves and the diversity's
    for text in ("the teacher's canaries", "canaries at the best step, 50", "canaries at the latest step, 200"):
        assert html.count(f"<figcaption>{escape(text)}") == 1
    assert "step, 150" not in html


def test_page_says_that_there_was_no_alarm(run, tmp_path):
    watch(run, None)
    assert "No alarm up to step 200. The best checkpoint is that of step 50." in page(run, None, tmp_path)


def test_alarms_of_several_runs_side_by_side(run, tmp_path):
    import shutil

    watch(run, {"step": 150, "best": 50, "reason": "diversity is lost."})
    other = shutil.copytree(run, tmp_path / "other")
    (other / "best.json").write_text(json.dumps({"step": 200, "alarm": None}))
    html = page([run, other], None, tmp_path)
    assert "Over-optimised at step 150" in html and "No alarm up to step 200" in html
    assert "Reward gap of the canaries" not in html and "Diversity of the canaries" in html  # of what is there


def test_a_run_that_is_named_twice_is_one_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert "What differs" not in page([run, run.name, f"{run}/"], None, tmp_path)
