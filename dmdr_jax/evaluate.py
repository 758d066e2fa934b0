"""Compares models on prompts they were not trained on: the same prompts and the same noise for all.

    python -m dmdr_jax.evaluate --out evaluation \\
        --model teacher=shapes:sd3,steps=25,guidance=3 \\
        --model teacher4=shapes:sd3,steps=4,guidance=3 \\
        --model student=runs/mine --baseline teacher4

Writes results.json (every image's numbers, means, standard errors, paired differences), table.md,
images.npz and a grid of pictures per model. The first model is the teacher that others are compared
with. For models outside the embedded world give --prompts FILE and --rewards: those scores are then
the whole table. A NAME=PATH is a diffusers folder, a hub id, shapes:NAME, an exported student, or a run.
"""

import argparse
from typing import Any

from dmdr_jax import cli

DEFAULT_REWARDS = "shapes:rewards/shapes_clip,shapes:rewards/shapes_hps"
DEFAULT_JUDGE = "shapes:rewards/shapes_judge"


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument(
        "--model", action="append", required=True, metavar="NAME=PATH[,steps=N,kernel=K,guidance=G]",
        help="a row of the table, again for each; the first is the teacher",
    )  # fmt: skip
    p.add_argument("--out", required=True, help="folder for the results")
    p.add_argument("--baseline", help="name of a model to compare the others with, besides the first")
    p.add_argument("--world", help="embedded world whose prompts and verifier to use (default: small)")
    p.add_argument("--per_tag", type=int, default=40, help="prompts of each of the world's six tasks (default: 40)")
    p.add_argument("--prompts", help="file of prompts in place of a world's; no verifier then")
    p.add_argument("--per_prompt", type=int, default=1, help="images per prompt (default: 1)")
    p.add_argument("--rewards", help=f"rewards trained on, PATH,... or none (default in a world: {DEFAULT_REWARDS})")
    p.add_argument("--judge", help=f"rewards never trained on, PATH,... or none (default in a world: {DEFAULT_JUDGE})")
    p.add_argument("--seed", type=int, default=0, help="of prompts and noise; image i starts from 100000 seed + i")
    p.add_argument("--batch", type=int, default=48, help="images drawn at a time")
    p.add_argument("--keep", type=int, default=240, help="images of each model to keep in images.npz")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of networks and activations")
    return p


def main(args: Any) -> None:
    from dmdr_jax.evaluation.run import evaluate

    print(evaluate(args))


if __name__ == "__main__":
    cli.run(main, parser())
