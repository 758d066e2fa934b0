"""The published checkpoints, as far as they can be known without their weights: configurations, keys and shapes.

``dmdr_jax/diffusers_io/published_models.json`` has, for each model, its ``model_index.json``, scheduler and components:
the ``config.json`` (with its SHA-256 where the repository's is on record), the number of parameters, and the sizes of
weight files or the SHA-256 of an index that are on record. ``manifests/NAME.txt`` has the tensors, one row for modules
of one kind::

    transformer_blocks.[0-22].attn.to_q  weight 1536x1536  bias 1536

stands for 23 x 2 tensors; ``[a-b]`` is a range, both ends included, and ``~`` marks a buffer.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from dmdr_jax.diffusers_io import published
from dmdr_jax.diffusers_io.read_plan import Stored

FOLDER = Path(__file__).parent / "manifests"
MODELS: dict[str, dict[str, Any]] = json.loads(published.MODELS.read_text(encoding="utf-8"))
COMPONENTS = [(model, component) for model in MODELS for component in MODELS[model]["components"]]
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}

_RANGE = re.compile(r"\[(\d+)-(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Tensors of a network.

    Attributes:
      shapes: by checkpoint key, in PyTorch's order.
      buffers: the keys that are no parameters.
    """

    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for key, shape in self.shapes.items() if key not in self.buffers)

    def stored(self, dtype: str = "F16", file: str = "model.safetensors") -> dict[str, Stored]:
        """The tensors as if they lay in one file."""
        return {key: Stored(Path(file), dtype, shape) for key, shape in self.shapes.items()}


def component(model: str, name: str) -> dict[str, Any]:
    """What `MODELS` has of a component."""
    return MODELS[model]["components"][name]


def class_of(model: str, name: str) -> str:
    """The class of a component."""
    return MODELS[model]["model_index"][name][1]


@functools.cache
def manifest(tensors: str) -> Manifest:
    """Reads ``manifests/<tensors>.txt``."""
    shapes: dict[str, tuple[int, ...]] = {}
    buffers = set()
    for row in (FOLDER / f"{tensors}.txt").read_text(encoding="utf-8").splitlines():
        if row.startswith("#"):
            continue
        modules, *fields = row.split()
        for module in _expand(modules):
            for name, size in zip(fields[::2], fields[1::2], strict=True):
                key = f"{module}.{name.removeprefix('~')}"
                assert key not in shapes, key
                shapes[key] = tuple(map(int, size.split("x")))
                if name.startswith("~"):
                    buffers.add(key)
    return Manifest(shapes, frozenset(buffers))


def file_size(tensors: dict[str, Stored]) -> int:
    """Bytes of the file that the safetensors library writes for these tensors and the metadata ``format: pt``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first, then by key: the library's order.
    for key, tensor in sorted(tensors.items(), key=lambda item: (-WIDTHS[item[1].dtype], item[0])):
        start, end = end, end + WIDTHS[tensor.dtype] * math.prod(tensor.shape)
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end


def index(tensors: dict[str, Stored], stem: str, max_shard_bytes: int) -> str:
    """The text of the index that diffusers and transformers write beside shards of at most that many bytes."""
    shards, sizes = [], [0]
    for tensor in tensors.values():
        size = WIDTHS[tensor.dtype] * math.prod(tensor.shape)
        if sizes[-1] + size > max_shard_bytes:
            sizes.append(0)
        sizes[-1] += size
        shards.append(len(sizes))
    names = [f"{stem}-{i:05d}-of-{len(sizes):05d}.safetensors" for i in shards]
    value = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(zip(tensors, names, strict=True))}
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _expand(modules: str) -> list[str]:
    """All names that a pattern stands for."""
    parts = _RANGE.split(modules)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    texts = parts[::3]
    return [
        "".join(itertools.chain(*zip(texts, map(str, chosen), strict=False))) + texts[-1]
        for chosen in itertools.product(*ranges)
    ]
