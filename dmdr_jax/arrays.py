"""Arrays between the devices and the host, and the host's room for them."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np


def on_host(array: Any) -> np.ndarray:
    """The whole array on this host, also where its devices are those of several."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def free_memory() -> float:
    """Bytes of the host's memory that programs may still take; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
