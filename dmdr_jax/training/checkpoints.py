"""Checkpoints of the trained state, by Orbax.

A checkpoint holds the train state (trained trees, optimiser states, EMA, step, raw key) and one JSON document: the
caller's metadata, and for every leaf its path, shape, dtype and checksum. Frozen weights are never in it.

Rules. A directory without checkpoints starts a run from nothing; where there is one, the latest is restored or the run
ends, never a silent restart. Saving is asynchronous and atomic: a step's folder gets its name when everything in it is
written, so a kill or a full disk at any moment leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from dmdr_jax.errors import UserError
from dmdr_jax.training import disk, runtime
from dmdr_jax.workdir import BEST, BEST_FILE, CHECKPOINTS

Tree = Any
Meta = dict[str, Any]

FORMAT = 1
_STATE, _META = "state", "meta"  # items of a step


class _Preserved:
    """A policy of Orbax that keeps one step, whatever the others say."""

    def __init__(self) -> None:
        self.step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: jax counts such questions, and the run asks them itself (`dmdr_jax.training.runtime.Stop`)."""
        return False


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made when absent.
      keep: how many of the latest steps stay.
      keep_every: steps divisible by this stay as well.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, keep_every: int | None = None):
        self.directory = disk.absolute(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; checkpoints need a directory, so move it or name another")
        self._preserved = _Preserved()
        policies: list[Any] = [checkpoint_managers.LatestN(max(keep, 1)), self._preserved]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # what a killed run left half written
        )
        with self._writing():
            self._manager = _Manager(self.directory, options=options)
        self._saved = self.latest()

    def latest(self) -> int | None:
        """The latest step on disk, or None where there is no checkpoint; one that is being saved does not count."""
        return max(_finished_steps(self.directory), default=None)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, one that is being saved included."""
        return sorted({*_finished_steps(self.directory), *([] if self._saved is None else [self._saved])})

    def preserve(self, step: int | None) -> None:
        """Keeps this step besides the latest ones, in place of the step that was kept so before."""
        self._preserved.step = step

    def save(self, step: int, state: Tree, meta: Meta | None = None) -> None:
        """Start saving; returns when the state is copied off the devices, so the caller may donate it.

        A step that is there already is left as it is.

        Args:
          meta: anything JSON can hold; `meta["model"]` is compared when the checkpoint is restored.

        Raises:
          UserError: the disk is full, now or in the save before.
        """
        if step == self._saved:
            return
        document = {"format": FORMAT, "meta": meta or {}, "leaves": _leaf_table(state)}
        items = {_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(document)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saved = step

    def restore(self, abstract: Tree, meta: Meta | None = None, step: int | None = None) -> Tree:
        """The state of `step` (the latest) in the shapes, dtypes and shardings of `abstract`.

        Args:
          abstract: the state's tree with jax.ShapeDtypeStruct leaves; a sharding may differ from the saved one.
          meta: when given, its "model" must equal the checkpoint's.

        Raises:
          UserError: there is no checkpoint, it is damaged, or it belongs to another model.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint; start the run that makes one")
        folder = self.directory / str(step)
        document = _read_document(folder)
        _check_model(folder, document["meta"].get("model"), (meta or {}).get("model"))
        _check_leaves(folder, document["leaves"], abstract)
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        with _damage(folder):
            state = self._manager.restore(step, args=items)[_STATE]
        _check_sums(folder, document["leaves"], state)
        return state

    def meta(self, step: int | None = None) -> Meta:
        """The metadata saved with `step` (the latest)."""
        return _read_document(self.directory / str(self.latest() if step is None else step))["meta"]

    def wait(self) -> None:
        """Return when everything started is on disk. Raises UserError when the disk is full."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being saved, then let go of the directory."""
        with self._writing():
            self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return disk.writing(f"save a checkpoint in {self.directory}", self._kept)

    def _kept(self) -> str:
        step = self.latest()
        return "no checkpoint was finished yet" if step is None else f"the checkpoint of step {step} is whole"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # A save under way is finished even if the run ends in an error, unless it would wait for what is gone.
        if not runtime.is_loss(error):
            self.close()


