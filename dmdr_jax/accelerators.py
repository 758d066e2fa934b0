"""What can be told of this machine's accelerators before JAX looks for them."""

import glob
import importlib.util
import os

NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What libtpu would ask the network for; any values will do."""


def has_tpu() -> bool:
    """Whether this machine is a TPU VM."""
    return has_libtpu() and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def has_libtpu() -> bool:
    """Whether libtpu is installed, for a TPU here or for its compiler alone."""
    return importlib.util.find_spec("libtpu") is not None


def quiet_libtpu() -> None:
    """Before jax is imported: lets libtpu find in silence that there is no TPU where it was installed for `plan`.

    JAX asks every installed backend whether it has devices, and this one would answer with a page of warnings.
    """
    if not os.environ.get("JAX_PLATFORMS") and has_libtpu() and not has_tpu():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
