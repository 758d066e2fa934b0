"""Weight files of a model folder: streamed into a parameter tree, and out of one.

Reading holds one leaf on the host at a time: its tensors are put side by side in the wanted type and handed to the
devices, which bring them into our layout. Writing holds one leaf too. A file appears under its name only when it is
complete.
"""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.diffusers_io.keymap import Entry, entries, leaves, unflatten
from dmdr_jax.diffusers_io.read_plan import Read, Stored, make_plan
from dmdr_jax.diffusers_io.tensor_file import FLOATS, TensorFile
from dmdr_jax.errors import UserError

STEMS = ("diffusion_pytorch_model", "model")
"""File names without suffix: diffusers' models, then transformers'."""

MAX_SHARD_BYTES = 5 * 2**30
_ALIGNMENT = 64
_READERS = 2

Buffers = Mapping[str, Callable[[], np.ndarray]]
"""Tensors by key, in the checkpoint's layout, for those that a checkpoint may lack because they can be computed."""

_SUFFIX = ".safetensors"
_TYPES = {name: stored for stored, name in FLOATS.items()} | {
    f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def stored_tensors(folder: str | Path, variant: str | None = None) -> dict[str, Stored]:
    """What a model folder holds, from the headers of its weight files.

    Args:
      folder: such as ``.../transformer``, with one weight file or several and their index.
      variant: such as ``"fp16"``; a folder without files of that variant is read without it, as
        diffusers does.

    Returns:
      Tensors by checkpoint key.

    Raises:
      UserError: no weight files, one named by the index is absent, or one cannot be read.
    """
    found = find_checkpoint(folder, variant)
    return _headers(found) if found.suffix == _SUFFIX else _sharded(found)


def find_checkpoint(folder: str | Path, variant: str | None = None) -> Path:
    """The weight file of a model folder, or the index of several; see `stored_tensors`."""
    folder = Path(folder)
    for wanted in dict.fromkeys((variant or None, None)):
        for stem in STEMS:
            for name in (single_name(stem, wanted), *index_names(stem, wanted)):
                if (folder / name).is_file():
                    return folder / name
    raise UserError(_nothing_found(folder, variant))


def weight_files(folder: str | Path, variant: str | None = None) -> dict[str, Path]:
    """Where each tensor of a model folder lies: file by checkpoint key (see `stored_tensors`)."""
    return {key: tensor.file for key, tensor in stored_tensors(folder, variant).items()}


def single_name(stem: str, variant: str | None) -> str:
    """The name of a checkpoint that is one file."""
    return f"{stem}.{variant}{_SUFFIX}" if variant else f"{stem}{_SUFFIX}"


def index_names(stem: str, variant: str | None) -> list[str]:
    """The names under which the index of a sharded checkpoint is found: today's, then older ones of variants."""
    if not variant:
        return [f"{stem}{_SUFFIX}.index.json"]
    return [
        f"{stem}{_SUFFIX}.index.{variant}.json",
        f"{stem}.{variant}{_SUFFIX}.index.json",
        f"{stem}{_SUFFIX}.{variant}.index.json",
    ]


def has_variant(folder: str | Path, variant: str) -> bool:
    """Whether a model folder holds weight files of this variant."""
    names = [name for stem in STEMS for name in (single_name(stem, variant), *index_names(stem, variant))]
    return any((Path(folder) / name).is_file() for name in names)


def read_tree(
    folder: str | Path,
    abstract: Any,
    dtype: Any = None,
    sharding: Any = None,
    variant: str | None = None,
    buffers: Buffers | None = None,
) -> Any:
    """Reads a model folder into a parameter tree.

    Two threads share the leaves, the largest first, while there is room: beside the tree two of them are in memory,
    in the type they are read as.

    Args:
      folder: the model's folder.
      abstract: the tree as ``jax.ShapeDtypeStruct`` leaves; paths name the checkpoint keys.
      dtype: type of the arrays; None keeps the type each leaf is stored in.
      sharding: None, one ``jax.sharding.Sharding`` for all leaves, or a tree of them.
      variant: see `stored_tensors`.
      buffers: what to put where the folder lacks a tensor.

    Returns:
      A nested dictionary of jax arrays like ``abstract``.

    Raises:
      UserError: a file, key, shape or type is not what the tree needs.
    """
    buffers = buffers or {}
    plan = make_plan(abstract, stored_tensors(folder, variant), folder, buffers)
    shardings = _sharding_by_path(abstract, sharding)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    flat: dict[keymap.Path, jax.Array] = {}
    for entry in plan.absent:
        tensor = entry.to_ours(np.asarray(buffers[entry.key]()))
        flat[entry.path] = _place(tensor.astype(dtype or tensor.dtype), shardings.get(entry.path))

    def read_share(paths: Sequence[keymap.Path]) -> dict[keymap.Path, jax.Array]:
        reader = _LeafReader(dtype)
        # A leaf's memory serves for the next one: a device must not be reading it any more.
        return {p: jax.block_until_ready(_place(reader.read(plan.reads[p]), shardings.get(p))) for p in paths}

    order = sorted(plan.reads, key=lambda path: -math.prod(shapes[path]))
    with ThreadPoolExecutor(_READERS) as threads:
        for share in threads.map(read_share, [order[i::_READERS] for i in range(_READERS)]):
            flat |= share
    return unflatten({path: flat[path] for path in shapes})


def stored_dtype(folder: str | Path, variant: str | None = None) -> str:
    """The floating-point type in which most of a model folder's tensors are stored, such as ``"bfloat16"``."""
    stored = [tensor.dtype for tensor in stored_tensors(folder, variant).values() if tensor.dtype in FLOATS]
    return FLOATS[max(stored, key=stored.count)] if stored else "float32"


def write_tree(
    folder: str | Path,
    tree: Any,
    dtype: Any = None,
    stem: str = STEMS[0],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes a parameter tree as a checkpoint: one file, or shards with their index.

    Args:
      folder: made if absent.
      tree: nested mapping of arrays (fully addressable from this process).
      dtype: type to store; None keeps each leaf's own.
      stem: `STEMS`: diffusers' name or transformers'.
      max_shard_bytes: a checkpoint larger than this is split.

    Returns:
      The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = dict(leaves(tree))
    shards = _shards(entries(tree), flat, dtype, max_shard_bytes)
    written, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}{_SUFFIX}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{_SUFFIX}"
        described = {entry.key: (_stored_type(flat[entry.path], dtype), entry.shape) for entry in shard}
        write_tensors(folder / name, described, _tensors(shard, flat, dtype))
        weight_map.update(dict.fromkeys((entry.key for entry in shard), name))
        written.append(folder / name)
    if len(shards) > 1:
        total = sum(_bytes(entry, flat, dtype) for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / f"{stem}{_SUFFIX}.index.json", json.dumps(index, indent=2))
        written.append(folder / f"{stem}{_SUFFIX}.index.json")
    return written


def save_file(tensors: Mapping[str, np.ndarray], file: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file, complete or not at all.

    Raises:
      UserError: the disk is full, or the place cannot be written.
    """
    described = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    write_tensors(file, described, tensors.values(), metadata)


def write_tensors(
    file: str | Path,
    described: Mapping[str, tuple[Any, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file from tensors that need not be in memory together, complete or not at all.

    Args:
      file: its name.
      described: type and shape of each tensor by key.
      tensors: in the same order.
      metadata: texts for the header.

    Raises:
      UserError: the disk is full, or the place cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, (dtype, shape) in described.items():
        start, end = end, end + jnp.dtype(dtype).itemsize * math.prod(shape)
        header[key] = {"dtype": _TYPES[jnp.dtype(dtype).name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8 bytes
    with _arriving(Path(file)) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))  # type: ignore[call-overload]


def write_text(file: str | Path, text: str) -> None:
    """Writes one text file, complete or not at all; UserError as `save_file`."""
    with _arriving(Path(file)) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def _arriving(file: Path) -> Iterator[BinaryIO]:
    """A stream into a temporary name beside ``file`` that becomes ``file`` when the block has ended well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.chmod(name, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; check the folder's permissions and free space.") from error
    try:
        with open(handle, "wb") as stream:
            yield stream
        os.replace(name, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; nothing was left under that name.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _headers(file: Path) -> dict[str, Stored]:
    return {key: Stored(file, header.dtype, header.shape) for key, header in TensorFile(file).headers.items()}


def _sharded(index: Path) -> dict[str, Stored]:
    """Tensors by key from an index, checked against what the files hold."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        strange = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a checkpoint index ({error!r}); fetch it again.") from error
    if strange:
        raise UserError(f"{index} names a file outside its folder, {strange[0]!r}; fetch it again.")
    held: dict[str, dict[str, Stored]] = {}
    for name in names:
        file = index.parent / name
        if not file.is_file():
            keys = [key for key, place in weight_map.items() if place == name]
            raise UserError(f"{file} is missing: {index.name} places {len(keys)} tensors there, such as {keys[0]!r}.")
        held[name] = _headers(file)
    for key, name in weight_map.items():
        if key not in held[name]:
            raise UserError(f"{index.parent / name} lacks the tensor {key!r} that {index.name} lists.")
    # A tensor that no index lists is still in the checkpoint; where two files hold one, the index decides.
    stored = {key: tensor for tensors in held.values() for key, tensor in tensors.items()}
    return stored | {key: held[name][key] for key, name in weight_map.items()}


def _nothing_found(folder: Path, variant: str | None) -> str:
    """Why a folder has no weights to read, and the mend."""
    if not folder.is_dir():
        return f"{folder} does not exist."
    variants = {
        p.name.removesuffix(_SUFFIX).split(".", 1)[1].split("-0", 1)[0]
        for p in folder.glob(f"*{_SUFFIX}")
        if "." in p.name.removesuffix(_SUFFIX)
    }
    if variants:
        return f"{folder} has only weights of the variant {' and '.join(sorted(variants))}; ask for that variant."
    shards = sorted(p.name for p in folder.glob(f"*-of-*{_SUFFIX}"))
    if shards:
        return f"{folder} has shards such as {shards[0]} but not their index, {index_names(_stem(shards[0]), None)[0]}."
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return f"{folder} has pickled weights only; save the model again with safe_serialization=True."
    return f"{folder} has no {STEMS[0]}{_SUFFIX} or {STEMS[1]}{_SUFFIX}."


def _stem(shard: str) -> str:
    """The stem of a shard's name."""
    return shard.split("-0", 1)[0]


class _LeafReader:
    """Reads leaves of the tree on the host, in our layout.

    Where the layouts differ, a leaf is a view with other strides, which device_put brings into line faster than numpy
    can. It copies such a view, so the memory behind it serves again for the next leaf, whose reading ends the use of
    this one: fresh memory costs as much time as reading into it. A leaf that needs no such copy is given memory of its
    own, which jax may keep.
    """

    def __init__(self, dtype: Any):
        self._dtype = dtype
        self._files: dict[Path, TensorFile] = {}
        self._memory = np.empty(0, np.uint8)

    def read(self, parts: tuple[Read, ...]) -> np.ndarray:
        """One leaf, all its stacked tensors, in the type that is wanted or in the widest of those stored."""
        first = parts[0].entry
        stored = [jnp.dtype(FLOATS[part.stored.dtype]) for part in parts]
        kind = jnp.dtype(self._dtype) if self._dtype is not None else jnp.dtype(jnp.result_type(*stored))
        lengths = tuple(max(part.entry.index[axis] for part in parts) + 1 for axis in range(len(first.index)))
        host = _aligned((*lengths, *first.shape), kind)
        if not first.to_ours(host).flags.c_contiguous:
            host = self._scratch(host.shape, kind)
        for part, given in zip(parts, stored):
            place = host[(*part.entry.index, ...)]  # type: ignore[arg-type]
            if given == kind:
                self._file(part).read_into(part.key, place)
            else:
                place[...] = self._file(part).read(part.key).reshape(place.shape)
        return first.to_ours(host)

    def _scratch(self, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        size = math.prod(shape) * kind.itemsize
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(kind).reshape(shape)

    def _file(self, part: Read) -> TensorFile:
        file = part.stored.file
        if file not in self._files:
            self._files[file] = TensorFile(file)
        return self._files[file]


def _aligned(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Fresh memory as jax wants it, so that a CPU takes it without a copy."""
    memory = np.empty(math.prod(shape) * kind.itemsize + _ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    return memory[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)


def _place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)

    # Each process hands over only what its own devices hold. A part in line is not copied by jax, and is ours to copy.
    def piece(index: Any) -> np.ndarray:
        part = host[index]
        return part.copy() if part.flags.c_contiguous else part

    return jax.make_array_from_callback(host.shape, sharding, piece)


def _sharding_by_path(abstract: Any, sharding: Any) -> dict[keymap.Path, Any]:
    if sharding is None:
        return {}
    if isinstance(sharding, jax.sharding.Sharding):
        return {path: sharding for path, _ in leaves(abstract)}
    return dict(leaves(sharding))


def _stored_type(leaf: Any, dtype: Any) -> np.dtype:
    """The type a leaf is written in: integers keep theirs."""
    own = jnp.dtype(leaf.dtype)
    return own if dtype is None or not jnp.issubdtype(own, jnp.floating) else jnp.dtype(dtype)


def _bytes(entry: Entry, flat: Mapping[keymap.Path, Any], dtype: Any) -> int:
    return math.prod(entry.shape) * _stored_type(flat[entry.path], dtype).itemsize


def _shards(wanted: list[Entry], flat: Mapping[keymap.Path, Any], dtype: Any, max_bytes: int) -> list[list[Entry]]:
    """Entries in the tree's order, cut into lots of at most ``max_bytes``."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in wanted:
        more = _bytes(entry, flat, dtype)
        if shards[-1] and size + more > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += more
    return shards


def _tensors(shard: list[Entry], flat: Mapping[keymap.Path, Any], dtype: Any) -> Iterator[np.ndarray]:
    """Tensors in the checkpoint's layout; a stacked leaf is fetched from the devices once."""
    fetched: tuple[keymap.Path | None, np.ndarray] = (None, np.empty(0))
    for entry in shard:
        if fetched[0] != entry.path:
            fetched = entry.path, np.asarray(jax.device_get(flat[entry.path]))
        yield entry.to_torch(fetched[1][entry.index]).astype(_stored_type(flat[entry.path], dtype), copy=False)
