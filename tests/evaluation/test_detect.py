"""From pictures to detections: transformers' network is random here, what stands around it is not."""

import json

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import detect


def test_segments_become_detections_with_boxes():
    masks = np.zeros((2, 10, 12))
    masks[0, 2:5, 3:9] = 1
    masks[1, 9, 11] = 1
    segments = [{"label_id": 7, "score": 0.75}, {"label_id": 1, "score": 0.5}]
    found = detect.listed(masks, segments, {7: "mouse", 1: "dog"})
    assert [(f["label"], f["score"], f["box"]) for f in found] == [
        ("computer mouse", 0.75, [3, 2, 9, 5]),
        ("dog", 0.5, [11, 9, 12, 10]),
    ]
    assert detect.listed(np.full((10, 12), -1), [], {}) == []


def test_an_object_is_cut_out_on_grey():
    image = np.zeros((6, 8, 3), np.uint8)
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    mask[1, 2] = False
    cut = detect.cut_out(image, {"box": detect.box_of(mask), "mask": mask})
    assert cut.shape == (3, 3, 3)
    assert (cut[0, 0] == 0x99).all()
    assert (cut[1:] == 0).all()


def test_colours_are_those_that_clip_is_nearest_to(monkeypatch):
    """The shipped CLIP knows colours of shapes: what it says of a crop is what its cosines say."""
    from dmdr_jax.evaluation import geneval
    from dmdr_jax.rewards.registry import open_reward
    from dmdr_jax.shapes.assets import resolve

    folder = resolve("shapes:rewards/shapes_clip")
    monkeypatch.setattr(detect, "TEMPLATES", ("a {color} {name}", "{color} {name}"))
    monkeypatch.setattr(geneval, "COLORS", ("red", "green", "blue"))
    image = np.full((40, 40, 3), 128, np.uint8)
    image[5:20, 5:20] = (31, 90, 200)
    mask = np.zeros((40, 40), bool)
    mask[5:20, 5:20] = True
    objects = [{"label": "square", "box": detect.box_of(mask), "mask": mask}] * 2
    got = detect.open_colors(folder)(image, objects)
    reward = open_reward("clipscore", folder)
    crop = detect.cut_out(image, objects[0])
    means = []
    for color in geneval.COLORS:
        texts = reward.prompt_features([f"a {color} square", f"{color} square"])
        mean = texts.mean(0) / np.linalg.norm(texts.mean(0))
        scores = reward.score_files([crop] * 2, [f"a {color} square", f"{color} square"])
        means.append(scores.mean() / np.linalg.norm(texts.mean(0)))
        assert np.linalg.norm(mean) == pytest.approx(1)
    assert got == [geneval.COLORS[int(np.argmax(means))]] * 2


@pytest.fixture
def folder(tmp_path):
    """Two prompts with two pictures each."""
    for i, item in enumerate(({"class": "dog", "count": 1}, {"class": "dog", "count": 1, "color": "red"})):
        place = tmp_path / "images" / f"{i:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "include": [item], "prompt": "p"}))
        for k in range(2):
            Image.new("RGB", (9, 9), (i, k, 0)).save(place / "samples" / f"{k:05d}.png")
    return tmp_path


def run(folder):
    argv = ["--images", folder / "images", "--detector", "d", "--clip", "c", "--out", folder / "seen.jsonl"]
    detect.main(detect.parser().parse_args(list(map(str, argv))))
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


def test_every_picture_gets_a_line_and_a_kill_costs_one(folder, monkeypatch):
    looked = []

    def see(image):
        looked.append(tuple(image[0, 0]))
        return [{"label": "dog", "score": 0.9, "box": [0, 0, 9, 9], "mask": np.ones((9, 9), bool)}]

    monkeypatch.setattr(detect, "open_detector", lambda name: see)
    monkeypatch.setattr(detect, "open_colors", lambda path: lambda image, objects: ["red"] * len(objects))
    lines = run(folder)
    assert [line["filename"] for line in lines] == [f"0000{i}/samples/0000{k}.png" for i in (0, 1) for k in (0, 1)]
    assert "color" not in lines[0]["detections"][0]
    assert lines[2]["metadata"]["include"] == [{"class": "dog", "count": 1, "color": "red"}]
    assert lines[2]["detections"] == [{"label": "dog", "score": 0.9, "box": [0, 0, 9, 9], "color": "red"}]
    text = (folder / "seen.jsonl").read_text()
    (folder / "seen.jsonl").write_text(text[: -len(text) // 3])
    looked.clear()
    assert run(folder) == lines
    assert 0 < len(looked) < 4


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(UserError, match="holds no 00000/samples"):
        run(tmp_path)


@pytest.mark.slow
def test_transformers_network_is_read_and_run(tmp_path):
    """A random Mask2Former of a few thousand parameters, from its folder to detections."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        id2label={0: "dog", 1: "mouse"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    found = detect.open_detector(str(tmp_path))(np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8))
    for one in found:
        assert one["label"] in ("dog", "computer mouse")
        assert one["mask"].shape == (48, 56)
        assert 0.3 <= one["score"] <= 1
