"""Disks that cannot be written, however deep in a library's threads that was met, told in one sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from dmdr_jax.errors import UserError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL_TEXTS = ("no space left on device", "disk quota exceeded")  # of libraries that wrap the errno


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
        if why is None:
            raise
        safe, mend = kept(), "make room" if why in _FULL.values() else "mend that"
        advice = f"{safe}, so {mend}" if safe else mend
        raise UserError(f"cannot {what}: {why}; {advice} and run the same command again") from error


def _why(error: BaseException | None) -> str | None:
    """The reason, when `error` or one of its causes came from the file system."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            return _FULL.get(error.errno or 0) or error.strerror or str(error)
        if any(text in str(error).lower() for text in _FULL_TEXTS):
            return _FULL[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None
