"""Distances between two sets of features, on the host in fp64.

*Frechet distance* of the Gaussians fitted to the sets (Heusel et al. 2017, eq. 6)::

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))                                   (1)

With R = S_b^(1/2) (symmetric, by eigenvalues) the trace of the root is the sum of the singular values of
X R / sqrt(n - 1), X being the centred features of a: no square root of a matrix that is not symmetric, and nothing
added to a diagonal where there are fewer images than features.

*MMD* with a Gaussian kernel (Gretton et al. 2012, eq. 5, the biased estimate; Jayasumana et al. 2024 on CLIP features:
CMMD, sigma 10, times 1000)::

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b),    k(a, b) = exp(-|a - b|^2 / 2 sigma^2)      (2)

*Precision and recall* (Kynkaanniemi et al. 2019): the share of a's points that lie in b's manifold, and of b's points
in a's. A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbours.

All of them depend on the number of images (the first is biased upwards by about 1 / n): compare equal numbers.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from dmdr_jax.errors import UserError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3
_CHUNK = 2048  # rows of a kernel or distance matrix held at a time


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A normal distribution.

    Attributes:
      mean: ``[d]``.
      covariance: ``[d, d]``, of any rank.
    """

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> "Gaussian":
        """To features ``[n, d]``, with the unbiased covariance.

        Raises:
          UserError: fewer than two rows.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise UserError(f"a Frechet distance needs at least two images on each side, not {len(x)}.")
        return cls(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))

    @classmethod
    def read(cls, file: str | Path) -> "Gaussian":
        """From an .npz with ``mu`` and ``sigma``, as pytorch-fid and clean-fid keep statistics.

        Raises:
          UserError: it is no such file.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                mean, covariance = (np.asarray(stored[name], np.float64) for name in ("mu", "sigma"))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} holds no statistics mu and sigma ({error}): give an .npz of FID's.") from None
        if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
            raise UserError(f"{file}: mu {mean.shape} and sigma {covariance.shape} do not belong together.")
        return cls(mean, covariance)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(features: np.ndarray, reference: Gaussian) -> float:
    """Equation (1) between features ``[n, d]`` and a reference.

    Raises:
      UserError: fewer than two images, or features of another width.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] != len(reference.mean):
        raise UserError(
            f"a Frechet distance needs at least two images and features of one width: there are {x.shape} against "
            f"{len(reference.mean)}."
        )
    mean, n = x.mean(0), len(x)
    centred = (x - mean) / np.sqrt(n - 1)
    mapped = centred @ reference.root
    if n < x.shape[1]:
        cross = np.linalg.svd(mapped, compute_uv=False).sum()
    else:
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(mapped.T @ mapped), 0)).sum()
    spread = (centred**2).sum() + np.trace(reference.covariance)
    return float(max(((mean - reference.mean) ** 2).sum() + spread - 2 * cross, 0.0))


class KernelReference:
    """A set that others' MMD is measured to; its own part of equation (2) is computed once.

    Args:
      features: ``[m, d]``.
    """

    def __init__(self, features: np.ndarray, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE):
        self.features, self.sigma, self.scale = np.asarray(features, np.float64), sigma, scale
        self._own = self._mean_kernel(self.features, self.features)

    def mmd(self, features: np.ndarray) -> float:
        """``scale`` times equation (2) between features ``[n, d]`` and the reference."""
        x = np.asarray(features, np.float64)
        return self.scale * (
            self._mean_kernel(x, x) + self._own - 2 * self._mean_kernel(x, self.features)
        )  # fmt: skip

    def _mean_kernel(self, a: np.ndarray, b: np.ndarray) -> float:
        sums = [np.exp(-rows / (2 * self.sigma**2)).sum() for rows in _squared_distances(a, b)]
        return float(np.sum(sums) / (len(a) * len(b)))


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, as CMMD wants CLIP's features."""
    x = np.asarray(features, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def radii(features: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Squared distance ``[n]`` of each row to its k-th nearest other row.

    Raises:
      UserError: there are no k others.
    """
    x = np.asarray(features, np.float64)
    if len(x) <= k:
        raise UserError(f"precision and recall with {k} neighbours need more than {k} images on each side.")
    # The nearest row is the row itself; rounding must not make it anything but 0.
    return np.concatenate([np.partition(np.maximum(rows, 0), k, axis=1)[:, k] for rows in _squared_distances(x, x)])


def coverage(points: np.ndarray, manifold: np.ndarray, squared_radii: np.ndarray) -> float:
    """Share of the points ``[n, d]`` that lie in one of the balls around ``manifold`` ``[m, d]``."""
    inside = [(np.maximum(rows, 0) <= squared_radii).any(1) for rows in _squared_distances(points, manifold)]
    return float(np.concatenate(inside).mean())


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall of features ``[n, d]`` to reference features ``[m, d]``.

    Raises:
      UserError: a set has no more than k rows.
    """
    a, b = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    return coverage(a, b, radii(b, k)), coverage(b, a, radii(a, k))


def _squared_distances(a: np.ndarray, b: np.ndarray):
    """``|a_i - b_j|^2``, some rows at a time; the mean of b is taken off first, which keeps digits."""
    centre = b.mean(0)
    a, b = np.asarray(a, np.float64) - centre, b - centre
    b_norms = (b**2).sum(1)
    for start in range(0, len(a), _CHUNK):
        rows = a[start : start + _CHUNK]
        yield (rows**2).sum(1)[:, None] + b_norms - 2 * rows @ b.T
