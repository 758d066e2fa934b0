"""What tables and figures make of records: against numbers worked out by hand."""

import json
import math
import re
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.experiments import charts, figures, records, results, statistics, tables
from dmdr_jax.experiments.spec import Bars, Curves, Experiment, Logged, Pareto, Pretraining, Row, Sweep
from dmdr_jax.shapes.prompts import TAGS

ROOT = Path(__file__).parents[1]
TEACHER = "shapes:sd3,steps=25"

# --- statistics ----------------------------------------------------------------------------------------------------


def test_the_error_of_a_crossed_mean_by_hand():
    """Two seeds, three prompts: mean squares by hand."""
    x = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]])
    # Means: 2.5; seeds 2, 3; prompts 1.5, 3, 3. MS_seeds = 3 * .5 / 1, MS_prompts = 2 * 1.5 / 2, MS_both = 1 / 2.
    found = statistics.crossed(x, [0, 1, 2])
    assert found.mean == 2.5
    assert found.se == pytest.approx(math.sqrt((1.5 + 1.5 - 0.5) / 6))
    assert found.freedom == pytest.approx(2.5**2 / (1.5**2 / 1 + 1.5**2 / 2 + 0.5**2 / 2))


def test_the_error_of_a_crossed_mean_is_right_on_average():
    """Seeds, prompts of one to three images, noise: the estimated variance against the true one."""
    rng, units = np.random.default_rng(0), np.repeat(np.arange(24), np.tile([1, 2, 3], 8))
    counts = np.bincount(units)
    true = 0.3**2 / 3 + 0.5**2 * (counts**2).sum() / len(units) ** 2 + 1.0 / (3 * len(units))
    estimates, means = [], []
    for _ in range(1500):
        prompts = rng.normal(0, 0.5, len(counts))[units]
        x = rng.normal(0, 0.3, (3, 1)) + prompts + rng.normal(0, 1, (3, len(units)))
        found = statistics.crossed(x, units)
        estimates.append(found.se**2)
        means.append(found.mean)
    assert np.var(means) == pytest.approx(true, rel=0.12)
    assert np.mean(estimates) == pytest.approx(true, rel=0.06)


def test_one_seed_has_the_error_of_its_prompts():
    verdicts = np.array([[True, False, True, True]])
    assert statistics.crossed(verdicts, range(4)).se == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    alike = statistics.crossed(np.ones((3, 4), bool), range(4))
    assert alike.mean == 1.0 and alike.se > 0.1


# --- tables --------------------------------------------------------------------------------------------------------


def made_record(row, seed, strict, judge, **more):
    """A record by hand: verdicts and judge's scores of as many images, each of its own prompt."""
    n = len(strict)
    images = {
        "prompts": "x",
        "units": list(range(n)),
        "strict": "".join(map(str, strict)),
        "judge/shapes_judge": [round(1000 * j) for j in judge],
    }
    measures = {"strict": [float(np.mean(strict)), 0.1, n], "background_entropy": [1.0 + 0.1 * (seed or 0), 0.05, n]}
    cost = {"updates": 100, "total_cpu_seconds": 60.0, "flops_training": 2e12} if seed is not None else {}
    common = {
        "format": 1, "experiment": "toy", "row": row, "seed": seed, "cost": cost, "model": {"nfe": 4}, "teacher": {},
        "environment": {"versions": {"jax": "1"}, "commit": "abc", "processor": "1 x p", "devices": "1 x cpu"},
        "evaluation": {"world": "small", "per_tag": 1, "per_prompt": 1, "seed": 1},
    }  # fmt: skip
    return common | {"measures": measures, "images": images} | more


