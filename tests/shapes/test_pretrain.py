"""The making of a teacher, at sizes at which nothing is learned: what it begins with and where it goes on."""

import json

import jax
import numpy as np
import pytest

from configs.shapes import pretrain_sd3, pretrain_sd3_64px
from dmdr_jax.diffusers_io.pipeline import load_pipeline
from dmdr_jax.errors import UserError
from dmdr_jax.shapes import pretrain_stages

TEXT = "text_encoder"
WORDS = "text_model", "embeddings.token_embedding", "embedding"
PLACES = "text_model", "embeddings.position_embedding", "embedding"


def small(config):
    """The same stages with tiny networks and next to no updates."""
    config.vae.model.update(block_out_channels=(4, 4, 4), norm_num_groups=2)
    config.vae.update(steps=1, batch=2)
    config.vae.decoder.update(steps=1, batch=2)
    config.denoiser.update(
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    config.text.update(hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1, heads=2)
    config.teacher.update(scenes=64, steps=2, batch=4, warmup=1, save_every=1)
    return config


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished folder of the small world."""
    out = tmp_path_factory.mktemp("first")
    run(small(pretrain_sd3.get_config()), out)
    return out


def run(config, out):
    (out / "work").mkdir(parents=True, exist_ok=True)
    pretrain_stages.train_teacher(config, out)


def leaf(tree, path):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def test_the_folder_is_saved_and_scored_as_it_goes(first):
    curve = [json.loads(line) for line in (first / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [1, 2]
    assert all(0 <= row["strict"] <= row["lenient"] <= 1 and row["loss"] > 0 for row in curve)
    assert load_pipeline(str(first / "pipeline")).configs["transformer"]["sample_size"] == 8


def test_the_same_command_goes_on_where_it_stopped(first, tmp_path):
    config = small(pretrain_sd3.get_config())
    (tmp_path / "work").mkdir()
    (tmp_path / "work/vae.pkl").write_bytes((first / "work/vae.pkl").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_stages, "write_whole", stop_after(pretrain_stages.write_whole, "teacher.pkl"))
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path)
    run(config, tmp_path)
    assert [json.loads(row)["step"] for row in (tmp_path / "curve.jsonl").read_text().splitlines()] == [2]
    whole, resumed = (load_pipeline(str(folder / "pipeline")).params for folder in (first, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def stop_after(function, name):
    def stopping(file, value):
        function(file, value)
        if file.name == name:
            raise KeyboardInterrupt

    return stopping


def test_a_larger_world_begins_with_what_a_smaller_one_knows(first, tmp_path):
    config = small(pretrain_sd3_64px.get_config())
    config.vae.start = config.teacher.start = str(first / "pipeline")
    config.teacher.update(steps=1, lr=0.0)
    config.seed = 1
    run(config, tmp_path)
    before, after = (load_pipeline(str(folder / "pipeline")) for folder in (first, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, before.params["transformer"], after.params["transformer"])
    places = leaf(before.params[TEXT], PLACES)
    np.testing.assert_array_equal(leaf(after.params[TEXT], PLACES)[: len(places)], places)
    ours, theirs = (leaf(p.params[TEXT], WORDS) for p in (after, before))
    ids = [p.tokenizers[TEXT].get_vocab() for p in (after, before)]
    assert len(ids[0]) > len(ids[1]) and ids[0]["red</w>"] != ids[1]["red</w>"]
    for word in ("red</w>", "circle</w>", "<|endoftext|>"):
        np.testing.assert_array_equal(ours[ids[0][word]], theirs[ids[1][word]])
    new = ours[ids[0]["heart</w>"]]
    assert new.any() and not (theirs == new).all(1).any()


def test_a_start_of_another_size_is_refused(first, tmp_path):
    config = small(pretrain_sd3_64px.get_config())
    config.vae.start = config.teacher.start = str(first / "pipeline")
    config.text.intermediate_size = 24
    with pytest.raises(UserError, match=r"teacher\.start=.*text_encoder.*mlp.fc1.* is \(1, 16\) there and \(1, 24\)"):
        run(config, tmp_path)
