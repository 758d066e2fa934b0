"""GenEval's verdict against its published rule, written out again, and by hand."""

import json

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation.geneval import COLORS, Detection, read_detections, relations, summarise, verdict
from dmdr_jax.evaluation.run import evaluate

CLASSES = ("bench", "dog", "computer mouse")


# --- the published rule ------------------------------------------------------------------------------------------


def official_relations(box_a, box_b):
    """GenEval's relative_position."""
    boxes = np.array([box_a, box_b])[:, :4].reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=-2)
    dim_a, dim_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - 0.1 * (dim_a + dim_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    names = [("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5)]
    return {name for name, holds in names if holds}


def official_verdict(detections, metadata):
    """GenEval's evaluate_image and evaluate, on boxes and colours that are given."""
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    objects = {}
    for name in {d.label for d in detections}:
        boxes = [d for d in detections if d.label == name]
        order = np.argsort([d.score for d in boxes])[::-1]
        kept = [boxes[i] for i in order if boxes[i].score > threshold][:16]
        if kept:
            objects[name] = kept
    correct, matched_groups = True, []
    for req in metadata.get("include", []):
        matched = True
        found = objects.get(req["class"], [])[: req["count"]]
        if len(found) < req["count"]:
            correct = matched = False
        else:
            if "color" in req and [d.color for d in found].count(req["color"]) < req["count"]:
                correct = matched = False
            if "position" in req and matched:
                expected, target = req["position"]
                if matched_groups[target] is None:
                    correct = matched = False
                else:
                    for obj in found:
                        for other in matched_groups[target]:
                            if expected not in official_relations(obj.box, other.box):
                                correct = matched = False
        matched_groups.append(found if matched else None)
    for req in metadata.get("exclude", []):
        if len(objects.get(req["class"], [])) >= req["count"]:
            correct = False
    return correct


def random_record(rng):
    tag = rng.choice(["single_object", "counting", "colors", "position", "color_attr"])
    first, second = rng.permutation(CLASSES)[:2]
    include = [{"class": first, "count": int(rng.integers(1, 3)) if tag == "counting" else 1}]
    record = {"tag": str(tag), "include": include, "prompt": "p"}
    if tag in ("colors", "color_attr"):
        include[0]["color"] = str(rng.choice(COLORS[:2]))
    if tag in ("position", "color_attr"):
        include.append({"class": second, "count": 1})
    if tag == "color_attr":
        include[1]["color"] = str(rng.choice(COLORS[:2]))
    if tag == "position":
        include[1]["position"] = [str(rng.choice(["left of", "right of", "above", "below"])), 0]
    if tag == "counting":
        record["exclude"] = [{"class": first, "count": include[0]["count"] + 1}]
    return record


def random_detections(rng):
    found = []
    for _ in range(rng.integers(0, 6)):
        corner, size = rng.random(2) * 60, 4 + rng.random(2) * 40
        box = (*corner, *(corner + size))
        score = float(rng.choice([0.1, 0.31, 0.6, 0.89, 0.95]) + 1e-4 * rng.random())
        found.append(Detection(str(rng.choice(CLASSES)), score, box, str(rng.choice(COLORS[:2]))))
    return found


def test_verdicts_are_the_official_ones():
    rng = np.random.default_rng(0)
    cases = [(random_detections(rng), random_record(rng)) for _ in range(1000)]
    ours = [verdict(*case)[0] for case in cases]
    assert ours == [official_verdict(*case) for case in cases]
    for tag in ("single_object", "counting", "colors", "position", "color_attr"):
        share = np.mean([good for good, (_, record) in zip(ours, cases) if record["tag"] == tag])
        assert 0.02 < share < 0.98


def test_relations_are_the_official_ones():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = ((*c, *(c + s)) for c, s in zip(rng.random((2, 2)) * 50, rng.random((2, 2)) * 60))
        assert relations(a, b) == official_relations(a, b)
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == set()


# --- by hand -----------------------------------------------------------------------------------------------------


def at(x, y, label="dog", color=None, score=0.9):
    return Detection(label, score, (x - 5, y - 5, x + 5, y + 5), color)


def test_relations_by_hand():
    assert relations((0, 0, 10, 10), (40, 0, 50, 10)) == {"left of"}
    assert relations((40, 0, 50, 10), (0, 0, 10, 10)) == {"right of"}
    assert relations((0, 0, 10, 10), (0, 40, 10, 50)) == {"above"}
    assert relations((0, 0, 10, 10), (40, 40, 50, 50)) == {"left of", "above"}  # a diagonal has both
    assert relations((0, 0, 100, 100), (10, 0, 110, 100)) == set()  # they overlap much


@pytest.mark.parametrize(
    ("detections", "good"),
    [
        ([at(0, 0)], True),
        ([at(0, 0, score=0.3)], False),
        ([], False),
        ([at(0, 0), at(50, 0), at(0, 50, "bench")], True),  # more than is asked for does not count
    ],
)
def test_a_single_object(detections, good):
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    got, reason = verdict(detections, record)
    assert got is good
    assert bool(reason) is not good


def test_counting_wants_confidence_and_no_more():
    record = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "two dogs",
    }
    two = [at(0, 0, score=0.95), at(50, 0, score=0.91)]
    assert verdict(two, record) == (True, "")
    assert verdict([*two, at(99, 0, score=0.89)], record)[0]
    assert verdict([*two, at(99, 0, score=0.92)], record) == (False, "expected dog<3, found 3")
    assert verdict(two[:1], record)[1] == "expected dog>=2, found 1"


def test_the_most_confident_object_must_have_the_colour():
    record = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}
    red, blue = at(0, 0, color="red", score=0.8), at(50, 0, color="blue", score=0.9)
    assert verdict([red], record)[0]
    assert not verdict([red, blue], record)[0]
    assert "expected red dog>=1, found 0 red; and 1 blue" in verdict([blue], record)[1]


def test_a_position_to_what_is_not_there():
    record = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
        "prompt": "a bench left of a dog",
    }
    assert verdict([at(50, 0), at(0, 0, "bench")], record)[0]
    assert "expected bench left of target, found right of target" in verdict([at(0, 0), at(50, 0, "bench")], record)[1]
    assert "no target for bench to be left of" in verdict([at(0, 0, "bench")], record)[1]


