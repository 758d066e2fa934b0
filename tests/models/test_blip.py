"""ImageReward's network against PyTorch on random weights: score and gradient to the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.models.blip import BlipConfig, ImageRewardModel, LinearHead
from tests.models.blip_reference import MEAN, STD, ImageReward
from tests.torch_weights import abstract_params, from_torch, randomise

CONFIG = BlipConfig(
    image_size=32,
    vision_width=64,
    vision_layers=2,
    vision_heads=1,
    vision_hidden=96,
    text_width=128,
    text_layers=2,
    text_heads=2,
    text_hidden=80,
    vocab_size=60,
    max_positions=40,
    head_widths=(12, 8, 6, 4, 1),
)


def inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 60, (3, 7))
    for row, length in zip(ids, (7, 3, 5)):
        row[length:] = 0
    return rng.standard_normal((3, 32, 32, 3)).astype(np.float32), ids, ids != 0


@pytest.fixture(scope="module")
def model():
    theirs = randomise(ImageReward(), seed=1)
    weights = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k and "_proj." not in k}
    params = from_torch(abstract_params(ImageRewardModel(CONFIG), *inputs()), weights)
    return theirs, params


@pytest.mark.parametrize("remat", [False, True])
def test_score_and_gradient_are_those_of_pytorch(model, remat):
    theirs, params = model
    pixels, ids, mask = inputs()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().requires_grad_()
    expected = theirs(x, torch.from_numpy(ids), torch.from_numpy(mask))
    cotangent = np.float32([1.0, -2.0, 0.5])
    (gradient,) = torch.autograd.grad((expected * torch.from_numpy(cotangent)).sum(), x)
    ours = ImageRewardModel(CONFIG, remat=remat)

    @jax.jit
    def run(params, pixels):
        score, pullback = jax.vjp(lambda x: (ours.apply({"params": params}, x, ids, mask) - MEAN) / STD, pixels)
        return score, pullback(cotangent)[0]

    score, grad = run(params, pixels)
    np.testing.assert_allclose(score, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    gradient = gradient.permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(grad - gradient) / np.linalg.norm(gradient) < 1e-5


def test_padding_and_its_length_do_not_matter(model):
    _, params = model
    pixels, ids, mask = inputs()
    score = jax.jit(ImageRewardModel(CONFIG).apply)
    longer = [np.pad(x, ((0, 0), (0, 4))) for x in (ids, mask)]
    short, long = score({"params": params}, pixels, ids, mask), score({"params": params}, pixels, *longer)
    np.testing.assert_allclose(short, long, rtol=1e-5)
    other = np.where(mask, ids, 9)
    np.testing.assert_array_equal(score({"params": params}, pixels, other, mask), short)


def test_bf16_towers_have_an_fp32_head(model):
    _, params = model
    low = jax.jit(ImageRewardModel(CONFIG, jnp.bfloat16).apply)({"params": params}, *inputs())
    full = jax.jit(ImageRewardModel(CONFIG).apply)({"params": params}, *inputs())
    assert low.dtype == jnp.float32 and 0 < np.abs(low - full).max() < 0.1


def test_head_with_and_without_relu():
    rng = np.random.default_rng(0)
    x, kernels = rng.standard_normal((4, 6)), [rng.standard_normal(s) for s in ((6, 5), (5, 1))]
    params = {f"layers.{n}": {"kernel": k, "bias": np.zeros(k.shape[1])} for n, k in zip((0, 2), kernels)}
    for relu in (False, True):
        found = LinearHead((5, 1), (0, 2), relu=relu).apply({"params": params}, x)
        hidden = x @ kernels[0]
        expected = (np.maximum(hidden, 0) if relu else hidden) @ kernels[1]
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4)


def test_bad_input_is_named(model):
    _, params = model
    pixels, ids, mask = inputs()
    with pytest.raises(UserError, match="16 x 16, resize them to 32 x 32"):
        ImageRewardModel(CONFIG).apply({"params": params}, pixels[:, :16, :16], ids, mask)
    with pytest.raises(UserError, match="41 tokens"):
        jax.eval_shape(ImageRewardModel(CONFIG).apply, {"params": params}, pixels, np.zeros((3, 41), int), None)
    with pytest.raises(UserError, match="text tower's width 768 is not divisible by its 11 heads"):
        BlipConfig(text_heads=11)
