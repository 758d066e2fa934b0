"""The evaluation program: its command line, and its way from images to files (the networks are left out)."""

import dataclasses
import re
import types

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation import run, shapes_eval
from dmdr_jax.evaluation.entries import Entry, parse_entries, parse_entry
from dmdr_jax.evaluation.run import Questions
from dmdr_jax.shapes.world import LARGE, SMALL
from tests.evaluation.fake_models import FakeModel, install

MODELS = ["--model", "teacher=a,steps=25,guidance=3", "--model", "student=b"]


@dataclasses.dataclass(frozen=True)
class DrawnElsewhere:
    """Stands for a model; the images come from `images_of`."""

    size: tuple[int, int] = (SMALL.size, SMALL.size)
    meta: None = None
    pipeline: types.SimpleNamespace = dataclasses.field(default_factory=lambda: types.SimpleNamespace(student=None))

    def recipe(self, steps, kernel, guidance, size):
        steps = steps or 4
        grid = tuple(np.linspace(1, 0, steps + 1).tolist())
        return types.SimpleNamespace(grid=grid, kernel=kernel or "ode", guidance=guidance or 1.0, nfe=steps)


def images_of(args, ask, entry, model, recipe):
    """The teacher draws what is asked, the student the first half of it and then nothing; ten images a second."""
    images = shapes_eval.floor_renders(SMALL, ask.records)
    if entry.name == "student":
        images[len(images) // 2 :] = 0.5
    return images, 10.0


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "open_models", lambda entries, dtype: [DrawnElsewhere() for _ in entries])
    monkeypatch.setattr(run, "_draw", images_of)
    return lambda *more: parser().parse_args(["--out", str(tmp_path / "out"), "--per_tag", "3", *MODELS, *more])


def test_entries():
    assert parse_entry("a=runs/x") == Entry("a", "runs/x")
    assert parse_entry("a=shapes:sd3,steps=4,kernel=cps(0.5),guidance=1.5") == Entry(
        "a", "shapes:sd3", 4, "cps(0.5)", 1.5
    )


@pytest.mark.parametrize("text", ["runs/x", "=x", "a=", "a b=x", "a=x,step=4", "a=x,steps=four", "a=x,guidance="])
def test_malformed_entries(text):
    with pytest.raises(UserError, match="--model"):
        parse_entry(text)


def test_names_are_distinct_and_the_baseline_is_one_of_them():
    with pytest.raises(UserError, match="two models are called 'a'"):
        parse_entries(["a=x", "a=y"])
    with pytest.raises(UserError, match="'c' is none of the models; they are: a, b"):
        parse_entries(["a=x", "b=y"], "c")


def test_from_command_line_to_files(arguments):
    args = arguments("--rewards", "none", "--judge", "none", "--keep", "6", "--seed", "3")
    table = run.evaluate(args)
    results = files.read(args.out)
    teacher, student = results["models"]
    assert (teacher["nfe"], teacher["guidance"], student["nfe"]) == (25, 3.0, 4)
    assert teacher["summary"]["strict"].mean == 1.0
    assert student["summary"]["strict"].mean == 0.5
    assert student["differences"]["teacher"]["strict"].mean == -0.5
    assert results["floor"]["summary"]["strict"].mean == 1.0
    assert re.search(r"\| student +\| +4 \| +10 \| 0\.500 ±", table)
    assert [p["noise_seed"] for p in results["prompts"][:2]] == [300000, 300001]
    with np.load(f"{args.out}/{files.IMAGES_FILE}") as stored:
        assert stored["index"].tolist() == [0, 3, 7, 10, 14, 17]
        assert stored["model_1"].shape == (6, 32, 32, 3)
        assert (stored["model_1"][-1] == 128).all()


def test_a_world_is_scored_by_rewards_that_know_it_or_by_those_that_are_named(arguments):
    assert set(run._scorers(arguments(), "rewards", SMALL)) == {"shapes_clip", "shapes_hps"}
    assert set(run._scorers(arguments(), "judge", SMALL)) == {"shapes_judge"}
    assert not any(run._scorers(arguments(), option, LARGE) for option in ("rewards", "judge"))
    named = arguments("--judge", "shapes:rewards/shapes_judge")
    assert set(run._scorers(named, "judge", LARGE)) == {"shapes_judge"}


def test_same_seed_same_questions(arguments):
    a, b, c = (Questions.make(arguments("--seed", seed)) for seed in ("1", "1", "2"))
    assert (a.prompts, a.seeds) == (b.prompts, b.seeds)
    assert a.prompts != c.prompts
    assert not set(a.seeds) & set(c.seeds)


def test_several_images_per_prompt_start_from_different_noise(arguments, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    ask = Questions.make(arguments("--prompts", str(tmp_path / "p.txt"), "--per_prompt", "2"))
    assert ask.prompts == ["one", "one", "two", "two"]
    assert len(set(ask.seeds)) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "p.txt", "--world", "small"], "exclude each other"),
        (["--world", "tiny"], "unknown world"),
        (["--world", "large"], "draws 32 x 32 pixels"),
        (["--per_tag", "0"], "--per_tag must be at least 1"),
        (["--rewards", "shapes:nowhere"], "is not shipped"),
    ],
)
def test_bad_input_is_said_before_anything_is_drawn(arguments, monkeypatch, more, message):
    monkeypatch.setattr(run, "_draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(UserError, match=message):
        run.evaluate(arguments(*more))


def test_prompts_without_scores_measure_nothing(arguments, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(UserError, match="nothing to measure"):
        run.evaluate(arguments("--prompts", str(tmp_path / "p.txt")))


def test_in_a_world_processes_share_and_a_kill_costs_nothing(monkeypatch, tmp_path):
    model = FakeModel(0.3, side=SMALL.size)
    drawn = install(monkeypatch, {})
    monkeypatch.setattr(run, "open_models", lambda entries, dtype: [model for _ in entries])
    argv = ["--out", str(tmp_path / "out"), "--per_tag", "2", "--batch", "5", "--rewards", "none", "--judge", "none"]

    def evaluate(*more):
        return run.evaluate(parser().parse_args([*argv, *MODELS, *more]))

    assert "images of teacher: 6 of 12 are there" in evaluate("--shard", "1/2")
    assert sorted(place for lot in drawn for place in lot) == sorted([1, 3, 5, 7, 9, 11] * 2)  # of both models
    drawn.clear()
    assert "| student |" in evaluate("--shard", "0/2")
    assert {place for lot in drawn for place in lot} == {0, 2, 4, 6, 8, 10}
    drawn.clear()
    assert "| student |" in evaluate()
    assert drawn == []


def test_one_thing_at_a_time(arguments):
    with pytest.raises(UserError, match="--model and --images exclude each other"):
        run.evaluate(arguments("--images", "pictures"))
    with pytest.raises(UserError, match="--limit leaves out prompts"):
        run.evaluate(arguments("--benchmark", "geneval", "--prompts", "p", "--limit", "3"))


def test_images_from_elsewhere_are_for_prompts(arguments, tmp_path):
    with pytest.raises(UserError, match="goes with --prompts"):
        run.evaluate(arguments("--model", f"theirs=images:{tmp_path}"))
