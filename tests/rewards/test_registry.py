"""Opening rewards by name: kinds and their spellings, options on a command line, what is refused."""

import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.kinds import KINDS, find_kind, is_function, kind_name
from dmdr_jax.rewards.registry import kind_of, open_reward, open_spec, parse_reward
from dmdr_jax.shapes.assets import resolve


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("pickscore", "folder", "pickscore"),
        ("hpsv21", "HPS_v2.1_compressed.pt", "hps"),
        ("HPSv2.1", "HPS_v2.1_compressed.pt", "hps"),
        ("hps", "folder", "hps"),
        ("clip_g14", "folder", "clip"),
        ("dfn-378", "folder", "dfn"),
        ("clipscore", "folder", "clipscore"),
        ("image_reward", "ImageReward.pt", "imagereward"),
        ("shapes_hps", "folder", "shapes"),
        ("my_reward", "folder", "clip"),
        ("mine", "file.py:f", "python"),
        ("hps", "package.module:score", "python"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic"),
    ],
)
def test_kinds_from_names_and_paths(name, path, kind):
    assert find_kind(name, "", path) == kind


def test_a_kind_said_wins_and_an_unknown_one_is_refused(tmp_path):
    assert find_kind("clip", "HPSv2", "x") == "hps"
    with pytest.raises(UserError, match="kind 'vqa' is not known; known are clip, dfn"):
        find_kind("x", "vqa", "x")
    (tmp_path / "w.pt").touch()
    with pytest.raises(UserError, match="'mine': name its kind"):
        find_kind("mine", "", str(tmp_path / "w.pt"))
    assert kind_name("nothing") is None and all(kind_name(kind) == kind for kind in KINDS)


def test_functions_are_told_from_paths(tmp_path):
    assert is_function("a/b.py:f") and is_function("pkg.mod:score_it")
    assert not any(map(is_function, ("folder", "shapes:rewards/shapes_clip", "C:f", "a:b c")))


def test_a_command_line_is_read():
    spec = parse_reward("hpsv21=/w/HPS,v2.1.pt,tokenizer=/w/tok,prompt_prefix=a photo, of ")
    assert (spec.name, spec.path, spec.tokenizer) == ("hpsv21", "/w/HPS,v2.1.pt", "/w/tok")
    assert spec.prompt_prefix == "a photo, of "
    assert parse_reward("shapes:rewards/shapes_clip", resolve).name == "shapes_clip"
    assert parse_reward("my.py:sharp").name == "sharp"
    assert parse_reward("x=my.py:sharp").path == "my.py:sharp"
    for bad in ("", "=path", "name=", "name=,tokenizer=x"):
        with pytest.raises(UserError, match="written NAME=PATH"):
            parse_reward(bad)


def test_open_reward_opens_the_shipped_clip_and_a_function(tmp_path):
    path = resolve("shapes:rewards/shapes_clip")
    by_kind = open_reward("shapes", path)
    by_name = open_spec(parse_reward(f"clip={path}"))
    images = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
    prompts = ["a red circle", "two blue squares"]
    np.testing.assert_array_equal(by_kind.score_prompts(images, prompts), by_name.score_prompts(images, prompts))
    assert isinstance(by_kind, Reward) and kind_of(by_kind).shown_times == 100.0
    (tmp_path / "own.py").write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    own = open_spec(parse_reward(f"{tmp_path}/own.py:bright"))
    np.testing.assert_allclose(own.score_prompts(images, prompts), images.mean((1, 2, 3)), rtol=1e-5)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="'clip' has no path"):
        open_reward("clip", "")
    with pytest.raises(UserError, match="there is no folder"):
        open_reward("pickscore", str(tmp_path / "none"))
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"'hps'.*holds no CLIP"):
        open_reward("hps", str(tmp_path / "w.pt"))


def test_specs_from_a_configuration_are_hashable():
    spec = RewardSpec("hps", positive_words=["a"], negative_words=["b", "c"])
    assert hash(spec) == hash(RewardSpec("hps", positive_words=("a",), negative_words=("b", "c")))
