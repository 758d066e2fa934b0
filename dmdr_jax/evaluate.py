"""Compares models on prompts they were not trained on (the same prompts and the same noise for all), or scores images.

    python -m dmdr_jax.evaluate --out evaluation \\
        --model teacher=shapes:sd3,steps=25,guidance=3 \\
        --model teacher4=shapes:sd3,steps=4,guidance=3 \\
        --model student=runs/mine --baseline teacher4

    python -m dmdr_jax.evaluate --out evaluation --prompts prompts.txt --dtype bfloat16 \\
        --model teacher=/data/stable-diffusion-3-medium-diffusers --model student=runs/mine \\
        --reward pickscore=/data/PickScore_v1 --reward hpsv21=/data/HPS_v2.1_compressed.pt,tokenizer=/data/CLIP-H

    python -m dmdr_jax.evaluate --images pictures --prompts prompts.txt \\
        --reward pickscore=/data/PickScore_v1 --out scores.json

The first model is the teacher that others are compared with; a NAME=PATH is a diffusers folder, a hub id,
shapes:NAME, an exported student, a run, or images:FOLDER with images drawn elsewhere. Without --prompts the embedded
world's prompts, verifier and rewards are used. Writes results.json (every image's numbers, means, standard errors,
paired differences with confidence intervals, and all that is needed to repeat it), table.md and the images. A killed
evaluation goes on where it was. Several hosts share it: the same command on each, as with dmdr_jax.train.
docs/evaluation.md has the protocols.
"""

import argparse
from typing import Any

from dmdr_jax import cli

DEFAULT_REWARDS = "shapes:rewards/shapes_clip,shapes:rewards/shapes_hps"
DEFAULT_JUDGE = "shapes:rewards/shapes_judge"
DEFAULTS_OF = "small"
"""The world that they were trained in; in another one nothing is scored by default but by its verifier."""
BENCHMARKS = ("geneval", "dpg", "hpsv2", "compbench")
REWARD = "NAME=PATH[,tokenizer=FOLDER,...]"


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--out", required=True, help="folder for the results; with --images or --detections a file")

    asked = p.add_argument_group("what is compared")
    asked.add_argument(
        "--model", action="append", metavar="NAME=PATH[,steps=N,kernel=K,guidance=G]",
        help="a row of the table, again for each; the first is the teacher",
    )  # fmt: skip
    asked.add_argument("--baseline", help="name of a model to compare the others with, besides the first")
    asked.add_argument("--world", help="embedded world whose prompts and verifier to use (default: small)")
    asked.add_argument("--per_tag", type=int, default=40, help="prompts of each of the world's six tasks (default: 40)")
    asked.add_argument("--prompts", help="prompts in place of a world's: a file, or what a benchmark publishes")
    asked.add_argument("--per_prompt", type=int, help="images per prompt (default: 1; in a benchmark its own number)")
    asked.add_argument("--limit", type=int, help="of --prompts take this many, chosen by --seed")
    asked.add_argument("--benchmark", choices=BENCHMARKS, help="also lay the images out as its own scorer reads them")
    asked.add_argument("--images", metavar="FOLDER", help="score these images, one prompt each, instead of drawing")
    asked.add_argument("--detections", metavar="FILE", help="judge what a detector saw in GenEval's images")

    measured = p.add_argument_group("what is measured")
    measured.add_argument("--reward", action="append", metavar=REWARD, help="a score, again for each")
    measured.add_argument("--trained", metavar="NAME,...", help="those of --reward that a student was trained on")
    measured.add_argument(
        "--rewards",
        help=f"rewards trained on, PATH,... or none (default in the {DEFAULTS_OF} world: {DEFAULT_REWARDS})",
    )
    measured.add_argument(
        "--judge",
        help=f"rewards never trained on, PATH,... or none (default in the {DEFAULTS_OF} world: {DEFAULT_JUDGE})",
    )
    measured.add_argument(
        "--features", action="append", metavar="NAME=PATH",
        help="features for distances between sets of images: inception=FILE, clip=FOLDER, NAME=file.py:function",
    )  # fmt: skip
    measured.add_argument(
        "--reference", action="append", metavar="NAME=FOLDER",
        help="images to measure distances to, besides the first model's; again for each",
    )  # fmt: skip
    measured.add_argument(
        "--lpips", metavar="TRUNK,LINEAR", help="weight files of LPIPS, for the diversity of several images per prompt"
    )

    how = p.add_argument_group("how")
    how.add_argument("--seed", type=int, default=0, help="of prompts and noise; image i starts from 100000 seed + i")
    how.add_argument("--size", metavar="N or HxW", help="of the images in pixels (default: each model's own)")
    how.add_argument("--batch", type=int, default=48, help="images drawn at a time")
    how.add_argument("--keep", type=int, default=240, help="a world's images of each model to keep in images.npz")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of networks and activations")
    how.add_argument("--reward_dtype", choices=("float32", "bfloat16"), default="float32", help="of rewards' towers")
    how.add_argument("--shard", metavar="i/n", help="this process's part of the work, i from 0; all share --out")
    return p


def main(args: Any) -> None:
    from pathlib import Path

    from dmdr_jax.errors import UserError

    if "://" in args.out:
        raise UserError(f"--out {args.out} is no place on a disk: give a folder that all hosts see, and copy it then.")

    folder = Path(args.out or ".").parent if args.images or args.detections else Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {folder}: {error.strerror}.") from None

    from dmdr_jax.evaluation.run import evaluate
    from dmdr_jax.evaluation.shards import join_others

    if not args.shard:
        join_others(folder)
    print(evaluate(args))


if __name__ == "__main__":
    cli.run(main, parser())