def load_trained(path: epath.PathLike, fields: Sequence[str] = ("generator", "ema")) -> tuple[dict[str, Tree], Meta]:
    """Trained trees on the host, for export and sampling; no abstract state is needed.

    Args:
      path: a run's workdir, its checkpoints folder (the latest step is taken), or the folder of one step.
      fields: parts of the state to read. Nothing else is read from disk; parts that are absent or None are left out.

    Returns:
      ({field: nested dict of numpy arrays}, metadata with "step" added).

    Raises:
      UserError: there is no checkpoint at `path`, it is damaged, or it has none of the fields.
    """
    folder = find_step(path)
    document = _read_document(folder)
    present = {field for leaf in document["leaves"] if (field := leaf.split("/")[0]) in fields}
    if not present:
        raise UserError(f"checkpoint {folder} holds none of {', '.join(fields)}; it is not one of this project's runs")
    with _damage(folder):
        trees = _read_fields(folder / _STATE, [field for field in fields if field in present])
    _check_sums(folder, document["leaves"], trees)
    return trees, {**document["meta"], "step": int(folder.name)}


def _read_fields(folder: epath.Path, fields: Sequence[str]) -> dict[str, Tree]:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree
    wanted = {field: tree[field] for field in fields}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    return handler.restore(
        folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    )


def find_step(path: epath.PathLike) -> epath.Path:
    """The step folder that `path` means: itself, the latest of a checkpoints folder or workdir, or WORKDIR/best."""
    path = disk.absolute(path)
    if is_best(path):
        if not (path.parent / BEST_FILE).exists():
            raise UserError(f"{path.parent} names no best checkpoint: it was not watched (config.watch.every)")
        step = json.loads((path.parent / BEST_FILE).read_text())["step"]
        if step is None:
            raise UserError(f"{path.parent / BEST_FILE} names none: all checkpoints are younger than the reward gap")
        path = path.parent / CHECKPOINTS / str(step)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; check the path")
    if _is_step(path):
        return path
    for folder in (path, path / CHECKPOINTS):
        if steps := _finished_steps(folder):
            return folder / str(steps[-1])
    raise UserError(f"{path} holds no checkpoint; give a run's workdir, its {CHECKPOINTS} folder or one step's folder")


def is_best(path: epath.PathLike) -> bool:
    """Whether WORKDIR/best is meant, which is no folder, of a workdir that is there."""
    text = os.fspath(path)
    if not text.endswith(BEST) or ("://" in text and not disk.is_remote(text)):
        return False
    path = disk.absolute(text)
    return path.name == BEST and not path.exists() and (path.parent / CHECKPOINTS).is_dir()


def _finished_steps(directory: epath.Path) -> list[int]:
    """Steps with a finished checkpoint, ascending."""
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(child.name) for child in children if _is_step(child))


def _is_step(folder: epath.Path) -> bool:
    if not folder.name.isdigit() or not ((folder / _STATE).is_dir() or (folder / _META).is_dir()):
        return False
    # An object store has no atomic rename: there Orbax writes this file last.
    return not disk.is_remote(folder) or (folder / "commit_success.txt").exists()


# --- what a checkpoint says of itself ------------------------------------------------------------------------------


def _leaf_table(state: Tree) -> dict[str, list]:
    """{path: [shape, dtype, checksum]} of every leaf."""
    leaves = _named_leaves(state)
    sums = checksums(list(leaves.values()))
    return {name: [list(leaf.shape), str(leaf.dtype), s] for (name, leaf), s in zip(leaves.items(), sums)}


