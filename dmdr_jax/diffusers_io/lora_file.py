"""LoRA deltas as safetensors files: ours for diffusers and PEFT, and those of other trainers for us.

A delta leaf ``(..., "kernel") -> {"a", "b"}`` of the module ``m`` is the pair
``transformer.m.lora_A.weight`` and ``transformer.m.lora_B.weight`` in PyTorch's layout. diffusers applies a file
without further word as ``W + B A``, so the scale (``alpha / r``, and whatever else the caller multiplies
with) is folded into B when writing: every reader then reproduces it. `lora_names` has the names under which files
of other trainers hold the same.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.diffusers_io import keymap, lora_names
from dmdr_jax.diffusers_io.safetensors_io import save_file
from dmdr_jax.diffusers_io.tensor_file import TensorFile
from dmdr_jax.errors import UserError

Array = jax.Array
Tree = Any
Pair = tuple[np.ndarray, np.ndarray]

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call such a file in a folder."""

CONFIG_NAME = "adapter_config.json"
"""PEFT's configuration, beside the file."""

_FACTORS = {"a": "lora_A", "b": "lora_B"}
_METADATA = "lora_adapter_metadata"


def write_lora(
    file: str | Path, delta: Tree, scale: Array | float = 1.0, dtype: Any = np.float32, component: str = "transformer"
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


def read_lora(
    file: str | Path, abstract: Tree, component: str = "transformer", alpha: float | None = None
) -> tuple[Tree, float]:
    """Reads a LoRA file as a delta on a parameter tree.

    Modules of one stack that the file leaves out get a zero delta, and lower ranks are filled up with zeros. Alpha is
    taken from tensors beside the factors, else from PEFT's configuration in the file's header, else from an
    ``adapter_config.json`` beside the file; a file that says nothing means ``W + B A``, as diffusers reads it.

    Args:
      file: one of PEFT, diffusers or kohya's scripts (`lora_names`), or a folder with one under its usual name.
      abstract: the parameters (arrays or shapes) that the delta is for.
      component: the network to read.
      alpha: for a file that does not say it.

    Returns:
      (delta in fp32, scale). The scale is ``alpha / r`` where it is one number for the whole file; else
      it is folded into the ``b`` factors, and 1.

    Raises:
      UserError: a name or a shape that does not fit, half a pair, or an adapter that is not plain LoRA.
    """
    file = _located(Path(file))
    places = {e.key.removesuffix(".weight"): e for e in keymap.entries(abstract) if e.path[-1] == "kernel"}
    pairs, alphas = _read_pairs(file, places, component)
    scale_of = _configured_scales(file, component, alpha)
    scales = {m: alphas[m] / _rank(pair) if m in alphas else scale_of(m, _rank(pair)) for m, pair in pairs.items()}
    common = set(scales.values())
    scale = common.pop() if len(common) == 1 else 1.0

    shapes = dict(keymap.leaves(abstract))
    flat: dict[keymap.Path, dict[str, np.ndarray]] = {}
    for module, (a, b) in pairs.items():
        entry = places[module]
        leaf = flat.setdefault(entry.path, _empty_leaf(entry, shapes[entry.path], pairs, places))
        here: Any = (*entry.index, ..., slice(0, a.shape[0]))
        leaf["a"][here] = a.transpose(keymap.TO_OURS[a.ndim])
        folded = b * np.float32(scales[module] / scale)
        leaf["b"][(*here, slice(None))] = folded.transpose(keymap.TO_OURS[b.ndim])
    return keymap.unflatten(flat), scale


def start_from(initial: Tree, delta: Tree, factor: float) -> Tree:
    """A delta to train on, from a new one and one that was read: it starts as the latter and all of it can learn.

    What the read delta leaves free (directions beyond its rank, modules it does not have) keeps the new one's random
    A and zero B, as two zero factors would never leave zero.

    Args:
      initial: of `dmdr_jax.lora.init`.
      delta: of `read_lora`, for the same network.
      factor: the read scale over the scale that the result is run with.

    Raises:
      UserError: the delta has a larger rank, or changes a module that the new one does not.
    """
    targets = dict(delta_leaves(initial))
    result = dict(targets)
    for path, pair in delta_leaves(delta):
        name = ".".join(path[:-1])
        if path not in targets:
            raise UserError(f"the LoRA to start from changes {name}, which config.generator.lora.targets leaves out.")
        new, r = targets[path], pair["a"].shape[-1]
        if r > new["a"].shape[-1]:
            rank = new["a"].shape[-1]
            raise UserError(f"the LoRA to start from has rank {r}, more than config.generator.lora.rank = {rank}.")
        result[path] = {
            "a": new["a"].at[..., :r].set(jnp.where(_used(pair), pair["a"], new["a"][..., :r])),
            "b": new["b"].at[..., :r, :].set(factor * pair["b"]),
        }
    return keymap.unflatten(result)


def delta_leaves(delta: Tree, path: keymap.Path = ()) -> Iterator[tuple[keymap.Path, dict[str, Any]]]:
    """Parameter paths and their ``{"a", "b"}`` in a delta."""
    for name, value in delta.items():
        if set(value) == set(_FACTORS):
            yield (*path, name), value
        else:
            yield from delta_leaves(value, (*path, name))


def _used(pair: Mapping[str, Any]) -> Any:
    """Which directions of a pair are not all zeros: ``[..., 1, r]``, to select columns of ``a``."""
    a, b = jnp.asarray(pair["a"]), jnp.asarray(pair["b"])
    window = (-4, -3) if b.shape[-4:-2] == (1, 1) else ()
    return (a != 0).any((*window, -2), keepdims=True) | (b != 0).any(-1)[..., None, :]


def _located(file: Path) -> Path:
    """The file itself, in a folder too."""
    if not file.is_dir():
        return file
    found = [file / name for name in FILE_NAMES if (file / name).is_file()] or sorted(file.glob("*.safetensors"))
    if len(found) != 1:
        held = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{file} should hold one LoRA file, such as {FILE_NAMES[0]}, but has {held}; name the file.")
    return found[0]


def _read_pairs(
    file: Path, places: Mapping[str, keymap.Entry], component: str
) -> tuple[dict[str, Pair], dict[str, float]]:
    """The factors ``(A, B)`` of each module in PyTorch's layout, fp32 and checked, and alphas stored beside them."""
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{file} is pickled; save the LoRA again as safetensors.")
    tensors = TensorFile(file)
    found: dict[str, dict[str, str]] = {}
    for key in tensors.headers:
        module, role = lora_names.split(key, places, component, file)
        if role in found.setdefault(module, {}):
            raise UserError(f"{file}: {key!r} and {found[module][role]!r} are the same factor of {module}.")
        found[module][role] = key
    if not found:
        raise UserError(f"{file} holds no tensors.")
    pairs, alphas = {}, {}
    for module, keys in found.items():
        absent = {lora_names.A, lora_names.B} - set(keys)
        if absent:
            held = next(iter(keys.values()))
            raise UserError(f"{file}: {module} has only {held!r}, not both LoRA factors.")
        read = {role: np.asarray(tensors.read(key), np.float32) for role, key in keys.items()}
        pairs[module] = _fitted(read[lora_names.A], read[lora_names.B], places[module], file)
        if lora_names.ALPHA in read:
            alphas[module] = float(read[lora_names.ALPHA].reshape(-1)[0])
    return pairs, alphas


def _fitted(a: np.ndarray, b: np.ndarray, entry: keymap.Entry, file: Path) -> Pair:
    """The factors with the axes of their weight; UserError where they do not fit it."""
    shape, r = entry.shape, a.shape[0] if a.ndim else 0
    wanted = (r, *shape[1:]), (shape[0], r, *(1 for _ in shape[2:]))
    # Some trainers store the factors of a dense layer as 1 x 1 convolutions.
    same = all(keymap.same_kernel(x.shape, w) for x, w in zip((a, b), wanted, strict=True))
    if not same or r < 1:
        module = entry.key.removesuffix(".weight")
        raise UserError(
            f"{file}: the factors of {module}, {list(a.shape)} and {list(b.shape)}, "
            f"do not fit its weight {list(shape)}."
        )
    return a.reshape(wanted[0]), b.reshape(wanted[1])


def _rank(pair: Pair) -> int:
    return pair[0].shape[0]


def _configured_scales(file: Path, component: str, alpha: float | None) -> Callable[[str, int], float]:
    """``(module, rank) -> scale`` by PEFT's configuration of the file, which may be none."""
    config = _configuration(file, component)
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        what = kind if kind != "LORA" else "DoRA" if config.get("use_dora") else "LoRA with biases"
        raise UserError(f"{file} is {what} by its configuration, not plain LoRA; only that can be read.")
    common, patterns = config.get("lora_alpha", alpha), config.get("alpha_pattern") or {}

    def scale(module: str, rank: int) -> float:
        own = next((value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), common)
        if own is None:
            return 1.0
        return float(own) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _configuration(file: Path, component: str) -> dict[str, Any]:
    """PEFT's settings for the component, from the file's header or from beside it; empty where there are none."""
    beside = file.with_name(CONFIG_NAME)
    try:
        packed = json.loads(TensorFile(file).metadata.get(_METADATA, "{}"))
        if not packed and beside.is_file():
            packed = json.loads(beside.read_text(encoding="utf-8"))
        own = {k.removeprefix(f"{component}."): v for k, v in packed.items() if k.startswith(f"{component}.")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"the LoRA configuration of {file} cannot be read ({error}).") from error
    return own or packed


def _empty_leaf(
    entry: keymap.Entry, leaf: Any, pairs: Mapping[str, Pair], places: Mapping[str, keymap.Entry]
) -> dict[str, np.ndarray]:
    """Zeros for a leaf's factors, with the largest rank among the stacked modules."""
    r = max(_rank(pair) for module, pair in pairs.items() if places[module].path == entry.path)
    stack, kernel = leaf.shape[: len(entry.index)], leaf.shape[len(entry.index) :]
    return {
        "a": np.zeros((*stack, *kernel[:-1], r), np.float32),
        "b": np.zeros((*stack, *(1,) * (len(kernel) - 2), r, kernel[-1]), np.float32),
    }
