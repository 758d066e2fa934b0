"""Where numbers come from: the command, the versions and the machine behind them."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmdr_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers")


def command() -> str:
    """The command line of this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def describe_environment() -> dict[str, Any]:
    """Versions, commit (where the code is in a git checkout), processor and accelerators."""
    import jax

    devices = sorted({device.device_kind for device in jax.devices()})
    return {
        "versions": {"dmdr_jax": __version__, "python": platform.python_version(), **versions(PACKAGES)},
        "commit": commit(),
        "processor": f"{os.cpu_count()} x {processor()}",
        "devices": f"{len(jax.devices())} x {', '.join(devices)}",
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed packages' versions; one that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this code runs from, with ``+changes`` where files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed somewhere inside another checkout
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
