"""Arrays between the devices and the host."""

from typing import Any

import jax
import numpy as np


def on_host(array: Any) -> np.ndarray:
    """The whole array on this host, also where its devices are those of several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
