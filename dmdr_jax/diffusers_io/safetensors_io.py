"""Weight files of a model folder: streamed into a parameter tree, and out of one.

Reading holds one leaf on the host at a time: each tensor is read alone, put into our layout and the
wanted type, stacked where the tree stacks it, and handed to the devices before the next leaf is read.
Writing fills one shard at a time. A file appears under its name only when it is complete.
"""

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io.keymap import Entry, closest, entries, leaves, resolve, unflatten
from dmdr_jax.errors import UserError

STEMS = ("diffusion_pytorch_model", "model")
"""File names without suffix: diffusers' models, then transformers'."""

MAX_SHARD_BYTES = 5 * 2**30

_SUFFIX = ".safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMED_AT_MOST = 5


def weight_files(folder: str | Path, variant: str | None = None) -> dict[str, Path]:
    """Where each tensor of a model folder lies.

    Args:
      folder: such as ``.../transformer``, with one weight file or several and their index.
      variant: such as ``"fp16"``; a folder without files of that variant is read without it, as
        diffusers does.

    Returns:
      File by checkpoint key.

    Raises:
      UserError: no weight files, one named by the index is absent, or one cannot be read.
    """
    folder = Path(folder)
    for wanted in dict.fromkeys((variant, None)):
        for stem in STEMS:
            tag = f".{wanted}" if wanted else ""
            single, index = folder / f"{stem}{tag}{_SUFFIX}", folder / f"{stem}{_SUFFIX}.index{tag}.json"
            if single.is_file():
                return dict.fromkeys(_keys(single), single)
            if index.is_file():
                return _sharded(index)
    raise UserError(_nothing_found(folder, variant))


def has_variant(folder: str | Path, variant: str) -> bool:
    """Whether a model folder holds weight files of this variant."""
    return any(Path(folder).glob(f"*.{variant}{_SUFFIX}")) or any(Path(folder).glob(f"*{_SUFFIX}.index.{variant}.json"))


def read_tree(
    folder: str | Path,
    abstract: Any,
    dtype: Any = None,
    sharding: Any = None,
    variant: str | None = None,
) -> Any:
    """Reads a model folder into a parameter tree.

    Args:
      folder: the model's folder.
      abstract: the tree as ``jax.ShapeDtypeStruct`` leaves; paths name the checkpoint keys.
      dtype: type of the arrays; None keeps the type each leaf is stored in.
      sharding: None, one ``jax.sharding.Sharding`` for all leaves, or a tree of them.
      variant: see `weight_files`.

    Returns:
      A nested dictionary of jax arrays like ``abstract``.

    Raises:
      UserError: a file, key or shape is not what the tree needs.
    """
    files = weight_files(folder, variant)
    wanted = entries(abstract)
    names = _matched(Path(folder), wanted, files)
    shardings = _sharding_by_path(abstract, sharding)
    by_leaf: dict[tuple[str, ...], list[Entry]] = {}
    for entry in wanted:
        by_leaf.setdefault(entry.path, []).append(entry)
    flat = {}
    with contextlib.ExitStack() as stack:
        readers = {file: stack.enter_context(open_tensors(file)) for file in {files[name] for name in names.values()}}
        _check_shapes(wanted, names, files, readers)
        for path, leaf in leaves(abstract):
            host = _read_leaf(by_leaf[path], leaf.shape, dtype, names, files, readers)
            flat[path] = _place(host, shardings.get(path))
    return unflatten(flat)


