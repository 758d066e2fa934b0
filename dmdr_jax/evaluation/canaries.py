"""What a fixed set of images says of over-optimisation, in numbers that are compared with the teacher's.

The images are the answers to the same prompts from the same noise, again and again as a student learns; the teacher's
are measured once. See `dmdr_jax.evaluation.overoptimisation` for what follows from them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.arrays import on_host
from dmdr_jax.evaluation.appearance import MEASURES, appearance, mean_colour
from dmdr_jax.evaluation.images import to_uint8
from dmdr_jax.evaluation.overoptimisation import HELD_OUT, TRAINED, Observation
from dmdr_jax.rewards.base import Reward
from dmdr_jax.rewards.clip_reward import ClipReward
from dmdr_jax.rewards.feature_cache import FeatureCache
from dmdr_jax.shapes.diversity import frechet_features

BATCH = 64  # images scored at a time
PREFIX = "watch/"
"""How the names of the metrics begin."""

Z_TRAINED, Z_HELD_OUT, GAP = "watch/z_trained", "watch/z_held_out", "watch/reward_gap"
SHARES = ("diversity", "palette", "chroma", "saturation", "contrast")
"""What is compared with the teacher's as a share of it."""
LOOKS = (*MEASURES, "diversity", "palette")
"""What is measured whatever the rewards are."""
DIVERSITY, PALETTE = "watch/diversity_share", "watch/palette_share"
CHROMA, CLIPPED = "watch/chroma_share", "watch/clipped_more"


def apart(reward: Reward, to_host: bool = False) -> Reward:
    """A reward whose cache of texts is its own, so that watching changes nothing in training.

    Args:
      to_host: its weights wait in the host's memory and are on a device only while it scores. So they do in a run of
        several processes, which all call, for each to score by itself.
    """
    changes: dict[str, Any] = {"cache": FeatureCache()} if isinstance(reward, ClipReward) else {}
    if to_host or jax.process_count() > 1:
        names = [name for name in ("params", "text_params") if hasattr(reward, name)]
        changes |= {name: jax.tree.map(on_host, getattr(reward, name)) for name in names}
    return dataclasses.replace(reward, **changes)  # type: ignore[type-var]


def measure(
    images: np.ndarray,
    prompts: Sequence[str],
    trained: Sequence[Reward],
    held_out: Sequence[Reward],
) -> dict[str, np.ndarray]:
    """Everything that is measured of images ``[n, h, w, 3]`` in [0, 1]; the images of one prompt are neighbours.

    Returns:
      ``reward/NAME``, ``judge/NAME`` and the `MEASURES` of appearance, ``[n]`` each; and ``diversity`` and
      ``palette``, one number each: how far the images of a prompt lie apart in what they show and in their colour.
    """
    found: dict[str, np.ndarray] = {}
    for prefix, rewards in ((TRAINED, trained), (HELD_OUT, held_out)):
        for reward in rewards:
            scores = reward.score_prompts(images, prompts, BATCH)
            found[prefix + reward.spec.name] = np.asarray(scores, np.float64)
    pictures = to_uint8(images)
    looks = [appearance(picture) for picture in pictures]
    found |= {name: np.array([look[name] for look in looks]) for name in MEASURES}
    towers = [reward for reward in (*held_out, *trained) if isinstance(reward, ClipReward)]
    features = clip_features(towers[0], images) if towers else frechet_features(images)
    colours = np.stack([mean_colour(picture) for picture in pictures])
    return found | {"diversity": np.array(spread(features, prompts)), "palette": np.array(spread(colours, prompts))}


def clip_features(reward: ClipReward, images: np.ndarray) -> np.ndarray:
    """Unit features ``[n, d]`` of a CLIP's image tower."""
    lots = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(reward.image_features(jnp.asarray(lot)), np.float64) for lot in lots])


def spread(features: np.ndarray, prompts: Sequence[str]) -> float:
    """Mean distance between the features of two images of one prompt; of any two where no prompt has two images."""
    groups = [np.flatnonzero(np.array(prompts) == prompt) for prompt in dict.fromkeys(prompts)]
    groups = [rows for rows in groups if len(rows) > 1] or [np.arange(len(prompts))]
    return float(np.mean([_mean_distance(features[rows]) for rows in groups]))


def _mean_distance(rows: np.ndarray) -> float:
    if len(rows) < 2:
        return 0.0
    a, b = np.triu_indices(len(rows), 1)
    return float(np.linalg.norm(rows[a] - rows[b], axis=-1).mean())


def compare(student: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a run: the student's means, and how they stand to the teacher's.

    Rewards that do not vary among the teacher's images have no z. ``chroma_share`` and its like are ratios to the
    teacher's, ``clipped_more`` is a difference.
    """
    found = {PREFIX + name: float(np.mean(values)) for name, values in student.items()}
    for key, prefix in ((Z_TRAINED, TRAINED), (Z_HELD_OUT, HELD_OUT)):
        z = [_z(student[name], teacher[name]) for name in student if name.startswith(prefix) and np.std(teacher[name])]
        if z:
            found[key] = float(np.mean(z))
    if Z_TRAINED in found and Z_HELD_OUT in found:
        found[GAP] = found[Z_TRAINED] - found[Z_HELD_OUT]
    for name in SHARES:
        of_teacher = float(np.mean(teacher[name]))
        if of_teacher > 0:
            found[f"{PREFIX}{name}_share"] = found[PREFIX + name] / of_teacher
    found[CLIPPED] = found[PREFIX + "clipped"] - float(np.mean(teacher["clipped"]))
    return found


def _z(values: np.ndarray, teacher: np.ndarray) -> float:
    return float((values.mean() - teacher.mean()) / teacher.std())


def observation(step: int, metrics: Mapping[str, Any]) -> Observation:
    """What the alarm's rule reads of a run's metrics at one step."""
    keys = {"trained": Z_TRAINED, "held_out": Z_HELD_OUT, "diversity": DIVERSITY, "palette": PALETTE}
    keys |= {"chroma": CHROMA, "clipped": CLIPPED}
    return Observation(step, **{name: metrics.get(key) for name, key in keys.items()})


def observations(rows: Sequence[Mapping[str, Any]]) -> list[Observation]:
    """Those of a run's metrics that were watched, by step; a step that was measured twice counts once."""
    seen = {row["step"]: observation(row["step"], row) for row in rows if any(key.startswith(PREFIX) for key in row)}
    return [seen[step] for step in sorted(seen)]
