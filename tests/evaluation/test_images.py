"""Pictures on disk."""

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.images import digests, image_files, read_image, read_images, to_uint8, write_image

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".PNG", ".ppm"])
def test_lossless_formats_come_back(tmp_path, suffix):
    Image.fromarray(PICTURE).save(tmp_path / f"a{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a{suffix}"), PICTURE)


def test_order_is_that_of_names_and_other_files_do_not_count(tmp_path):
    for name in ("b.png", "a10.png", "a2.webp", ".hidden.png", "B.jpg"):
        Image.fromarray(PICTURE).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("no picture")
    (tmp_path / "inside").mkdir()
    assert [file.name for file in image_files(tmp_path)] == ["B.jpg", "a10.png", "a2.webp", "b.png"]


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    grey = PICTURE[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, -1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[..., 1], grey)
    Image.fromarray(np.dstack([PICTURE, grey])).save(tmp_path / "clear.png")
    assert np.array_equal(read_image(tmp_path / "clear.png"), PICTURE)
    Image.fromarray(PICTURE).quantize(256).save(tmp_path / "palette.gif")
    assert read_image(tmp_path / "palette.gif").shape == PICTURE.shape


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing")
    with pytest.raises(UserError, match=r"broken\.png is no image"):
        read_images([tmp_path / "broken.png"])
    with pytest.raises(UserError, match="there is no folder"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image that Pillow can read"):
        image_files(tmp_path / "empty")


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", PICTURE)
    assert np.array_equal(read_image(tmp_path / "a.png"), PICTURE)

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "b.png", PICTURE)
    assert [f.name for f in image_files(tmp_path)] == ["a.png"]


def test_rounding_is_diffusers():
    values = np.array([-1.0, 0.0, 0.5 / 255, 1.5 / 255, 0.999, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 2, 255, 255]  # halves to even


def test_digests_tell_bytes_apart(tmp_path):
    for name, picture in (("a", PICTURE), ("b", PICTURE), ("c", PICTURE[::-1])):
        write_image(tmp_path / f"{name}.png", picture)
    a, b, c = digests(image_files(tmp_path))
    assert a == b != c
