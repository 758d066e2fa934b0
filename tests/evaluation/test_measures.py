"""Distances between sets, looks and diversity, on their way from the command line to the results."""

import json

import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation import features, measures
from dmdr_jax.evaluation import results as files
from dmdr_jax.evaluation.appearance import appearance
from dmdr_jax.evaluation.distances import Gaussian, KernelReference, frechet_distance, precision_recall, unit_rows
from dmdr_jax.evaluation.features import FeatureSpec, FeatureStore, centre, open_network, parse_features
from dmdr_jax.evaluation.images import digests, image_files, read_images
from dmdr_jax.evaluation.run import evaluate
from tests.evaluation.fake_models import FakeModel, install
from tests.evaluation.scoring import write_functions, write_pictures, write_prompts

N = 8
FUNCTION = """
import numpy as np

def means(images):
    return np.stack([image.reshape(-1, 3).mean(0) / 255 + image.shape[0] / 1e3 for image in images])
"""


def means(images):
    return np.stack([image.reshape(-1, 3).mean(0) / 255 + image.shape[0] / 1e3 for image in images])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    install(monkeypatch, {"a": FakeModel(0.2), "b": FakeModel(0.3)})
    write_prompts(tmp_path / "p.txt", N)
    write_functions(tmp_path)
    (tmp_path / "embed.py").write_text(FUNCTION)

    def run(*more):
        argv = ["--out", tmp_path / "out", "--prompts", tmp_path / "p.txt"]
        argv += ["--model", "teacher=a", "--model", "student=b"]
        return evaluate(parser().parse_args(list(map(str, [*argv, *more]))))

    return run


def galleries(out):
    return [read_images(image_files(out / model["gallery"])) for model in files.read(out)["models"]]


def test_distances_to_the_teacher_and_to_images(ask, tmp_path):
    write_pictures(tmp_path / "real", 12)
    ask("--features", f"f={tmp_path / 'embed.py'}:means", "--reference", f"real={tmp_path / 'real'}")
    teacher, student = files.read(tmp_path / "out")["models"]
    a, b = map(means, galleries(tmp_path / "out"))
    real = means(read_images(image_files(tmp_path / "real")))
    assert student["summary"]["frechet/f/teacher"].mean == pytest.approx(frechet_distance(b, Gaussian.fit(a)), rel=1e-4)
    assert student["summary"]["frechet/f/real"].mean == pytest.approx(frechet_distance(b, Gaussian.fit(real)), rel=1e-4)
    precision, recall = precision_recall(a, real)
    assert teacher["summary"]["precision/f/real"].mean == precision
    assert teacher["summary"]["recall/f/real"].mean == recall
    assert "frechet/f/teacher" not in teacher["summary"]
    assert student["summary"]["frechet/f/real"].se > 0
    difference = student["differences"]["teacher"]["frechet/f/real"]
    assert difference.mean == pytest.approx(
        student["summary"]["frechet/f/real"].mean - teacher["summary"]["frechet/f/real"].mean
    )
    assert difference.freedom == 7  # eight blocks


