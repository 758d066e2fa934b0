"""CLIPs in open_clip's files: towers and gradient against PyTorch, every form of file, and what is inferred."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmdr_jax.errors import UserError
from dmdr_jax.models.clip import Clip
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_files import ARCHITECTURES, open_clip_file, transformers_names
from dmdr_jax.rewards.clip_reward import CLIP_MEAN, CLIP_STD, load_clip_reward, read_params
from dmdr_jax.rewards.lazy_tensor import LazyTensor
from dmdr_jax.shapes.tokenizer import make_tokenizers, save_tokenizer
from tests.rewards.open_clip_towers import OpenClip
from tests.torch_weights import randomise

TOLERANCE = 1e-5


def build(seed=0, **settings):
    model = randomise(OpenClip(**settings), seed)
    model.logit_scale.data.fill_(1.7)
    return model


def relative_error(value, expected):
    expected = expected.detach().numpy()
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


def token_ids(rows=3, n=16, vocabulary=600):
    ids = np.random.default_rng(0).integers(3, vocabulary - 2, (rows, n))
    for row, end in zip(ids, (4, n - 1, 9)):
        row[end], row[end + 1 :] = vocabulary - 1, 0  # open_clip pads with 0
    return ids


def clip_of(path, **options):
    file = open_clip_file(path, **options)
    return Clip(file.config), read_params(file, jnp.float32)


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_towers_and_gradient_are_those_of_open_clip(tmp_path, quick):
    theirs = build(quick=quick)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours, params = clip_of(tmp_path / "weights.pt", activation="quick_gelu" if quick else "gelu")
    ids, pixels = token_ids(), np.random.default_rng(1).standard_normal((2, 28, 28, 3)).astype(np.float32)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().requires_grad_()
    image, text = theirs.encode_image(x), theirs.encode_text(torch.from_numpy(ids))
    unit = torch.nn.functional.normalize
    logits = theirs.logit_scale.exp() * unit(image, dim=-1) @ unit(text, dim=-1).T
    cotangent = np.random.default_rng(2).standard_normal(logits.shape).astype(np.float32)
    (gradient,) = torch.autograd.grad((logits * torch.from_numpy(cotangent)).sum(), x)

    @jax.jit
    def run(params, pixels):
        variables = {"params": params}
        value, pullback = jax.vjp(lambda x: ours.apply(variables, ids, x), pixels)
        encode = lambda name, x: ours.apply(variables, x, method=name)
        return encode("encode_image", pixels), encode("encode_text", ids), value, pullback(cotangent)[0]

    found = run(params, pixels)
    for value, expected in zip(found, (image, text, logits, gradient.permute(0, 2, 3, 1))):
        assert relative_error(value, expected) < TOLERANCE


def forms(model, folder):
    """One CLIP's weights in the files that people have, by name."""
    state = model.state_dict()
    yield "bin", _saved(state, folder / "open_clip_pytorch_model.bin")
    yield "legacy", _saved(state, folder / "a.pt", _use_new_zipfile_serialization=False)
    yield "nested", _saved({"epoch": 3, "scale": torch.ones(1), "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    yield "parallel", _saved({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "c.pt")
    save_file({k: v.clone() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    yield "safetensors", folder / "open_clip_model.safetensors"
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    custom = {f"text.{k}" if k.startswith(text) else k: v for k, v in state.items()}
    yield "custom text", _saved(custom, folder / "d.pth")
    yield (
        "openai",
        _saved(state | {"input_resolution": torch.tensor(28), "context_length": torch.tensor(16)}, folder / "e.pt"),
    )


def _saved(value, file, **options):
    torch.save(value, file, **options)
    return file


def test_every_form_of_file_gives_the_same_tree(tmp_path):
    model = build()
    trees = {name: clip_of(file, activation="gelu")[1] for name, file in forms(model, tmp_path)}
    assert len(trees) == 7
    flat = jax.tree.leaves(trees.pop("bin"))
    for name, tree in trees.items():
        assert all(np.array_equal(a, b) for a, b in zip(flat, jax.tree.leaves(tree), strict=True)), name


def test_half_precision_files_are_read_as_the_wanted_types(tmp_path):
    state = {k: v.half() for k, v in build().state_dict().items()}
    torch.save(state, tmp_path / "h.pt")
    params = read_params(open_clip_file(tmp_path / "h.pt"), jnp.bfloat16)
    tower, head = (
        params["vision_model"]["encoder.layers.0:2"]["mlp.fc1"]["kernel"],
        params["visual_projection"]["kernel"],
    )
    assert tower.dtype == jnp.bfloat16 and head.dtype == jnp.float32
    np.testing.assert_array_equal(head, state["visual.proj"].float().numpy())


def test_config_is_inferred_from_the_shapes(tmp_path):
    torch.save(build(size=42).state_dict(), tmp_path / "w.pt")
    config = open_clip_file(tmp_path / "w.pt").config
    vision, text = config.vision, config.text
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (64, 1, 2)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (96, 42, 14)
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (128, 2, 3)
    assert (text.vocab_size, text.max_position_embeddings, text.intermediate_size) == (600, 16, 80)
    assert config.projection_dim == 24 and vision.hidden_act == text.hidden_act == "gelu"


# (image width, heads, layers, hidden), the same for text, image size, patch, embedding, millions of parameters.
PUBLISHED = {
    "ViT-B-32": ((768, 12, 12, 3072), (512, 8, 12, 2048), 224, 32, 512, 151.28),
    "ViT-L-14": ((1024, 16, 24, 4096), (768, 12, 12, 3072), 224, 14, 768, 427.62),
    "ViT-H-14": ((1280, 16, 32, 5120), (1024, 16, 24, 4096), 224, 14, 1024, 986.11),
    "ViT-H-14-378": ((1280, 16, 32, 5120), (1024, 16, 24, 4096), 378, 14, 1024, 986.71),
    "ViT-g-14": ((1408, 16, 40, 6144), (1024, 16, 24, 4096), 224, 14, 1024, 1366.68),
    "ViT-bigG-14": ((1664, 16, 48, 8192), (1280, 20, 32, 5120), 224, 14, 1280, 2539.57),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_recognised(name, monkeypatch):
    """The real networks, as shapes without memory: heads, size, and the number of parameters that is published."""
    vision, text, size, patch, embed, millions = PUBLISHED[name]
    with torch.device("meta"):
        model = OpenClip(embed, size, patch, vision, text, vocabulary=49408, context=77)
    lazy = {key: LazyTensor(tuple(value.shape), lambda: None) for key, value in model.state_dict().items()}
    monkeypatch.setattr("dmdr_jax.rewards.clip_files.open_weights", lambda path: dict(lazy))
    for arch in ("", name):
        config = open_clip_file("w.pt", arch=arch).config
        assert (config.vision.num_attention_heads, config.text.num_attention_heads) == (vision[1], text[1])
        assert (config.vision.image_size, config.vision.intermediate_size) == (size, vision[3])
    assert set(ARCHITECTURES) >= {name}
    parameters = sum(int(np.prod(t.shape)) for t in transformers_names(lazy).values())
    assert round(parameters / 1e6, 2) == millions


def test_names_that_choose_the_network(tmp_path):
    torch.save(build().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="'ViT-X' is not known; known are ViT-B-32"):
        open_clip_file(tmp_path / "w.pt", arch="ViT-X")
    with pytest.raises(UserError, match="no ViT-H-14: its towers are 64 and 128 wide"):
        open_clip_file(tmp_path / "w.pt", arch="ViT-H-14")


def test_activation_comes_from_the_most_certain_source(tmp_path):
    state = build().state_dict()

    def activation(file, **options):
        config = open_clip_file(file, **options).config
        assert config.vision.hidden_act == config.text.hidden_act
        return config.vision.hidden_act

    plain, dfn = _saved(state, tmp_path / "w.pt"), _saved(state, tmp_path / "DFN5B.pt")
    openai = _saved(state | {"input_resolution": torch.tensor(28)}, tmp_path / "o.pt")
    assert activation(plain) == "gelu" and activation(plain, usual="quick_gelu") == "quick_gelu"
    assert activation(dfn) == activation(openai) == "quick_gelu"
    assert activation(dfn, activation="gelu") == "gelu"  # the authors' run
    folder = tmp_path / "folder"
    folder.mkdir()
    _saved(state, folder / "open_clip_pytorch_model.bin")
    for flag, expected in ((True, "quick_gelu"), (False, "gelu")):
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": flag}}))
        assert activation(folder, usual="gelu" if flag else "quick_gelu") == expected


def test_open_clip_config_gives_heads_and_normalisation(tmp_path):
    model = build(vision=(40, 5, 1, 64), text=(48, 4, 1, 64))
    file = _saved(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="heads of a text tower 48 wide"):
        open_clip_file(file)
    settings = {
        "model_cfg": {"vision_cfg": {"width": 40, "head_width": 8}, "text_cfg": {"heads": 4}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    opened = open_clip_file(tmp_path)
    assert (opened.config.vision.num_attention_heads, opened.config.text.num_attention_heads) == (5, 4)
    assert opened.preprocessing == {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    params, pixels = read_params(opened, jnp.float32), np.ones((1, 28, 28, 3), np.float32)
    ours = Clip(opened.config).apply({"params": params}, pixels, method="encode_image")
    expected = model.encode_image(torch.ones(1, 3, 28, 28))
    assert relative_error(ours, expected) < TOLERANCE


def test_other_networks_are_named(tmp_path):
    state = build().state_dict()
    timm = _saved({"visual.trunk.cls_token": torch.ones(2), **state}, tmp_path / "timm.pt")
    with pytest.raises(UserError, match=r"visual\.trunk\.cls_token.*not the plain transformers"):
        open_clip_file(timm)
    scaled = _saved({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(64), **state}, tmp_path / "scaled.pt")
    with pytest.raises(UserError, match=r"no place for: 'vision_model\.encoder\.layers\.0\.ls_1\.gamma'"):
        clip_of(scaled)
    lacking = {k: v for k, v in state.items() if k != "visual.transformer.resblocks.1.mlp.c_fc.bias"}
    with pytest.raises(UserError, match=r"lacks the tensor 'vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias'"):
        clip_of(_saved(lacking, tmp_path / "lacking.pt"))
    with pytest.raises(UserError, match="holds no CLIP"):
        open_clip_file(_saved({"w": torch.ones(2)}, tmp_path / "other.pt"))
    with pytest.raises(UserError, match="holds no state_dict of tensors, but 'a'"):
        open_clip_file(_saved({"a": 1}, tmp_path / "none.pt"))


def test_reward_from_a_weight_file_with_the_tokenizer_elsewhere(tmp_path):
    """HPSv2.1's way: one nested file, cosine, no logit scale, and an error that says how to get a tokenizer."""
    model = build()
    file = _saved({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"'hps'.*holds no tokenizer.*tokenizer=FOLDER"):
        load_clip_reward(RewardSpec("hps", str(file)))
    tokenizer, _ = make_tokenizers(["red", "circle", "blue"])
    save_tokenizer(tokenizer, tmp_path / "words")
    reward = load_clip_reward(RewardSpec("hps", str(file), tokenizer=str(tmp_path / "words")))
    prompts, images = ["red circle", "blue"], np.random.default_rng(0).random((2, 28, 28, 3)).astype(np.float32)
    pixels = (torch.from_numpy(images) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    ids = torch.from_numpy(reward.tokenize(prompts)).long()
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        features = unit(model.encode_image(pixels.permute(0, 3, 1, 2)), dim=-1), unit(model.encode_text(ids), dim=-1)
    expected = (features[0] * features[1]).sum(-1).numpy()
    np.testing.assert_allclose(reward.score_prompts(images, prompts), expected, atol=1e-5)
    picked = load_clip_reward(RewardSpec("pickscore", str(file), tokenizer=str(tmp_path / "words"), resize="pad"))
    np.testing.assert_allclose(picked.score_prompts(images, prompts), np.exp(1.7) * expected, atol=1e-4)
