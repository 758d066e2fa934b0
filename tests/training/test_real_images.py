"""Real images for the discriminator: what is read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.shapes import prompts
from dmdr_jax.shapes.verifier import judge
from dmdr_jax.shapes.world import get_world
from dmdr_jax.training.real_images import count_images, read_images

SIZE = (8, 16)


def picture(height, width, left, right):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = left, right
    return image


def test_a_folder_with_captions(tmp_path):
    Image.fromarray(picture(16, 32, 10, 200)).save(tmp_path / "b.png")
    Image.fromarray(picture(64, 32, 50, 90)).save(tmp_path / "a.PNG")
    (tmp_path / "b.txt").write_text("a box\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    images, captions = read_images(str(tmp_path), SIZE)
    assert images.shape == (2, 8, 16, 3) and images.dtype == np.uint8
    assert captions == ["", "a box"]  # in the order of the files' names
    assert count_images(str(tmp_path)) == 2
    assert images[1, 4, 2, 0] == 10 and images[1, 4, 13, 0] == 200
    assert abs(int(images[0, 4, 2, 0]) - 50) <= 1  # the middle of a tall image, its sides kept


def test_an_array_with_a_line_per_image(tmp_path):
    np.save(tmp_path / "set.npy", np.stack([picture(8, 16, i, i) for i in (3, 7)]))
    assert read_images(str(tmp_path / "set.npy"), SIZE)[1] == ["", ""]
    (tmp_path / "set.txt").write_text("one\ntwo\n", encoding="utf-8")
    images, captions = read_images(str(tmp_path / "set.npy"), SIZE)
    assert count_images(str(tmp_path / "set.npy")) == 2
    assert captions == ["one", "two"] and np.array_equal(images[:, 0, 0, 0], [3, 7])
    (tmp_path / "set.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(UserError, match="1 lines for 2 images"):
        read_images(str(tmp_path / "set.npy"), SIZE)


def test_renders_of_the_embedded_world():
    """Each shows what its caption says, by the verifier; the captions are of training, and the same every time."""
    world = get_world("small")
    images, captions = read_images("shapes:small:train", (world.size, world.size))
    assert images.shape == (count_images("shapes:small:train"), world.size, world.size, 3) and images.dtype == np.uint8
    known = {r["prompt"]: r for tag in prompts.TAG_WEIGHTS for r in prompts.all_records(world, tag)}
    records = [known[caption] for caption in captions]
    assert not any(prompts.is_held_out(world, record) for record in records)
    assert judge(world, images[:64] / np.float32(255), records[:64]).strict.all()
    assert read_images("shapes:train", (world.size, world.size))[1] == captions
    assert read_images("shapes:small:train", SIZE)[0].shape == (1024, *SIZE, 3)
    with pytest.raises(UserError, match="shapes:WORLD:train"):
        read_images("shapes:small:test", SIZE)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_images(str(tmp_path / "none"), SIZE)
    with pytest.raises(UserError, match="holds no image"):
        read_images(str(tmp_path), SIZE)
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        read_images(str(tmp_path), SIZE)
    np.save(tmp_path / "set.npy", np.zeros((2, 8, 16)))
    with pytest.raises(UserError, match=r"uint8 \[n, h, w, 3\]"):
        read_images(str(tmp_path / "set.npy"), SIZE)