def _named_leaves(tree: Tree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def checksums(leaves: list[Any]) -> list[int]:
    """Sum of each leaf's bits modulo 2^32, whatever its sharding.

    Orbax checks its index but not the numbers: a flipped bit on disk would otherwise come back as a weight.
    """
    if jax.default_backend() == "cpu" and all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return [_host_checksum(np.asarray(leaf)) for leaf in leaves]  # nothing to copy, nothing to compile
    return np.asarray(_device_checksums(leaves)).tolist()


def _host_checksum(leaf: np.ndarray) -> int:
    bits = np.ascontiguousarray(leaf).reshape(-1).view(f"u{min(leaf.dtype.itemsize, 4)}")
    return int(bits.sum(dtype=np.uint32))


@jax.jit
def _device_checksums(leaves: list[jax.Array]) -> jax.Array:
    """One pass over memory where the leaves lie, uint32 [leaves]."""
    return jnp.stack([jnp.sum(_bits(leaf), dtype=jnp.uint32) for leaf in leaves])


def _bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}").astype(jnp.uint32)


def _read_document(folder: epath.Path) -> dict[str, Any]:
    with _damage(folder):
        document = json.loads((folder / _META / "metadata").read_text())
        if document["format"] > FORMAT:
            raise UserError(f"checkpoint {folder} was made by a newer version of this program; update and run again")
        return {"meta": dict(document["meta"]), "leaves": dict(document["leaves"])}


def _check_model(folder: epath.Path, saved: Any, wanted: Any) -> None:
    difference = None if wanted is None else _first_difference(json.loads(json.dumps(wanted)), saved, "model")
    if difference:
        key, ours, theirs = difference
        raise UserError(
            f"checkpoint {folder} belongs to another model: {key} is {theirs} there and {ours} here; "
            "continue with its own configuration or choose another workdir"
        )


def _first_difference(ours: Any, theirs: Any, key: str) -> tuple[str, str, str] | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if name not in ours or name not in theirs:
                return f"{key}.{name}", _shown(ours, name), _shown(theirs, name)
            if difference := _first_difference(ours[name], theirs[name], f"{key}.{name}"):
                return difference
        return None
    return None if ours == theirs else (key, json.dumps(ours), json.dumps(theirs))


def _shown(mapping: dict, name: str) -> str:
    return json.dumps(mapping[name]) if name in mapping else "absent"


def _check_leaves(folder: epath.Path, saved: dict[str, list], abstract: Tree) -> None:
    wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named_leaves(abstract).items()}
    difference = None
    for name in [*wanted, *saved]:
        if name not in saved:
            difference = f"it has no {name}"
        elif name not in wanted:
            difference = f"its {name} has no place here"
        elif saved[name][:2] != wanted[name]:
            (shape, dtype), (our_shape, our_dtype) = saved[name][:2], wanted[name]
            difference = f"{name} is {dtype}{shape} there and {our_dtype}{our_shape} here"
        if difference:
            raise UserError(
                f"checkpoint {folder} belongs to another model: {difference}; "
                "continue with its own configuration or choose another workdir"
            )


def _check_sums(folder: epath.Path, saved: dict[str, list], state: Tree) -> None:
    leaves = _named_leaves(state)
    for name, checksum in zip(leaves, checksums(list(leaves.values()))):
        if name not in saved or saved[name][2] != checksum:
            raise UserError(_damage_message(folder, f"{name} is not what was saved"))


# --- errors --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _damage(folder: epath.Path) -> Iterator[None]:
    """What goes wrong in reading a finished checkpoint means that it is damaged, but for the network's errors."""
    try:
        yield
    except Exception as error:  # tensorstore raises bare Exception
        if isinstance(error, UserError) or runtime.is_loss(error) or disk.passes(error):
            raise
        raise UserError(_damage_message(folder, _first_line(_root_cause(error)))) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _damage_message(folder: epath.Path, why: str) -> str:
    before = [step for step in _finished_steps(folder.parent) if step < int(folder.name)]
    then = f"continue from step {max(before)}" if before else "start again from nothing"
    return f"checkpoint {folder} is damaged ({why}); move that folder away to {then}"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return line if len(line) <= 160 else line[:160] + "..."