@pytest.fixture
def written(tmp_path):
    """Records of a teacher and of two rows with two seeds."""
    judge = [0.1, 0.2, 0.3, 0.4]
    along = {"steps": [50, 100, 150], "strict": [[0.5, 0.01, 0, 0], [0.7, 0.01, 0, 0], [0.3, 0.01, 0, 0]]}
    logs = [{"step": [1, 2, 3, 4, 5, 6], "reward/r": [None, x, x, x + 1, x + 1, x + 1]} for x in (1.0, 3.0)]
    made = [
        made_record("teacher", None, [1, 0, 0, 0], judge),
        made_record("a", 0, [1, 1, 0, 0], judge, along=along, curves=logs[0]),
        made_record("a", 1, [1, 1, 1, 0], judge, curves=logs[1]),
        made_record("b", 0, [0, 1, 0, 0], judge),
        made_record("b", 1, [1, 0, 0, 0], judge),
    ]
    for record in made:
        file = records.record_file(tmp_path, "toy", record["row"], record["seed"])
        file.parent.mkdir(exist_ok=True)
        file.write_text(records.as_text(record))
    return tmp_path


ROWS = (Row("teacher", model="m"), Row("a", "row a", model="m", at=1.0), Row("b", model="m", at=20.0))
TOY = Experiment("toy", ROWS, TEACHER, (0, 1), pairs=(("a", "b"), ("a", "teacher")))


def test_tables_say_what_the_records_hold(written):
    teacher, a, b = tables.lines_of(TOY, written)
    assert tables.value(a, "strict").mean == 0.625
    # V_seeds = .125^2, V_prompts = var(1, 1, .5, 0) / 4, V_both = sum(residuals^2) / (1 * 3) / (2 * 4).
    residuals = np.array([[0.125, 0.125, -0.375, 0.125], [-0.125, -0.125, 0.375, -0.125]])
    variance = 0.125**2 + np.var([1, 1, 0.5, 0], ddof=1) / 4 - (residuals**2).sum() / 3 / 8
    assert tables.value(a, "strict").se == pytest.approx(math.sqrt(variance))
    entropy = tables.value(a, "background_entropy")
    assert entropy.mean == pytest.approx(1.05)
    assert entropy.se == pytest.approx(math.sqrt(0.005 / 2 + 0.05**2))
    table = tables.main_table(TOY, [teacher, a, b])
    assert re.search(r"\| row a +\| +4 \| +2 \| +0\.625 ± 0\.\d+ \| +0\.2500 ± 0\.\d+ \| +1\.050 ± 0\.071 \|", table)
    assert re.search(r"\| teacher +\| +4 \| +– \| +0\.250 ± 0\.250", table)
    assert "lenient" not in table  # nothing was measured


def test_pairs_are_compared_on_the_same_seed_and_image(written):
    teacher, a, b = tables.lines_of(TOY, written)
    found = tables.difference(a, b, "strict")
    d = np.array([[1, 0, 0, 0], [0, 1, 1, 0]], float)
    assert found.mean == d.mean() == 0.375
    assert found.se == pytest.approx(statistics.crossed(d, range(4)).se)
    # The teacher meets every seed.
    assert tables.difference(a, teacher, "strict").mean == 0.375
    assert tables.difference(a, a, "judge/shapes_judge").mean == 0.0
    assert tables.difference(a, b, "lenient") is None
    text = tables.pair_table(TOY, [teacher, a, b])
    assert "row a − b" in text and "row a − teacher" in text and "+0.375 [" in text


def test_records_that_were_asked_other_things_are_not_compared(written):
    file = records.record_file(written, "toy", "b", 0)
    file.write_text(file.read_text().replace('"prompts": "x"', '"prompts": "y"'))
    with pytest.raises(UserError, match="rows a and b were judged on different prompts"):
        tables.lines_of(TOY, written)
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        tables.lines_of(TOY, written)


def test_when_a_measure_fell():
    assert tables.first_fall([0.5, 0.7, 0.6, 0.3, 0.2], [0.02] * 5, 1) == 2
    assert tables.first_fall([0.5, 0.7, 0.3, 0.7], [0.02] * 4, 1) is None  # it came back
    assert tables.first_fall([5.0, 9.0, 9.0], [0.5] * 3, -1) == 1
    assert tables.first_fall([0.5, 0.7], [0.2] * 2, -1) is None


