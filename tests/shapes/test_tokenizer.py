"""The shapes world's tokenizers: whole words, CLIP's layout, any text, saved and loaded unchanged."""

import json

import pytest

from dmdr_jax.shapes.tokenizer import build_merges, make_tokenizers, make_vocabulary, save_tokenizer, split_word

# Words that share prefixes, letters and endings, where a careless merge order breaks one with another.
WORDS = ["a", "an", "and", "are", "circle", "circles", "green", "left", "of", "red"]
WORDS += ["ring", "rings", "square", "squares", "star", "stars", "three", "tree"]
PROMPTS = ["a red circle", "three green squares and a star", "a ring left of a circle"]


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizers(WORDS)


def test_every_word_is_one_token_whatever_the_order():
    for order in (WORDS, WORDS[::-1]):
        merges = build_merges(order)
        assert [split_word(word, merges) for word in WORDS] == [[word + "</w>"] for word in WORDS]


def test_transformers_agrees_with_split_word(tokenizers):
    vocabulary, merges = make_vocabulary(WORDS)
    for word in [*WORDS, "greed", "circus", "thread", "qqq"]:
        expected = [vocabulary[piece] for piece in split_word(word, merges)]
        assert tokenizers[0](word, add_special_tokens=False).input_ids == expected


def test_layout_is_clips(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.convert_tokens_to_ids("!") == 0
        assert tokenizer.eos_token_id == len(tokenizer) - 1
        assert tokenizer.bos_token_id == len(tokenizer) - 2
        assert tokenizer.model_max_length == 16
    assert tokenizers[0].pad_token_id == tokenizers[0].eos_token_id
    assert tokenizers[1].pad_token_id == 0


def test_padding_and_truncation(tokenizers):
    first, second = (t("a red circle", padding="max_length").input_ids for t in tokenizers)
    assert len(first) == len(second) == 16
    assert first[:5] == second[:5] and first[0] == tokenizers[0].bos_token_id
    assert first[4:] == [tokenizers[0].eos_token_id] * 12 and second[5:] == [0] * 11
    long = tokenizers[0]("a red circle " * 20, truncation=True).input_ids
    assert len(long) == 16 and long[-1] == tokenizers[0].eos_token_id


def test_any_text_tokenises_and_comes_back(tokenizers):
    for text in ("photo of 12 zebras, 50% off", "naïve 漢字 🙂", "", "\x00\x7f"):
        ids = tokenizers[0](text, add_special_tokens=False).input_ids
        assert tokenizers[0].eos_token_id not in ids
        decoded = tokenizers[0].decode(ids).replace(" ", "")
        assert decoded == text.lower().replace(" ", "")


def test_other_words_do_not_change_the_meaning_of_a_prompt():
    assert make_vocabulary(WORDS) == make_vocabulary([*WORDS[::-1], *WORDS])


def test_words_must_be_plain_letters():
    with pytest.raises(ValueError, match="'red-ish'"):
        make_tokenizers(["red-ish"])


@pytest.mark.parametrize("index", [0, 1])
def test_saved_and_loaded(tokenizers, index, tmp_path):
    from transformers import CLIPTokenizer

    save_tokenizer(tokenizers[index], tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    expected = tokenizers[index](PROMPTS, padding="max_length").input_ids
    assert loaded(PROMPTS, padding="max_length").input_ids == expected
    assert loaded.model_max_length == 16 and loaded.pad_token_id == tokenizers[index].pad_token_id
    assert json.loads((tmp_path / "vocab.json").read_text()) == make_vocabulary(WORDS)[0]
    rebuilt = CLIPTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    assert rebuilt(PROMPTS).input_ids == tokenizers[index](PROMPTS).input_ids
