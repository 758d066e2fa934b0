"""Runs an experiment: every row with every seed, by the ordinary programs, and goes on where it was stopped.

    python -m dmdr_jax.sweep --experiment=configs/shapes/experiments/main.py --out=runs/main --jobs=2
    python -m dmdr_jax.sweep --experiment=... --out=runs/main --rows=dmdr,dmd --seeds=0    # these alone
    python -m dmdr_jax.sweep --experiment=... --out=runs/main --dry_run                    # what would run

What is finished is not run again, what was killed goes on from its last checkpoint, a row that fails does not stop the
others. Each finished (row, seed) leaves a small record under --records; python -m dmdr_jax.experiments.results makes
the tables and figures of docs/results.md from them. The logs and runs stay under --out.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from dmdr_jax import cli


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--experiment", required=True, metavar="FILE.py[:ARG]", help="what to run")
    p.add_argument("--out", required=True, type=Path, help="folder of the runs")
    p.add_argument("--records", type=Path, default=Path("benchmarks/results"), help="folder of the records")
    p.add_argument("--jobs", type=int, default=1, help="rows at a time, each on its share of the cores (default: 1)")
    p.add_argument("--rows", default="", metavar="ROW,...", help="only these, with the rows that they go on from")
    p.add_argument("--seeds", default="", metavar="N,...", help="only these (default: the experiment's)")
    p.add_argument(
        "--keep_checkpoints", action="store_true",
        help="all of them; else a finished row keeps its last and what other rows begin with",
    )  # fmt: skip
    p.add_argument("--dry_run", action="store_true", help="print the commands and what of them is done")
    return p


def main(args: argparse.Namespace) -> int:
    from dmdr_jax.errors import UserError
    from dmdr_jax.experiments.display import Display, listing
    from dmdr_jax.experiments.jobs import Job, jobs_of
    from dmdr_jax.experiments.records import write_record
    from dmdr_jax.experiments.runner import Runner
    from dmdr_jax.experiments.spec import chosen, load

    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")
    experiment = load(args.experiment)
    rows = [label for label in args.rows.split(",") if label]
    jobs = jobs_of(experiment, chosen(experiment, rows, numbers(args.seeds)), args.out)
    if args.dry_run:
        print(listing(jobs))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: everything is stopped in good order

    def finished(job: Job) -> None:
        write_record(job, args.records)
        if not args.keep_checkpoints:
            job.prune()

    runner = Runner(jobs, args.jobs, finished, Display(jobs, args.jobs).show, compile_cache(args.out))
    failures = runner.run()
    for failure in failures:
        print(f"{failure.job.name} failed: {failure.why}\n  log: {failure.job.log}")
    left = [job for job in jobs if runner.state(job) not in ("done", "failed")]
    for job in left:
        print(f"{job.name} was not run: it goes on from a row that failed")
    print(f"{len(runner.done)} of {len(jobs)} done; records under {args.records / experiment.name}")
    return 1 if failures else 0


def numbers(text: str) -> list[int]:
    """Seeds of a command line; UserError where they are none."""
    from dmdr_jax.errors import UserError

    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"--seeds {text!r} must be whole numbers with commas between them.") from None


def compile_cache(out: Path) -> dict[str, str]:
    """Seeds of a row share their compiled programs, unless the user has a cache of their own."""
    name = "JAX_COMPILATION_CACHE_DIR"
    return {} if name in os.environ else {name: str((out / "compiled").absolute())}


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main, parser())
