"""Teacher ODE pairs on disk: what the teacher's own sampler makes of known noise.

Pair j is a prompt, noise and latents. Prompt and noise are functions of (seed, j), so that the latents alone are
stored: a chain of shards ``latents_FIRST.npy``, float32 ``[n, h, w, c]``, each of them holding the pairs from FIRST on
and followed by the one that starts where it ends. A shard gets its name when it is written whole, so a kill at any
moment costs the shard under way. ``pairs.json`` says what the pairs were drawn with.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dmdr_jax.errors import UserError
from dmdr_jax.training import disk, runtime

DOCUMENT = "pairs.json"


class PairStore:
    """The latents of pairs 0, 1, ... in the order in which they are drawn.

    Of several processes all know what is there, and the first writes.

    Args:
      folder: a local folder or one in an object store; made if absent.
      document: everything that the pairs depend on, in JSON's types.
      shape: ``(h, w, c)`` of a pair's latents.

    Raises:
      UserError: the folder holds pairs of another document, or a shard that cannot be read.
    """

    def __init__(self, folder: epath.PathLike, document: Mapping[str, Any], shape: tuple[int, int, int]):
        self.folder, self.shape = epath.Path(folder), tuple(shape)
        self._agree(json.loads(json.dumps(document)))
        self._fetched: dict[str, np.ndarray] = {}  # from an object store, which is asked for a shard once
        self._ends: list[int] = []  # of every shard: the index of the pair after its last
        while (path := self._path(len(self))).exists():
            self._ends.append(len(self) + len(self._open(path)))

    def __len__(self) -> int:
        """Pairs on disk."""
        return self._ends[-1] if self._ends else 0

    def append(self, latents: np.ndarray) -> None:
        """Writes the next ``n`` pairs' latents ``[n, h, w, c]``.

        Raises:
          UserError: the disk is full, or a number is not finite.
        """
        last = len(self) + len(latents)
        if not np.isfinite(latents).all():
            raise UserError(
                f"the teacher's latents of pairs {len(self)} to {last - 1} are not finite: take a smaller "
                "config.ode.guidance, or config.compute_dtype=float32."
            )
        shard = io.BytesIO()
        np.save(shard, np.asarray(latents, np.float32))
        self._write(self._path(len(self)), shard.getvalue())
        self._ends.append(last)

    def latents(self, pairs: np.ndarray) -> np.ndarray:
        """The latents ``[b, h, w, c]`` float32 of the pairs with these indices ``[b]``, in their order."""
        found = np.empty((len(pairs), *self.shape), np.float32)
        shards = np.searchsorted(self._ends, pairs, side="right")
        for shard in np.unique(shards):
            first = self._ends[shard - 1] if shard else 0
            rows = np.flatnonzero(shards == shard)
            found[rows] = self._open(self._path(first))[pairs[rows] - first]
        return found

    def _path(self, first: int) -> epath.Path:
        return self.folder / f"latents_{first:07d}.npy"

    def _open(self, path: epath.Path) -> np.ndarray:
        """A shard; on a disk mapped and not read, and closed with the array, so that there may be any number."""
        if path.name in self._fetched:
            return self._fetched[path.name]
        remote = disk.is_remote(path)
        try:
            shard = np.load(io.BytesIO(path.read_bytes())) if remote else np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run the same command again.") from error
        if shard.shape[1:] != self.shape or shard.dtype != np.float32 or not len(shard):
            raise UserError(
                f"{path} holds {shard.dtype}{list(shard.shape)} and not float32[n, {', '.join(map(str, self.shape))}]; "
                "delete it and run the same command again."
            )
        if remote:
            self._fetched[path.name] = shard
        return shard

    def _agree(self, document: dict[str, Any]) -> None:
        """Writes the document, or compares it with the one that is there."""
        path = self.folder / DOCUMENT
        if not path.exists():
            self._write(path, json.dumps(document, indent=2).encode())
            return
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} to draw its pairs anew.") from error
        for key in {**document, **there}:
            if there.get(key) != document.get(key):
                raise UserError(
                    f"{self.folder} holds pairs that were drawn otherwise: {key} is {json.dumps(there.get(key))} there "
                    f"and {json.dumps(document.get(key))} here; delete that folder to draw them anew, or choose "
                    "another workdir."
                )

    def _write(self, path: epath.Path, content: bytes) -> None:
        if runtime.is_first():
            disk.write_file(path, content)
