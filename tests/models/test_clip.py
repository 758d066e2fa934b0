"""CLIP's towers against transformers on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.models.clip import (
    Clip,
    ClipConfig,
    ClipTextConfig,
    ClipTextModel,
    ClipVisionConfig,
    ClipVisionModel,
    end_of_text,
)
from tests.torch_weights import abstract_params, from_torch, randomise

TOLERANCE = 1e-5
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 11,
    "projection_dim": 14,
    "eos_token_id": 49,
}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 15,
    "patch_size": 5,
    "projection_dim": 14,
}
LEGACY_EOS = 2


def relative_error(value, expected: torch.Tensor) -> float:
    expected = expected.detach().numpy()
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


def prompts(n: int = 9) -> np.ndarray:
    """Ids of three prompts that end at different places and are padded with the end token, as CLIP's are."""
    ids = np.random.default_rng(0).integers(3, 48, (3, n))
    for row, end in zip(ids, (2, n - 1, 4), strict=True):
        row[end:] = TEXT["eos_token_id"]
    return ids


def pixels(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 15, 15, 3)).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def torch_text_model(settings: dict, with_projection: bool):
    """A random transformers text encoder and its weights under the published names."""
    import transformers

    config = transformers.CLIPTextConfig(**settings)
    if with_projection:
        model = randomise(transformers.CLIPTextModelWithProjection(config))
        return model, model.state_dict()
    model = randomise(transformers.CLIPTextModel(config))
    # Published files have the prefix; transformers 5 adds it in loading and saving alone.
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in model.state_dict().items()}
    return model, weights


TEXT_VARIANTS = {
    "clip_l_projection": ({"hidden_act": "quick_gelu", "eos_token_id": LEGACY_EOS}, True, 9),
    "clip_l": ({"hidden_act": "quick_gelu", "eos_token_id": LEGACY_EOS}, False, 11),
    "big_g": ({"hidden_act": "gelu", "num_attention_heads": 4, "projection_dim": 24}, True, 5),
    "one_layer": ({"hidden_act": "gelu_new", "num_hidden_layers": 1, "layer_norm_eps": 1e-3}, True, 7),
}


@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_text_model_matches_transformers(variant):
    changes, with_projection, n = TEXT_VARIANTS[variant]
    settings = TEXT | changes
    theirs, weights = torch_text_model(settings, with_projection)
    name = "CLIPTextModelWithProjection" if with_projection else "CLIPTextModel"
    ours = ClipTextModel(ClipTextConfig.from_diffusers(settings | {"architectures": [name]}))
    ids = prompts(n)
    params = from_torch(abstract_params(ours, ids), weights)
    names = ["penultimate", "last", "pooled"] + ["projected"] * with_projection
    rng = np.random.default_rng(2)

    embedding = theirs.get_input_embeddings().weight.requires_grad_()
    out = theirs(torch.from_numpy(ids), output_hidden_states=True)
    last = out.last_hidden_state
    # transformers pools inside the text model; its WithProjection variant keeps the result to itself.
    pooled = last[torch.arange(len(ids)), torch.from_numpy((ids == TEXT["eos_token_id"]).argmax(-1))]
    expected = {"penultimate": out.hidden_states[-2], "last": last, "pooled": pooled}
    expected["projected"] = out.text_embeds if with_projection else out.pooler_output
    cotangents = {k: rng.standard_normal(expected[k].shape).astype(np.float32) for k in names}
    total = sum((expected[k] * torch.from_numpy(cotangents[k])).sum() for k in names)
    (expected_grad,) = torch.autograd.grad(total, embedding)

    @jax.jit
    def run(params):
        def total(params):
            out = ours.apply({"params": params}, ids)
            return sum((getattr(out, k) * cotangents[k]).sum() for k in names), out

        grads, out = jax.grad(total, has_aux=True)(params)
        return out, grads["text_model"]["embeddings.token_embedding"]["embedding"]

    out, grad = run(params)
    for k in names:
        assert relative_error(getattr(out, k), expected[k]) < TOLERANCE, k
    assert relative_error(grad, expected_grad) < TOLERANCE
    if not with_projection:
        assert out.projected is None
        assert relative_error(out.pooled, expected["projected"]) < TOLERANCE


