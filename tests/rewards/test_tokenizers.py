"""CLIP's tokenizer from every form of its files, and open_clip's cleaning of prompts."""

import gzip
import json

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.rewards import tokenizers
from dmdr_jax.rewards.tokenizers import MERGES_FILE, clean_text, clip_tokenizer, token_ids
from dmdr_jax.shapes.tokenizer import byte_characters, make_tokenizers, save_tokenizer


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr(tokenizers, "_PACKAGES", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("words")
    save_tokenizer(make_tokenizers(["red", "circle"])[0], place)
    return place


def test_the_first_place_with_a_tokenizer_counts_and_its_subfolder(folder, tmp_path):
    expected = token_ids(clip_tokenizer([folder], "x"), ["a red circle"], 16)
    (tmp_path / "tokenizer").symlink_to(folder)
    np.testing.assert_array_equal(token_ids(clip_tokenizer([tmp_path], "x"), ["a red circle"], 16), expected)
    np.testing.assert_array_equal(
        token_ids(clip_tokenizer([tmp_path / "none", folder], "x"), ["a red circle"], 16), expected
    )


def test_ids_are_cut_with_the_end_token_last(folder):
    tokenizer = clip_tokenizer([folder], "x")
    ids = token_ids(tokenizer, ["red " * 40, "red"], 16)
    assert ids.shape == (2, 16) and ids.dtype == np.int32
    assert ids[0, -1] == tokenizer.eos_token_id and (ids[1, 2:] == tokenizer.eos_token_id).all()


def test_openais_merges_make_the_published_vocabulary(tmp_path):
    """The list of merges as OpenAI ships it, made-up ones behind two real ones: ids are places in the vocabulary."""
    characters = byte_characters()
    merges = [("r", "e"), ("re", "d</w>")]
    merges += [(a, b) for a in characters for b in characters if (a, b) != ("r", "e")][: 49408 - 512 - 2 - 2]
    text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *(" ".join(m) for m in merges), "left over"])
    (tmp_path / MERGES_FILE).write_bytes(gzip.compress(text.encode()))
    for place in (tmp_path, tmp_path / MERGES_FILE):
        tokenizer = clip_tokenizer([place], "x")
        byte = {c: i for i, c in enumerate(byte_characters())}
        ids = token_ids(tokenizer, ["RED q!"], 77)[0]
        assert list(ids[:5]) == [49406, 513, 256 + byte["q"], 256 + byte["!"], 49407]


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Reward 'hps': .*holds no tokenizer; put CLIP's.*hf download"):
        clip_tokenizer([tmp_path], "Reward 'hps'")
    (tmp_path / MERGES_FILE).write_bytes(gzip.compress(b"version\na b"))
    with pytest.raises(UserError, match="tokens and not CLIP's 49408"):
        clip_tokenizer([tmp_path], "x")
    (tmp_path / MERGES_FILE).write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        clip_tokenizer([tmp_path], "x")


# What open_clip's cleaning (ftfy, then html.unescape twice, then whitespace) makes of these.
CLEANED = {
    "  a\tred \n circle ": "a red circle",
    "cats &amp;amp; dogs &lt;3": "cats & dogs <3",
    "it’s a “quoted” ‘word’": "it's a \"quoted\" 'word'",
    "eﬀect oﬃce": "effect office",
    "ＦＵＬＬ　ｗｉｄｔｈ！": "FULL width!",
    "cafe\u0301": "caf\u00e9",
    "bell\x07 and nul\x00": "bell and nul",
    "naïve 日本 – café…": "naïve 日本 – café…",
}


@pytest.mark.parametrize("text", CLEANED)
def test_cleaning(text):
    assert clean_text(text) == CLEANED[text] == clean_text(CLEANED[text])


def test_vocabulary_file_alone_is_enough(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    ids = token_ids(clip_tokenizer([tmp_path], "x"), ["a red circle"], 16)
    np.testing.assert_array_equal(ids[:, :5], token_ids(clip_tokenizer([folder], "x"), ["a red circle"], 16)[:, :5])
