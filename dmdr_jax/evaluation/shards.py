"""Sharing the work: which images are a process's own, and waiting for the others.

The processes of one JAX program (as `dmdr_jax.train` joins them) share by themselves; processes that know nothing of
each other are told their part by ``--shard i/n``. Either way ``--out`` is a folder that all of them see.
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
import numpy as np
from etils import epath

from dmdr_jax.errors import UserError
from dmdr_jax.training import runtime


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


def join_others(folder: Path) -> None:
    """Joins the processes of this JAX program, where the environment says that there are several.

    Args:
      folder: that the results go to.

    Raises:
      UserError: the others did not come, or the folder is not the same for all of them.
    """
    place = runtime.find_place(None, None, None, os.environ)
    if place is None:
        return
    try:
        runtime.join(place)
    except runtime.OthersLost as error:
        raise UserError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    runtime.check_shared(epath.Path(folder))


def wait_for_others(where: str) -> None:
    """Waits until all processes of this JAX program are here; processes told by ``--shard`` do not wait."""
    runtime.sync(where)
