"""One safetensors file, read tensor by tensor.

The format: the length n of a header in 8 bytes, little-endian; n bytes of JSON that give each tensor's type, shape
and place; the data. Data are read straight to where they are wanted: a mapped file would cost a fault for every page,
and its pages would count as the process's memory.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types of weights that can be read, by safetensors' names."""

_INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of one tensor.

    Attributes:
      dtype: safetensors' name, such as ``"BF16"``.
      shape: its shape.
      start: first byte, counted from the beginning of the file.
      end: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class TensorFile:
    """A file's tensors by key, and its metadata.

    Attributes:
      path: the file.
      headers: by key, in the file's order.
      metadata: the texts that the writer put into the header.
    """

    def __init__(self, path: str | Path):
        """Reads the header alone.

        Raises:
          UserError: the file is absent, truncated or not safetensors.
        """
        self.path = Path(path)
        try:
            self.headers, self.metadata = _read_headers(self.path)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist.") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}).") from error

    def read(self, key: str) -> np.ndarray:
        """A tensor, in an array of its own.

        Raises:
          UserError: it is of no floating-point type, or the file is not there any more.
        """
        tensor = np.empty(self.headers[key].shape, jnp.dtype(self.dtype(key)))
        self.read_into(key, tensor)
        return tensor

    def read_into(self, key: str, place: np.ndarray) -> None:
        """Fills ``place``, contiguous and of the tensor's type and size, whatever its shape.

        Raises:
          UserError: the file is not there any more, or has become shorter.
        """
        header = self.headers[key]
        rest = memoryview(place.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer
        if len(rest) != header.size:
            raise ValueError(f"{len(rest)} bytes for the {header.size} of {key}")
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(header.start)
                while rest:
                    count = stream.readinto(rest)
                    if not count:
                        raise _bad(self.path, f"truncated: it ends within the tensor {key!r}")
                    rest = rest[count:]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error}).") from error

    def dtype(self, key: str) -> str:
        """numpy's name of a tensor's type; UserError unless that is a floating-point type of at least 16 bits."""
        stored = self.headers[key].dtype
        if stored not in FLOATS:
            raise UserError(not_a_float(self.path, key, stored))
        return FLOATS[stored]


def not_a_float(path: Path, key: str, stored: str) -> str:
    """Why a tensor's type cannot be read, and the mend."""
    return (
        f"{path}: the tensor {key!r} is stored as {stored}, but weights must be {', '.join(FLOATS)}; "
        "use the model's files that are not quantised."
    )


def _read_headers(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise _bad(path, f"truncated: it has {size} bytes")
        length = struct.unpack("<Q", head)[0]
        if length > size - 8 or length > _LONGEST_HEADER:
            raise _bad(path, f"truncated or no safetensors file: it ends within its header, after {size} bytes")
        text = stream.read(length)
    try:
        described = json.loads(text)
        metadata = described.pop(_METADATA, None) or {}
        headers = {key: _header(value, 8 + length) for key, value in described.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad(path, "no safetensors file: its header is not readable") from error
    _check_places(path, headers, 8 + length, size)
    return headers, metadata


def _header(value: Any, base: int) -> Header:
    """One entry of the header; ValueError and the like where it makes no sense."""
    start, end = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(n) for n in value["shape"])
    dtype = value["dtype"]
    width = jnp.dtype(FLOATS[dtype]).itemsize if dtype in FLOATS else _INTEGERS.get(dtype)
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError(value)
    if width is not None and end - start != width * math.prod(shape):
        raise ValueError(value)
    return Header(dtype, shape, base + start, base + end)


def _check_places(path: Path, headers: dict[str, Header], base: int, size: int) -> None:
    """UserError unless the tensors fill the file's data exactly."""
    end = base
    for key, header in sorted(headers.items(), key=lambda item: (item[1].start, item[1].end)):
        if header.end > size:
            raise _bad(path, f"truncated: it ends within the tensor {key!r}, after {size} bytes")
        if header.start != end:
            raise _bad(path, "damaged: its header does not describe its data")
        end = header.end
    if end != size:
        raise _bad(path, "damaged: its header does not describe its data")


def _bad(path: Path, what: str) -> UserError:
    return UserError(f"{path} is {what}; fetch it again.")
