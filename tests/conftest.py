"""For all tests: one CPU device's worth of threads, no network, and programs that compile quickly."""

import gc
import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compile many small programs and run each a few times.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """After each file, what its tests compiled: a worker would otherwise keep gigabytes of programs to the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
