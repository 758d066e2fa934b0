"""The head of LAION's aesthetic predictor and of ImageReward as published files hold it."""

import re
from collections.abc import Mapping
from typing import Any

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.lazy_tensor import LazyTensor

_LAYER = re.compile(r"layers\.(\d+)\.weight")


def head_layers(tensors: Mapping[str, LazyTensor], prefix: str, source: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and numbers of the layers `PREFIXlayers.N`; UserError if the last does not give one number."""
    found = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match:
            found[int(match[1])] = tensor.shape[0]
    names = tuple(sorted(found))
    if not names or found[names[-1]] != 1:
        raise UserError(f"{source} holds no head that scores: layers {prefix}layers.N that end in one number.")
    return tuple(found[name] for name in names), names
