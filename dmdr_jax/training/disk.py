"""Writing to disks and object stores.

A place that cannot be written, however deep in a library's threads that was met, is told in one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

from etils import epath

from dmdr_jax.errors import UserError, causes

STORE = "gs://"
"""The object store, where a file is written once and whole: it cannot grow, and has its name when it is there."""

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL_TEXTS = ("no space left on device", "disk quota exceeded")  # of libraries that wrap the errno


_PASSING = ("unavailable", "deadline", "timed out", "timeout", "connection", "try again", "too many requests", " 503")
"""Words of errors that may be gone the next time."""


def passes(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of the network and not of what was read or written."""
    return any(
        isinstance(one, ConnectionError | TimeoutError) or any(word in str(one).lower() for word in _PASSING)
        for one in causes(error)
    )


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in the object store."""
    return os.fspath(path).startswith(STORE)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the current folder.

    Raises:
      UserError: it is a URL of a kind that cannot be written.
    """
    text = os.fspath(path)
    if is_remote(text):
        return epath.Path(text)  # whose own `absolute` would put it into the current folder
    if re.match(r"[a-z0-9]+:/", text):
        raise UserError(f"{text} is no place to write to; give a local folder, or one in {STORE}")
    return epath.Path(text).absolute()


def make_folder(folder: epath.PathLike) -> None:
    """Makes a folder and those above it, where they are absent.

    Raises:
      UserError: it cannot be made, or it is a URL of a kind that cannot be written.
    """
    folder = absolute(folder)
    with writing(f"make the folder {folder}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except ImportError as error:  # fsspec names the package
            raise UserError(f"{folder} cannot be reached: {error}") from error


def write_file(path: epath.Path, content: bytes) -> None:
    """Writes a file, whole or not at all, and the folder that it lies in. Raises UserError when the disk is full."""
    with writing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            path.write_bytes(content)
        else:
            unfinished = path.with_name(path.name + ".tmp")
            unfinished.write_bytes(content)
            unfinished.replace(path)


@contextlib.contextmanager
def writing(what: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """Around code that writes: an error that comes from the file system becomes a UserError, any other stays.

    Args:
      what: completes "cannot ...".
      kept: says, when asked after the failure, what is safe.
    """
    try:
        yield
    except Exception as error:
        why = _why(error)
        if why is None or passes(error):
            raise
        safe, mend = kept(), "make room" if why in _FULL.values() else "mend that"
        advice = f"{safe}, so {mend}" if safe else mend
        raise UserError(f"cannot {what}: {why}; {advice} and run the same command again") from error


def _why(error: BaseException | None) -> str | None:
    """The reason, when `error` or one of its causes came from the file system."""
    for one in causes(error):
        if isinstance(one, OSError):
            return _FULL.get(one.errno or 0) or one.strerror or str(one)
        if any(text in str(one).lower() for text in _FULL_TEXTS):
            return _FULL[errno.ENOSPC]
    return None
