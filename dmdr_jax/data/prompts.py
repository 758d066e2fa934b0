"""Prompts: where they come from, and the order they are trained in.

DMDR is image-free, so its data set is a list of strings. `load_prompts` reads one from a file, from TFDS or from the
embedded world. `PromptStream` puts it in an order that is a pure function of (seed, batch number): resuming needs
the step and nothing else, and any number of hosts sees the same global batches.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dmdr_jax.data.files import PROMPT_FIELDS, Record, file_records
from dmdr_jax.data.tfds_source import tfds_records
from dmdr_jax.errors import UserError

if TYPE_CHECKING:
    from dmdr_jax.shapes.world import World

DEFAULT_WORLD = "small"  # what "shapes:train" means


def load_prompts(spec: str) -> list[str]:
    """Every prompt of a source, in its own order; blank ones are left out.

    Args:
      spec: a file or folder in a format of `dmdr_jax.data.files`; "tfds:name[:split]", a data set stored as
        array_record (`name` may be its folder); or "shapes:[world:]train", the embedded world's training prompts.

    Raises:
      UserError: the source is missing, empty, not UTF-8, or has no prompt field.
    """
    return not_blank(all_prompts(spec), spec)


def not_blank(prompts: Sequence[str], spec: str) -> list[str]:
    """The prompts with something in them; UserError, naming the source, where there is none."""
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise UserError(f"{spec} holds no prompts; give at least one")
    return kept


def evenly(prompts: Sequence[str], count: int) -> list[str]:
    """As many prompts as asked for, from all over the source; some twice where there are fewer."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def all_prompts(spec: str) -> list[str]:
    """As `load_prompts`, with "" for what is blank, and nothing for an empty source: what `survey` counts."""
    spec = str(spec)
    if spec.startswith("shapes:"):
        return _shapes_prompts(spec)
    if spec.startswith("tfds:"):
        return [record["prompt"] for record in tfds_records(spec)]
    return [record["prompt"] for record in file_records(pathlib.Path(spec).expanduser(), columns=PROMPT_FIELDS)]


def read_eval_records(path: str | pathlib.Path) -> list[Record]:
    """Prompts to evaluate on, with whatever else their file says about them.

    Returns:
      One record per prompt with the field "prompt"; from JSON and parquet also every other field that JSON can hold,
      such as GenEval's "tag", "include" and "exclude" (Ghosh et al. 2023).

    Raises:
      UserError: as `load_prompts`, or GenEval's fields have the wrong type.
    """
    if str(path).startswith(("tfds:", "shapes:")):
        records = [{"prompt": prompt} for prompt in load_prompts(str(path))]
    else:
        records = [record for record in file_records(pathlib.Path(path).expanduser()) if record["prompt"]]
    if not records:
        raise UserError(f"{path} holds no prompts; give at least one")
    records = [{key: value for key, value in record.items() if _is_json(value)} for record in records]
    for number, record in enumerate(records, 1):
        for field, kind, name in (("tag", str, "a string"), ("include", list, "a list"), ("exclude", list, "a list")):
            if not isinstance(record.get(field, kind()), kind):
                raise UserError(f"{path}, record {number}: GenEval's field {field!r} must be {name}")
    return records


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class PromptStream:
    """Batches of prompts in an endless shuffled order, without state.

    Epoch e visits every prompt once, in a permutation keyed by (seed, e); batch i holds positions
    [i * batch, (i + 1) * batch) of the epochs laid end to end, so a batch may span epochs or be larger than one.
    """

    def __init__(self, prompts: Sequence[str], batch: int, seed: int):
        if batch < 1:
            raise UserError(f"the batch must be at least 1 prompt, not {batch}")
        if not prompts:
            raise UserError("the list of prompts is empty; give at least one")
        self.prompts = tuple(prompts)
        self.batch_size = batch
        self.seed = seed

    def indices(self, i: int) -> np.ndarray:
        """Indices [batch] into the prompts of batch `i`."""
        positions = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.prompts))
        n = len(self.prompts)
        return np.concatenate([epoch_order(n, self.seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def batch(self, i: int) -> list[str]:
        """The `batch` prompts of batch `i`, counted from 0."""
        return [self.prompts[index] for index in self.indices(i)]


@functools.lru_cache(maxsize=2)  # a large set is not sorted again for every batch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation [n] that depends on (seed, epoch) alone.

    It sorts raw bits of Philox (Salmon et al. 2011), whose stream numpy guarantees across versions; it guarantees no
    such thing of `Generator.permutation`.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    order.setflags(write=False)
    return order


def _shapes_prompts(spec: str) -> list[str]:
    from dmdr_jax.shapes.prompts import balanced_train_prompts

    return balanced_train_prompts(world_of(spec))


def world_of(spec: str) -> World:
    """The embedded world that ``shapes:[WORLD:]train`` names."""
    from dmdr_jax.shapes.world import get_world

    parts = spec.split(":")[1:]
    if len(parts) not in (1, 2) or parts[-1] != "train":
        raise UserError(f"cannot read {spec!r}; write shapes:train or shapes:WORLD:train")
    return get_world(parts[0] if len(parts) == 2 else DEFAULT_WORLD)
