"""A workdir in an object store: gs:// as the code sees it, played by `tests.training.object_store`."""

import sys

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils

from dmdr_jax.errors import UserError
from dmdr_jax.model import open_model
from dmdr_jax.training import disk
from dmdr_jax.training.checkpoints import Checkpoints, load_trained
from dmdr_jax.training.loop import train
from dmdr_jax.training.metrics import MetricWriter, read_metrics
from tests.training import object_store, tiny
from tests.training.conftest import leaves_equal
from tests.training.test_checkpoints import META, abstract, assert_same, make_state

RUN = "gs://bucket/runs/first"


@pytest.fixture(scope="module")
def server():
    """tensorstore reads the address once, so there is one server for all tests."""
    store = object_store.Store()
    server = object_store.serve(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
        # Orbax asks the real service, through a package of Google's, what kind of bucket it is.
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        for name in ("gs", "gcs"):
            kind = type("Bucket", (object_store.Bucket,), {"store": store})
            patch.setitem(sys.modules["fsspec.registry"]._registry, name, kind)
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        yield store
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    server.shutdown()


@pytest.fixture
def store(server):
    server.objects.clear()
    return server


def names(store):
    return [name.removeprefix("bucket/runs/first/") for name in store.names("bucket/runs/first/")]


def test_files(store):
    disk.make_folder(RUN)
    disk.write_file(epath.Path(RUN) / "a" / "b.txt", b"12")
    assert names(store) == ["a/b.txt"] and disk.is_remote(RUN) and not disk.is_remote("runs/gs")
    for folder in ("ftp://host/folder", "memory://run"):
        with pytest.raises(UserError, match="is no place to write to; give a local folder, or one in gs://"):
            disk.make_folder(folder)


def test_metrics_grow_with_every_flush(store, tmp_path):
    with MetricWriter(RUN) as writer:
        for step in range(1, 4):
            writer.scalars(step, {"loss": step})
            if step == 2:
                writer.flush()
                assert [row["step"] for row in read_metrics(RUN)] == [1, 2]
        assert len(read_metrics(RUN)) == 2  # nothing is sent for every line
    assert len(read_metrics(RUN)) == 3
    with MetricWriter(RUN, resume_step=2) as writer:
        writer.scalars(3, {"loss": 30.0})
        writer.images(3, {"grid": np.zeros((2, 2, 3), np.uint8)})
    assert [row["loss"] for row in read_metrics(RUN)] == [1, 2, 30]
    files = [name for name in names(store) if name.startswith("tensorboard/")]
    assert len(files) == 3  # one for each time that something was sent
    assert scalars(store, files, tmp_path) == [(1, 1), (2, 2), (3, 30)]


def scalars(store, files, folder):
    """What TensorBoard reads in the files, brought to a disk."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in files:
        (folder / file.split("/")[-1]).write_bytes(store.objects[f"bucket/runs/first/{file}"][0])
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("loss")]


def test_checkpoints(store):
    with Checkpoints(f"{RUN}/checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), META)
    with Checkpoints(f"{RUN}/checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        assert_same(checkpoints.restore(abstract(make_state()), META), make_state(3))
        assert_same(checkpoints.restore(abstract(make_state()), step=2), make_state(2))
    assert not any(name.startswith("checkpoints/1/") for name in names(store))
    trees, meta = load_trained(RUN)
    assert meta["step"] == 3
    np.testing.assert_array_equal(trees["generator"]["norm.out"]["scale"], make_state(3).generator["norm.out"]["scale"])


def test_a_save_that_was_killed_does_not_count(store):
    """There is no renaming in an object store: a step counts when its last file is there."""
    with Checkpoints(f"{RUN}/checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), META)
    del store.objects["bucket/runs/first/checkpoints/2/commit_success.txt"]
    assert load_trained(RUN)[1]["step"] == 1
    with Checkpoints(f"{RUN}/checkpoints") as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(abstract(make_state()), META), make_state(1))
        checkpoints.save(2, make_state(2), META)
    assert_same(load_trained(RUN, ("key",))[0]["key"], np.asarray(make_state(2).key))


@pytest.mark.slow
def test_a_whole_run(store, teacher, prompts_file, tmp_path):
    """In the store as on a disk, and resumed there."""
    config = tiny.config(teacher, prompts_file, preview__images=2)
    expected = train(config, tmp_path)
    state = train(config, RUN, stop=lambda step: step == 3)
    assert int(state.step) == 3
    assert leaves_equal(train(config, RUN), expected)
    assert [row["step"] for row in read_metrics(RUN)] == [1, 2, 3, 4]
    wanted = {"config.json", "samples/prompts.txt", "samples/teacher.png", "samples/student_000004.png"}
    assert wanted <= set(names(store)) and not any("tmp" in name for name in names(store))
    assert open_model(RUN).meta["step"] == 4
    for name in ("samples/teacher.png", "samples/student_000004.png"):
        assert store.objects[f"bucket/runs/first/{name}"][0] == (tmp_path / name).read_bytes()


def test_a_report_of_a_run_there(store, tmp_path):
    """As `python -m dmdr_jax.report gs://...`, with metrics, a grid and another run beside it."""
    import io
    import json

    from PIL import Image

    from dmdr_jax.evaluation.report import write_report

    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "png")
    for name, seed in (("first", 1), ("second", 2)):
        folder = epath.Path(f"gs://bucket/runs/{name}")
        config = {"model": "m", "steps": 9, "batch": 2, "seed": seed, "rewards": {}, "student": {"steps": 4}}
        config["generator"] = {"kind": "full"}
        disk.write_file(folder / "config.json", json.dumps({"config": config}).encode())
        disk.write_file(folder / "metrics.jsonl", b'{"step": 1, "dm/score_gap": 0.5}\n')
        disk.write_file(folder / "samples" / "student_000001.png", png.getvalue())
    write_report(RUN, None, tmp_path / "one.html")
    html = (tmp_path / "one.html").read_text()
    assert "student at step 1" in html and "data:image/png" in html and "<svg" in html and RUN in html
    write_report([RUN, "gs://bucket/runs/second"], None, tmp_path / "two.html")
    assert "<th>first</th><th>second</th>" in (tmp_path / "two.html").read_text()
