"""Diversity and distribution distance in the embedded world, without a network.

*Attribute entropy*: what the prompt leaves open (background, unnamed colors, where things stand) should stay random. It
is read off the verifier's detections, in nats, with the Miller-Madow correction H + (K - 1) / 2N for K values seen in N
samples (Miller 1955), because the plug-in estimate is too low for few samples.

*Frechet distance* between Gaussians fitted to features (Heusel et al. 2017):
|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). The features are hand-made and say nothing of the prompt: they see
blur, noise, colors and composition, never whether the image answers its prompt, which the verifier does. The distance
is biased upwards by about 1/N, so compare equal N and print the floor of real against real beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.shapes.render import chroma, oklab
from dmdr_jax.shapes.verifier import Detections
from dmdr_jax.shapes.world import World

POOL = 4  # cells per axis of the pooled image
GRADIENT_QUANTILES = (0.5, 0.75, 0.85, 0.9, 0.95, 0.98, 1.0)
CHROMA_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 1.0)
FEATURES = POOL * POOL * 3 + len(GRADIENT_QUANTILES) + len(CHROMA_QUANTILES)
STD_FLOOR = 0.02  # below this a nearly constant feature would dominate the distance


# --- attribute entropy ---------------------------------------------------------------------------------------------


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a distribution seen as `counts`, Miller-Madow corrected and at most ln(len(counts)).

    Zero when everything seen is alike; nan when nothing was seen.
    """
    counts = np.asarray(counts, np.float64)
    total, seen = counts.sum(), counts[counts > 0]
    if total == 0:
        return float("nan")
    share = seen / total
    corrected = -(share * np.log(share)).sum() + (len(seen) - 1) / (2 * total)
    return float(min(corrected, np.log(len(counts))))


@dataclasses.dataclass(frozen=True)
class AttributeDiversity:
    """Spread of what prompts leave open; nan where nothing could be read.

    Attributes:
      background_entropy: nats, over the images whose background is one of the world's.
      unknown_background: share of the images whose background is none of the world's.
      color_entropy: nats, over the colors of the requested objects whose color the prompt leaves open.
      position_std: pixels, standard deviation of the centres of the accepted objects, mean over the two axes.
      samples: images.
    """

    background_entropy: float
    unknown_background: float
    color_entropy: float
    position_std: float
    samples: int


def attribute_diversity(
    world: World,
    detections: Detections,
    records: Sequence[Mapping],
    groups: Sequence[Hashable] | None = None,
) -> AttributeDiversity:
    """Spread of the attributes that prompts leave open.

    Args:
      detections: from `verifier.detect`, n images.
      records: the n prompts' records.
      groups: n keys. None pools all images. Given (for instance the prompt), each measure is taken within each group
        and averaged over groups, which also sees a collapse that differs from prompt to prompt; every group then
        wants many images, as K images cannot show more than ln K nats.
    Raises:
      UserError: the numbers of images, records and groups differ.
    """
    n = len(detections.objects)
    keys = [None] * n if groups is None else list(groups)
    if not n == len(records) == len(keys):
        raise UserError(f"{n} images, {len(records)} records and {len(keys)} groups; give one of each per image")
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    rows = np.array([_measure(world, detections, records, index) for index in members.values()]).reshape(-1, 4)
    known = [column[~np.isnan(column)] for column in rows.T]
    background, unknown, color, position = (float(column.mean()) if len(column) else float("nan") for column in known)
    return AttributeDiversity(background, unknown, color, position, samples=n)


def _measure(world: World, detections: Detections, records: Sequence[Mapping], index: list[int]) -> list[float]:
    """The four measures of `AttributeDiversity` for some images."""
    background = detections.background[index]
    backgrounds = np.bincount(background[background >= 0], minlength=len(world.backgrounds))
    colors = [color for i in index for color in _open_colors(detections, records[i], i)]
    color_counts = np.bincount([world.colors.index(color) for color in colors], minlength=len(world.colors))
    boxes = np.array([found.box for i in index for found in detections.objects[i]]).reshape(-1, 4)
    spread = float((boxes[:, :2] + boxes[:, 2:]).std(0).mean() / 2) if len(boxes) else float("nan")
    return [entropy(backgrounds), float((background < 0).mean()), entropy(color_counts), spread]


def _open_colors(detections: Detections, record: Mapping, image: int) -> list[str]:
    """Colors of the detected objects of requested classes for which the record names no color."""
    free = {item["class"] for item in record["include"] if "color" not in item}
    return [found.color for found in detections.objects[image] if found.shape in free]


# --- Frechet distance ----------------------------------------------------------------------------------------------


def frechet_features(images: np.ndarray, batch: int = 256) -> np.ndarray:
    """Hand-made features of sRGB images in [0, 1]: float64 [n, FEATURES].

    OKLab averaged over a POOL x POOL grid, quantiles of the lightness gradient's length, quantiles of chroma.
    Raises UserError unless height and width are multiples of POOL.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % POOL or images.shape[2] % POOL:
        raise UserError(f"features want images [n, h, w, 3] with sides divisible by {POOL}, got {list(images.shape)}")
    parts = [_features(oklab(images[i : i + batch])) for i in range(0, len(images), batch)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, FEATURES))


def _features(lab: np.ndarray) -> np.ndarray:
    n, height, width, _ = lab.shape
    pooled = lab.reshape(n, POOL, height // POOL, POOL, width // POOL, 3).mean((2, 4)).reshape(n, -1)
    light = lab[..., 0]
    gradient = np.hypot(np.diff(light, axis=1)[:, :, :-1], np.diff(light, axis=2)[:, :-1])
    edges = np.quantile(gradient.reshape(n, -1), GRADIENT_QUANTILES, axis=1).T
    colorful = np.quantile(chroma(lab).reshape(n, -1), CHROMA_QUANTILES, axis=1).T
    return np.concatenate([pooled, edges, colorful], axis=1)


def gaussian_frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians; means [d], covariances [d, d], which may be rank deficient.

    tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric R S_b R with R = S_a^(1/2).
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of features [n, d] to reference features [m, d], in the reference's standard deviations.

    Both are divided by the reference's standard deviation per dimension, floored at STD_FLOOR.
    Raises UserError with fewer than two rows on a side or different d.
    """
    a, b = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(
            f"the Frechet distance wants two sets of at least two rows of equal width, got {a.shape} and {b.shape}"
        )
    scale = np.maximum(b.std(0), STD_FLOOR)
    a, b = a / scale, b / scale
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b)]
    return gaussian_frechet(a.mean(0), covariances[0], b.mean(0), covariances[1])