def test_fids_own_statistics_are_a_reference(ask, tmp_path):
    x = np.random.default_rng(0).random((20, 3))
    np.savez(tmp_path / "stats.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    ask("--features", f"f={tmp_path / 'embed.py'}:means", "--reference", f"coco={tmp_path / 'stats.npz'}")
    found = files.read(tmp_path / "out")
    expected = frechet_distance(means(galleries(tmp_path / "out")[0]), Gaussian.fit(x))
    assert found["models"][0]["summary"]["frechet/f/coco"].mean == pytest.approx(expected, rel=1e-4)
    assert "precision/f/coco" not in found["models"][0]["summary"]


def test_clip_features_give_cmmd(ask, tmp_path):
    path = "shapes:rewards/shapes_judge"
    ask("--features", f"clip={path}")
    a, b = galleries(tmp_path / "out")
    network = open_network(parse_features(f"clip={path}"))
    a, b = network.embed(a), network.embed(b)
    expected = KernelReference(unit_rows(a)).mmd(unit_rows(b))
    found = files.read(tmp_path / "out")["models"][1]["summary"]
    assert found["cmmd/clip/teacher"].mean == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_clip_features_are_those_of_the_reward(tmp_path):
    """Two ways to one number: the reward's cosine is that of these features with the prompt's."""
    from dmdr_jax.rewards.base import RewardSpec
    from dmdr_jax.rewards.registry import open_spec
    from dmdr_jax.shapes.assets import resolve

    folder = resolve("shapes:rewards/shapes_clip")
    reward = open_spec(RewardSpec("shapes", folder))
    images = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    image_side = unit_rows(open_network(FeatureSpec("clip", "clip", folder)).embed(images))
    text_side = reward.prompt_features(["a red circle"] * 2)
    assert (image_side * text_side).sum(1) == pytest.approx(reward.score_files(images, ["a red circle"] * 2), abs=1e-5)


def test_features_are_kept(tmp_path, monkeypatch):
    write_pictures(tmp_path / "p", 5)
    (tmp_path / "embed.py").write_text(FUNCTION)
    monkeypatch.setattr(features, "LOT", 2)
    pictures = image_files(tmp_path / "p")
    names, done = digests(pictures), []
    store = FeatureStore.make(parse_features(f"f={tmp_path / 'embed.py'}:means"), tmp_path / "work")
    store.fill(pictures[:3], names[:3], done.append)
    assert done == [0, 2, 1]
    assert store.collect(names)[1] == 3
    done.clear()
    store.fill(pictures, names, done.append)
    assert done == [3, 2]
    found, there = store.collect(names[::-1])
    assert there == 5
    assert found == pytest.approx(means(read_images(pictures[::-1])), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f=nowhere.py:means", "there is no function nowhere.py:means"),
        ("vgg=file.pth", "begin the name with inception or clip"),
        ("inception=x,resize=tf", "only resize=clean or resize=pytorch"),
        ("inception=nowhere.pth", "there is no file nowhere.pth"),
    ],
)
def test_malformed_features(text, message):
    with pytest.raises(UserError, match=message):
        open_network(parse_features(text))


def test_too_few_images_for_a_distance(ask, tmp_path):
    write_pictures(tmp_path / "few", 3)
    embed = f"f={tmp_path / 'embed.py'}:means"
    with pytest.raises(UserError, match="at least 8 images of each model, not 2"):
        ask("--features", embed, "--limit", "2")
    with pytest.raises(UserError, match="must hold at least 8 images"):
        ask("--features", embed, "--reference", f"few={tmp_path / 'few'}")


def test_the_middle_square():
    x = np.arange(5 * 8 * 3).reshape(5, 8, 3)
    assert np.array_equal(centre(x), x[:, 1:6])
    assert np.array_equal(centre(x.transpose(1, 0, 2)), x.transpose(1, 0, 2)[1:6])


def test_diversity_of_the_images_of_a_prompt(ask, tmp_path, monkeypatch):
    class Metric:
        params, weights = np.zeros(1), np.zeros(1)

        def spread(self, images):
            reds = np.array([image[0, 0, 0] / 255 for image in images])
            return np.abs(reds[:, None] - reds).sum(1) / (len(reds) - 1)

    monkeypatch.setattr(measures, "load_lpips", lambda trunk, linear: Metric())
    ask("--lpips", "a.pth,b.pth", "--per_prompt", "3", "--limit", "4")
    found = files.read(tmp_path / "out")
    teacher = found["models"][0]
    reds = np.array([i[0, 0, 0] / 255 for i in galleries(tmp_path / "out")[0]]).reshape(4, 3)
    pairs = [np.mean([abs(r[0] - r[1]), abs(r[0] - r[2]), abs(r[1] - r[2])]) for r in reds]
    assert teacher["summary"]["lpips"].mean == pytest.approx(np.mean(pairs))
    assert teacher["summary"]["lpips"].se >= np.std(pairs, ddof=1) / 2 - 1e-9
    assert any(column.key == "lpips" for column in found["columns"])
    journal = next((tmp_path / "out" / "work" / "lpips").iterdir())
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == 8  # a line for each prompt


def test_appearance_of_plain_pictures():
    grey, red = np.full((300, 300, 3), 128, np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert appearance(grey) == pytest.approx({"chroma": 0, "saturation": 0, "contrast": 0, "clipped": 0}, abs=1e-3)
    found = appearance(red)
    assert found["saturation"] == pytest.approx(1)
    assert found["clipped"] == 1
    assert found["chroma"] > 0.15
    half = grey.copy()
    half[:, :150] = 255
    assert appearance(half)["clipped"] == 0.5
    assert appearance(half)["contrast"] > 0.1


def test_torch_is_not_needed():
    """The networks that read PyTorch's files do it without PyTorch."""
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None; import dmdr_jax.evaluation.features, dmdr_jax.evaluation.lpips"
    assert torch.__version__
    subprocess.run([sys.executable, "-c", code], check=True)
