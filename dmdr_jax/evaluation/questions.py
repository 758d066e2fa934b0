"""What every model is asked: prompts, the noise that each image starts from, and how large the images are."""

import dataclasses
import functools
import re
from typing import Any

import numpy as np

from dmdr_jax.data.prompts import all_prompts, epoch_order, read_eval_records
from dmdr_jax.data.survey import Survey, survey
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.benchmarks import BENCHMARKS, Benchmark
from dmdr_jax.model import Model
from dmdr_jax.shapes.prompts import eval_records
from dmdr_jax.shapes.world import World, get_world

DEFAULT_WORLD = "small"
TASK_FIELDS = ("tag", "style", "category", "Category")  # of a record
SEED_STRIDE = 100_000  # noise seeds between one evaluation seed and the next


@dataclasses.dataclass(frozen=True)
class Questions:
    """What every model is asked.

    Attributes:
      world: whose verifier judges the images; None: no verifier.
      records: one per image; the images of one prompt are neighbours.
      seeds: of the noise, one per image.
      asked_size: height and width in pixels; None: each model's own.
      benchmark: whose prompts these are.
      per_prompt: images of each prompt.
      survey: what is to be said of the prompts' source; None for a world's.
    """

    world: World | None
    records: list[dict[str, Any]]
    seeds: list[int]
    asked_size: tuple[int, int] | None = None
    benchmark: Benchmark | None = None
    per_prompt: int = 1
    survey: Survey | None = None

    @classmethod
    def make(cls, args: Any) -> "Questions":
        """From the command line; UserError where it asks for nothing or for two things."""
        _check(args)
        benchmark = BENCHMARKS[args.benchmark] if args.benchmark else None
        per_prompt = args.per_prompt or (benchmark.per_prompt if benchmark else 1)
        world, counts = None, None
        if benchmark:
            records = benchmark.read(args.prompts)
            counts = survey(record["prompt"] for record in records)
        elif args.prompts:
            records = read_eval_records(args.prompts)
            counts = survey(all_prompts(args.prompts))
        else:
            world = get_world(args.world or DEFAULT_WORLD)
            records = eval_records(world, args.per_tag, args.seed)
        if args.limit and args.limit < len(records):
            records = [records[i] for i in sorted(epoch_order(len(records), args.seed, 0)[: args.limit])]
        records = [record for record in records for _ in range(per_prompt)]
        seeds = [(args.seed * SEED_STRIDE + i) % 2**32 for i in range(len(records))]
        return cls(world, records, seeds, parse_size(args.size), benchmark, per_prompt, counts)

    @functools.cached_property
    def prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records]

    @functools.cached_property
    def subsets(self) -> dict[str, np.ndarray]:
        """Indices of the images of each task."""
        from dmdr_jax.evaluation import shapes_eval

        return {} if self.world is None else shapes_eval.subsets(self.records)

    @functools.cached_property
    def tasks(self) -> dict[str, np.ndarray]:
        """Indices of the images of each task, style or category that the prompts' file names; empty for one alone."""
        named = [next((str(record[f]) for f in TASK_FIELDS if record.get(f)), "") for record in self.records]
        tasks = [task for task in dict.fromkeys(named) if task]
        return {task: np.flatnonzero(np.array(named) == task) for task in tasks} if len(tasks) > 1 else {}

    def size(self, model: Model) -> tuple[int, int]:
        """Image height and width, pixels."""
        if self.world is not None:
            return self.world.size, self.world.size
        return self.asked_size or model.size


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of ``"1024"`` or ``"512x768"``.

    Raises:
      UserError: it is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--size {text!r} is neither a number of pixels such as 1024 nor HxW such as 768x1024.")
    return int(match[1]), int(match[2] or match[1])


def _check(args: Any) -> None:
    if args.prompts and args.world:
        raise UserError("--prompts and --world exclude each other: a world brings its own prompts.")
    if args.benchmark and not args.prompts:
        raise UserError(f"--benchmark {args.benchmark} needs --prompts: the file or folder that it publishes.")
    if args.benchmark and args.limit:
        raise UserError("--limit leaves out prompts that --benchmark's scorer looks for: give the one or the other.")
    if args.size and not args.prompts:
        raise UserError("--size goes with --prompts: a world's images have the world's size.")
    for option in ("per_tag", "per_prompt", "limit", "batch", "keep"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, not {value}.")
