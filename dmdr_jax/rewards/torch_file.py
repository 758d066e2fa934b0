"""Files written by `torch.save`, read without PyTorch and without running anything that is pickled in them.

Such a file is a pickle that names tensors, and their storages as plain bytes: in entries of a zip archive
since PyTorch 1.6, before that behind the pickle. A pickle may call whatever it can import, so the reader here
knows a short list of names (`_allowed`), gives each a harmless meaning of its own and imports nothing. Storages
are mapped into memory and read when a tensor is asked for.
"""

import _compat_pickle
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.lazy_tensor import LazyTensor

# What `pickle.dumps(0x1950A86A20F9469CFC6C, 2)` gives: the first bytes of every file of the old form.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = 30

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("double", "float", "half", "long", "int", "short"),
)
# What the unpickler and the functions it calls raise on a file that is damaged.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError),
    *(OverflowError, MemoryError, RecursionError, struct.error),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),  # packed in an unknown way, or encrypted
)


def read_torch_file(path: str | Path) -> Any:
    """What was given to `torch.save`, with a `LazyTensor` in the place of each tensor or parameter.

    Containers come back as plain dictionaries, lists, tuples and sets, a type as its name.

    Args:
      path: a file of either form, zip archive or old.

    Raises:
      UserError: the file is absent, truncated or damaged, not of this kind, or names anything but tensors,
        containers, numbers and strings.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LEGACY_START))
            file.seek(0)
            if start.startswith(_ZIP_START):
                return _read_zip(path, file)
            if start == _LEGACY_START:
                return _read_legacy(path, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or truncated ({type(error).__name__}: {error}); fetch it again.") from error
    raise UserError(f"{path} is no file of torch.save: neither a zip archive nor PyTorch's older form.")


class _Storages:
    """The storages of one file: checked when the pickle names them, mapped when a tensor is read."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.places: dict[str, Callable[[], np.ndarray]] = {}

    def place(self, key: str, start: int, nbytes: int) -> None:
        """Says where the storage ``key`` lies; refuses one that the file does not hold."""
        if start + nbytes > len(self.map):
            raise EOFError(f"the storage {key!r} ends {start + nbytes - len(self.map)} bytes behind the file's end")
        self.places[key] = lambda: np.frombuffer(self.map, np.uint8, nbytes, start)

    def tensor(self, key: str, dtype: np.dtype, offset: int, shape: tuple, stride: tuple) -> LazyTensor:
        """A tensor on the storage ``key``; offset and strides count elements, as PyTorch's do."""
        counts = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError(f"a tensor has the shape {shape}, the strides {stride} and the offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride)) if all(shape) else -1

        def load() -> np.ndarray:
            flat = self.places[key]()
            flat = flat[: flat.size // dtype.itemsize * dtype.itemsize].view(dtype)
            if last >= flat.size:
                raise UserError(f"{self.path}: a tensor reaches beyond its storage {key!r}; fetch the file again.")
            steps = [step * dtype.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(flat[offset:] if all(shape) else flat, shape, steps, writeable=False)

        return LazyTensor(shape, load)


class _Fixed:
    """What a pickle may hold but not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it changes a {type(self).__name__}")


class _Storage(_Fixed):
    """A reference to a storage, as the pickle holds it."""

    __slots__ = ("dtype", "key")

    def __init__(self, key: str, dtype: np.dtype):
        self.key, self.dtype = key, dtype


class _Dict(dict):
    """What stands for an OrderedDict: keeps its items and drops the attributes that a pickle adds."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Known(_Fixed):
    """What stands for a global that a pickle may name; a function if ``call`` is given."""

    __slots__ = ("_call", "name")

    def __init__(self, name: str, call: Callable | None = None):
        self.name, self._call = name, call

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise pickle.UnpicklingError(f"{self.name} is called as a function")
        return self._call(*args)


class _Unpickler(pickle.Unpickler):
    """Gives names of `_allowed` their meaning and refuses every other one; storages become references."""

    def __init__(self, path: Path, file: Any, storages: _Storages):
        super().__init__(file, encoding="utf-8")
        self._path, self._storages = path, storages
        self._known = _allowed(storages)
        self.named: dict[str, tuple[int, int]] = {}  # elements and bytes of each, of the storages that are named

    def find_class(self, module: str, name: str) -> Any:
        # PyTorch's pickles spell names as Python 2 did.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        known = self._known.get((module, name))
        if known is None:
            raise UserError(
                f"{self._path} is refused: it names {module}.{name}, which is no part of a file of weights; nothing of "
                "it was run. Ask its authors for safetensors, or save its state_dict alone where you trust it."
            )
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"it holds a {kind!r} that is no storage")
        if not isinstance(storage_type, _Known) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("it describes a storage in an unknown way")
        dtype = np.dtype(_STORAGES[storage_type.name])
        self.named[str(key)] = count, dtype.itemsize
        return _Storage(str(key), dtype)


def _allowed(storages: _Storages) -> dict[tuple[str, str], _Known]:
    """Everything that a pickle may name, and what it then gets."""

    def tensor(storage: _Storage, offset: int, shape: Iterable, stride: Iterable, *_: Any) -> LazyTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        return storages.tensor(storage.key, storage.dtype, offset, tuple(shape), tuple(stride))

    def parameter(data: LazyTensor, *_: Any) -> LazyTensor:
        return data

    def plain_bytes(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it encodes a text as {encoding!r}")
        return text.encode("latin1")

    calls: dict[tuple[str, str], Callable] = {
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
        ("collections", "OrderedDict"): lambda pairs=(): _Dict(pairs),
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "complex"): complex,
        ("torch", "Size"): lambda sizes=(): tuple(sizes),
        ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
        ("_codecs", "encode"): plain_bytes,  # how a pickle of this protocol spells bytes
    }
    known = {place: _Known(place[1], call) for place, call in calls.items()}
    known |= {("torch", name): _Known(name) for name in (*_STORAGES, *_DTYPE_NAMES)}
    return known


def _read_zip(path: Path, file: BinaryIO) -> Any:
    storages = _Storages(path, file)
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        root = found[0].removesuffix("data.pkl") if found else ""
        if f"{root}constants.pkl" in entries:
            raise UserError(f"{path} is a TorchScript program, not weights: save its state_dict() with torch.save.")
        if not found:
            raise UserError(f"{path} is a zip archive, but none of torch.save: it has no data.pkl.")
        order = f"{root}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise UserError(f"{path} was written on a big-endian machine; save it again on another.")
        with archive.open(found[0]) as stream:
            unpickler = _Unpickler(path, stream, storages)
            tree = unpickler.load()
        for key, (count, size) in unpickler.named.items():
            info = entries.get(f"{root}data/{key}")
            if info is None or info.file_size < count * size:
                raise EOFError(f"the storage {key!r} is {'absent' if info is None else 'too short'}")
            if info.compress_type == zipfile.ZIP_STORED:
                storages.place(key, _data_start(storages.map, info), info.file_size)
            else:
                storages.places[key] = _compressed(path, info.filename)
    return tree


def _data_start(data: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where an uncompressed entry's bytes begin: behind its local header, which varies in length."""
    header = data[info.header_offset : info.header_offset + _LOCAL_HEADER]
    if not header.startswith(_ZIP_START):
        raise zipfile.BadZipFile(f"{info.filename} is not where the archive's directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + _LOCAL_HEADER + name + extra


def _compressed(path: Path, name: str) -> Callable[[], np.ndarray]:
    """Reads an entry of an archive that somebody has packed anew."""

    def load() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:
                return np.frombuffer(archive.read(name), np.uint8)
        except _DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again.") from error

    return load


def _read_legacy(path: Path, file: BinaryIO) -> Any:
    """Four pickles (magic number, version, the machine, the tree), the storages' keys, then each with its length."""
    storages = _Storages(path, file)
    file.seek(len(_LEGACY_START))
    _Unpickler(path, file, storages).load()
    machine = _Unpickler(path, file, storages).load()
    if machine["little_endian"] is not True:
        raise UserError(f"{path} was written on a big-endian machine; save it again on another.")
    unpickler = _Unpickler(path, file, storages)
    tree = unpickler.load()
    keys = _Unpickler(path, file, storages).load()
    start = file.tell()
    for key in map(str, keys):
        count, size = unpickler.named[key]
        (stored,) = struct.unpack("<q", storages.map[start : start + 8])
        if stored != count:
            raise ValueError(f"the storage {key!r} has {stored} elements and not {count}")
        storages.place(key, start + 8, count * size)
        start += 8 + count * size
    absent = set(unpickler.named) - set(storages.places)
    if absent:
        raise EOFError(f"the storage {sorted(absent)[0]!r} is absent")
    return tree
