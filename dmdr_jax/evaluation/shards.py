"""Sharing the work: which images are a process's own, and waiting for the others.

The processes of one JAX program (``jax.distributed``) share by themselves; processes that know nothing of each other
are told their part by ``--shard i/n``. Either way ``--out`` is a folder that all of them see.
"""

import dataclasses
import re

import jax
import numpy as np

from dmdr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def make(cls, text: str | None) -> "Shard":
        """Of ``"i/n"``; without it the part of this process in its JAX program.

        Raises:
          UserError: the text has another form, or i is not below n.
        """
        if text is None:
            return cls(jax.process_index(), jax.process_count())
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"--shard {text!r} is not i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4.")
        return cls(int(match[1]), int(match[2]))

    def rows(self, n: int) -> np.ndarray:
        """This part's of n rows: every ``count``-th."""
        return np.arange(self.index, n, self.count)


class OthersAtWork(Exception):
    """This process has done its part, and others have not: the message says what is missing."""

    def __init__(self, what: str, done: int, total: int):
        super().__init__(
            f"{what}: {done} of {total} are there; the last process to finish writes the results "
            "(or run the same command again, without --shard)."
        )


def wait_for_others(where: str) -> None:
    """Waits until all processes of this JAX program are here; processes told by ``--shard`` do not wait."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)
