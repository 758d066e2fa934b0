"""Copies a PyTorch module's weights into one of our parameter trees, for parity tests.

    params = from_torch(abstract_params(module, *example_inputs), torch_module.state_dict())

It follows the naming rule of `dmdr_jax.models.layers`, on its own, so that a test of a network does
not lean on the checkpoint reader.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
import torch

_STACK = re.compile(r"^(.*)\.(\d+):(\d+)$")
_WEIGHT_LEAVES = ("kernel", "scale", "embedding")


def abstract_params(module, *args, **kwargs) -> dict:
    """The shapes of ``module``'s parameters for example inputs, without computing anything."""
    method = kwargs.pop("method", None)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, method=method, **kwargs))
    return shapes["params"]


def from_torch(abstract: Mapping, state_dict: Mapping[str, torch.Tensor], dtype=np.float32) -> dict:
    """A tree shaped like ``abstract`` filled from ``state_dict``.

    Raises KeyError if a key is missing and ValueError if a shape differs or a key is left over.
    """
    unused = set(state_dict)

    def leaf(path, shape_like):
        names = [entry.key for entry in path]
        value = _gather(names, state_dict, unused).astype(dtype)
        if value.shape != tuple(shape_like.shape):
            raise ValueError(f"{'.'.join(names)}: {value.shape} in torch, {shape_like.shape} here")
        return value

    tree = jax.tree_util.tree_map_with_path(leaf, dict(abstract))
    if unused:
        raise ValueError(f"left over in the torch module: {sorted(unused)}")
    return tree


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """Fills every floating parameter with noise: matrices ~ N(0, scale^2 / fan_in), vectors near their usual 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim >= 2:
                p.copy_(noise * scale / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def _gather(names: list[str], state_dict, unused: set) -> np.ndarray:
    for i, name in enumerate(names):
        if stack := _STACK.match(name):
            stem, first, end = stack[1], int(stack[2]), int(stack[3])
            members = [[*names[:i], f"{stem}.{k}", *names[i + 1 :]] for k in range(first, end)]
            return np.stack([_gather(member, state_dict, unused) for member in members])
    is_weight = names[-1] in _WEIGHT_LEAVES
    key = ".".join([*names[:-1], "weight" if is_weight else names[-1]])
    value = state_dict[key].detach().cpu().double().numpy()
    unused.discard(key)
    if names[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
