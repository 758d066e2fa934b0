"""Each way to a square against Pillow, PyTorch and transformers' processor; the two paths of a reward agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocessing

SIZES = [(37, 53), (53, 37), (64, 64), (20, 90), (18, 17)]
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def torch_resize(image, height, width):
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    return (
        torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    )


def pillow_resize(image, height, width):
    bands = [Image.fromarray(np.ascontiguousarray(image[..., c]), mode="F") for c in range(3)]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BICUBIC)) for band in bands], -1)


@pytest.mark.parametrize("size", SIZES)
def test_antialiased_bicubic_is_that_of_pillow_and_pytorch(size):
    image = images(*size, 3)
    ours = np.asarray(Preprocessing(24, **PLAIN)(image[None]))[0]
    np.testing.assert_allclose(ours, torch_resize(image, 24, 24), atol=1e-5)
    np.testing.assert_allclose(ours, pillow_resize(image, 24, 24), atol=1e-5)


def test_one_lit_pixel_lands_where_it_does_in_pytorch():
    """Finds a shift by half a pixel and a kernel that is not widened, for shrinking and for growing."""
    for side, size in ((40, 16), (12, 30)):
        image = np.zeros((side, side, 3), np.float32)
        image[side // 3, side // 2] = 1.0
        ours = np.asarray(Preprocessing(size, **PLAIN)(image[None]))[0]
        np.testing.assert_allclose(ours, torch_resize(image, size, size), atol=1e-6)


def hps_reference(image, size):
    """HPSv2's ResizeMaxSize on tensors: the long side to `size`, black around."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new = round(height * scale), round(width * scale)
    out = np.zeros((size, size, 3), np.float32)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    out[top : top + new[0], left : left + new[1]] = torch_resize(image, *new)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_hpsv2s(size):
    image = images(*size, 3)
    ours = Preprocessing(24, resize="pad")(image[None])[0]
    expected = (hps_reference(image, 24) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_crop_on_8_bit_images_is_transformers_to_the_last_digit(size):
    from transformers import CLIPImageProcessorPil

    image = (255 * images(*size, 3)).astype(np.uint8)
    sides = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    theirs = CLIPImageProcessorPil(**sides)(Image.fromarray(image), return_tensors="np").pixel_values[0]
    ours = Preprocessing(24, resize="crop").published([image])[0]
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("size", [(24, 27), (24, 25), (29, 24)])
def test_odd_rests_of_the_crop(size):
    """torchvision rounds half the rest to even, transformers cuts it."""
    image = images(*size, 3)
    rest = max(size) - 24
    for crop, offset in (("floor", rest // 2), ("round", round(rest / 2))):
        rows, columns = (slice(offset, offset + 24) if side > 24 else slice(None) for side in size)
        ours = Preprocessing(24, resize="crop", crop=crop, **PLAIN)(image[None])[0]
        np.testing.assert_array_equal(ours, image[rows, columns])


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_both_paths_agree_but_for_the_rounding(resize, size):
    """Smooth pictures, as photographs are: what differs is Pillow's rounding to 8 bits, twice."""
    y, x = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 2, size[1]), indexing="ij")
    image = np.stack([0.5 + 0.4 * np.sin(x + y), 0.5 + 0.4 * np.cos(2 * x), 0.3 + 0.1 * y], -1)
    image = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    preprocess = Preprocessing(24, resize=resize, **PLAIN)
    float_path = preprocess(image[None] / np.float32(255))[0]
    np.testing.assert_allclose(preprocess.published([image])[0], float_path, atol=1.5 / 255)


def test_three_ways_give_three_results_and_flat_images_stay_flat():
    image = images(1, 30, 60, 3)
    results = [np.asarray(Preprocessing(24, resize=resize)(image)) for resize in ("squash", "crop", "pad")]
    assert all(result.shape == (1, 24, 24, 3) for result in results)
    assert all(np.abs(a - b).max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)) for a, b in [(results[a], results[b])])
    flat = np.full((1, 30, 60, 3), 0.7, np.float32)
    for resize in ("squash", "crop"):
        np.testing.assert_allclose(Preprocessing(24, resize=resize, **PLAIN)(flat), 0.7, rtol=1e-5)


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_gradient_reaches_what_is_shown(resize):
    image = images(1, 12, 24, 3)
    grad = jax.grad(lambda x: Preprocessing(8, resize=resize, **PLAIN)(x).sum())(jnp.asarray(image))
    columns = np.abs(np.asarray(grad)[0]).sum((0, 2)) > 1e-6
    assert columns.all() if resize == "pad" else (columns[8:16].all() and not columns[:3].any())


def test_bad_settings_and_images_are_named():
    with pytest.raises(UserError, match="one of squash, crop, pad, not 'stretch'"):
        Preprocessing(24, resize="stretch")
    with pytest.raises(UserError, match=r"uint8 \[h, w, 3\], not float32 \[4, 4, 3\]"):
        Preprocessing(24).published([np.zeros((4, 4, 3), np.float32)])
