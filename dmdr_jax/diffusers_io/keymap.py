"""Checkpoint keys from parameter paths, by one rule.

Every network here names its parameters as the published PyTorch checkpoint does
(`dmdr_jax.models.layers`), so the map from a parameter tree to a checkpoint is derived, not
listed:

* the key is the path joined with dots, with ``kernel``, ``scale`` and ``embedding`` read as
  ``weight``; other leaf names stand for themselves;
* a path component ``name.i:j`` is the modules ``name.i`` .. ``name.(j-1)`` stacked along a leading
  axis: one leaf, ``j - i`` checkpoint tensors;
* a 2-D ``kernel`` is PyTorch's ``[out, in]`` transposed to ``[in, out]``, a 4-D ``kernel`` its
  ``[out, in, kh, kw]`` transposed to ``[kh, kw, in, out]``; all else is stored as it is.

Published files have spelled a few keys differently over the years; `spellings` knows them.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Path = tuple[str, ...]

_STACK = re.compile(r"(.+)\.(\d+):(\d+)")
_WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# Tensor layout by leaf rank: the axes of the PyTorch tensor in our order, and back.
TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}

_T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_TEXT_MODEL = "text_model."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint tensor and its place in the parameter tree.

    Attributes:
      key: checkpoint key, such as ``transformer_blocks.3.attn.to_q.weight``.
      path: path of the leaf.
      index: position along the leaf's leading stack axes, ``()`` for an unstacked leaf.
      shape: the tensor's shape in the checkpoint.
      transposed: whether the layout differs between the two.
    """

    key: str
    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor of this shape can fill the place.

        Old checkpoints store some dense layers as 1 x 1 convolutions: the same numbers under two more axes.
        """
        return shape == self.shape or (self.transposed and same_kernel(shape, self.shape))

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The checkpoint tensor, or several stacked along leading axes, in the tree's layout (a view)."""
        if not self.transposed:
            return tensor
        lead = tensor.ndim - len(self.shape)
        return tensor.transpose(*range(lead), *(lead + axis for axis in TO_OURS[len(self.shape)]))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """One (unstacked) array of the tree in the checkpoint's layout (a view)."""
        return array.transpose(TO_TORCH[array.ndim]) if self.transposed else array


def same_kernel(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes differ at most in a window of 1 x 1: a dense kernel and a convolution of the same."""
    return (a[:2] if a[2:] == (1, 1) else a) == (b[:2] if b[2:] == (1, 1) else b)


def leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Paths and leaves of a nested mapping, in insertion order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            for path, leaf in leaves(value):
                yield (name, *path), leaf
        else:
            yield (name,), value


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dictionaries from paths: the inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def module_names(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The checkpoint modules that a module path stands for, each with its place in the stack.

    ``("blocks.0:2", "to_q")`` gives ``[("blocks.0.to_q", (0,)), ("blocks.1.to_q", (1,))]``.
    """
    choices: list[list[tuple[str, tuple[int, ...]]]] = []
    for component in path:
        if stack := _STACK.fullmatch(component):
            first, last = int(stack[2]), int(stack[3])
            choices.append([(f"{stack[1]}.{i}", (i - first,)) for i in range(first, last)])
        else:
            choices.append([(component, ())])
    names = []
    for parts in itertools.product(*choices):
        names.append((".".join(name for name, _ in parts), tuple(i for _, index in parts for i in index)))
    return names


def stack_rank(path: Path) -> int:
    """How many leading stack axes a leaf at ``path`` has."""
    return sum(_STACK.fullmatch(component) is not None for component in path)


def entries(tree: Any) -> list[Entry]:
    """All checkpoint tensors of a parameter tree, those of one leaf next to each other.

    Args:
      tree: nested mapping of arrays or ``jax.ShapeDtypeStruct`` (as ``jax.eval_shape`` gives).

    Raises:
      ValueError: a leaf does not follow the naming rule (its stack length or kernel rank is wrong).
    """
    found: list[Entry] = []
    for path, leaf in leaves(tree):
        *module, name = path
        places = module_names(tuple(module))
        rank = stack_rank(path)
        counts = tuple(max(index[axis] for _, index in places) + 1 for axis in range(rank))
        if tuple(leaf.shape[:rank]) != counts:
            raise ValueError(f"{'/'.join(path)}: shape {leaf.shape} does not start with the stack {counts}.")
        shape = tuple(leaf.shape[rank:])
        transposed = name == "kernel"
        if transposed and len(shape) not in TO_TORCH:
            raise ValueError(f"{'/'.join(path)}: a kernel has 2 or 4 axes, not the shape {shape}.")
        if transposed:
            shape = tuple(shape[axis] for axis in TO_TORCH[len(shape)])
        suffix = "weight" if name in _WEIGHT_LEAVES else name
        for prefix, index in places:
            found.append(Entry(f"{prefix}.{suffix}" if prefix else suffix, path, index, shape, transposed))
    return found


def spellings(key: str) -> list[str]:
    """The names under which published files may hold ``key``, today's first.

    CLIP text towers with and without ``text_model.``, T5's two names of one table, and the names
    of the VAE's attention layers before diffusers 0.18.
    """
    names = [key]
    names.append(key.removeprefix(_TEXT_MODEL) if key.startswith(_TEXT_MODEL) else _TEXT_MODEL + key)
    if key in _T5_TABLES:
        names += [name for name in _T5_TABLES if name != key]
    for new, old in _OLD_ATTENTION.items():
        if ".attentions." in key and f".{new}." in key:
            names.append(key.replace(f".{new}.", f".{old}."))
    return names


def is_ignored(key: str) -> bool:
    """Whether a file's tensor is no parameter: CLIP's stored position ids."""
    return key.endswith("position_ids")


def resolve(wanted: Iterable[Entry], available: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Matches the tensors of a tree with the keys of a file.

    Returns:
      (names, missing, unexpected): the file's spelling of each found key; keys of the tree that the
      file lacks; keys of the file that the tree has no place for.
    """
    held = set(available)
    names: dict[str, str] = {}
    missing: list[str] = []
    unused = {key for key in held if not is_ignored(key)}
    for entry in wanted:
        same = [name for name in spellings(entry.key) if name in held]
        if same:
            names[entry.key] = same[0]
            unused.difference_update(same)
        else:
            missing.append(entry.key)
    return names, missing, sorted(unused)


def closest(key: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates most like ``key``, for an error message: ``"a, b or c"``, or ``"none alike"``."""
    best = difflib.get_close_matches(key, list(candidates), n=count, cutoff=0.5)
    if not best:
        return "none alike"
    return best[0] if len(best) == 1 else ", ".join(best[:-1]) + " or " + best[-1]


def abstract(module: Any, *inputs: jax.ShapeDtypeStruct) -> Any:
    """The parameter tree of a Linen module as shapes, at no cost in memory.

    Args:
      module: a Linen module.
      inputs: shapes and dtypes of the arguments of its ``__call__``.
    """
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