def test_the_alarm_stands_above_what_fell():
    along = {"steps": [50], "strict": [[0.5, 0.1, 0.0, 0.1]]}
    alarm = {"step": 150, "best": 50, "reason": "diversity."}
    watches = [None, {"step": 200, "alarm": None}, {"step": 50, "alarm": alarm}]
    seeds = [{"seed": i, "along": along, "watch": watch} for i, watch in enumerate(watches)]
    row = Row("a", model="m")
    [head, _, first, *_] = tables.monitor_table([tables.Line(row, seeds)]).splitlines()
    assert head.split("|")[2].strip() == "a" and [cell.strip() for cell in first.split("|")[1:3]] == [
        "alarm while it trained",
        f"{tables.MISSING}, never, 150",
    ]
    assert "alarm" not in tables.monitor_table([tables.Line(row, seeds[:1])])


FIGURES = (
    Bars(("strict", "background_entropy")),
    Curves(("strict",), x="flops"),
    Pareto("strict", "flops"),
    Sweep(("strict",), "dose"),
    Curves(("junk",)),
    Logged("reward/r", (("a",), ("b",))),
)


def test_the_page_is_made_from_the_records_alone(written, tmp_path, capsys):
    page, file = tmp_path / "docs/results.md", tmp_path / "toy.py"
    rows = "(Row('a', 'row a', model='m', at=1.0), Row('b', model='m', at=20.0))"
    file.write_text(
        "from dmdr_jax.experiments.spec import *\nfrom dmdr_jax.experiments.spec import Logged, Sweep\n"
        "def get_experiment(name='toy'):\n"
        f"    return Experiment(name, {rows}, {TEACHER!r}, (0, 1), pairs=(('a', 'b'),), figures={FIGURES!r})\n"
    )
    page.parent.mkdir()
    part = "<!-- results of {0} -->\n{1}<!-- end of {0} -->\n"
    before = "# Mine\n" + part.format(file, "stale\n") + "words\n" + part.format(f"{file}:none", "")
    page.write_text(before)
    former = page.parent / "images/results/toy_bars_9.svg"
    former.parent.mkdir(parents=True)
    former.write_text("<svg/>")
    program = lambda *more: results.main(results.parser().parse_args([f"--page={page}", f"--records={written}", *more]))
    assert program("--check") == 1 and page.read_text() == before
    assert program() == 0 and program("--check") == 0
    text = page.read_text()
    assert text.startswith("# Mine\n") and "\nwords\n" in text and "stale" not in text
    assert f"<!-- results of {file}:none -->\n<!-- end of" in text  # no records: empty
    assert "worse for good from step" in text and "| 150" in text
    assert "python -m dmdr_jax.sweep --experiment=" in text and "commit abc" in text
    assert re.search(r"\| row a +\| +100 \| +2 \| +1 \|", text)  # updates, TFLOP, CPU minutes
    drawn = sorted(path.name for path in (page.parent / "images/results").iterdir())
    assert drawn == ["toy_bars_0.svg", "toy_curves_1.svg", "toy_logged_5.svg", "toy_pareto_2.svg", "toy_sweep_3.svg"]
    assert all(f"(images/results/{name})" in text for name in drawn)
    capsys.readouterr()
    page.write_text("<!-- results of x.py -->\n")
    with pytest.raises(UserError, match=r"has no <!-- end of x\.py -->"):
        program()


def test_the_committed_page_is_what_the_committed_records_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert results.main(results.parser().parse_args(["--check"])) == 0, capsys.readouterr().out


# --- figures -------------------------------------------------------------------------------------------------------


def test_what_training_logged_is_averaged_over_entries_and_seeds(written):
    """Entries that all seeds have, three to a point; the error is between the seeds."""
    (point,) = figures._as_logged(tables.lines_of(TOY, written)[1], "reward/r")
    assert (point.x, point.y) == (3.0, pytest.approx(2.0 + 1 / 3)) and point.error == pytest.approx(1.0)
    assert figures._as_logged(tables.lines_of(TOY, written)[2], "reward/r") == ()


