"""Grouped bars as inline SVG: means with their standard errors."""

import math
from collections.abc import Callable, Sequence
from html import escape

from dmdr_jax.evaluation.curves import HEIGHT, LEFT, RIGHT, TOP, ticks

BOTTOM = 34
BAR, GAP = 14, 16  # widths
COLORS = 8  # that the style sheet has
LABEL = 9  # pixels a letter of a label takes, about
MOST_LETTERS = 14

Bar = tuple[float, float] | None
"""Mean and standard error, or nothing."""


def bar_chart(groups: Sequence[str], series: Sequence[Sequence[Bar]], label: str) -> str:
    """An SVG with a bar for each series in each group, from 0 (or the lowest value) up, whiskers of one error.

    Args:
      groups: names below the bars.
      series: ``[models][groups]``.
      label: what is shown, for those who cannot see it.
    """
    names = [name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…" for name in groups]
    step = max(BAR * len(series) + GAP, *(LABEL * len(name) * 0.8 for name in names))
    width = LEFT + RIGHT + step * len(groups)
    low, high = _span([bar for bars in series for bar in bars if bar])

    def place(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {width:.0f} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in ticks(low, high, 6):
        y = place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for g, name in enumerate(names):
        middle = LEFT + step * (g + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(name)}</text>')
        left = middle - BAR * len(series) / 2
        parts += [_bar(left + BAR * i, i, bars[g], place, max(low, 0.0)) for i, bars in enumerate(series)]
    return "".join([*parts, "</svg>"])


def _bar(x: float, i: int, bar: Bar, place: Callable[[float], float], base: float) -> str:
    if bar is None:
        return ""
    mean, se = bar
    top, bottom = sorted((place(mean), place(base)))
    drawn = (
        f'<rect class="bar b{i % COLORS}" x="{x + 1:.1f}" y="{top:.1f}" width="{BAR - 2}" height="{bottom - top:.1f}"/>'
    )
    if not math.isfinite(se):
        return drawn
    middle, ends = x + BAR / 2, (place(mean - se), place(mean + se))
    line = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"'
    return f'{drawn}<line class="whisker" {line}/>'


def _span(bars: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """From 0 or below it to above the highest whisker; where all is far from 0, from below the lowest."""
    errors = [se if math.isfinite(se) else 0.0 for _, se in bars]
    low = min((mean - se for (mean, _), se in zip(bars, errors)), default=0.0)
    high = max((mean + se for (mean, _), se in zip(bars, errors)), default=1.0)
    low = low - 0.1 * (high - low) if low > 0.7 * high > 0 else min(low, 0.0)
    return (low, high) if high > low else (low, low + 1.0)
