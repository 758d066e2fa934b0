"""Prompt sources, their errors, and the stateless order."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dmdr_jax.data.prompts import PromptStream, epoch_order, load_prompts, read_eval_records
from dmdr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = ["a red circle", "naïve café", "日本の猫"]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


# --- sources ---


def test_txt_strips_blank_lines_windows_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "p.txt", "\r\n".join(["\ufeff" + PROMPTS[0], "", "  " + PROMPTS[1] + "  ", PROMPTS[2], ""]))
    assert load_prompts(path) == PROMPTS


def test_txt_keeps_unicode_line_separators_inside_a_prompt(tmp_path):
    path = write(tmp_path / "p.txt", "one\u2028still one\ntwo\n")
    assert load_prompts(path) == ["one\u2028still one", "two"]


@pytest.mark.parametrize("field", ["prompt", "text", "caption", "input_prompt"])
def test_jsonl_and_json_take_every_field_name_and_plain_strings(tmp_path, field):
    items = [{field: PROMPTS[0], "id": 3}, PROMPTS[1], {field: PROMPTS[2]}]
    lines = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, items)) + "\n\n")
    whole = write(tmp_path / "p.json", json.dumps(items))
    assert load_prompts(lines) == load_prompts(whole) == PROMPTS


def test_prompt_field_wins_over_later_names(tmp_path):
    path = write(tmp_path / "p.jsonl", json.dumps({"caption": "no", "prompt": "yes"}))
    assert load_prompts(path) == ["yes"]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "caption": PROMPTS}), path)
    assert load_prompts(path) == PROMPTS
    assert read_eval_records(path)[1] == {"id": 2, "caption": PROMPTS[1], "prompt": PROMPTS[1]}


def test_shapes_train_leaves_out_the_held_out_compositions():
    from dmdr_jax.shapes.prompts import TAGS, all_records, is_held_out
    from dmdr_jax.shapes.world import get_world

    prompts, world = load_prompts("shapes:train"), get_world("small")
    assert prompts == load_prompts("shapes:small:train")
    held_out = {r["prompt"] for tag in TAGS for r in all_records(world, tag) if is_held_out(world, r)}
    assert held_out and not held_out & set(prompts)
    assert load_prompts("shapes:large:train") != prompts


TFDS_BUILDER = """
    import numpy as np
    import tensorflow_datasets as tfds

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look for checksums of downloads beside it

        def _info(self):
            features = tfds.features.FeaturesDict({"caption": tfds.features.Text(), "index": np.int64})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"caption": f"prompt {i} \u00e9", "index": i}
