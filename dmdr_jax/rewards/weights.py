"""Published weights, in whatever file they come, into a parameter tree.

`open_weights` gives the tensors of a safetensors file, of a `torch.save` file or of a model folder by name,
nothing read yet; `fill_tree` reads those that a network needs, one leaf of the tree at a time.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import safetensors_io
from dmdr_jax.diffusers_io.keymap import closest, entries, leaves, resolve, unflatten
from dmdr_jax.diffusers_io.tensor_file import TensorFile
from dmdr_jax.errors import UserError
from dmdr_jax.rewards.lazy_tensor import LazyTensor
from dmdr_jax.rewards.torch_file import read_torch_file

Tensors = dict[str, LazyTensor]
Path_ = tuple[str, ...]

# Files of a model folder, best first: transformers', open_clip's, each as safetensors before pickles.
_SAFE_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_PICKLED_FILES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Where training programs put the weights in what they save.
_NESTS = ("state_dict", "model_state_dict", "model", "module", "weights")
_PARALLEL = "module."


def open_weights(path: str | Path) -> Tensors:
    """The tensors of a file or of a model folder by name, not read yet.

    Args:
      path: a safetensors file, a file of `torch.save`, or a folder with one of the usual names in it (shards with
        their index, or one file alone, too).

    Raises:
      UserError: nothing there, no weights in it, or a damaged file.
    """
    path = Path(path)
    tensors: Tensors = {}
    for file in _files(path) if path.is_dir() else [path]:
        tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    return tensors


def _files(folder: Path) -> list[Path]:
    """The weight files of a model folder; UserError where there are none, or several that do not belong together."""
    stems = [
        f"{stem}{ending}" for stem in safetensors_io.STEMS for ending in (".safetensors", ".safetensors.index.json")
    ]
    if any((folder / name).is_file() for name in stems):
        return sorted(set(safetensors_io.weight_files(folder).values()))
    if (folder / _PICKLED_INDEX).is_file():
        return _shards(folder / _PICKLED_INDEX)
    for name in (*_SAFE_FILES, *_PICKLED_FILES):
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if len(found) != 1:
        what = (
            f"several weight files ({', '.join(file.name for file in found)}): name one" if found else "no weight file"
        )
        raise UserError(f"{folder} holds {what}.")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a checkpoint index ({error!r}); fetch it again.") from error
    return sorted(index.parent / name for name in names)


def _read_safetensors(file: Path) -> Tensors:
    reader = TensorFile(file)
    lazy = {name: LazyTensor(header.shape, partial(reader.read, name)) for name, header in reader.headers.items()}
    return _without_prefix(lazy)


def _read_pickled(file: Path) -> Tensors:
    tree = read_torch_file(file)
    levels = [tree, *(tree[name] for name in _NESTS if name in tree)] if isinstance(tree, dict) else []
    # Beside a nested state_dict there may lie single tensors, such as a temperature.
    tensors = max(map(_tensors_of, levels), key=len, default={})
    if not tensors:
        held = ", ".join(map(repr, tree)) if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise UserError(f"{file} holds no state_dict of tensors, but {held or 'nothing'}.")
    return _without_prefix(tensors)


def _tensors_of(level: Any) -> Tensors:
    if not isinstance(level, dict):
        return {}
    return {str(name): value for name, value in level.items() if isinstance(value, LazyTensor)}


def _without_prefix(tensors: Tensors) -> Tensors:
    """Without the prefix that PyTorch's parallel training puts before every name."""
    if all(name.startswith(_PARALLEL) for name in tensors):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return tensors


def fill_tree(
    abstract: Any,
    tensors: Mapping[str, LazyTensor],
    source: str | Path,
    dtype: Callable[[Path_], Any],
    ignored: Callable[[str], bool] = lambda name: False,
) -> Any:
    """Reads tensors into a parameter tree.

    Args:
      abstract: the tree as `jax.ShapeDtypeStruct` leaves; paths name the tensors (`dmdr_jax.diffusers_io.keymap`).
      tensors: by checkpoint name; those that the tree has no place for must be `ignored`.
      source: of the tensors, for messages.
      dtype: the type of the leaf at a path.
      ignored: whether a tensor of this name may be left over.

    Returns:
      A nested dictionary of jax arrays like ``abstract``.

    Raises:
      UserError: a tensor is missing, left over, or of another shape.
    """
    wanted = entries(abstract)
    names, missing, unexpected = resolve(wanted, tensors)
    unexpected = [name for name in unexpected if not ignored(name)]
    _check_names(source, missing, unexpected, [entry.key for entry in wanted])
    for entry in wanted:
        name, shape = names[entry.key], tensors[names[entry.key]].shape
        if shape != entry.shape:
            raise UserError(
                f"{source}: the tensor {name!r} has shape {list(shape)} where the network has {list(entry.shape)}; "
                "it is not of the architecture that was named or inferred."
            )
    flat = {}
    for path, leaf in leaves(abstract):
        host = np.empty(leaf.shape, jnp.dtype(dtype(path)))
        for entry in (entry for entry in wanted if entry.path == path):
            host[entry.index] = entry.to_ours(tensors[names[entry.key]].load())
        flat[path] = jax.device_put(host)
    return unflatten(flat)


def _check_names(source: str | Path, missing: list[str], unexpected: list[str], wanted: Iterable[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(
            f"{source} lacks the tensor {missing[0]!r}{more} of this network; "
            f"closest in the file: {closest(missing[0], unexpected)}."
        )
    if unexpected:
        listed = ", ".join(map(repr, unexpected[:5])) + (", ..." if len(unexpected) > 5 else "")
        raise UserError(
            f"{source} holds {len(unexpected)} tensors that this network has no place for: {listed}; "
            f"closest in the network to the first: {closest(unexpected[0], wanted)}."
        )
