"""Prompts in the formats in which they are published."""

import json

import numpy as np
import pytest

from dmdr_jax.data.prompts import PromptStream, all_prompts, load_prompts, read_eval_records
from dmdr_jax.data.survey import normalised, survey, survey_large
from dmdr_jax.errors import UserError

PARTI = "Prompt\tCategory\tChallenge\tNote\n" + "".join(
    f"{prompt}\tAnimals\tBasic\t{note}\n" for prompt, note in [("bond", ""), ('a "quoted" owl', "has quotes"), ("", "")]
)
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 7, "file_name": "7.jpg"}],
    "annotations": [{"image_id": 7, "id": 1, "caption": "A bike. "}, {"image_id": 7, "id": 2, "caption": "A red bike"}],
}
SHAREGPT = [{"input_prompt": "Draw a cat", "output_image": "text_to_image/1.png"}]
HPD = [{"prompt": "a castle", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]}]
PUBLISHED = {
    "t2i-2m-filtered-prompts.txt": ("one prompt\nanother, with a comma\n", ["one prompt", "another, with a comma"]),
    "text_to_image.json": (json.dumps(SHAREGPT), ["Draw a cat"]),
    "PartiPrompts.tsv": (PARTI, ["bond", 'a "quoted" owl']),
    "train.json": (json.dumps(HPD), ["a castle"]),
    "captions_val2014.json": (json.dumps(COCO), ["A bike.", "A red bike"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_by_name_and_by_their_folder(tmp_path, name):
    text, prompts = PUBLISHED[name]
    (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about it")
    assert load_prompts(str(tmp_path / name)) == prompts
    assert load_prompts(str(tmp_path)) == prompts


def test_a_benchmarks_list_of_strings(tmp_path):
    (tmp_path / "anime.json").write_text(json.dumps(["a girl", "a robot"]))
    assert load_prompts(str(tmp_path / "anime.json")) == ["a girl", "a robot"]


def test_what_else_a_table_says_is_kept(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    first = read_eval_records(tmp_path / "PartiPrompts.tsv")[0]
    assert first == {"Prompt": "bond", "Category": "Animals", "Challenge": "Basic", "Note": "", "prompt": "bond"}


def test_a_table_needs_a_column_of_prompts(tmp_path):
    (tmp_path / "p.tsv").write_text("title\tnote\na\tb\n")
    with pytest.raises(UserError, match="has no column of prompts"):
        load_prompts(str(tmp_path / "p.tsv"))


def test_a_folder_of_parquet_shards_in_order(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "data").mkdir()
    for i in (1, 0):
        table = pyarrow.table({"Caption": [f"{i}a", f"{i}b"], "jpg_0": [b"x", b"y"]})
        parquet.write_table(table, tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    assert load_prompts(str(tmp_path)) == ["0a", "0b", "1a", "1b"]


# --- counts ------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words, with a start and an end."""

    def __call__(self, texts, truncation, padding, verbose):
        assert not truncation and not padding
        return {"input_ids": [[0, *range(len(text.split())), 1] for text in texts]}


def test_empty_doubled_and_overlong_prompts_are_counted(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\n\na  red cat\ncafe\u0301\ncaf\u00e9\n   \none two three four\n")
    found = survey(all_prompts(str(tmp_path / "p.txt")), {"text_encoder": (Words(), 5), "t5": (Words(), 9)})
    assert (found.prompts, found.empty, found.duplicates) == (5, 2, 2)
    assert found.cut == {"text_encoder": 1, "t5": 0}
    assert str(found) == "5 prompts, 2 empty ones left out, 2 duplicates, 1 longer than text_encoder reads"


def test_nothing_to_say_of_a_good_list():
    assert str(survey(["a", "b"])) == "2 prompts"
    assert survey([]).prompts == 0
    assert normalised(" a\tb\u00a0c ") == "a b c"


def test_of_many_prompts_the_overlong_are_counted_in_a_sample(monkeypatch):
    texts = ["one two three four"] * 10 + ["one"] * 11 + [""]
    whole = survey_large(texts, {"t": (Words(), 5)})
    assert whole == survey(texts, {"t": (Words(), 5)}) and whole.cut == {"t": 10}
    monkeypatch.setattr("dmdr_jax.data.survey.SAMPLE", 11)
    found = survey_large(texts, {"t": (Words(), 5)})  # every other one of the 21
    assert found.cut == {"t": 10} and (found.prompts, found.empty) == (21, 1)


def test_a_last_line_without_an_end_is_no_empty_prompt(tmp_path):
    for text in ("a\nb", "a\nb\n"):
        (tmp_path / "p.txt").write_text(text)
        assert survey(all_prompts(str(tmp_path / "p.txt"))).empty == 0


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_see_the_same_batch(hosts):
    """Every host computes the whole order and takes its rows: no host needs to know how many there are before it."""
    prompts = [str(i) for i in range(23)]
    for step in (0, 3, 11):
        rows = PromptStream(prompts, 8, seed=5).indices(step)
        whole = [PromptStream(prompts, 8, seed=5).indices(step) for _ in range(hosts)]
        parts = [whole[h][h * 8 // hosts : (h + 1) * 8 // hosts] for h in range(hosts)]
        assert np.array_equal(np.concatenate(parts), rows)


def test_columns_that_json_cannot_hold_are_left_out(tmp_path):
    """Images beside captions, as many data sets have them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["a", "b"], "image": [b"\xff", b"\x00"], "width": [3, 4]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_eval_records(tmp_path / "p.parquet") == [{"prompt": "a", "width": 3}, {"prompt": "b", "width": 4}]
