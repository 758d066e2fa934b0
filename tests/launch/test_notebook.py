"""The notebook, executed from its first cell to its last in small mode by the real programs."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab_demo.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def texts(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def pictures(cell):
    found = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_the_notebook_is_kept_without_outputs_and_in_small_mode():
    notebook = read()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert cells[0].source.startswith('MODE = "small"')
    attached = [cell for cell in notebook.cells if "attachments" in cell]
    assert attached and all(f"(attachment:{name})" in cell.source for cell in attached for name in cell["attachments"])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all of its cells have run, and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("colab") / "out"
    notebook = read()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, count = re.subn(r'OUT = "[^"]*"', f'OUT = "{out}"', first.source)
    assert count == 1
    # It lies in launch/, where Jupyter would open it.
    client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    return client.execute(), out


def test_every_cell_runs_and_the_programs_leave_what_they_should(executed):
    notebook, out = executed
    files = ("shapes/metrics.jsonl", "report.html", "shapes_student/model_index.json", "sd3_report.html")
    assert [name for name in (*files, "dmdr_lora.safetensors") if not (out / name).exists()] == []
    printed = "".join(texts(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "joint stage  step 4/4" in printed and "pipe.load_lora_weights" in printed
    assert "$ python -m dmdr_jax.plan" in printed


def test_its_pictures_are_pictures(executed):
    notebook, _ = executed
    shown = [picture for cell in notebook.cells for picture in pictures(cell)]
    assert len(shown) == 3  # teacher twice; with the student; teacher and student of the second part
    assert all(picture.std() > 10 for picture in shown)
    above, below = shown[0][:128], shown[0][128:256]
    assert above.shape == below.shape and np.abs(above.astype(float) - below).mean() > 1  # 25 steps, 4 steps
