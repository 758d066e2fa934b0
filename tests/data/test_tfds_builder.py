"""The data set of prompts: made and read without tensorflow."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
    import sys
    from pathlib import Path

    from dmdr_jax.data import tfds_builder
    from dmdr_jax.data.prompts import load_prompts
    from dmdr_jax.errors import UserError

    file, out = Path(sys.argv[1]) / "p.txt", str(Path(sys.argv[1]) / "tfds")
    prompts = [f"prompt {i} \u00e9" for i in range(50)]
    file.write_text("\\n".join([prompts[0], "", *prompts]) + "\\n")

    def make(*more):
        tfds_builder.main(tfds_builder.parser().parse_args(["--prompts", str(file), "--out", out, *more]))

    make("--name", "mine", "--distinct")
    folder = f"{out}/dmdr_prompts/mine/1.0.0"
    assert load_prompts(f"tfds:{folder}") == prompts  # in their order
    assert load_prompts(f"tfds:{folder}:train[10:12]") == prompts[10:12]
    make("--name", "mine", "--distinct")  # is there already
    make("--name", "all")
    assert load_prompts(f"tfds:{out}/dmdr_prompts/all/1.0.0")[:2] == [prompts[0]] * 2
    make("--prompts", f"tfds:{folder}", "--name", "copy")
    try:
        make("--name", "mine")
    except UserError as error:
        assert "already holds other prompts" in str(error), error
    else:
        raise AssertionError
    import tensorflow_datasets as tfds
    records = tfds.builder_from_directory(folder).as_data_source("train")
    ids = {records[i]["id"] for i in range(50)}
    assert "tensorflow" not in sys.modules
    assert len(ids) == 50 and tfds_builder.prompt_id(" prompt  0 e\u0301").encode() in ids
"""


def test_made_and_read_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "50 prompts in tfds:" in done.stdout
    assert "51 prompts, 1 empty ones left out, 1 duplicates" in done.stdout
