"""From picture files to raw values: the whole program against transformers, Pillow and PyTorch, written anew here."""

import html
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dmdr_jax.evaluate import parser
from dmdr_jax.evaluation.run import evaluate
from dmdr_jax.rewards.clip_reward import CLIP_MEAN, CLIP_STD
from dmdr_jax.shapes.tokenizer import make_tokenizers, save_tokenizer
from tests.rewards.test_clip_reward import WORDS, make_folder
from tests.rewards.test_open_clip import build

TOLERANCE = 2e-6
PROMPTS = [
    "a red circle",
    "",
    "a blue square and " * 9,
    "A  RED   Circle",
    "photo &amp; red",
    "red",
    "blue",
    "a",
    "and",
]
PROCESSOR = {
    "crop_size": 16, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 16,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip


def write_pictures(folder):
    """Pictures of every size and kind."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    folder.mkdir()
    Image.fromarray(noise(40, 40, 3)).save(folder / "a.png")
    Image.fromarray(noise(33, 61, 3)).save(folder / "b.png")
    Image.fromarray(noise(70, 31, 3)).save(folder / "c.jpg", quality=92)
    Image.fromarray(noise(30, 30, 3)).save(folder / "D.WEBP", lossless=True)
    Image.fromarray(noise(31, 29, 4)).save(folder / "e_transparent.png")
    Image.fromarray(noise(20, 24)).save(folder / "f_grey.png")
    Image.fromarray(rng.integers(0, 65536, (24, 20)).astype(np.uint16)).save(folder / "g_deep.png")
    Image.fromarray(noise(25, 25, 3)).convert("P").save(folder / "h_palette.png")
    Image.fromarray(noise(7, 300, 3)).save(folder / "i_wide.bmp")
    (folder / "notes.txt").write_text("no picture")


def picture(file):
    image = Image.open(file)
    if image.mode == "I;16":
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    write_pictures(root / "pictures")
    (root / "prompts.txt").write_text("".join(prompt + "\n" for prompt in PROMPTS))
    (root / "hf").mkdir()
    clip = make_folder(root / "hf", eos="legacy", hidden_act="quick_gelu")
    (root / "hf" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    save_tokenizer(make_tokenizers(WORDS)[0], root / "words")
    towers = build(quick=True)
    parallel = {f"module.{name}": value for name, value in towers.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": parallel}, root / "HPS_v2.1_compressed.pt")
    torch.save(towers.state_dict(), root / "open_clip_pytorch_model.bin")
    argv = ["--images", root / "pictures", "--prompts", root / "prompts.txt", "--out", root / "scores.json"]
    for name in ("pickscore", "clipscore", "mine"):
        argv += ["--reward", f"{name}={root / 'hf'}"]
    argv += ["--reward", f"hpsv21={root / 'HPS_v2.1_compressed.pt'},tokenizer={root / 'words'},activation=quick_gelu"]
    argv += ["--reward", f"dfn={root / 'open_clip_pytorch_model.bin'},tokenizer={root / 'words'}"]
    table = evaluate(parser().parse_args(list(map(str, argv))))
    document = json.loads((root / "scores.json").read_text())
    files = sorted((f for f in (root / "pictures").iterdir() if f.suffix != ".txt"), key=lambda f: f.name)
    assert document["files"] == [file.name for file in files]
    return root, document, [picture(file) for file in files], clip, towers, table


def ids_of(folder, prompts):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids


def test_a_folder_of_transformers(scored):
    """PickScore and CLIPScore with transformers' own processor; any other CLIP as its preprocessor_config.json says."""
    from transformers import AutoImageProcessor

    root, document, pictures, clip, *_ = scored
    process = AutoImageProcessor.from_pretrained(root / "hf", use_fast=False)
    pixels = torch.cat([process(images=image, return_tensors="pt")["pixel_values"] for image in pictures])
    with torch.no_grad():
        out = clip(input_ids=ids_of(root / "hf", PROMPTS), pixel_values=pixels)
    cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    for name, expected in {
        "clipscore": cosines,
        "mine": cosines,
        "pickscore": clip.logit_scale.exp().item() * cosines,
    }.items():
        np.testing.assert_allclose(document["scores"][name], expected, atol=TOLERANCE, err_msg=name)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def padded(image, side):
    """HPSv2: the longest side becomes ``side``, black around it, on tensors."""
    x = tensor(image)
    height, width = (max(1, round(n * side / max(x.shape[1:]))) for n in x.shape[1:])
    if (height, width) != tuple(x.shape[1:]):
        x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(x, (left, side - width - left, top, side - height - top))


@pytest.mark.parametrize("name", ["hpsv21", "dfn"])
def test_a_file_of_open_clip(scored, name):
    root, document, pictures, _, towers, _ = scored
    squashed = [tensor(image.resize((28, 28), Image.Resampling.BICUBIC)) for image in pictures]
    square = [padded(image, 28) for image in pictures] if name == "hpsv21" else squashed
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        images = F.normalize(towers.encode_image((torch.stack(square) - mean) / std), dim=-1)
        texts = F.normalize(towers.encode_text(ids_of(root / "words", list(map(html.unescape, PROMPTS)))), dim=-1)
    np.testing.assert_allclose(document["scores"][name], (images * texts).sum(-1).numpy(), atol=TOLERANCE)


def test_what_is_odd_about_the_prompts_is_said(scored):
    _, document, *_, table = scored
    said = document["prompt_survey"]
    assert said.startswith("8 prompts, ") and said.endswith(", 1 empty")
    assert "1 longer than hpsv21 reads" in said and "1 longer than pickscore reads" in said
    assert table.startswith(said)
