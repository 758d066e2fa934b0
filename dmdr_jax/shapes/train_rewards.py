"""Trains a reward of the embedded world and saves it as a transformers CLIPModel folder.

    python -m dmdr_jax.shapes.train_rewards --name shapes_clip --out dmdr_jax/shapes/assets/rewards/shapes_clip

See `dmdr_jax.shapes.rewards` for what the three rewards are. Minutes on one CPU core each; the measures on
pictures and prompts that were not trained on go to `metrics.json` in the folder.
"""

import argparse
import json
import time
from pathlib import Path

from dmdr_jax import cli
from dmdr_jax.errors import UserError

NAMES = ("shapes_clip", "shapes_hps", "shapes_judge")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dmdr_jax.shapes.train_rewards", description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, choices=NAMES, help="which reward")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", default="small", help="a world of dmdr_jax.shapes.world")
    parser.add_argument("--pool", type=int, default=6000, help="groups of pictures to draw batches from")
    return parser


def main(args: argparse.Namespace) -> None:
    """Trains, measures, saves and prints."""
    if args.steps < 10 or args.pool < 100:
        raise UserError("--steps must be at least 10 and --pool at least 100.")
    from dmdr_jax.diffusers_io.safetensors_io import write_text
    from dmdr_jax.shapes import reward_measures, reward_training

    started = time.monotonic()
    trainer = reward_training.train(args.name, args.world, args.steps, args.seed, args.pool)
    reward_training.save(trainer, args.out)
    measures = reward_measures.measure(trainer)
    run = {"name": args.name, "world": args.world, "steps": args.steps, "seed": args.seed, "pool": args.pool}
    table = json.dumps({**run, **{key: round(value, 4) for key, value in measures.items()}}, indent=2)
    write_text(args.out / "metrics.json", table + "\n")
    print(table)
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    cli.run(main, make_parser())
