"""What the embedded world measures on images that need no network."""

import json
import math

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation import shapes_eval
from dmdr_jax.evaluation.table import decide
from dmdr_jax.shapes.prompts import TAGS, eval_records
from dmdr_jax.shapes.render import color_array
from dmdr_jax.shapes.world import SMALL

RECORDS = eval_records(SMALL, 8, seed=0)
PERFECT = shapes_eval.floor_renders(SMALL, RECORDS)
REFERENCES = {"renders": shapes_eval.reference_features(SMALL, RECORDS)}
ALL = np.arange(len(RECORDS))


@pytest.fixture(scope="module")
def results(evaluation):
    return files.read(evaluation)


def test_perfect_images_pass_everything():
    measured = shapes_eval.measure(SMALL, PERFECT, RECORDS, REFERENCES)
    assert measured.per_image["strict"].all()
    assert measured.per_image["partial"].min() == 1.0
    assert measured.per_image["junk"].max() < 0.02
    assert measured.statistics["background_entropy"](ALL) == pytest.approx(math.log(3), abs=0.15)


def test_distance_to_renders_grows_with_damage():
    distances = [
        shapes_eval.measure(SMALL, images, RECORDS, REFERENCES).statistics["frechet/renders"](ALL)
        for images in (PERFECT, 0.8 * PERFECT, np.random.default_rng(0).random(PERFECT.shape))
    ]
    assert distances == sorted(distances)
    assert distances[2] > 10 * distances[0]


def test_one_background_has_no_entropy_and_gray_no_chroma():
    gray = np.repeat(PERFECT.mean(-1, keepdims=True), 3, axis=-1)
    assert shapes_eval.measure(SMALL, gray, RECORDS, {}).per_image["chroma"].max() < 1e-3
    black = np.broadcast_to(color_array(("black",)), PERFECT.shape)
    assert shapes_eval.measure(SMALL, black, RECORDS, {}).statistics["background_entropy"](ALL) == 0.0


def test_floor_images_are_not_among_the_reference():
    assert len(REFERENCES["renders"]) == shapes_eval.REFERENCE_COPIES * len(RECORDS)
    again = shapes_eval.renders(SMALL, RECORDS, [0])
    other = shapes_eval.renders(SMALL, RECORDS, [1])
    assert np.array_equal(again, PERFECT)
    assert np.mean([np.array_equal(a, b) for a, b in zip(PERFECT, other)]) < 0.1


def test_subsets_are_the_tasks_and_the_unseen_compositions():
    rows = shapes_eval.subsets(RECORDS)
    assert list(rows) == ["unseen", *TAGS]
    assert sorted(np.concatenate([rows[tag] for tag in TAGS])) == list(ALL)
    assert {RECORDS[i]["tag"] for i in rows["unseen"]} == {"two_object", "colors", "position", "color_attr"}


def test_summary_is_the_mean_of_the_records(results):
    for model in results["models"]:
        verdicts = [image["strict"] for image in model["images"]]
        assert model["summary"]["strict"].mean == pytest.approx(np.mean(verdicts))
        position = [v for v, prompt in zip(verdicts, results["prompts"]) if prompt["tag"] == "position"]
        assert model["summary"]["strict/position"].mean == pytest.approx(np.mean(position))
        assert all(estimate.se >= 0 for estimate in model["summary"].values())


def test_differences_are_paired_and_signed(results):
    _, few, student = results["models"]
    gain = student["differences"]["teacher4"]["strict"]
    assert gain.mean == pytest.approx(student["summary"]["strict"].mean - few["summary"]["strict"].mean)
    assert decide(gain, 1) == "better"
    assert decide(student["differences"]["teacher4"]["frechet/renders"], -1) == "better"
    assert decide(few["differences"]["teacher"]["strict"], 1) == "worse"
    assert list(few["differences"]) == ["teacher"]  # nothing is compared with itself


def test_numbers_survive_the_file(evaluation, tmp_path):
    stored = json.loads((evaluation / files.RESULTS_FILE).read_text())
    assert "frechet/teacher" not in stored["models"][0]["summary"]
    assert stored["models"][1]["summary"]["frechet/teacher"]["mean"] > 0
    assert isinstance(stored["models"][0]["images"][0]["strict"], bool)
    stored["models"][0]["summary"]["strict"]["se"] = math.nan
    files.write(tmp_path, stored | {"columns": []})
    assert math.isnan(files.read(tmp_path)["models"][0]["summary"]["strict"].se)


def test_table_in_markdown(results):
    text = files.as_markdown(results)
    strict = results["models"][2]["summary"]["strict"]
    assert f"{strict.mean:.3f} ± {strict.se:.3f}" in text
    assert "Differences from teacher4" in text
    table = [line for line in text.splitlines() if line.startswith("| student")]
    assert len(table) == 3 + 2 * 3  # three groups, and three for each reference


def test_reading_nothing_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is missing"):
        files.read(tmp_path)


def test_outside_a_world_only_scores_are_columns():
    assert [c.key for c in files.columns(TAGS, ["reward/a", "judge/b"], in_world=False)] == ["reward/a", "judge/b"]