@pytest.mark.parametrize("eos", [LEGACY_EOS, 7])
def test_pooling_rule(eos):
    """With eos 7 the end is the first 7; a config that says 2 pools the first largest id, wherever it is."""
    ids = np.array([[5, 9, 7, 9, 7], [7, 1, 2, 3, 4], [3, 4, 5, 6, 9]])
    expected = [1, 0, 4] if eos == LEGACY_EOS else [2, 0, 0]
    np.testing.assert_array_equal(end_of_text(jnp.asarray(ids), eos), expected)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_whole_clip_matches_transformers(act):
    import transformers

    settings = {
        "projection_dim": 14,
        "text_config": TEXT | {"hidden_act": act},
        "vision_config": VISION | {"hidden_act": act},
    }
    theirs = randomise(transformers.CLIPModel(transformers.CLIPConfig(**settings)))
    theirs.logit_scale.data.fill_(1.7)
    ours = Clip(ClipConfig.from_diffusers(settings), remat=act == "gelu")
    ids, images = prompts(), pixels()
    params = from_torch(abstract_params(ours, ids, images), theirs.state_dict())

    x = channels_first(images).requires_grad_()
    expected = theirs(input_ids=torch.from_numpy(ids), pixel_values=x)
    cotangent = np.random.default_rng(3).standard_normal((2, 3)).astype(np.float32)
    (expected_grad,) = torch.autograd.grad((expected.logits_per_image * torch.from_numpy(cotangent)).sum(), x)

    @jax.jit
    def run(variables, images):
        logits, pullback = jax.vjp(lambda x: ours.apply(variables, ids, x), images)
        text = ours.apply(variables, ids, method="encode_text")
        image = ours.apply(variables, images, method="encode_image")
        return logits, pullback(cotangent)[0], text, image

    logits, grad, text, image = run({"params": params}, images)
    assert relative_error(logits, expected.logits_per_image) < TOLERANCE
    assert relative_error(grad, expected_grad.permute(0, 2, 3, 1)) < TOLERANCE
    lengths = np.linalg.norm(text, axis=-1, keepdims=True), np.linalg.norm(image, axis=-1, keepdims=True)
    assert relative_error(text / lengths[0], expected.text_embeds) < TOLERANCE
    assert relative_error(image / lengths[1], expected.image_embeds) < TOLERANCE


@pytest.mark.parametrize("with_projection", [True, False])
def test_vision_model_matches_transformers(with_projection):
    import transformers

    settings = VISION | {"image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
    kind = transformers.CLIPVisionModelWithProjection if with_projection else transformers.CLIPVisionModel
    theirs = randomise(kind(transformers.CLIPVisionConfig(**settings)))
    weights = theirs.state_dict()
    if not with_projection:
        weights = {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in weights.items()}
    ours = ClipVisionModel(ClipVisionConfig.from_diffusers(settings | {"architectures": [kind.__name__]}))
    images = pixels(3)[:, :12, :12]
    params = from_torch(abstract_params(ours, images), weights)
    out = jax.jit(ours.apply)({"params": params}, images)
    expected = theirs(channels_first(images))
    assert relative_error(out.last, expected.last_hidden_state) < TOLERANCE
    if with_projection:
        assert relative_error(out.projected, expected.image_embeds) < TOLERANCE
    else:
        assert relative_error(out.pooled, expected.pooler_output) < TOLERANCE
        assert out.projected is None


def test_bf16_keeps_projections_fp32():
    ours = ClipTextModel(ClipTextConfig(**TEXT), jnp.bfloat16)
    ids = prompts()
    rng = np.random.default_rng(0)
    abstract = abstract_params(ours, ids)
    variables = {"params": jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), abstract)}
    half = jax.jit(ours.apply)(variables, ids)
    full = jax.jit(ClipTextModel(ClipTextConfig(**TEXT)).apply)(variables, ids)
    assert half.penultimate.dtype == jnp.bfloat16
    assert half.last.dtype == half.projected.dtype == jnp.float32
    error = np.linalg.norm(half.projected - full.projected) / np.linalg.norm(full.projected)
    assert 0 < error < 0.05


def test_config_round_trip():
    text = ClipTextConfig(**TEXT)
    vision = ClipVisionConfig(**VISION, with_projection=False)
    assert ClipTextConfig.from_diffusers(text.to_diffusers()) == text
    assert ClipVisionConfig.from_diffusers(vision.to_diffusers()) == vision


def test_whole_config_round_trip_through_transformers(tmp_path):
    import transformers

    config = ClipConfig.from_diffusers({"projection_dim": 14, "text_config": TEXT, "vision_config": VISION})
    transformers.CLIPConfig(**config.to_diffusers()).save_pretrained(tmp_path)
    again = ClipConfig.from_diffusers(transformers.CLIPConfig.from_pretrained(tmp_path).to_dict())
    assert again == config


def test_bad_input_is_named():
    with pytest.raises(UserError, match="hidden_act 'relu'"):
        ClipTextConfig.from_diffusers(TEXT | {"hidden_act": "relu"})
    with pytest.raises(UserError, match="num_attention_heads 7"):
        ClipVisionConfig.from_diffusers(VISION | {"num_attention_heads": 7})
    with pytest.raises(UserError, match="num_channels"):
        ClipVisionConfig.from_diffusers(VISION | {"num_channels": 1})
    with pytest.raises(UserError, match="12 tokens"):
        abstract_params(ClipTextModel(ClipTextConfig(**TEXT)), np.zeros((1, 12), int))
    with pytest.raises(UserError, match="15 x 15"):
        abstract_params(ClipVisionModel(ClipVisionConfig(**VISION)), np.zeros((1, 14, 16, 3)))
