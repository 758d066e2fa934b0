"""Text encoders that read all prompts first and leave: the same run without them."""

from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from dmdr_jax import arrays
from dmdr_jax.data.prompts import load_prompts
from dmdr_jax.diffusers_io.pipeline import Pipeline
from dmdr_jax.diffusers_io.text import encode, text_params
from dmdr_jax.errors import UserError
from dmdr_jax.training import setup, text
from dmdr_jax.training.abstract import AbstractRun
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import train
from dmdr_jax.training.metrics import read_metrics
from tests import tiny_pipelines
from tests.training import tiny

FIELDS = ("generator", "fake", "ema")


@pytest.fixture(scope="module", params=["sd3", "sd3_no_t5", "sdxl"])
def folder(request, tmp_path_factory):
    return tiny_pipelines.save(tmp_path_factory.mktemp("text") / request.param, request.param)


def load(folder, prompts_file, **changes) -> tuple[Pipeline, text.EncodeText, object]:
    config, layout = tiny.config(folder, prompts_file, **changes), Layout.make(-1, 1)
    pipeline = setup.load_teacher(config, layout, load_prompts(config.prompts))
    return pipeline, text.conditioning_of(config, pipeline, layout, partial(encode, size=(16, 24))), config


def test_what_was_encoded_once_is_what_the_encoders_give(folder, prompts_file):
    there, given, _ = load(folder, prompts_file)
    gone, stored, config = load(folder, prompts_file, encode_once=True)
    assert text_params(there) and not text_params(gone)
    assert gone.tokenizers.keys() == there.tokenizers.keys()
    assert AbstractRun.of(config).residents().text == 0
    for prompts in (["", tiny.PROMPTS[3], tiny.PROMPTS[3]], tiny.PROMPTS[:3]):
        expected, found = given(prompts), stored(prompts)
        assert jax.tree.structure(expected) == jax.tree.structure(found)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
            assert a.dtype == b.dtype and a.sharding == b.sharding
            np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="'never seen' was not encoded"):
        stored(["never seen"])


def test_a_run_without_its_text_encoders_is_the_same_run(teacher, tmp_path, prompts_file):
    """To rounding: the unconditional prompt, and the pictures' texts, are encoded in batches of another size."""
    watched = tmp_path / "watched.txt"
    watched.write_text("a cross\n")
    common = dict(steps=2, watch__prompts=str(watched), preview__every=2, preview__images=2)
    for name, once in (("there", False), ("gone", True)):
        train(tiny.config(teacher, prompts_file, encode_once=once, **common), tmp_path / name)
    trees = [load_trained(tmp_path / name, FIELDS)[0] for name in ("there", "gone")]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    gaps = [[row["dm/score_gap"] for row in read_metrics(tmp_path / name)] for name in ("there", "gone")]
    np.testing.assert_allclose(*gaps, rtol=1e-4)
    pictures = [sorted((tmp_path / name / "samples").glob("*.png")) for name in ("there", "gone")]
    assert [file.name for file in pictures[0]] == ["student_000002.png", "teacher.png"]
    for files in zip(*pictures, strict=True):
        there, gone = (np.asarray(Image.open(file), int) for file in files)
        assert np.abs(there - gone).max() <= 1


def test_more_than_the_host_has_room_for_is_refused(teacher, prompts_file, monkeypatch):
    monkeypatch.setattr(arrays, "free_memory", lambda: 1000.0)
    config = tiny.config(teacher, prompts_file, encode_once=True)
    with pytest.raises(UserError, match=r"6 prompts takes .* leave encode_once off"):
        setup.load_teacher(config, Layout.make(-1, 1), load_prompts(config.prompts))
