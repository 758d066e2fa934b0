"""For all tests: one CPU device's worth of threads, no network, and programs that compile quickly, and once."""

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compile many small programs and run each a few times: in one piece, and without the newer way of writing
# kernels, it takes half as long.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)


def pytest_configure(config):
    """Ctrl-C as usual, and one folder for the compiled programs of all the tests' processes, removed by the first."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a script starts with & ignores it, and so its children
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="dmdr_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # all of them
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


LONG = ("notebook", "processes", "programs", "loop", "sharding", "ode", "passes", "sdxl", "watch", "tilted_gaussian")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that workers, each of which takes a file at a time, end together."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """After each file, what its tests compiled: a worker would otherwise keep gigabytes of programs to the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
