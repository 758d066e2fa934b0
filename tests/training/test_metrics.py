"""metrics.jsonl, TensorBoard read back by TensorBoard itself, and the console."""

import io
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.training.metrics import MetricWriter, Progress, read_metrics


def events(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_reach_both_files(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 0.5, "dm/gap": np.float32(2)})
        writer.scalars(2, {"loss": np.array([0.25])})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "dm/gap": 2.0}, {"step": 2, "loss": 0.25}]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("dm/gap")] == [(1, 2.0)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()
    writer.close()


def test_jax_scalars(tmp_path):
    import jax.numpy as jnp

    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": jnp.asarray(0.5, jnp.bfloat16)})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_non_finite_numbers_are_null_in_json_and_themselves_in_tensorboard(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "norm": null}\n'
    assert np.isnan(events(tmp_path).Scalars("loss")[0].value)


def test_images_and_texts(tmp_path):
    from PIL import Image

    grid = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with MetricWriter(tmp_path) as writer:
        writer.images(3, {"grid": grid})
        writer.texts(0, {"config": "steps = 4"})
    (image,) = events(tmp_path).Images("grid")
    assert (image.step, image.height, image.width) == (3, 6, 9)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), grid)
    (text,) = events(tmp_path).Tensors("config")
    assert text.tensor_proto.string_val[0] == b"steps = 4"
    assert events(tmp_path).PluginTagToContent("text").keys() == {"config"}


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_images_must_be_uint8_rgb(tmp_path, bad):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="must be uint8"):
        writer.images(0, {"grid": bad})


def test_resuming_drops_what_will_be_written_again(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with MetricWriter(tmp_path, resume_step=3) as writer:
        for step in (4, 5):
            writer.scalars(step, {"loss": 10 * step})
    values = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == values
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == values


def test_starting_afresh_drops_everything(tmp_path):
    for value in (1.0, 2.0):
        with MetricWriter(tmp_path) as writer:
            writer.scalars(1, {"loss": value})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_only_the_primary_process_writes(tmp_path):
    with MetricWriter(tmp_path / "run", primary=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, {"grid": np.zeros((2, 2, 3), np.uint8)})
        writer.texts(1, {"config": ""})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics in"):
        MetricWriter(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "absent")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    """Met when a line is written, or later when clu's thread writes the event."""
    writer = MetricWriter(tmp_path / "a")
    writer._lines._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write metrics in .*: the disk is full; make room and run"):
        writer.scalars(1, {"loss": 1.0})
    with pytest.raises(UserError, match="the disk is full"):
        writer.close()  # not an OSError, which would hide the first

    writer = MetricWriter(tmp_path / "b")
    writer._events._writers[0]._writer._records._writer = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(UserError, match="the disk is full"):
        writer.scalars(1, {"loss": 1.0})
        writer.flush()


def test_clu_works_without_tensorflow(tmp_path):
    """Also clu's own default writer, whose TensorBoard part is ours then."""
    program = """
        import sys
        sys.modules["tensorflow"] = None
        from dmdr_jax.training import events
        from clu import metric_writers
        writer = metric_writers.create_default_writer(sys.argv[1], asynchronous=False)
        writer.write_scalars(7, {"loss": 0.5})
        writer.write_hparams({"lr": 1e-4})
        writer.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "tensorboard")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(7, 0.5)]


# --- console ---


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_without_a_terminal():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, initial=10, show=("dm/score_gap", "reward"), every=10.0, stream=stream, clock=clock)
    for step in range(11, 32):
        clock.now += 5.0 if step == 11 else 1.0
        progress.update(step, {"dm/score_gap": 0.123456, "reward": 2.0, "other": 1.0})
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 21/100  1.00 step/s  ETA 01:19  score gap 0.1235  reward 2",
        "step 31/100  1.00 step/s  ETA 01:09  score gap 0.1235  reward 2",
    ]
    clock.now += 276.0
    progress.update(100)
    progress.note("saved")
    progress.close()
    assert stream.getvalue().splitlines()[2:] == ["step 100/100  4.00 s/step  ETA 00:00", "saved"]


def test_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(10, initial=4, show=("loss",), stream=stream, stage=lambda step: f"stage {step}") as progress:
        progress.update(5, {"loss": 0.5})
        progress.note("hello")
        progress.update(10, {"loss": 0.25})
    text = stream.getvalue()
    assert "10/10" in text and "loss 0.25" in text and "hello\n" in text and "stage 10: 100%" in text


def test_lines_say_the_stage_and_rewards_by_their_names():
    clock, stream = Clock(), io.StringIO()
    show = ("dm/score_gap", "fake/loss", "reward/aesthetic")
    stage = lambda step: "joint stage" if step > 1 else "cold start"
    progress = Progress(2, show=show, every=0.0, stream=stream, clock=clock, stage=stage)
    for step in (1, 2):
        clock.now += 2.0
        progress.update(
            step, {"dm/score_gap": 0.2, "fake/loss": 0.8, **({"reward/aesthetic": 5.5} if step > 1 else {})}
        )
    assert stream.getvalue().splitlines() == [
        "cold start  step 1/2  2 s with compiling  score gap 0.2  fake loss 0.8",
        "joint stage  step 2/2  2.00 s/step  ETA 00:00  score gap 0.2  fake loss 0.8  aesthetic 5.5",
    ]


def test_tensorboard_explains_every_curve(tmp_path):
    from tensorboard import data_compat
    from tensorboard.compat.proto.summary_pb2 import Summary

    with MetricWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.scalars(step, {"dm/score_gap": 0.5, "reward/hps": 1.0, "my/own": 1.0})
        writer.images(1, {"samples/student": np.zeros((2, 2, 3), np.uint8)})
    metadata = events(tmp_path).summary_metadata
    assert {tag: m.display_name for tag, m in metadata.items()} == {
        "dm/score_gap": "score gap",
        "reward/hps": "hps",
        "samples/student": "student",
    }
    value = Summary.Value(tag="dm/score_gap", simple_value=0.5, metadata=metadata["dm/score_gap"])
    assert "steady rise" in data_compat.migrate_value(value).metadata.summary_description  # as the page shows it
