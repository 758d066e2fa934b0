"""LoRA as parameter-tree deltas (Hu et al. 2021, arXiv 2106.09685): W' = W + s A B.

A delta is a tree with the paths of the kernels it changes and leaves ``{"a", "b"}``: for a dense kernel
``[in, out]``, a ``[in, r]`` and b ``[r, out]``; for a convolution ``[kh, kw, in, out]``, a ``[kh, kw, in, r]`` and b
``[1, 1, r, out]``; stacked kernels add the same leading axis to both. Adapters are trained, saved and averaged as
plain trees; the layers apply them as a side path, with a scale that may differ per batch row (`variables`), or they
are added to the weights once (`merge`).
"""

import dataclasses
import difflib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.errors import UserError

Array = jax.Array
Tree = Mapping[str, Any]

_JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
# The eight projections of SD3's joint attention.
SD3_TARGETS = (rf"transformer_blocks\.\d+\.{_JOINT}",)
# Also the second attention where there is one (SD3.5-Medium), the feed-forward layers and the modulations.
SD3_WIDE_TARGETS = (
    rf"transformer_blocks\.\d+\.({_JOINT}|attn2\.(to_q|to_k|to_v|to_out\.0)"
    r"|(ff|ff_context)\.net\.(0\.proj|2)|(norm1|norm1_context)\.linear)",
)
_CROSS = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
# SDXL's attention projections alone.
SDXL_ATTENTION_TARGETS = (_CROSS,)
# What DMD2 and DMDR adapt in SDXL: attention with its entry and exit, feed-forward, and the convolutional blocks.
SDXL_TARGETS = (
    rf"{_CROSS}|.*\.attentions\.\d+\.(proj_in|proj_out)|.*\.ff\.net\.(0\.proj|2)"
    r"|.*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.*\.(downsamplers|upsamplers)\.0\.conv",
)

_STACK = re.compile(r"(.*)\.(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which modules are adapted and how.

    Attributes:
      rank: r, the inner width of A B.
      alpha: the effective scale of the adapter is ``alpha / rank``.
      targets: regular expressions; a module is adapted if one matches the whole of its dotted PyTorch name, such as
        ``transformer_blocks.3.attn.to_q``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = SD3_TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank} must be at least 1.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(key: Array, params: Tree, config: LoraConfig) -> dict[str, Any]:
    """A new fp32 delta: A ~ N(0, 1 / r^2), as diffusers' "gaussian", and B = 0, so that it starts as no change.

    Args:
      key: a random key; each kernel's A depends on it and on the kernel's path alone.
      params: the network's parameters, or their shapes.
      config: rank and targets.

    Raises:
      UserError: a target matches no module, or only some layers of a stack (a stack is adapted whole).
    """
    kernels = _kernels(params)
    chosen = _choose(kernels, config.targets)
    delta: dict[str, Any] = {}
    for path in chosen:
        path_key = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
        _insert(delta, path, _init_pair(path_key, kernels[path].shape, _lead(path), config.rank))
    return delta


def merge(params: Tree, delta: Tree, scale: Array | float = 1.0) -> dict[str, Any]:
    """``params`` with ``scale * A B`` added to every adapted kernel, in fp32 and then in the kernel's own type.

    Args:
      params: the network's parameters.
      delta: from `init`, for the same network.
      scale: a scalar, with ``alpha / rank`` in it.

    Raises:
      UserError: the delta belongs to another network.
    """

    def walk(node: Any, change: Any) -> Any:
        if change is None:
            return node
        if not isinstance(node, Mapping):
            return _add_product(node, change, scale)
        if lost := set(change) - set(node):
            raise UserError(f"the LoRA delta changes {sorted(lost)[0]!r}, which the network does not have.")
        return {name: walk(child, change.get(name)) for name, child in node.items()}

    return walk(params, delta)


def variables(params: Tree, delta: Tree | None = None) -> dict[str, Tree]:
    """What ``module.apply`` takes: the parameters, and the delta where there is one."""
    return {"params": params} if delta is None else {"params": params, "lora": delta}


def count(delta: Tree) -> int:
    """How many numbers the delta holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(delta))


def _init_pair(key: Array, shape: tuple[int, ...], lead: int, rank: int) -> dict[str, Array]:
    stack, (*window, fan_in, fan_out) = shape[:lead], shape[lead:]
    a = jax.random.normal(key, (*stack, *window, fan_in, rank), jnp.float32) / rank
    b = jnp.zeros((*stack, *(1 for _ in window), rank, fan_out), jnp.float32)
    return {"a": a, "b": b}


def _add_product(kernel: Array, pair: Tree, scale: Array | float) -> Array:
    # One broadcasting product covers all four layouts: stacks align, and b's 1 x 1 window spreads over a's.
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    a, b = (jnp.asarray(pair[name], wide) for name in ("a", "b"))
    if (*a.shape[:-1], b.shape[-1]) != kernel.shape:
        raise UserError(f"a LoRA pair of shapes {a.shape} and {b.shape} does not fit a kernel of shape {kernel.shape}.")
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(wide) + scale * product).astype(kernel.dtype)


def _kernels(params: Tree) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {tuple(entry.key for entry in path): leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in paths.items() if path[-1] == "kernel"}


def _choose(kernels: Mapping[tuple[str, ...], Any], targets: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths whose module names match, in the order of the tree."""
    names = {path: _module_names(path[:-1]) for path in kernels}
    chosen = set()
    for target in targets:
        hits = {path: [n for n in group if re.fullmatch(target, n)] for path, group in names.items()}
        if not any(hits.values()):
            raise UserError(f"LoRA target {target!r} matches no module; the nearest are {_nearest(target, names)}.")
        for path, hit in hits.items():
            if hit and len(hit) < len(names[path]):
                missed = next(n for n in names[path] if n not in hit)
                raise UserError(
                    f"LoRA target {target!r} matches {hit[0]} but not {missed}, which is stored in one stack with it;"
                    " target all layers of a kind."
                )
        chosen |= {path for path, hit in hits.items() if hit}
    return [path for path in kernels if path in chosen]


def _module_names(path: tuple[str, ...]) -> list[str]:
    """The PyTorch names that a path stands for: one, or one per layer of its stack."""
    names = [""]
    for part in path:
        stack = _STACK.fullmatch(part)
        parts = [f"{stack[1]}.{i}" for i in range(int(stack[2]), int(stack[3]))] if stack else [part]
        names = [f"{name}.{p}" if name else p for name in names for p in parts]
    return names


def _lead(path: tuple[str, ...]) -> int:
    return sum(bool(_STACK.fullmatch(part)) for part in path)


def _nearest(target: str, names: Mapping[Any, list[str]]) -> str:
    # Layer numbers and a regular expression's signs would drown the likeness of the names proper.
    plain = re.sub(r"\\d\+|\\|[()^$]", "", target)
    firsts = sorted({group[0] for group in names.values()})
    suffixes = {name: ".".join(name.split(".")[-max(plain.count(".") + 1, 1) :]) for name in firsts}
    ranked = sorted(firsts, key=lambda n: difflib.SequenceMatcher(None, plain, suffixes[n]).ratio(), reverse=True)
    return ", ".join(ranked[:3])


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
