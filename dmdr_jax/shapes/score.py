"""Scores a teacher's folder with the verifier on prompts not trained on."""

from pathlib import Path

import numpy as np

from dmdr_jax.generate import draw_images, initial_noise
from dmdr_jax.model import open_model
from dmdr_jax.shapes import prompts, verifier
from dmdr_jax.shapes.world import World


def strict_scores(
    folder: Path, world: World, *, steps: int = 25, guidance: float = 3.0, per_tag: int = 40, seed: int = 11
) -> dict[str, float]:
    """Strict and lenient verdict, overall and strict by tag, of Euler samples with guidance."""
    model = open_model(str(folder))
    records = prompts.eval_records(world, per_tag, seed)
    recipe = model.recipe(steps, "ode", guidance, (world.size, world.size))
    noise = initial_noise(model.pipeline, world.size, world.size, range(seed, seed + len(records)))
    images = draw_images(model.pipeline, model.weights, recipe, [r["prompt"] for r in records], noise, batch=60)
    verdict = verifier.judge(world, images, records)
    tags = np.array([r["tag"] for r in records])
    scores = {"strict": float(verdict.strict.mean()), "lenient": float(verdict.lenient.mean())}
    return scores | {tag: float(verdict.strict[tags == tag].mean()) for tag in prompts.TAGS}
