"""What a reward of the embedded world is worth, on prompts and pictures that it was not trained on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.rewards.clip_reward import embed_images, embed_texts, split_params
from dmdr_jax.shapes import rewards
from dmdr_jax.shapes.reward_data import KINDS, Groups, all_world_records, make_groups
from dmdr_jax.shapes.reward_training import EQUAL_SHARE, WORSE_KINDS, Trainer
from dmdr_jax.shapes.verifier import judge

Array = jax.Array

TEST_GROUPS, TEST_SEED = 400, 10_000
REPAIR_STEPS, REPAIR_STEP = 40, 0.4
PALE, SATURATED = 0.8, 1.4


def measure(trainer: Trainer, seed: int = TEST_SEED) -> dict[str, float]:
    """All measures on fresh groups: prompts that were trained on under `seen/`, the others under `held_out/`."""
    metrics: dict[str, float] = {}
    for offset, (name, split) in enumerate((("seen", "train"), ("held_out", "held_out"))):
        groups = make_groups(trainer.world, TEST_GROUPS, seed + offset, split)
        cosines = trainer.group_cosines(groups)
        found = {**retrieval_metrics(cosines, groups), **verdict_metrics(cosines, groups)}
        found |= repair_metrics(trainer, groups)
        found |= taste_metrics(trainer, groups, seed)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return metrics


def unit_images(images: Array) -> Array:
    """Each image `[b, h, w, 3]` divided by its L2 norm."""
    return images / jnp.maximum(jnp.sqrt((images**2).sum((1, 2, 3), keepdims=True)), 1e-12)


def repair_metrics(trainer: Trainer, groups: Groups, count: int = 256) -> dict[str, float]:
    """What climbing the score does to wrong pictures: verdicts and scores before and after steps on the pixels.

    REPAIR_STEPS steps of L2 length REPAIR_STEP along the gradient, kept in [0, 1]. An informative reward makes
    wrong pictures right; one that can be fooled raises its score alone.
    """
    own = np.take_along_axis(groups.truth, groups.prompt[:, None, None], 2)[..., 0]
    wrong = np.argwhere(~own)
    wrong = wrong[np.random.default_rng(0).permutation(len(wrong))[:count]]
    start = jnp.asarray(groups.images[wrong[:, 0], wrong[:, 1]].astype(np.float32) / 255)
    vision, text = split_params(trainer.params)
    features = embed_texts(trainer.text, text, trainer.ids[groups.prompt[wrong[:, 0]]])

    def total(images: Array) -> tuple[Array, Array]:
        scores = (embed_images(trainer.vision, trainer.preprocess, vision, images) * features).sum(-1)
        return scores.sum(), scores

    @jax.jit
    def climb(images: Array) -> tuple[Array, Array]:
        def one(images: Array, _: None) -> tuple[Array, Array]:
            uphill, scores = jax.grad(total, has_aux=True)(images)
            return jnp.clip(images + REPAIR_STEP * unit_images(uphill), 0.0, 1.0), scores.mean()

        return jax.lax.scan(one, images, None, length=REPAIR_STEPS)

    end, scores = climb(start)
    records = all_world_records(trainer.world)
    asked = [records[p] for p in groups.prompt[wrong[:, 0]]]
    before = judge(trainer.world, np.asarray(start), asked).summary()
    after = judge(trainer.world, np.asarray(end), asked).summary()
    metrics = {f"repair/{name}": after[name] for name in ("strict", "lenient", "partial", "junk_fraction")}
    metrics["repair/partial_before"] = before["partial"]
    return metrics | {"repair/score_before": float(scores[0]), "repair/score": float(total(end)[1].mean())}


def taste_metrics(trainer: Trainer, groups: Groups, seed: int) -> dict[str, float]:
    """`preference_metrics` of the trainer's network, as it stands."""
    pairs = rewards.preference_pairs(groups, WORSE_KINDS, EQUAL_SHARE, seed)
    vision, text = split_params(trainer.params)
    shown = PairFeatures.of(pairs, lambda images: embed_images(trainer.vision, trainer.preprocess, vision, images))
    return preference_metrics(shown, embed_texts(trainer.text, text, trainer.ids[pairs.prompt]))


