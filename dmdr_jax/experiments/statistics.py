"""Means over training seeds and prompts, and what they are worth.

Every trained row has S seeds, and all are asked the same n images in G prompts: seeds and prompts are crossed. For
``x[s, i]`` (a measure, or the difference of two rows on the same seed, prompt and noise) the variance of the grand
mean under random effects of seeds, of prompts and of both together is (Scheffe 1959, chapter 7)::

    V = V_seeds + V_prompts - V_both                                                               (1)

* V_seeds: the sample variance of the S means, over S;
* V_prompts: of the means over seeds, by `dmdr_jax.evaluation.table.estimate`, prompts being the unit;
* V_both: the residuals ``x[s, i] - x[s] - x[i] + x`` summed by (seed, prompt), squared, over n^2 S^2, times
  S G / ((S - 1) (G - 1)): what both of the others contain.

Where each prompt has one image these are mean squares: V = (MS_seeds + MS_prompts - MS_both) / (S n). V is at least
the larger of V_seeds and V_prompts. Its degrees of freedom are Satterthwaite's, so that three seeds that disagree give
a wide confidence interval. With one seed, or where nothing is trained, only V_prompts is known.

Distribution measures (a Frechet distance, an entropy) are no means over images: `over_seeds` adds to V_seeds the mean
of the squared jackknife errors, as if the images erred alike in all seeds, which is cautious.
"""

import math
from collections.abc import Sequence

import numpy as np

from dmdr_jax.evaluation.table import Estimate, Units, estimate


def crossed(values: np.ndarray, units: Units) -> Estimate:
    """The grand mean of ``values`` ``[S, n]`` with its standard error, equation (1).

    Args:
      units: ``[n]`` labels: images of the same prompt.
    """
    values = np.atleast_2d(values)
    seeds, n = values.shape
    if seeds == 1 or n == 0 or (values == values.flat[0]).all():
        return estimate(values[0], units)  # knows what to say of verdicts that are all alike
    x = values.astype(np.float64)
    over_prompts = estimate(x.mean(0), units)
    v_seeds, v_prompts = x.mean(1).var(ddof=1) / seeds, over_prompts.se**2
    groups = len(np.unique(np.asarray(units)))
    v_both = _both(x, units) if groups > 1 else 0.0
    variance = max(v_seeds + v_prompts - v_both, v_seeds, v_prompts)
    freedom = _satterthwaite(
        variance, [(v_seeds, seeds - 1), (v_prompts, groups - 1), (v_both, (seeds - 1) * (groups - 1))]
    )
    return Estimate(float(x.mean()), math.sqrt(variance), n, freedom)


def _both(x: np.ndarray, units: Units) -> float:
    """V_both."""
    seeds, n = x.shape
    residuals = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    sums = np.stack([np.bincount(unit, row) for row in residuals])
    groups = sums.shape[1]
    return float((sums**2).sum() / (seeds * n) ** 2 * seeds * groups / ((seeds - 1) * (groups - 1)))


def _satterthwaite(variance: float, parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of mean squares with (value, degrees of freedom) each."""
    below = sum(value**2 / freedom for value, freedom in parts if freedom > 0)
    least = min(freedom for _, freedom in parts if freedom > 0)
    return max(float(least), variance**2 / below) if below > 0 else float(least)


def over_seeds(numbers: Sequence[float], errors: Sequence[float], n: int) -> Estimate:
    """The mean of one number per seed, each with the standard error that its images give it."""
    x, within = np.array(numbers, np.float64), np.array(errors, np.float64)
    from_images = float(np.mean(within**2))
    if len(x) == 1:
        return Estimate(float(x[0]), math.sqrt(from_images), n)
    return Estimate(float(x.mean()), math.sqrt(x.var(ddof=1) / len(x) + from_images), n)


def decided(difference: Estimate) -> int:
    """1 or -1 where the 95 % confidence interval is above or below 0, else 0."""
    low, high = difference.interval()
    return 1 if low > 0 else -1 if high < 0 else 0
