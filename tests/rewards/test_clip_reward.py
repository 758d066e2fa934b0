"""The CLIP reward against transformers on random weights, and its gradient to the pixels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.clip_reward import CLIP_MEAN, CLIP_STD, Preprocessing, load_clip_reward, unit
from dmdr_jax.shapes.tokenizer import make_tokenizers, save_tokenizer
from tests.torch_weights import randomise

WORDS = "a and red blue circle square photo realistic".split()
PROMPTS = ["a red circle", "a red circle and a blue square", "a blue square and " * 9]


def make_folder(folder, eos="tokenizer", **vision):
    """A tiny random CLIPModel with its tokenizer in `folder`; returns the PyTorch model."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer, _ = make_tokenizers(WORDS)
    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "hidden_size": 32, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": 2 if eos == "legacy" else tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    image = {**tower, "hidden_size": 24, "image_size": 16, "patch_size": 8, "hidden_act": "gelu", **vision}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=20))
    randomise(model, seed=3)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": CLIP_STD}))
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model = make_folder(folder)
    return model, load_clip_reward(RewardSpec("clip", str(folder)))


def torch_scores(model, ids, images):
    """The cosine as PyTorch has it: torch's antialiased bicubic, CLIP's mean and std, CLIPModel's embeddings."""
    side = model.config.vision_config.image_size
    pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).clamp(0, 1)
    pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    return (out.image_embeds * out.text_embeds).sum(-1).numpy()


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.2, 1.2, shape).astype(np.float32)


@pytest.mark.parametrize("size", [(16, 16), (37, 37), (24, 40), (9, 9)])
def test_scores_are_those_of_transformers(clip, size):
    model, reward = clip
    ids, images = reward.tokenize(PROMPTS), random_images(3, *size, 3)
    ours = score_of(reward)(reward.params, jnp.asarray(images), reward.text_features(ids))
    assert ours.shape == (3,) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, torch_scores(model, ids, images), atol=1e-5)


def test_legacy_end_token(tmp_path):
    model = make_folder(tmp_path, eos="legacy")
    reward = load_clip_reward(RewardSpec("clip", str(tmp_path)))
    ids, images = reward.tokenize(PROMPTS), random_images(3, 16, 16, 3)
    np.testing.assert_allclose(reward.score_prompts(images, PROMPTS), torch_scores(model, ids, images), atol=1e-5)


def test_bf16_towers_still_score_in_fp32(clip):
    model, reward = clip
    low = load_clip_reward(reward.spec, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}
    images = random_images(3, 16, 16, 3)
    scores = low.score_prompts(images, PROMPTS)
    assert scores.dtype == np.float32
    # bf16 rounds near 0.5 to multiples of 0.002: a head in bf16 would land exactly on its values.
    assert (scores != scores.astype(jnp.bfloat16).astype(np.float32)).any()
    np.testing.assert_allclose(scores, reward.score_prompts(images, PROMPTS), atol=0.05)


def score_of(reward):
    """The reward's score compiled, as it is used."""
    return jax.jit(reward.score)


def test_gradient_to_the_pixels_by_finite_differences(clip):
    _, reward = clip
    features = reward.text_features(reward.tokenize(PROMPTS))
    images = jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, (3, 24, 24, 3)), jnp.float32)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=images.shape), jnp.float32)

    @jax.jit
    def total(images):
        return reward.score(reward.params, images, features).sum()

    step = 0.01
    numeric = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
    exact = (jax.jit(jax.grad(total))(images) * direction).sum()
    assert abs(exact) > 0.01
    np.testing.assert_allclose(exact, numeric, rtol=0.01)


def test_gradient_reaches_pixels_and_nothing_else(clip):
    _, reward = clip
    features = reward.text_features(reward.tokenize(PROMPTS))
    images = jnp.asarray(random_images(3, 16, 16, 3))

    def total(params, images, features):
        return reward.score(params, images, features).sum()

    to_params, to_images, to_text = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(reward.params, images, features)
    assert all(not leaf.any() for leaf in jax.tree.leaves(to_params)) and not to_text.any()
    inside = (images >= 0) & (images <= 1)
    assert (to_images[inside] != 0).mean() > 0.99
    assert not to_images[~inside].any()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_flat_images_give_finite_scores_and_gradients(clip, value):
    _, reward = clip
    features = reward.text_features(reward.tokenize(PROMPTS[:1]))
    score_and_gradient = jax.jit(jax.value_and_grad(lambda x: reward.score(reward.params, x, features)[0]))
    score, grad = score_and_gradient(jnp.full((1, 24, 24, 3), value))
    assert jnp.isfinite(score) and jnp.isfinite(grad).all() and (grad != 0).any()


def test_unit_of_a_zero_row_is_zero_with_a_finite_gradient():
    np.testing.assert_array_equal(unit(jnp.zeros((1, 4))), 0.0)
    assert jnp.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 4)))).all()


def test_prompt_prefix_and_truncation(clip):
    _, reward = clip
    prefixed = load_clip_reward(RewardSpec("hps", reward.spec.path, prompt_prefix="realistic photo "))
    ids = prefixed.tokenize(["a red circle", PROMPTS[2]])
    assert ids.shape == (2, 16) and (ids[:, -1] == reward.tokenizer.eos_token_id).all()
    np.testing.assert_array_equal(ids[0], reward.tokenize(["realistic photo a red circle"])[0])


def test_it_is_a_reward_and_parameters_are_arguments(clip):
    _, reward = clip
    assert isinstance(reward, Reward)
    features = reward.text_features(reward.tokenize(PROMPTS))
    images = jnp.asarray(random_images(3, 16, 16, 3))
    scaled = jax.tree.map(lambda leaf: 2.0 * leaf, reward.params)
    score = score_of(reward)
    assert not np.allclose(score(scaled, images, features), score(reward.params, images, features))


def test_preprocessing_reads_mean_and_std_and_squashes():
    preprocess = Preprocessing.from_config({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 8)
    out = preprocess(jnp.ones((1, 16, 32, 3)))
    np.testing.assert_allclose(out, jnp.full((1, 8, 8, 3), 2.0), rtol=1e-6)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_clip_reward(RewardSpec("mine", str(tmp_path / "none")))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="'mine'.*holds a t5"):
        load_clip_reward(RewardSpec("mine", str(tmp_path)))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    make_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="'mine'.*tokenizer"):
        load_clip_reward(RewardSpec("mine", str(tmp_path)))