class PairFeatures(NamedTuple):
    """Features `[p, d]` of pairs of pictures by saturation: `better`, `worse`; `equal` bool `[p]` as in `Pairs`."""

    better: dict[float, np.ndarray]
    worse: dict[float, np.ndarray]
    equal: np.ndarray

    @classmethod
    def of(cls, pairs: rewards.Pairs, embed: Callable[[Array], Array]) -> "PairFeatures":
        """Those of `pairs` by `embed`, images `[p, h, w, 3]` in [0, 1] to unit features."""

        def shown(images: np.ndarray) -> dict[float, np.ndarray]:
            scaled = jnp.asarray(images, jnp.float32) / 255
            return {
                factor: np.asarray(embed(rewards.saturate(scaled, jnp.full(len(images), factor))))
                for factor in (PALE, 1.0, SATURATED)
            }

        return cls(shown(pairs.better), shown(pairs.worse), pairs.equal)


def preference_metrics(shown: PairFeatures, text: Array | np.ndarray) -> dict[str, float]:
    """How well texts' features `[p, d]` tell which of two pictures is the better.

    Pair accuracies: `unbiased` (same saturation), `better_saturated`, `worse_saturated`; and `taste`, how often, of two
    right pictures, the more saturated one scores higher; .5 is no taste.
    """

    def wins(better: float, worse: float) -> np.ndarray:
        return np.asarray(((shown.better[better] - shown.worse[worse]) * text).sum(-1)) > 0

    judged = ~shown.equal
    liked, disliked = wins(SATURATED, PALE), wins(PALE, SATURATED)
    return {
        "preference/unbiased": float(wins(1.0, 1.0)[judged].mean()),
        "preference/better_saturated": float(liked[judged].mean()),
        "preference/worse_saturated": float(disliked[judged].mean()),
        "preference/taste": float(np.concatenate([liked[shown.equal], ~disliked[shown.equal]]).mean()),
    }


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney)."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def verdict_metrics(cosines: np.ndarray, groups: Groups) -> dict[str, float]:
    """How well scores tell the strict verdict, per kind of picture.

    Args:
      cosines: `[g, m, c]`, every picture of the groups against every record.

    Returns:
      `auc/KIND`: pictures of the kind that fail their group's prompt against the clean ones of all groups that have
      such a picture; `pair/KIND`: the same, but against the clean one of the same group; `auc/all`, `pair/all`; and
      the mean scores `score/true`, `score/false`, `score/shuffled` (the clean picture under another group's prompt).
    """
    column = groups.prompt[:, None, None]
    scores = np.take_along_axis(cosines, column, 2)[..., 0]
    fails = ~np.take_along_axis(groups.truth, column, 2)[..., 0]
    clean = scores[:, 0]
    metrics: dict[str, float] = {}
    for k, kind in [*enumerate(KINDS), (-1, "all")]:
        chosen = fails & ((groups.kinds == k) | (k < 0))
        if kind != "clean" and chosen.any():
            partners = clean[np.nonzero(chosen)[0]]
            metrics[f"auc/{kind}"] = auc(partners, scores[chosen])
            metrics[f"pair/{kind}"] = float((partners > scores[chosen]).mean())
    metrics |= {"score/true": float(clean.mean()), "score/false": float(scores[fails].mean())}
    metrics["score/shuffled"] = float(cosines[np.arange(len(clean)), 0, np.roll(groups.prompt, 1)].mean())
    metrics["score/std"] = float(scores.std())
    return metrics


def retrieval_metrics(cosines: np.ndarray, groups: Groups) -> dict[str, float]:
    """Top-1 accuracy of clean pictures among all captions, and of captions among all clean pictures.

    Args:
      cosines: `[g, m, c]`.
    """
    clean, truth = cosines[:, 0], groups.truth[:, 0]
    rows = np.arange(len(clean))
    asked = np.unique(groups.prompt)
    return {
        "retrieval/caption": float(truth[rows, clean.argmax(1)].mean()),
        "retrieval/image": float(truth[clean[:, asked].argmax(0), asked].mean()),
    }
