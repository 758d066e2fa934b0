"""Drawing with a shipped model: an image is the same whatever was drawn with it, and on how many devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmdr_jax.evaluation.gallery import Order, draw_missing, gallery_of
from dmdr_jax.model import open_model

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "two blue squares", "a star", "a green ring"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draws with the shipped teacher by a stochastic kernel; returns the model, its recipe and a function."""
    model = open_model("shapes:sd3")
    recipe = model.recipe(2, "renoise", 1.0, (32, 32))

    def draw(folder, rows, batch=2, seeds=range(4)):
        gallery = gallery_of(folder, "m", model, recipe, Order(PROMPTS, list(seeds), (32, 32)), "float32", 0)
        draw_missing(gallery, model, recipe, Order(PROMPTS, list(seeds), (32, 32)), rows, batch)
        return gallery

    whole = draw(tmp_path_factory.mktemp("whole"), range(4))
    return whole, draw


def test_in_parts_as_in_one(drawn, tmp_path):
    whole, draw = drawn
    draw(tmp_path, [3, 1])
    parts = draw(tmp_path, range(4))
    assert whole.folder.name == parts.folder.name
    assert np.abs(whole.read() - parts.read()).max() < 1.5 / 255
    assert whole.read().std() > 0.02
    assert parts.images_per_second() > 0


def test_images_differ_by_noise_and_prompt(drawn):
    images = drawn[0].read()
    assert min(np.abs(images[i] - images[j]).max() for i in range(4) for j in range(i)) > 0.05


def test_another_order_is_another_gallery(drawn, tmp_path):
    whole, draw = drawn
    assert draw(tmp_path, [], seeds=range(1, 5)).folder.name != whole.folder.name


PROGRAM = """
import sys, numpy as np, jax
from tests.evaluation import test_gallery as t
from dmdr_jax.evaluation.gallery import Drawing, Order
from dmdr_jax.model import open_model

model = open_model("shapes:sd3")
draw = Drawing(model, model.recipe(2, "renoise", 1.0, (32, 32)), Order(t.PROMPTS, list(range(4)), (32, 32)), 3)
assert len(jax.devices()) == 2 and draw.batch == 4
np.save(sys.argv[1], draw([0, 1, 2, 3])[0])
"""


@pytest.mark.slow
def test_on_two_devices_as_on_one(drawn, tmp_path):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "x.npy")], env=environment, check=True, timeout=600)
    assert np.abs(np.load(tmp_path / "x.npy") - drawn[0].read()).max() < 1.5 / 255
