"""TensorBoard event files through clu, without tensorflow.

`clu.metric_writers` imports tensorflow for one of its writers. Importing this module puts `EventWriter`, which needs
the tensorboard package alone, in that writer's place: clu's asynchronous writers then work as they are.
"""

from __future__ import annotations

import io
import os
import platform
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from dmdr_jax.training import disk
from dmdr_jax.training.names import name_of

_REPLACED = "clu.metric_writers.summary_writer"
_stand_in = types.ModuleType(_REPLACED)
_stand_in.SummaryWriter = lambda logdir: EventWriter(logdir)  # type: ignore[attr-defined]
sys.modules.setdefault(_REPLACED, _stand_in)

from clu import metric_writers  # noqa: E402


class EventWriter(metric_writers.MetricWriter):
    """clu's MetricWriter interface over event files: scalars, images and texts.

    On a disk there is one file; in an object store each `flush` ends one and begins another, which TensorBoard reads in
    the order of their names.

    Args:
      logdir: folder of the event files.
      start_step: the first step this writer will write; TensorBoard then forgets what an earlier, interrupted run
        wrote from there on.
    """

    def __init__(self, logdir: epath.PathLike, start_step: int = 0):
        super().__init__()
        self._folder = epath.Path(logdir)
        self._described: set[str] = set()
        disk.make_folder(self._folder)
        self._begin()
        self._add(Event(step=start_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        described = ((tag, float(value), self._describe(tag)) for tag, value in scalars.items())
        self._write(step, [Summary.Value(tag=t, simple_value=value, metadata=text) for t, value, text in described])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """uint8 [h, w, 3], or [n, h, w, 3] for several under numbered tags."""
        values = []
        for tag, array in images.items():
            stack = array if array.ndim == 4 else array[None]
            tags = [tag] if len(stack) == 1 else [f"{tag}/{i}" for i in range(len(stack))]
            described = ((name, _png(image), self._describe(name)) for name, image in zip(tags, stack))
            values += [Summary.Value(tag=name, image=png, metadata=text) for name, png, text in described]
        self._write(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Shown as Markdown."""
        metadata = text_metadata.create_summary_metadata("", "")
        self.write_summaries(
            step, {tag: np.array(text.encode(), object) for tag, text in texts.items()}, dict.fromkeys(texts, metadata)
        )

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        rows = "".join(f"| {key} | {value} |\n" for key, value in hparams.items())
        self.write_texts(0, {"hparams": f"| key | value |\n| --- | --- |\n{rows}"})

    def write_summaries(
        self, step: int, values: Mapping[str, np.ndarray], metadata: Mapping[str, SummaryMetadata] | None = None
    ) -> None:
        metadata = metadata or {}
        tensors = {tag: tensor_util.make_tensor_proto(value) for tag, value in values.items()}
        self._write(step, [Summary.Value(tag=t, tensor=v, metadata=metadata.get(t)) for t, v in tensors.items()])

    def write_videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
        raise NotImplementedError("EventWriter writes no videos")

    def write_audios(self, step: int, audios: Mapping[str, np.ndarray], *, sample_rate: int) -> None:
        raise NotImplementedError("EventWriter writes no audio")

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Any = None) -> None:
        raise NotImplementedError("EventWriter writes no histograms")

    def flush(self) -> None:
        self._records.flush()
        if isinstance(self._file, io.BytesIO) and self._unsent:
            disk.write_file(self._path, self._file.getvalue())
            self._begin()

    def close(self) -> None:
        self.flush()
        self._records.close()

    def _describe(self, tag: str) -> SummaryMetadata | None:
        """Title and explanation, which TensorBoard shows beside a chart; once for each tag, as it keeps the first."""
        name = name_of(tag)
        if name is None or tag in self._described:
            return None
        self._described.add(tag)
        return SummaryMetadata(display_name=name.title, summary_description=name.text)

    def _begin(self) -> None:
        """A new file. Two runs in one folder get names of their own, in the order they were started."""
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{platform.node()}.{os.getpid()}"
        self._path = self._folder / name
        self._file = io.BytesIO() if disk.is_remote(self._folder) else open(self._path, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        self._unsent = False

    def _write(self, step: int, values: list[Summary.Value]) -> None:
        self._add(Event(step=int(step), summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()
        self._unsent = True


def _png(image: np.ndarray) -> Summary.Image:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    height, width, channels = image.shape
    return Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