def stored_dtype(folder: str | Path, variant: str | None = None) -> str:
    """The floating-point type in which most of a model folder's tensors are stored, such as ``"bfloat16"``."""
    counts: dict[str, int] = {}
    for file in sorted(set(weight_files(folder, variant).values())):
        with open_tensors(file) as reader:
            stored = [_DTYPES.get(reader.get_slice(key).get_dtype()) for key in tensor_names(reader)]
            for name in filter(None, stored):
                counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: counts[name]) if counts else "float32"


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
        save_file(dict(_tensors(shard, flat, dtype)), folder / name)
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
    from safetensors import SafetensorError
    from safetensors.numpy import save_file as save

    # safetensors stores the memory of a transposed view as it lies, silently: only contiguous arrays may go in
    # (ascontiguousarray would turn a scalar into a vector).
    whole = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    with _arriving(Path(file)) as temporary:
        try:
            save(whole, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(error) from error


def write_text(file: str | Path, text: str) -> None:
    """Writes one text file, complete or not at all; UserError as `save_file`."""
    with _arriving(Path(file)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _arriving(file: Path) -> Iterator[Path]:
    """A temporary name beside ``file`` that becomes ``file`` when the block has ended well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        os.chmod(name, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; check the folder's permissions and free space.") from error
    try:
        yield Path(name)
        os.replace(name, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; nothing was left under that name.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def open_tensors(file: str | Path) -> Any:
    """Opens a safetensors file to read single tensors: a context manager as ``safetensors.safe_open``.

    Raises:
      UserError: the file is absent, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # numpy knows bfloat16 because jax, imported above, has registered it.
        return safe_open(file, framework="np")
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is {_damage(Path(file))} ({error}); fetch it again.") from error


def _damage(file: Path) -> str:
    """What is wrong with a file that safetensors refuses, with the first tensor that is cut off."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            return f"truncated: it has {size} bytes"
        length = struct.unpack("<Q", head)[0]
        if length > size - 8:
            return f"truncated or no safetensors file: it ends within its header, after {size} bytes"
        try:
            header = json.loads(stream.read(length))
            spans = {key: value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError):
            return "no safetensors file: its header is not readable"
    cut = [key for key, end in sorted(spans.items(), key=lambda item: item[1]) if 8 + length + end > size]
    if cut:
        return f"truncated: it ends within the tensor {cut[0]!r}, after {size} bytes"
    return "damaged: its header does not describe its data"


def tensor_names(reader: Any) -> list[str]:
    """The keys of a file opened by `open_tensors`, which cannot be iterated over itself."""
    return list(reader.keys())


def _keys(file: Path) -> list[str]:
    with open_tensors(file) as reader:
        return tensor_names(reader)


def _sharded(index: Path) -> dict[str, Path]:
    """Files by key from an index, checked against what the files hold."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a checkpoint index ({error!r}); fetch it again.") from error
    files = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if not file.is_file():
            keys = [key for key, held in weight_map.items() if held == name]
            raise UserError(f"{file} is missing: {index.name} places {len(keys)} tensors there, such as {keys[0]!r}.")
        files.update(dict.fromkeys(_keys(file), file))
    absent = [key for key in weight_map if key not in files]
    if absent:
        file = index.parent / weight_map[absent[0]]
        raise UserError(f"{file} lacks the tensor {absent[0]!r} that {index.name} lists.")
    return files


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
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return f"{folder} has pickled weights only; save the model again with safe_serialization=True."
    return f"{folder} has no {STEMS[0]}{_SUFFIX} or {STEMS[1]}{_SUFFIX}."


def _matched(folder: Path, wanted: list[Entry], files: Mapping[str, Path]) -> dict[str, str]:
    """The file's key for each entry; UserError where the two do not match one to one."""
    names, missing, unexpected = resolve(wanted, files)
    if missing:
        key = missing[0]
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(
            f"{folder} lacks the tensor {key!r}{more} that its config.json asks for; "
            f"closest in the file: {closest(key, unexpected)}."
        )
    if unexpected:
        key, rest = unexpected[0], unexpected[_NAMED_AT_MOST:]
        listed = ", ".join(map(repr, unexpected[:_NAMED_AT_MOST])) + (", ..." if rest else "")
        raise UserError(
            f"{files[key]} holds {len(unexpected)} tensors that the model of config.json has no place for: {listed}; "
            f"closest in the model to the first: {closest(key, [entry.key for entry in wanted])}."
        )
    return names


def _check_shapes(
    wanted: list[Entry], names: Mapping[str, str], files: Mapping[str, Path], readers: Mapping[Path, Any]
) -> None:
    """UserError at the first tensor of another shape, before any data is read."""
    for entry in wanted:
        name = names[entry.key]
        shape = tuple(readers[files[name]].get_slice(name).get_shape())
        if shape != entry.shape:
            raise UserError(
                f"{files[name]}: the tensor {name!r} has shape {list(shape)}, "
                f"but its config.json asks for {list(entry.shape)}; the two are not of one model."
            )


def _read_leaf(
    parts: list[Entry],
    shape: tuple[int, ...],
    dtype: Any,
    names: Mapping[str, str],
    files: Mapping[str, Path],
    readers: Mapping[Path, Any],
) -> np.ndarray:
    """One leaf of the tree, all its stacked tensors, on the host."""
    host = None
    for entry in parts:
        name = names[entry.key]
        try:
            tensor = entry.to_ours(readers[files[name]].get_tensor(name))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{files[name]}: the tensor {name!r} cannot be read ({error}).") from error
        if host is None:
            host = np.empty(shape, tensor.dtype if dtype is None else jnp.dtype(dtype))
        host[entry.index] = tensor
    assert host is not None
    return host


def _place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)
    # Each process hands over only what its own devices hold.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _sharding_by_path(abstract: Any, sharding: Any) -> dict[tuple[str, ...], Any]:
    if sharding is None:
        return {}
    if isinstance(sharding, jax.sharding.Sharding):
        return {path: sharding for path, _ in leaves(abstract)}
    return dict(leaves(sharding))


def _stored(leaf: Any, dtype: Any) -> np.dtype:
    """The type a leaf is written in: integers keep theirs."""
    own = jnp.dtype(leaf.dtype)
    return own if dtype is None or not jnp.issubdtype(own, jnp.floating) else jnp.dtype(dtype)


def _bytes(entry: Entry, flat: Mapping[tuple[str, ...], Any], dtype: Any) -> int:
    return int(np.prod(entry.shape, dtype=np.int64)) * _stored(flat[entry.path], dtype).itemsize


def _shards(wanted: list[Entry], flat: Mapping[tuple[str, ...], Any], dtype: Any, max_bytes: int) -> list[list[Entry]]:
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


def _tensors(shard: list[Entry], flat: Mapping[tuple[str, ...], Any], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Keys and tensors in the checkpoint's layout; a stacked leaf is fetched from the devices once."""
    fetched: tuple[tuple[str, ...] | None, np.ndarray] = (None, np.empty(0))
    for entry in shard:
        if fetched[0] != entry.path:
            fetched = entry.path, np.asarray(jax.device_get(flat[entry.path]))
        tensor = entry.to_torch(fetched[1][entry.index]).astype(_stored(flat[entry.path], dtype))
        yield entry.key, tensor
