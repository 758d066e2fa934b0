"""The CLIP reward against transformers on random weights, and its gradient to the pixels."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.clip_reward import CLIP_MEAN, CLIP_STD, Preprocessing, load_clip_reward, unit
from dmdr_jax.rewards.contrast import NEGATIVE, POSITIVE, contrast_words
from dmdr_jax.rewards.feature_cache import FeatureCache
from dmdr_jax.shapes.tokenizer import make_tokenizers, save_tokenizer
from tests.torch_weights import randomise

WORDS = ["a", "and", "red", "blue", "circle", "square", "photo", "realistic"]
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


@pytest.mark.parametrize("size", [(16, 16), (37, 21), (9, 9)])
def test_scores_are_those_of_transformers(clip, size):
    model, reward = clip
    images = random_images(3, *size, 3)
    ours = reward.score_prompts(images, PROMPTS)
    assert ours.shape == (3,) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, torch_scores(model, reward.tokenize(PROMPTS), images), atol=1e-5)


def test_legacy_end_token(tmp_path):
    model = make_folder(tmp_path, eos="legacy")
    reward = load_clip_reward(RewardSpec("clip", str(tmp_path)))
    ids, images = reward.tokenize(PROMPTS), random_images(3, 16, 16, 3)
    np.testing.assert_allclose(reward.score_prompts(images, PROMPTS), torch_scores(model, ids, images), atol=1e-5)


def test_bf16_towers_still_score_in_fp32(clip):
    _, reward = clip
    low = load_clip_reward(reward.spec, dtype=jnp.bfloat16)
    tower, head = low.params["vision_model"], low.params["visual_projection"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tower["encoder.layers.0:2"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves([tower["post_layernorm"], head])} == {jnp.dtype(jnp.float32)}
    images = random_images(3, 16, 16, 3)
    scores = low.score_prompts(images, PROMPTS)
    assert scores.dtype == np.float32
    # bf16 rounds near 0.5 to multiples of 0.002: a head in bf16 would land exactly on its values.
    assert (scores != scores.astype(jnp.bfloat16).astype(np.float32)).any()
    np.testing.assert_allclose(scores, reward.score_prompts(images, PROMPTS), atol=0.05)


@pytest.fixture(scope="module")
def gradients(clip):
    """Compiled ``(params, images [3, 24, 24, 3], text features) -> (sum of scores, gradients to all three)``."""
    _, reward = clip
    return jax.jit(jax.value_and_grad(lambda *inputs: reward.score(*inputs).sum(), argnums=(0, 1, 2)))


@pytest.fixture(scope="module")
def features(clip):
    _, reward = clip
    return reward.text_features(reward.tokenize(PROMPTS))


def test_gradient_to_the_pixels_by_finite_differences(clip, gradients, features):
    _, reward = clip
    images = np.random.default_rng(1).uniform(0.1, 0.9, (3, 24, 24, 3)).astype(np.float32)
    direction = np.random.default_rng(2).normal(size=images.shape).astype(np.float32)
    step = 0.01
    above, below = (gradients(reward.params, images + sign * step * direction, features)[0] for sign in (1, -1))
    exact = (np.asarray(gradients(reward.params, images, features)[1][1]) * direction).sum()
    assert abs(exact) > 0.01
    np.testing.assert_allclose(exact, (above - below) / (2 * step), rtol=0.01)


def test_gradient_reaches_pixels_and_nothing_else(clip, gradients, features):
    _, reward = clip
    images = random_images(3, 24, 24, 3)
    _, (to_params, to_images, to_text) = gradients(reward.params, images, features)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(to_params)) and not np.asarray(to_text).any()
    inside = (images >= 0) & (images <= 1)
    to_images = np.asarray(to_images)
    assert (to_images[inside] != 0).mean() > 0.99
    assert not to_images[~inside].any()


def test_flat_images_give_finite_scores_and_gradients(clip, gradients, features):
    _, reward = clip
    flat = np.broadcast_to(np.float32([0.0, 1.0, 0.5])[:, None, None, None], (3, 24, 24, 3))
    total, (_, to_images, _) = gradients(reward.params, flat, features)
    assert np.isfinite(total) and np.isfinite(to_images).all()
    assert (np.asarray(to_images) != 0).any(axis=(1, 2, 3)).all()


def test_unit_of_a_zero_row_is_zero_with_a_finite_gradient():
    np.testing.assert_array_equal(unit(jnp.zeros((1, 4))), 0.0)
    assert jnp.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 4)))).all()


def test_prompt_prefix_and_truncation(clip):
    _, reward = clip
    prefixed = load_clip_reward(RewardSpec("hps", reward.spec.path, prompt_prefix="realistic photo "))
    ids = prefixed.tokenize(["a red circle", PROMPTS[2]])
    assert ids.shape == (2, 16) and (ids[:, -1] == reward.tokenizer.eos_token_id).all()
    np.testing.assert_array_equal(ids[0], reward.tokenize(["realistic photo a red circle"])[0])


def test_it_is_a_reward_and_parameters_are_arguments(clip, gradients, features):
    _, reward = clip
    assert isinstance(reward, Reward)
    images = random_images(3, 24, 24, 3)
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, reward.params)
    assert not np.allclose(gradients(doubled, images, features)[0], gradients(reward.params, images, features)[0])


def test_preprocessing_reads_mean_and_std_and_squashes():
    preprocess = Preprocessing.from_config({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 8)
    out = preprocess(jnp.ones((1, 16, 32, 3)))
    np.testing.assert_allclose(out, jnp.full((1, 8, 8, 3), 2.0), rtol=1e-6)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_clip_reward(RewardSpec("mine", str(tmp_path / "none")))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"'mine'.*holds a t5"):
        load_clip_reward(RewardSpec("mine", str(tmp_path)))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    make_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"'mine'.*tokenizer"):
        load_clip_reward(RewardSpec("mine", str(tmp_path)))


def test_pickled_and_sharded_folders_are_the_same_reward(clip, tmp_path):
    """transformers' folders from before safetensors: one `pytorch_model.bin`, or shards with an index."""
    model, reward = clip
    images = random_images(3, 16, 16, 3)
    expected = reward.score_prompts(images, PROMPTS)
    state = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    whole, sharded = (shutil.copytree(reward.spec.path, tmp_path / name) for name in ("whole", "sharded"))
    for folder in (whole, sharded):
        (folder / "model.safetensors").unlink()
    torch.save(state, whole / "pytorch_model.bin")
    parts = {"a.bin": dict(list(state.items())[::2]), "b.bin": dict(list(state.items())[1::2])}
    for name, part in parts.items():
        torch.save(part, sharded / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for folder in (whole, sharded):
        found = load_clip_reward(RewardSpec("clip", str(folder)))
        np.testing.assert_array_equal(found.score_prompts(images, PROMPTS), expected)
    (sharded / "b.bin").unlink()
    with pytest.raises(UserError, match=r"b\.bin cannot be read"):
        load_clip_reward(RewardSpec("clip", str(sharded)))


def test_features_of_a_prompt_are_computed_once(clip, monkeypatch):
    _, reward = clip
    reward = dataclasses.replace(reward, cache=FeatureCache(capacity=2))
    expected = np.asarray(reward.text_features(reward.tokenize(PROMPTS)))
    np.testing.assert_allclose(reward.prompt_features(PROMPTS), expected, atol=1e-6)
    placed = []
    place = lambda ids: placed.append(ids.shape) or jnp.asarray(ids)
    np.testing.assert_array_equal(reward.prompt_features([PROMPTS[2], PROMPTS[1]], place), expected[[2, 1]])
    assert not placed
    reward.prompt_features([PROMPTS[0], PROMPTS[1]], place)
    assert placed == [(2, 16)]


def test_contrast_is_the_weighted_difference_of_two_texts(clip):
    _, plain = clip
    spec = dataclasses.replace(plain.spec, positive_words=["red"], negative_words=["blue"], contrast=0.25)
    reward = dataclasses.replace(plain, spec=spec, cache=FeatureCache())
    ids = reward.tokenize(PROMPTS)
    assert ids.shape == (3, 2, 16)
    positive, negative = (plain.prompt_features([f"{word}. {p}" for p in PROMPTS]) for word in ("red", "blue"))
    expected = 1.25 * positive - negative
    np.testing.assert_allclose(reward.text_features(ids), expected, atol=1e-5)
    np.testing.assert_allclose(reward.prompt_features(PROMPTS), expected, atol=1e-5)
    images = random_images(3, 16, 16, 3)
    scores = reward.score_prompts(images, PROMPTS)
    parts = [plain.score_prompts(images, [f"{word}. {p}" for p in PROMPTS]) for word in ("red", "blue")]
    np.testing.assert_allclose(scores, 1.25 * parts[0] - parts[1], atol=1e-5)


def test_words_that_leave_no_room_for_the_prompts_are_refused(clip):
    _, plain = clip
    prompts = ["a red circle", "a blue circle", "a red square"]
    for words, fits in ((["red"], True), (["red", "Natural-lighting"], False)):  # which it spells in bytes
        spec = dataclasses.replace(plain.spec, positive_words=words, negative_words=["blue"])
        reward = dataclasses.replace(plain, spec=spec)
        if fits:
            reward.check_prompts(prompts)
        else:
            with pytest.raises(UserError, match="behind 'Natural-lighting' only 1 of 3 prompts still differ"):
                reward.check_prompts(prompts)
    plain.check_prompts(prompts)


def test_words_of_a_contrast_depend_on_the_batch_alone():
    spec = RewardSpec("hps", positive_words=POSITIVE, negative_words=NEGATIVE)
    batches = [[f"prompt {i}", f"prompt {i + 1}"] for i in range(60)]
    words = [contrast_words(spec, batch) for batch in batches]
    assert words == [contrast_words(spec, batch) for batch in batches]
    assert set(words) == {(p, n) for p in POSITIVE for n in NEGATIVE}


def test_files_of_any_size_are_scored_as_transformers_scores_them(clip):
    """PickScore's recipe: transformers' processor on each picture, exp(logit_scale) times the cosine."""
    from transformers import CLIPImageProcessorPil

    model, reward = clip
    picked = load_clip_reward(RewardSpec("pickscore", reward.spec.path))
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((16, 16), (40, 23), (19, 64))]
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pixels = CLIPImageProcessorPil(**sides)([Image.fromarray(x) for x in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(reward.tokenize(PROMPTS)).long(), pixel_values=pixels)
    found = picked.score_files(images, PROMPTS, batch=2)
    np.testing.assert_allclose(found, out.logits_per_image.diagonal().numpy(), rtol=1e-5)


def test_activation_switch_changes_the_towers(clip):
    _, reward = clip
    quick = load_clip_reward(dataclasses.replace(reward.spec, activation="quick_gelu"))
    assert quick.vision.config.hidden_act == quick.text.config.hidden_act == "quick_gelu"
    assert reward.vision.config.hidden_act == "gelu"
