"""ImageReward.pt from file to score: names, sizes, tokenizer, preprocessing and what is refused."""

import json

import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.image_reward import MAX_TOKENS, infer_config, load_image_reward
from dmdr_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD
from dmdr_jax.rewards.weights import open_weights
from tests.models.blip_reference import ImageReward
from tests.torch_weights import randomise

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "blue", "square", "and", ",", "##s"]
PROMPTS = ["A red circle", "a blue square and red circles, unheard", "a red circle and " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny `ImageReward.pt` and a vocabulary; and the PyTorch model."""
    place = tmp_path_factory.mktemp("imagereward")
    model = randomise(ImageReward(vocabulary=len(WORDS) + 2), seed=1)
    torch.save(model.state_dict(), place / "ImageReward.pt")
    (place / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    (place / "med_config.json").write_text(json.dumps({"num_attention_heads": 2, "layer_norm_eps": 1e-12}))
    return place, model


@pytest.fixture(scope="module")
def reward(folder):
    return load_image_reward(RewardSpec("ir", str(folder[0] / "ImageReward.pt")))


def test_scores_are_those_of_pytorch(folder, reward):
    images = np.random.default_rng(0).random((3, 32, 32, 3)).astype(np.float32)
    ids = reward.tokenize(PROMPTS)
    pixels = torch.from_numpy((images - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = folder[1](pixels, torch.from_numpy(ids).long(), torch.from_numpy(ids != 0)).numpy()
    assert isinstance(reward, Reward) and reward.differentiable
    np.testing.assert_allclose(reward.score_prompts(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    files = reward.score_files(list((255 * images).round().astype(np.uint8)), PROMPTS)
    np.testing.assert_allclose(files, expected, atol=0.05)


def test_prompts_are_lower_cased_word_pieces_cut_to_35(reward):
    ids = reward.tokenize(PROMPTS)
    assert ids.shape == (3, MAX_TOKENS) == (3, 35) and ids.dtype == np.int32
    word = {w: i for i, w in enumerate(WORDS)}
    assert list(ids[0, :6]) == [word[w] for w in ("[CLS]", "a", "red", "circle", "[SEP]", "[PAD]")]
    assert word["##s"] in ids[1] and word["[UNK]"] in ids[1]
    assert ids[2, 34] == word["[SEP]"] and (ids[2] != 0).all()
    np.testing.assert_array_equal(reward.prompt_features(PROMPTS), ids)


def test_folder_and_prefix(folder):
    reward = load_image_reward(RewardSpec("ir", str(folder[0]), prompt_prefix="a "))
    assert list(reward.tokenize(["red"])[0, :4]) == [2, 5, 6, 3]


def test_published_sizes_are_recognised():
    with torch.device("meta"):
        model = ImageReward(224, 16, (1024, 24, 16, 4096), (768, 12, 12, 3072), 30524, 512)
    lazy = {name: type("T", (), {"shape": tuple(t.shape)}) for name, t in model.state_dict().items()}
    config = infer_config(lazy, "ImageReward.pt", {})
    assert (config.image_size, config.vision_layers, config.vision_heads) == (224, 24, 16)
    assert (config.text_layers, config.text_heads, config.vocab_size) == (12, 12, 30524)
    assert config.head_names == (0, 2, 4, 6, 7)


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"'ir'.*there is no file"):
        load_image_reward(RewardSpec("ir", str(tmp_path / "none.pt")))
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no ImageReward"):
        load_image_reward(RewardSpec("ir", str(tmp_path / "other.pt")))
    state = folder[1].state_dict()
    torch.save(state | {"blip.extra": torch.ones(2)}, tmp_path / "extra.pt")
    with pytest.raises(UserError, match=r"no place for: 'blip\.extra'"):
        load_image_reward(RewardSpec("ir", str(tmp_path / "extra.pt")))
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"'ir'.*no tokenizer.*vocab\.txt"):
        load_image_reward(RewardSpec("ir", str(tmp_path / "ImageReward.pt")))
    with pytest.raises(UserError, match="only a CLIP's score can be contrasted"):
        load_image_reward(RewardSpec("ir", str(folder[0]), positive_words=("a",), negative_words=("b",)))
    assert "mlp.layers.7.weight" in open_weights(folder[0])
