"""Statistics of a comparison: means, standard errors, paired differences, and how they are written.

Every model draws the same prompts from the same noise, so models are compared image by image: the
standard error of a difference is that of the mean of ``d_i = x_i - y_i``, which leaves out what
prompts and noise contribute to both.

Several images of one prompt are not independent. With N images in G prompts, and r_g the sum of the
residuals of prompt g, the prompt is the unit in (Liang and Zeger 1986)::

    se^2 = G / (G - 1) * sum_g r_g^2 / N^2                                              (1)

which is the ordinary s^2 / N where every prompt has one image. With few prompts (1) is too small on
average, so the larger of (1) and the image-wise standard error is taken (Angrist and Pischke 2009,
section 8.2).

What is no mean (a Frechet distance, an entropy) gets the delete-a-group jackknife over B blocks::

    se^2 = (B - 1) / B * sum_b (theta_(b) - mean theta_())^2                            (2)

Confidence intervals are mean +- t se, with Student's t at G - 1 (or B - 1) degrees of freedom.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BLOCKS = 20
DECISIVE = 2.0  # standard errors
LEVEL = 0.95  # of confidence intervals
_MANY = 1e9  # degrees of freedom beyond which Student's t is the normal distribution
MISSING = "–"

Statistic = Callable[[np.ndarray], float]
"""Maps indices of images to a number."""

Units = Sequence[Any] | np.ndarray
"""What is independent: a label per image."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, its standard error (nan where unknown) and the images behind it.

    Attributes:
      freedom: degrees of freedom of the standard error.
    """

    mean: float
    se: float
    n: int
    freedom: float = math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The confidence interval that holds the true value with probability ``level``; nan where unknown."""
        from scipy.special import stdtrit

        if not (math.isfinite(self.se) and self.freedom >= 1):
            return math.nan, math.nan
        t = stdtrit(min(self.freedom, _MANY), (1 + level) / 2)
        return float(self.mean - t * self.se), float(self.mean + t * self.se)


# --- estimates -----------------------------------------------------------------------------------------------------


def estimate(values: np.ndarray, units: Units | None = None) -> Estimate:
    """Mean of ``values`` ``[n]`` with its standard error.

    Verdicts (bool) that are all alike say nothing of their spread; for the standard error one success and
    one failure are then added (Laplace's rule of succession).

    Args:
      units: what is independent, ``[n]`` labels (the prompts); None: every value.
    """
    values = np.asarray(values)
    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan, 0)
    x: np.ndarray = values.astype(np.float64)
    freedom = (n if units is None else len(np.unique(np.asarray(units)))) - 1
    if values.dtype == bool and _alike(x):
        return Estimate(float(x.mean()), _laplace_error(x, (0, 1)), n, freedom)
    by_image, by_unit = _unit_error(x, np.arange(n)), math.nan if units is None else _unit_error(x, units)
    return Estimate(float(x.mean()), float(np.fmax(by_image, by_unit)), n, freedom)


def _unit_error(x: np.ndarray, units: Units) -> float:
    """Equation (1); nan with fewer than two units."""
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    residuals = np.bincount(unit, x - x.mean())
    g = len(residuals)
    return math.sqrt(g / (g - 1) * (residuals**2).sum()) / len(x) if g > 1 else math.nan


def _alike(x: np.ndarray) -> bool:
    return len(x) > 0 and bool((x == x[0]).all())


def _laplace_error(x: np.ndarray, added: tuple[float, float]) -> float:
    """Standard error of ``x`` with two more observations."""
    padded = np.concatenate([x, added])
    return float(padded.std() / math.sqrt(len(padded)))


def paired(values: np.ndarray, others: np.ndarray, units: Units | None = None) -> Estimate:
    """Mean difference ``values - others`` of measurements ``[n]`` on the same prompts and noise.

    As in `estimate`, differences of verdicts that are all alike get one gain and one loss for the standard error.
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    if np.asarray(values).dtype == bool and _alike(difference):
        freedom = (len(difference) if units is None else len(np.unique(np.asarray(units)))) - 1
        return Estimate(float(difference.mean()), _laplace_error(difference, (-1, 1)), len(difference), freedom)
    return estimate(difference, units)


def jackknife(statistic: Statistic, n: int, blocks: int = BLOCKS, together: int = 1) -> Estimate:
    """A statistic of n images with its standard error, equation (2).

    Images are dealt to the blocks in turn, so that each block has the same mix of prompts.

    Args:
      together: how many neighbours (the images of one prompt) are dealt as one.
    """
    index = np.arange(n)
    block = index // together
    blocks = min(blocks, int(block[-1]) + 1) if n else 0
    if blocks < 2:
        return Estimate(statistic(index), math.nan, n)
    left_out = np.array([statistic(index[block % blocks != b]) for b in range(blocks)])
    se = math.sqrt((blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum())
    return Estimate(statistic(index), se, n, blocks - 1)


def decide(difference: Estimate, better: int) -> str:
    """``better``, ``worse`` or ``undecided``: whether a difference exceeds two standard errors.

    Args:
      better: 1 where more is better, -1 where less is; 0 for what is neither, where the answer is
        ``higher``, ``lower`` or ``undecided``.
    """
    if not abs(difference.mean) > DECISIVE * difference.se:  # also where the standard error is unknown
        return "undecided"
    if better == 0:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if difference.mean * better > 0 else "worse"


# --- writing -------------------------------------------------------------------------------------------------------


def format_estimate(value: Estimate | None, digits: int = 3, signed: bool = False, times: float = 1.0) -> str:
    """``0.617 ± 0.031``; the standard error is left out where it is unknown, and all where the number is."""
    if value is None or not math.isfinite(value.mean):
        return MISSING
    mean = f"{times * value.mean:{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {times * value.se:.{digits}f}" if math.isfinite(value.se) else mean


def format_interval(value: Estimate | None, digits: int = 3, times: float = 1.0) -> str:
    """``[-0.012, +0.034]``, the confidence interval; `MISSING` where it is unknown."""
    low, high = (math.nan, math.nan) if value is None else value.interval()
    return f"[{times * low:+.{digits}f}, {times * high:+.{digits}f}]" if math.isfinite(low) else MISSING


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns line up as plain text too; the first column is aligned left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in (header, *rows)
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