"""

TFDS_PROGRAM = """
    import sys
    from tiny_captions.builder import TinyCaptions
    from dmdr_jax.data.prompts import load_prompts
    from dmdr_jax.errors import UserError

    builder = TinyCaptions(data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare()
    all_four = [f"prompt {i} \u00e9" for i in range(4)]
    assert sorted(load_prompts(f"tfds:{builder.data_dir}")) == all_four
    assert sorted(load_prompts(f"tfds:{builder.data_dir}:train")) == all_four
    assert len(load_prompts(f"tfds:{builder.data_dir}:train[:2]")) == 2
    assert sorted(load_prompts("tfds:tiny_captions:1.0.0:train")) == all_four
    for bad in (f"tfds:{builder.data_dir}:absent", "tfds:no_such_set"):
        try:
            load_prompts(bad)
        except UserError as error:
            assert "tfds:" in str(error), error
        else:
            raise AssertionError(bad)
    assert "tensorflow" not in sys.modules
"""


def test_tfds_array_record_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    package = tmp_path / "tiny_captions"
    package.mkdir()
    write(package / "__init__.py", "")
    write(package / "builder.py", textwrap.dedent(TFDS_BUILDER))
    command = [sys.executable, "-c", textwrap.dedent(TFDS_PROGRAM), str(tmp_path / "data")]
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": paths}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- errors ---


def test_missing_file_and_unknown_kind(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt does not exist"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(UserError, match=r"\.txt, \.jsonl, \.json, \.parquet"):
        load_prompts(write(tmp_path / "p.csv", "a"))
    with pytest.raises(UserError, match="cannot read prompts"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_file(tmp_path, name, text):
    path = write(tmp_path / name, text)
    for reader in (load_prompts, read_eval_records):
        with pytest.raises(UserError, match="holds no prompts"):
            reader(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bad_utf8_names_line_and_byte(tmp_path, mark):
    path = tmp_path / "p.txt"
    path.write_bytes(mark + "good café\n".encode() + "bad café\n".encode("latin-1"))
    at = len(mark) + len("good café\n".encode()) + len("bad caf")
    with pytest.raises(UserError, match=rf"not UTF-8: line 2, byte {at} of the file is 0xe9"):
        load_prompts(str(path))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"title": "b"}\n', r"line 2 has no prompt field; it has 'title'"),
        ("p.jsonl", '{"prompt": "\\ud83d cat"}\n', r"line 1: the field 'prompt' holds half of a character"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"line 2: the field 'prompt' must be a string, not 3"),
        ("p.jsonl", '{"prompt": "a"}\n{oops\n', r"line 2 is not JSON"),
        ("p.jsonl", "[1]\n", r"line 1 is neither a string nor an object"),
        ("p.json", '{"prompt": "a"}', r"must hold one JSON list"),
        ("p.parquet", "not parquet", r"not a readable parquet file"),
        ("p.jsonl", '{"prompt": "a", "include": "circle"}', r"GenEval's field 'include' must be a list"),
    ],
)
def test_malformed_records(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_eval_records(write(tmp_path / name, text))


def test_parquet_without_a_prompt_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.table({"title": PROMPTS}), path)
    with pytest.raises(UserError, match="no prompt field"):
        load_prompts(path)


@pytest.mark.parametrize("spec", ["shapes:", "shapes:small", "shapes:small:eval", "shapes:a:b:train", "tfds:"])
def test_malformed_specs(spec):
    with pytest.raises(UserError, match="cannot read"):
        load_prompts(spec)


def test_unknown_world():
    with pytest.raises(UserError, match="nowhere"):
        load_prompts("shapes:nowhere:train")


# --- evaluation records ---


def test_eval_records_keep_geneval_metadata(tmp_path):
    record = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"}
    assert read_eval_records(write(tmp_path / "p.jsonl", json.dumps(record))) == [record]
    assert read_eval_records(write(tmp_path / "p.txt", "a red circle\n")) == [{"prompt": "a red circle"}]


# --- order ---


@pytest.mark.parametrize("n, batch", [(10, 3), (10, 5), (3, 8), (1, 4)])
def test_every_epoch_visits_every_prompt_once(n, batch):
    stream = PromptStream([str(i) for i in range(n)], batch, seed=1)
    batches = [stream.batch(i) for i in range(4 * n)]
    assert all(len(prompts) == batch for prompts in batches)
    flat = list(itertools.chain(*batches))
    for epoch in range(len(flat) // n):
        assert len(set(flat[epoch * n : (epoch + 1) * n])) == n


def test_batch_depends_on_seed_and_number_alone():
    prompts = [str(i) for i in range(17)]
    one, other = PromptStream(prompts, 5, seed=3), PromptStream(prompts, 5, seed=3)
    forward = [one.batch(i) for i in range(20)]
    assert [other.batch(i) for i in reversed(range(20))] == forward[::-1]
    assert PromptStream(prompts, 5, seed=4).batch(0) != forward[0]


def test_order_does_not_depend_on_the_batch_size():
    prompts = [str(i) for i in range(11)]
    small, large = PromptStream(prompts, 2, seed=0), PromptStream(prompts, 6, seed=0)
    in_small, in_large = [small.batch(i) for i in range(9)], [large.batch(i) for i in range(3)]
    assert list(itertools.chain(*in_small)) == list(itertools.chain(*in_large))


def test_epochs_are_shuffled_anew():
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 0, 1))
    # Adjacent keys must not give shifted or equal orders: the place of element 0 spreads over epochs.
    places = collections.Counter(int(np.argmin(epoch_order(4, 0, epoch))) for epoch in range(400))
    assert min(places.values()) > 60


def test_order_is_pinned():
    """A resumed run must see the order it started with, whatever version it resumes on."""
    assert epoch_order(8, 7, 2).tolist() == [6, 7, 4, 0, 1, 5, 3, 2]


def test_bad_arguments():
    with pytest.raises(UserError, match="batch must be at least 1"):
        PromptStream(["a"], 0, 0)
    with pytest.raises(UserError, match="empty"):
        PromptStream([], 1, 0)


def test_negative_and_large_seeds_work():
    assert PromptStream(["a", "b"], 2, -1).batch(0) and PromptStream(["a", "b"], 2, 2**63).batch(10**6)
