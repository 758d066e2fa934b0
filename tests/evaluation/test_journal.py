"""What outlives a kill, and how the work is shared."""

import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.journal import Journal, key_of, write_text
from dmdr_jax.evaluation.shards import Shard


def test_everybody_reads_what_anybody_wrote(tmp_path):
    one, other = Journal(tmp_path / "j", 0), Journal(tmp_path / "j", 1)
    assert one.read() == {}
    one.add({"a": 1.5})
    other.add({"b": [1, 2]})
    one.add({"c": None})
    assert one.read() == other.read() == {"a": 1.5, "b": [1, 2], "c": None}


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.add({"a": 1, "b": 2})
    with open(journal.file, "ab") as file:
        file.write(b'{"c": 3')
    assert journal.read() == {"a": 1, "b": 2}
    journal.add({"d": 4})
    assert journal.read() == {"a": 1, "b": 2, "d": 4}


def test_numbers_come_back_to_the_last_bit(tmp_path):
    Journal(tmp_path).add({"x": 0.1 + 0.2, "nan": float("nan")})
    found = Journal(tmp_path).read()
    assert found["x"] == 0.1 + 0.2
    assert found["nan"] != found["nan"]


def test_only_what_is_missing_is_computed(tmp_path):
    asked, done = [], []

    def squares(rows):
        asked.append(rows)
        return [i * i for i in rows]

    Journal(tmp_path).add({"k1": "known"})
    keys = [f"k{i}" for i in range(6)]
    Journal(tmp_path).fill(keys, squares, 2, done.append)
    assert asked == [[0, 2], [3, 4], [5]]
    assert done == [1, 2, 2, 1]
    assert Journal(tmp_path).read() == {"k0": 0, "k1": "known", "k2": 4, "k3": 9, "k4": 16, "k5": 25}


def test_a_kill_keeps_the_lots_before_it(tmp_path):
    def fails_at_the_third(rows):
        if 4 in rows:
            raise KeyboardInterrupt
        return rows

    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path).fill(list("abcdef"), fails_at_the_third, 2)
    assert Journal(tmp_path).read() == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_keys_depend_on_contents_alone():
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert key_of("a", "bc") != key_of("ab", "c")


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "deep" / "file", "one")
    write_text(tmp_path / "deep" / "file", "two")
    assert [(f.name, f.read_text()) for f in (tmp_path / "deep").iterdir()] == [("file", "two")]


@pytest.mark.parametrize("n", [0, 1, 7, 8])
def test_parts_cover_everything_once(n):
    parts = [Shard.make(f"{i}/3").rows(n).tolist() for i in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_by_default():
    assert Shard.make(None) == Shard(0, 1)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", "0/2x"])
def test_malformed_parts(text):
    with pytest.raises(UserError, match="--shard"):
        Shard.make(text)
