"""The aesthetic head on CLIP's image features against PyTorch, from each place where its two files may lie."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.aesthetic import load_aesthetic_reward
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.rewards.open_clip_towers import OpenClip
from tests.rewards.test_clip_reward import make_folder
from tests.torch_weights import randomise

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


def linear_head(width, relu=False):
    sizes, layers = [width, 16, 12, 8, 6, 1], []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + [nn.ReLU()] * (relu and i < 4) + [nn.Dropout(0.2)] * (i < 3)
    return randomise(nn.ModuleDict({"layers": nn.Sequential(*layers)}), seed=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_l14")
    return folder, make_folder(folder)


def expected_scores(model, head, images):
    pixels = (torch.from_numpy(images) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output
        return head["layers"](nn.functional.normalize(features, dim=-1))[:, 0].numpy()


IMAGES = np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_scores_are_those_of_pytorch(clip, tmp_path, relu):
    folder, model = clip
    head = linear_head(20, relu)
    torch.save(head.state_dict(), tmp_path / HEAD)
    reward = load_aesthetic_reward(RewardSpec("aesthetic", str(tmp_path / HEAD), backbone=str(folder)))
    assert isinstance(reward, Reward)
    found = reward.score_prompts(IMAGES, ["not", "read", ""])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_scores(model, head, IMAGES), rtol=1e-4, atol=1e-5)


def test_head_in_clips_folder_and_an_open_clip_backbone(clip, tmp_path):
    folder, model = clip
    place = shutil.copytree(folder, tmp_path / "both")
    head = linear_head(20)
    torch.save(head.state_dict(), place / HEAD)
    for path in (place, place / HEAD):
        reward = load_aesthetic_reward(RewardSpec("aesthetic", str(path)))
        np.testing.assert_allclose(
            reward.score_prompts(IMAGES[:1], [""]), expected_scores(model, head, IMAGES[:1]), rtol=1e-4, atol=1e-5
        )
    torch.save(randomise(OpenClip(embed=20)).state_dict(), tmp_path / "ViT-L-14.pt")
    spec = RewardSpec("aesthetic", str(place / HEAD), backbone=str(tmp_path / "ViT-L-14.pt"))
    reward = load_aesthetic_reward(spec)
    assert reward.vision.config.hidden_act == "quick_gelu"  # OpenAI's, unless a file says otherwise
    assert set(reward.params["clip"]) == {"vision_model", "visual_projection"}


def test_bad_input_is_named(clip, tmp_path):
    with pytest.raises(UserError, match="there is no aesthetic head"):
        load_aesthetic_reward(RewardSpec("aesthetic", str(tmp_path)))
    torch.save(linear_head(20).state_dict(), tmp_path / HEAD)
    with pytest.raises(UserError, match="backbone=FOLDER"):
        load_aesthetic_reward(RewardSpec("aesthetic", str(tmp_path / HEAD)))
    torch.save(linear_head(24).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"layers\.0\.weight' has shape \[16, 24\] where the network has \[16, 20\]"):
        load_aesthetic_reward(RewardSpec("aesthetic", str(tmp_path / "wide.pth"), backbone=str(clip[0])))
    torch.save({"w": torch.ones(2)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="no head that scores"):
        load_aesthetic_reward(RewardSpec("aesthetic", str(tmp_path / "none.pth"), backbone=str(clip[0])))