def test_how_a_teacher_was_trained_is_drawn_from_its_folder(tmp_path):
    rows = [{"step": 10 * i, "loss": 1 / i, "strict": i / 5, **dict.fromkeys(TAGS, i / 9)} for i in (1, 2, 3)]
    (tmp_path / "training.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    figure = Pretraining(str(tmp_path))
    verdicts, loss = figures._pretraining(figure, [])
    for panel, curves in ((verdicts, 1 + len(TAGS)), (loss, 1)):
        circles = elements([panel], "circle")
        across = [float(circle.get("cx")) for circle in circles[:3]]
        assert len(circles) == 3 * curves and across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.1)
    down = [float(circle.get("cy")) for circle in elements([loss], "circle")]
    assert (down[1] - down[0]) / (down[2] - down[0]) == pytest.approx(0.5 / (2 / 3), abs=1e-2)
    assert "single object" in [e.text for e in elements([verdicts], "text")]
    assert figures.draw(figure, TOY, []).startswith("<svg") and str(tmp_path) in figures.describe(figure)


def elements(panels, kind, name="*"):
    tree = ET.fromstring(charts.write_svg(panels, "label & more"))
    return [e for e in tree.iter("{http://www.w3.org/2000/svg}" + kind) if name == "*" or e.get("class") == name]


def test_bars_are_as_long_as_their_numbers():
    panel = charts.bar_panel("t", [charts.Bar("x", 2.0, 0.5, (1.5, 2.5)), charts.Bar("<y>", -1.0)])
    first, second = [e for e in elements([panel], "rect") if e.get("rx")]
    scale = float(first.get("width")) / 2.0
    assert float(second.get("width")) == pytest.approx(scale, abs=0.11)
    assert float(second.get("x")) + float(second.get("width")) == pytest.approx(float(first.get("x")), abs=0.11)
    [whisker] = elements([panel], "line", "whisker")
    assert float(whisker.get("x2")) - float(whisker.get("x1")) == pytest.approx(scale, abs=0.11)
    assert len(elements([panel], "circle", "seed")) == 2


@pytest.mark.parametrize("log_x", [False, True])
def test_points_lie_where_their_numbers_say(log_x):
    xs = (1.0, 10.0, 100.0)
    series = charts.Series("s", tuple(charts.Point(x, y, 0.1) for x, y in zip(xs, (3.0, 1.0, 2.0))))
    circles = elements([charts.xy_panel("t", [series], "x", log_x)], "circle")
    across = [float(c.get("cx")) for c in circles]
    down = [float(c.get("cy")) for c in circles]
    ratio = (across[1] - across[0]) / (across[2] - across[0])
    assert ratio == pytest.approx(0.5 if log_x else 1 / 11, abs=1e-3)
    assert (down[1] - down[2]) / (down[1] - down[0]) == pytest.approx(0.5, abs=1e-2)


def test_a_level_lies_where_its_number_says_and_is_in_sight():
    series = charts.Series("s", (charts.Point(0, 1.0), charts.Point(1, 2.0)))
    panel = charts.xy_panel("t", [series], "x", level=("teacher", 4.0))
    [level] = elements([panel], "line", "level")
    low, high = (float(c.get("cy")) for c in elements([panel], "circle"))
    assert (low - float(level.get("y1"))) / (low - high) == pytest.approx(3.0, abs=1e-2)
    assert level.get("y1") == level.get("y2") and float(level.get("y1")) > charts.TOP
    assert "teacher" in [e.text for e in elements([panel], "text")]


def test_the_teachers_level_is_what_differences_are_from():
    rows = {"strict": [[0.3, 0.1, -0.2, 0.1]], "frechet/teacher": [[6.0, 0.1, None, None]]}
    lines = [types.SimpleNamespace(records=[{}, {"along": {"steps": [50], **rows}}])]
    assert figures._teacher_level(lines, "strict") == ("teacher", pytest.approx(0.5))
    assert figures._teacher_level(lines, "frechet/teacher") is None


