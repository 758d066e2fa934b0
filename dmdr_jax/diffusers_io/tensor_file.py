"""One safetensors file, mapped into memory and read tensor by tensor.

The format: the length n of a header in 8 bytes, little-endian; n bytes of JSON that give each tensor's type, shape
and place; the data. Tensors come as views of the mapped file, and `TensorFile.release` hands their pages back, so
that reading a checkpoint does not fill the process's memory with a second copy of it.
"""

import dataclasses
import json
import math
import mmap
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
        self._map: mmap.mmap | None = None

    def read(self, key: str) -> np.ndarray:
        """A tensor as a read-only view of the file.

        Raises:
          UserError: it is of no floating-point type, or the file is not there any more.
        """
        header = self.headers[key]
        dtype = jnp.dtype(self.dtype(key))
        if not header.size:
            return np.empty(header.shape, dtype)
        flat = np.frombuffer(self._mapped(), dtype, header.size // dtype.itemsize, header.start)
        return flat.reshape(header.shape)

    def dtype(self, key: str) -> str:
        """numpy's name of a tensor's type; UserError unless that is a floating-point type of at least 16 bits."""
        stored = self.headers[key].dtype
        if stored not in FLOATS:
            raise UserError(not_a_float(self.path, key, stored))
        return FLOATS[stored]

    def release(self, key: str) -> None:
        """Lets the system take back the memory of a tensor's pages (views stay valid: they are read again)."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            header = self.headers[key]
            start = header.start - header.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, header.end - start)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                with open(self.path, "rb") as stream:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.path} cannot be read ({error}).") from error
        return self._map


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
