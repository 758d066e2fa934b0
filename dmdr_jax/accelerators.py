"""What can be told of this machine's accelerators before JAX looks for them."""

import glob
import importlib.util
import os
from pathlib import Path

NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What libtpu would ask the network for; any values will do."""
OF_JAX = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY", "TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION")
"""What JAX sets itself when it is imported, for its children to inherit."""
GOOGLE = "0x1ae0"
"""The vendor of TPUs on the PCI bus, and of some network cards."""


def has_libtpu() -> bool:
    """Whether libtpu is installed, for a TPU here or for its compiler alone."""
    return importlib.util.find_spec("libtpu") is not None


def has_tpu() -> bool:
    """Whether this machine is a TPU VM."""
    return has_libtpu() and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def may_have_tpu() -> bool:
    """Whether anything at all speaks for a TPU: a device, a Google card on the bus, a variable of the environment."""
    vendors = (Path(file).read_text().strip() for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    told = any(name.startswith("TPU_") and name not in OF_JAX for name in os.environ)
    return has_tpu() or GOOGLE in vendors or told


def quiet_libtpu() -> None:
    """Before jax is imported: lets libtpu find in silence that there is no TPU where it was installed for `plan`.

    JAX asks every installed backend whether it has devices, and this one would answer with a page of warnings.
    """
    if not os.environ.get("JAX_PLATFORMS") and has_libtpu() and not may_have_tpu():
        os.environ.update(NO_TPU)