def test_names_beside_points_do_not_cover_each_other():
    points = tuple(
        charts.Point(x, 1.0, name=name) for x, name in ((1, "point 1"), (1.2, "point 2"), (1.4, "point 3"), (9, ""))
    )
    panel = charts.xy_panel("", [charts.Series("", points, joined=False)], "x")
    names = [e for e in elements([panel], "text") if e.text.startswith("point")]
    heights = sorted(float(e.get("y")) for e in names)
    assert len(heights) == 3 and min(np.diff(heights)) >= charts.NAME_HEIGHT - 0.1


def test_many_points_have_numbers_and_their_names_stand_below():
    points = tuple(charts.Point(x, x % 3, name=f"point {x}") for x in range(1, charts.NAMES + 2))
    panel = charts.xy_panel("", [charts.Series("", points, joined=False)], "x")
    found = elements([panel], "text")
    names = [e for e in found if e.text.startswith("point")]
    assert [e.text for e in names] == [point.name for point in points]
    assert float(names[0].get("y")) > charts.HEIGHT and float(names[-1].get("y")) < panel.height
    for point, name in zip(points, names):
        number = point.name.removeprefix("point ")
        beside = [e for e in found if e.text == number and e.get("y") == name.get("y")]
        assert len(beside) == 1 and sum(e.text == number for e in found) >= 2
    few = charts.xy_panel("", [charts.Series("", points[:3], joined=False)], "x")
    assert few.height == charts.HEIGHT


def test_the_front_is_what_nothing_cheaper_reaches():
    points = [charts.Point(x, y) for x, y in ((3, 0.5), (1, 0.2), (2, 0.1), (4, 0.4), (5, 0.9))]
    assert [(p.x, p.y) for p in figures._front(points, 1)] == [(1, 0.2), (3, 0.5), (5, 0.9)]
    assert [(p.x, p.y) for p in figures._front(points, -1)] == [(1, 0.2), (2, 0.1)]


# --- records and costs ---------------------------------------------------------------------------------------------


def test_curves_are_thinned_to_means():
    rows = [{"step": i, "dm/loss": float(i), "reward/x": None if i % 2 else 1.0, "other": 1.0} for i in range(1, 241)]
    curves = records.thin_curves(rows)
    assert len(curves["step"]) == records.POINTS and set(curves) == {"step", "dm/loss", "reward/x"}
    assert curves["step"][:2] == curves["dm/loss"][:2] == [2.5, 6.5] and set(curves["reward/x"]) == {1.0}
    assert records.thin_curves([]) == {}


def test_operations_are_counted_through_loops_and_derivatives():
    import jax
    import jax.numpy as jnp

    from dmdr_jax.experiments.cost import count

    w, x = jnp.zeros((5, 7, 7)), jnp.zeros((3, 7))
    one = 2 * 3 * 7 * 7

    def deep(w, x):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0].sum()

    assert count(jax.make_jaxpr(deep)(w, x)) == 5 * one
    assert count(jax.make_jaxpr(jax.jit(jax.grad(deep)))(w, x)) == 3 * 5 * one
    assert count(jax.make_jaxpr(jax.grad(jax.checkpoint(lambda w, x: jnp.tanh(x @ w[0]).sum())))(w, x)) >= 2 * one
    image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 2, 6))
    convolve = lambda a, b: jax.lax.conv_general_dilated(
        a, b, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert count(jax.make_jaxpr(convolve)(image, kernel)) == 2 * (2 * 6 * 6 * 6) * (3 * 3 * 2)
    branches = lambda p, a: jax.lax.cond(p, lambda a: a @ a, lambda a: a, a)
    assert count(jax.make_jaxpr(branches)(True, jnp.zeros((4, 4)))) == 2 * 4**3
