"""Scores of a folder of images that somebody else made: raw values, image by image."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dmdr_jax.data.prompts import all_prompts
from dmdr_jax.data.survey import survey
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.environment import command, describe_environment
from dmdr_jax.evaluation.images import digests, image_files
from dmdr_jax.evaluation.journal import write_text
from dmdr_jax.evaluation.results import plain
from dmdr_jax.evaluation.scorers import Scorer, parse_rewards
from dmdr_jax.evaluation.shards import OthersAtWork, Shard, wait_for_others
from dmdr_jax.evaluation.table import estimate, markdown_table


def score_folder(args: Any) -> str:
    """Runs ``--images``; returns the table of means.

    The scores go to ``--out``; a killed run goes on where it was, from the folder beside it that is removed at the end.

    Raises:
      UserError: the number of images is not that of the prompts, a reward cannot be read, or an image.
      OthersAtWork: other processes have not done their part yet.
    """
    out = Path(args.out or "scores.json")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: with --images give a file, such as {out / 'scores.json'}.")
    files = image_files(args.images)
    prompts = matching_prompts(args.prompts, files, args.images)
    specs = parse_rewards(args.reward or ())
    if not specs:
        raise UserError("--images without --reward leaves nothing to measure: give --reward NAME=PATH at least once.")
    shard, work = Shard.make(args.shard), out.with_name(f".{out.name}.work")
    scorers = [Scorer.make(spec, args.reward_dtype, work, shard.index) for spec in specs]
    names, own = digests(files), shard.rows(len(files))
    for scorer in scorers:
        with tqdm(total=len(own), desc=scorer.spec.name, unit="image") as bar:
            scorer.score([files[i] for i in own], [names[i] for i in own], [prompts[i] for i in own], bar.update)
    wait_for_others("scored")
    scores = gather(scorers, names, prompts)
    if shard.index == 0 or args.shard:
        write_text(out, json.dumps(plain(document(args, files, prompts, scorers, scores)), indent=1, allow_nan=False))
    wait_for_others("written")
    if not args.shard:  # another shard may still be reading
        shutil.rmtree(work, ignore_errors=True)
    return f"{describe_prompts(scorers, prompts)}\n\n{table(scores, prompts)}"


def describe_prompts(scorers: list[Scorer], prompts: list[str]) -> str:
    """How many there are, and what is odd about them."""
    cut = {scorer.spec.name: scorer.cut_prompts(prompts) for scorer in scorers}
    found = dataclasses.replace(survey(filter(None, prompts)), cut=cut)
    return f"{found}, {prompts.count('')} empty" if "" in prompts else str(found)


def matching_prompts(source: str | None, files: list[Path], folder: str) -> list[str]:
    """One prompt for each image.

    Empty lines are prompts where they are needed for one a line, and else are passed over.

    Raises:
      UserError: there is no file of prompts, or it does not have one for each image.
    """
    if not source:
        raise UserError("--images needs --prompts FILE: one prompt a line, in the order of the images' file names.")
    lines = all_prompts(source)
    prompts = [line for line in lines if line]
    for found in (lines, prompts):
        if len(found) == len(files):
            return found
    empty = f" (and {len(lines) - len(prompts)} empty lines)" if len(prompts) < len(lines) else ""
    raise UserError(
        f"{folder} holds {len(files)} images and {source} has {len(prompts)} prompts{empty}: "
        "give one prompt for each image, in the order of their file names."
    )


def gather(scorers: list[Scorer], names: list[str], prompts: list[str]) -> dict[str, np.ndarray]:
    """All scores by reward; OthersAtWork while some are missing."""
    scores = {}
    for scorer in scorers:
        scores[scorer.spec.name], there = scorer.collect(names, prompts)
        if there < len(names):
            raise OthersAtWork(f"scores of {scorer.spec.name}", there, len(names))
    return scores


def document(
    args: Any, files: list[Path], prompts: list[str], scorers: list[Scorer], scores: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What the file holds: raw values, their means, and what is needed to make them again."""
    return {
        "scores": scores,
        "summary": {name: estimate(values, prompts) for name, values in scores.items()},
        "files": [file.name for file in files],
        "prompts": prompts,
        "images": str(args.images),
        "prompt_file": str(args.prompts),
        "prompt_survey": describe_prompts(scorers, prompts),
        "rewards": {scorer.spec.name: scorer.describe() for scorer in scorers},
        "command": command(),
        "environment": describe_environment(),
    }


def table(scores: dict[str, np.ndarray], prompts: list[str]) -> str:
    """Means and standard errors in Markdown."""
    rows = []
    for name, values in scores.items():
        e = estimate(values, prompts)
        rows.append([name, f"{e.mean:.6g}", f"{e.se:.2g}", str(e.n)])
    return markdown_table(["reward", "mean", "standard error", "images"], rows)
