"""LoRA deltas as the safetensors files of PEFT and diffusers, both ways.

A delta leaf ``(..., "kernel") -> {"a", "b"}`` of the module ``m`` is the pair
``transformer.m.lora_A.weight`` and ``transformer.m.lora_B.weight`` in PyTorch's layout. diffusers applies a file
without further word as ``W + B A``, so the scale (``alpha / r``, and whatever else the caller multiplies
with) is folded into B when writing: every reader then reproduces it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.diffusers_io.safetensors_io import open_tensors, save_file, tensor_names
from dmdr_jax.errors import UserError

Tree = Any

_FACTORS = {"a": "lora_A", "b": "lora_B"}
_METADATA = "lora_adapter_metadata"
_ALPHA = ".alpha"


def write_lora(
    file: str | Path, delta: Tree, scale: float = 1.0, dtype: Any = np.float32, component: str = "transformer"
) -> None:
    """Writes a delta as a file for ``pipe.load_lora_weights``.

    Args:
      file: its name, ending in ``.safetensors``.
      delta: tree of the parameters' paths with leaves ``{"a", "b"}``.
      scale: the effective scale of the delta, ``alpha / r`` included.
      dtype: type to store.
      component: the network it belongs to.
    """
    tensors = {}
    for path, factors in delta_leaves(delta):
        for name, letters in _FACTORS.items():
            array = np.asarray(factors[name], np.float32) * (np.float32(scale) if name == "b" else np.float32(1))
            for module, index in keymap.module_names(path[:-1]):
                tensor = array[index].transpose(keymap.TO_TORCH[array[index].ndim])
                tensors[f"{component}.{module}.{letters}.weight"] = tensor.astype(dtype)
    if not tensors:
        raise UserError(f"there is no LoRA delta to write to {file}: the generator was trained in full.")
    save_file(tensors, file)


def read_lora(file: str | Path, abstract: Tree, component: str = "transformer") -> tuple[Tree, float]:
    """Reads a LoRA file as a delta on a parameter tree.

    Modules of one stack that the file leaves out get a zero delta, and lower ranks are filled up with zeros.

    Args:
      file: in PEFT's naming, with or without the component's prefix.
      abstract: the parameters (arrays or shapes) that the delta is for.
      component: the network to read.

    Returns:
      (delta in fp32, scale). The scale is ``alpha / r`` where it is one number for the whole file; else
      it is folded into the ``b`` factors, and 1.

    Raises:
      UserError: an unknown key, a shape that does not fit, or half a pair.
    """
    with open_tensors(file) as reader:
        tensors = {key: np.asarray(reader.get_tensor(key), np.float32) for key in tensor_names(reader)}
        metadata = json.loads((reader.metadata() or {}).get(_METADATA, "{}"))
    tensors = _without_prefix(tensors, component, file)
    alphas = {key.removesuffix(_ALPHA): tensors.pop(key).item() for key in list(tensors) if key.endswith(_ALPHA)}
    places = {e.key.removesuffix(".weight"): e for e in keymap.entries(abstract) if e.path[-1] == "kernel"}
    pairs = _pairs(tensors, places, file)
    alphas = {**_metadata_alphas(metadata, component, pairs), **alphas}
    scales = {module: alphas.get(module, float(_rank(pair))) / _rank(pair) for module, pair in pairs.items()}
    common = set(scales.values())
    scale = common.pop() if len(common) == 1 else 1.0

    shapes = dict(keymap.leaves(abstract))
    flat: dict[keymap.Path, dict[str, np.ndarray]] = {}
    for module, (a, b) in pairs.items():
        entry = places[module]
        leaf = flat.setdefault(entry.path, _empty_leaf(entry, shapes[entry.path], pairs, places))
        leaf["a"][(*entry.index, ..., slice(0, a.shape[0]))] = a.transpose(keymap.TO_OURS[a.ndim])
        folded = b * np.float32(scales[module] / scale)
        leaf["b"][(*entry.index, ..., slice(0, a.shape[0]), slice(None))] = folded.transpose(keymap.TO_OURS[b.ndim])
    return keymap.unflatten(flat), scale


def delta_leaves(delta: Tree, path: keymap.Path = ()) -> Iterator[tuple[keymap.Path, dict[str, Any]]]:
    """Parameter paths and their ``{"a", "b"}`` in a delta."""
    for name, value in delta.items():
        if set(value) == set(_FACTORS):
            yield (*path, name), value
        else:
            yield from delta_leaves(value, (*path, name))


def _without_prefix(tensors: dict[str, np.ndarray], component: str, file: str | Path) -> dict[str, np.ndarray]:
    """Keys relative to the component; UserError for another component's, which would be dropped silently."""
    if not any(key.startswith(f"{component}.") for key in tensors):
        return tensors
    foreign = [key for key in tensors if not key.startswith(f"{component}.")]
    if foreign:
        raise UserError(f"{file}: {foreign[0]!r} is not of the {component}; only its LoRA can be read.")
    return {key.removeprefix(f"{component}."): tensor for key, tensor in tensors.items()}


def _pairs(
    tensors: dict[str, np.ndarray], places: dict[str, keymap.Entry], file: str | Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors ``(A, B)`` of each module in PyTorch's layout, checked against the modules' shapes."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        module, _, letters = key.removesuffix(".weight").rpartition(".")
        if letters not in _FACTORS.values() or not key.endswith(".weight") or module not in places:
            nearest = keymap.closest(module or key, places)
            raise UserError(f"{file}: {key!r} names no LoRA factor of this model; closest modules: {nearest}.")
        found.setdefault(module, {})[letters] = tensor
    pairs = {}
    for module, factors in found.items():
        if len(factors) < 2:
            raise UserError(f"{file}: {module} has only {next(iter(factors))}, not both LoRA factors.")
        a, b = factors["lora_A"], factors["lora_B"]
        shape = places[module].shape
        if a.shape[1:] != shape[1:] or b.shape[0] != shape[0] or b.shape[1] != a.shape[0] or b.ndim != len(shape):
            raise UserError(
                f"{file}: the factors of {module}, {list(a.shape)} and {list(b.shape)}, "
                f"do not fit its weight {list(shape)}."
            )
        pairs[module] = a, b
    return pairs


def _rank(pair: tuple[np.ndarray, np.ndarray]) -> int:
    return pair[0].shape[0]


def _metadata_alphas(metadata: dict[str, Any], component: str, modules: Any) -> dict[str, float]:
    """Alpha by module from a PEFT configuration in a file's header, where it has one."""
    alpha = metadata.get(f"{component}.lora_alpha", metadata.get("lora_alpha"))
    pattern = metadata.get(f"{component}.alpha_pattern", metadata.get("alpha_pattern")) or {}
    alphas = {} if alpha is None else dict.fromkeys(modules, float(alpha))
    return {**alphas, **{name.removeprefix("^"): float(value) for name, value in pattern.items()}}


def _empty_leaf(
    entry: keymap.Entry, leaf: Any, pairs: dict[str, tuple[np.ndarray, np.ndarray]], places: dict[str, keymap.Entry]
) -> dict[str, np.ndarray]:
    """Zeros for a leaf's factors, with the largest rank among the stacked modules."""
    r = max(_rank(pair) for module, pair in pairs.items() if places[module].path == entry.path)
    stack, kernel = leaf.shape[: len(entry.index)], leaf.shape[len(entry.index) :]
    return {
        "a": np.zeros((*stack, *kernel[:-1], r), np.float32),
        "b": np.zeros((*stack, *(1,) * (len(kernel) - 2), r, kernel[-1]), np.float32),
    }
