"""The shipped rewards: read by us and by transformers alike, and worth something on pictures they have not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_reward import load_clip_reward
from dmdr_jax.shapes import assets
from dmdr_jax.shapes.reward_data import all_world_records, make_groups
from dmdr_jax.shapes.train_rewards import NAMES
from dmdr_jax.shapes.world import SMALL

KINDS = ("recolored", "missing")


@pytest.fixture(scope="module")
def shown():
    """(prompts [g], clean and failing pictures [2 g, 32, 32, 3]) of compositions that were held out."""
    groups = make_groups(SMALL, 60, seed=77, split="held_out", scene_kinds=(KINDS,), picture_kinds=())
    wrong = ~groups.truth[np.arange(60), 1, groups.prompt]
    records = all_world_records(SMALL)
    prompts = [records[p]["prompt"] for p in groups.prompt[wrong]]
    return prompts, np.concatenate([groups.images[wrong, 0], groups.images[wrong, 1]]).astype(np.float32) / 255


@pytest.mark.parametrize("name", NAMES)
def test_shipped_reward(name, shown):
    from transformers import CLIPModel

    folder = Path(assets.resolve(f"shapes:rewards/{name}"))
    reward = load_clip_reward(RewardSpec(name, str(folder)))
    prompts, images = shown
    scores = reward.score_prompts(images, prompts * 2)
    clean, wrong = np.split(scores, 2)
    assert (clean > wrong).mean() > 0.9

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = (torch.from_numpy(images[:8]).permute(0, 3, 1, 2) - 0.5) / 0.25
    ids = torch.from_numpy(reward.tokenize(prompts[:8])).long()
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    np.testing.assert_allclose(scores[:8], (out.image_embeds * out.text_embeds).sum(-1).numpy(), atol=1e-4)

    assert (folder / "model.safetensors").stat().st_size < 1.2e6
    assert json.loads((folder / "metrics.json").read_text())["name"] == name