def test_summary_is_the_mean_of_the_tasks():
    tags = ["colors"] * 4 + ["counting"] * 2
    records = [{"tag": tag, "prompt": f"{tag} {i // 2}"} for i, tag in enumerate(tags)]
    found = summarise([True, True, False, False, True, False], records)
    assert {tag: e.mean for tag, e in found.tasks.items()} == {"colors": 0.5, "counting": 0.5}
    assert (found.overall.mean, found.images, found.prompts) == (0.5, 6, 3)
    assert found.right_images == 0.5
    assert found.right_prompts == pytest.approx(2 / 3)
    assert found.tasks["colors"].se == pytest.approx(0.5)  # two prompts that disagree


# --- the program -------------------------------------------------------------------------------------------------

RECORDS = [
    {"tag": "single_object", "include": [{"class": "computer mouse", "count": 1}], "prompt": "a photo of a mouse"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
]


def line(name, *objects):
    found = [{"label": d.label, "score": d.score, "box": d.box, "color": d.color} for d in objects]
    return json.dumps({"filename": name, "detections": found}) + "\n"


def run(folder, text):
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (folder / "d.jsonl").write_text(text)
    argv = ["--detections", folder / "d.jsonl", "--prompts", folder, "--out", folder / "geneval.json"]
    return evaluate(parser().parse_args(list(map(str, argv))))


def test_from_detections_to_the_table(tmp_path):
    mouse = Detection("mouse", 0.8, (0, 0, 9, 9))  # COCO's name
    text = line("geneval/00000/samples/00000.png", mouse) + line("geneval/00000/samples/00001.png")
    text += line("geneval/00001/samples/00000.png", at(9, 9, color="red"))
    table = run(tmp_path, text)
    found = json.loads((tmp_path / "geneval.json").read_text())
    assert [r["correct"] for r in found["results"]] == [True, False, True]
    assert found["results"][1]["reason"] == "expected computer mouse>=1, found 0"
    assert found["summary"]["overall"]["mean"] == 0.75
    assert found["summary"]["tasks"]["single_object"]["mean"] == 0.5
    assert "0.75000" in table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no detections"),
        ("{oops", "line 1 is not"),
        ('{"filename": "x.png", "detections": []}', "which prompt is it"),
        ('{"index": 2, "detections": []}', "which prompt is it"),
        ('{"index": 0, "detections": [{"label": "dog"}]}', "line 1 is not"),
        ('{"index": 1, "detections": [{"label": "dog", "score": 1, "box": [0, 0, 1, 1]}]}', 'a dog has no "color"'),
    ],
)
def test_malformed_detections(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, text)


def test_prompts_by_index_and_by_their_own_record(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"index": 1, "detections": []})
        + "\n"
        + json.dumps({"filename": "x", "metadata": json.dumps(RECORDS[0]), "detections": []})
    )
    assert [record["tag"] for _, _, record in read_detections(tmp_path / "d.jsonl", RECORDS)] == [
        "colors",
        "single_object",
    ]
