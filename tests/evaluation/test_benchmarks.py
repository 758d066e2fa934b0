"""Prompts as benchmarks publish them, and folders as their scorers read them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.benchmarks import BENCHMARKS, compbench_name, link, spread_by_style, two_by_two


def pictures(folder, count, size=(6, 4)):
    """``count`` pictures of one colour each; picture i is (i, 0, 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:05d}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.new("RGB", size, (i, 0, 0)).save(file)
    return files


def groups_of(files, n):
    return [files[i : i + n] for i in range(0, len(files), n)]


def tree(root):
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


# --- GenEval -----------------------------------------------------------------------------------------------------


def test_geneval_folders_as_its_scorer_walks_them(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [], "prompt": "two dogs"},
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    read = BENCHMARKS["geneval"].read(str(tmp_path))
    assert read == records
    root = tmp_path / "out"
    assert BENCHMARKS["geneval"].lay_out(root, groups_of(pictures(tmp_path / "p", 8), 4), read) == 8
    seen = {}
    for folder in root.iterdir():  # as evaluate_images.py does it
        assert folder.name.isdigit()
        names = [f.name for f in (folder / "samples").iterdir() if re.match(r"\d+\.png", f.name)]
        seen[json.loads((folder / "metadata.jsonl").read_text())["prompt"]] = sorted(names)
    assert seen == {r["prompt"]: [f"{i:05d}.png" for i in range(4)] for r in records}
    with Image.open(root / "00001" / "samples" / "00002.png") as image:
        assert image.getpixel((0, 0)) == (6, 0, 0)
    before = tree(root)
    BENCHMARKS["geneval"].lay_out(root, groups_of(pictures(tmp_path / "p", 8), 4), read)
    assert tree(root) == before


def test_geneval_needs_its_fields(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog"}\n')
    with pytest.raises(UserError, match="record 1 has no 'tag'"):
        BENCHMARKS["geneval"].read(str(tmp_path / "p.jsonl"))


# --- DPG-Bench ---------------------------------------------------------------------------------------------------


def test_dpg_prompts_from_the_folder_and_from_the_table(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "b2.txt").write_text("A long\nprompt. ")
    (tmp_path / "prompts" / "a1.txt").write_text("Another")
    expected = [{"id": "a1", "prompt": "Another"}, {"id": "b2", "prompt": "A long prompt."}]
    assert BENCHMARKS["dpg"].read(str(tmp_path / "prompts")) == expected
    text = 'item_id,text,keywords\na1,Another,x\na1,Another,y\nb2,"A long\nprompt.",z\n'
    (tmp_path / "dpg_bench.csv").write_text(text)
    assert BENCHMARKS["dpg"].read(str(tmp_path)) == expected
    (tmp_path / "prompts" / "c.d.txt").write_text("x")
    with pytest.raises(UserError, match=r"'c\.d' has a dot"):
        BENCHMARKS["dpg"].read(str(tmp_path / "prompts"))
    with pytest.raises(UserError, match="is not DPG-Bench's"):
        BENCHMARKS["dpg"].read(str(tmp_path / "nowhere"))


def test_dpg_grids_in_the_scorers_order(tmp_path):
    files = pictures(tmp_path / "p", 4, (5, 5))
    BENCHMARKS["dpg"].lay_out(tmp_path / "out", [files], [{"id": "a1"}])
    assert tree(tmp_path / "out") == ["a1.png"]
    grid, side = Image.open(tmp_path / "out" / "a1.png"), 5
    crops = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    assert [grid.crop(crop).getpixel((2, 2))[0] for crop in crops] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="up to four images of one size"):
        two_by_two([*files[:3], *pictures(tmp_path / "q", 1, (4, 5))])
    BENCHMARKS["dpg"].lay_out(tmp_path / "one", [files[:1]], [{"id": "a1"}])
    assert Image.open(tmp_path / "one" / "a1.png").size == (5, 5)


# --- HPSv2 -------------------------------------------------------------------------------------------------------


def test_hpsv2_folders_and_styles(tmp_path):
    for style, prompts in (("photo", ["p0", "p1"]), ("anime", ["a0"]), ("drawbench", ["no style"])):
        (tmp_path / f"{style}.json").write_text(json.dumps(prompts))
    records = BENCHMARKS["hpsv2"].read(str(tmp_path))
    assert [(r["style"], r["index"], r["prompt"]) for r in records] == [
        ("anime", 0, "a0"),
        ("photo", 0, "p0"),
        ("photo", 1, "p1"),
    ]
    BENCHMARKS["hpsv2"].lay_out(tmp_path / "out", groups_of(pictures(tmp_path / "p", 3), 1), records)
    assert tree(tmp_path / "out") == ["anime/00000.jpg", "photo/00000.jpg", "photo/00001.jpg"]
    assert Image.open(tmp_path / "out" / "photo" / "00001.jpg").format == "JPEG"
    assert len(BENCHMARKS["hpsv2"].read(str(tmp_path / "drawbench.json"))) == 1
    with pytest.raises(UserError, match=r"holds none of anime\.json"):
        BENCHMARKS["hpsv2"].read(str(tmp_path / "out"))


def test_hpsv2_table_is_its_programs():
    scores = np.random.default_rng(0).random(800 + 160)
    records = [{"style": "anime"}] * 800 + [{"style": "photo"}] * 160
    found = spread_by_style(scores, records)
    means = [np.mean(scores[i : i + 80]) * 100 for i in range(0, 800, 80)]
    assert found["anime"] == pytest.approx({"mean": np.mean(means), "std": np.std(means)})
    assert found["photo"]["mean"] == pytest.approx(100 * scores[800:].mean())


# --- T2I-CompBench -----------------------------------------------------------------------------------------------


def test_compbench_names_as_its_scorers_read_them(tmp_path):
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\ta green bench\na red/black cat_fish\n")
    (tmp_path / "shape_val.txt").write_text("a round bag\n")
    (tmp_path / "color_train.txt").write_text("no\n")
    records = BENCHMARKS["compbench"].read(str(tmp_path))
    assert [r["category"] for r in records] == ["color", "color", "shape"]
    root = tmp_path / "out"
    BENCHMARKS["compbench"].lay_out(root, groups_of(pictures(tmp_path / "p", 6), 2), records)
    names = [f.name for f in (root / "color" / "samples").iterdir()]
    names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py does it
    assert [n.split("_")[0] for n in names] == ["a green bench and a blue bowl"] * 2 + ["a red black cat fish"] * 2
    assert [int(n.split(".png")[0].split("_")[1]) for n in names] == [0, 1, 2, 3]
    assert tree(root / "shape") == ["samples/a round bag_000000.png", "samples/a round bag_000001.png"]


def test_a_long_prompt_fits_a_file_name():
    name = compbench_name("é" * 300, 12)
    assert len(name.encode()) <= 255
    assert name.endswith("_000012.png")
    assert set(name.removesuffix("_000012.png")) == {"é"}


def test_links_are_copies_where_there_are_none(tmp_path, monkeypatch):
    (file,) = pictures(tmp_path / "p", 1)
    link(file, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").samefile(file)

    def refused(*_):
        raise OSError

    monkeypatch.setattr("os.link", refused)
    link(file, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() == file.read_bytes()
    assert not (tmp_path / "c.png").samefile(file)
