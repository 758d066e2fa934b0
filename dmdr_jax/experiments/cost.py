"""Counts the floating point operations of training, from shapes alone: no weights are read, nothing is run.

    python -m dmdr_jax.experiments.cost --out cost.json --stage configs/shapes/sd3.py 0 500 batch=16

A --stage is a configuration, the generator steps from and to which it trains, and its overrides; several are added up.
Counted are matrix products and convolutions (two operations for a multiply-add) of the two compiled updates, backward
passes and recomputation included, and of the regression before the cold start; not the text encoders, previews and
evaluations. Loops count every turn, which XLA's own analysis does not.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.planning.work import count


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--out", required=True, type=Path, help="file for the counts")
    p.add_argument(
        "--stage", action="append", nargs="+", required=True, metavar="ARG", help="CONFIG FIRST LAST [KEY=VALUE ...]"
    )
    return p


def main(args: argparse.Namespace) -> None:
    stages = [argument for stage in args.stage for argument in ("--stage", *stage)]
    try:
        found: dict[str, Any] = {"stages": stages, **add([stage_cost(*stage_of(stage)) for stage in args.stage])}
    except UserError:
        raise
    except Exception as error:  # what a future method does may defeat the counting; a run must not fail for that
        found = {"stages": stages, "error": f"{type(error).__name__}: {error}"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    half = args.out.with_suffix(f".{os.getpid()}.tmp")  # two seeds of a row may count at the same time
    half.write_text(json.dumps(found, indent=1), encoding="utf-8")
    half.replace(args.out)
    print(json.dumps(found))


def stage_of(arguments: Sequence[str]) -> tuple[Any, int, int]:
    """Configuration, first and last step; UserError where they are not there."""
    if len(arguments) < 3 or not (arguments[1].isdigit() and arguments[2].isdigit()):
        raise UserError("--stage needs CONFIG FIRST LAST and then overrides KEY=VALUE.")
    return cli.load_config(arguments[0], arguments[3:]), int(arguments[1]), int(arguments[2])


def add(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of the totals; the costs of single updates are those of the last stage."""
    return {**costs[-1], "training": sum(cost["training"] for cost in costs)}


def stage_cost(config: Any, first: int, last: int) -> dict[str, float]:
    """Operations of one fake update, of one generator update at ``last``, and of the updates from first to last."""
    import jax

    from dmdr_jax.objectives.base import active_terms, separate_fake_updates
    from dmdr_jax.training.abstract import AbstractRun
    from dmdr_jax.training.step import fake_step, generator_step

    run = AbstractRun.of(config)
    inputs = run.state, run.frozen, run.batch
    fake = count(jax.make_jaxpr(partial(fake_step, run.plan))(*inputs))
    generator: dict[Any, float] = {}
    total = ode_cost(config, run) if first == 0 else 0.0
    for step in range(first, last):
        terms = active_terms(run.terms, step)
        if terms not in generator:
            generator[terms] = count(jax.make_jaxpr(partial(generator_step, run.plan, terms))(*inputs))
        updates = separate_fake_updates(terms, config.fake.updates)
        total += generator[terms] + (updates + (step == 0 and updates > 0)) * fake
    latest = active_terms(run.terms, last - 1)
    return {"fake_update": fake, "generator_update": generator[latest], "training": total}


def ode_cost(config: Any, run: Any) -> float:
    """The regression before the cold start: the teacher's pairs and the updates."""
    if not config.ode.steps:
        return 0.0
    import jax

    from dmdr_jax.training.abstract import AbstractOde
    from dmdr_jax.training.ode import ode_step, teacher_latents

    ode = AbstractOde.of(config, run)
    pair = count(jax.make_jaxpr(partial(teacher_latents, ode.stage))(*ode.pairs)) / config.ode.batch
    update = count(jax.make_jaxpr(partial(ode_step, ode.stage))(*ode.regression))
    return config.ode.pairs * pair + config.ode.steps * update


if __name__ == "__main__":
    cli.run(main, parser())
