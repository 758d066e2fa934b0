"""Line charts as inline SVG: nothing to load, sharp at any size."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 30  # margins around the plot
MAX_POINTS = 400
SMOOTHING = 1 / 20  # of the run, averaged for the bold line


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: ``values[i]`` at ``steps[i]``."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def series_of(rows: Sequence[Mapping[str, float | None]], names: Mapping[str, str]) -> list[Series]:
    """The metrics ``names`` (key to display name) out of the lines of metrics.jsonl; absent ones are left out."""
    found = []
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            steps, values = zip(*points)
            found.append(Series(name, np.array(steps, np.float64), np.array(values, np.float64)))
    return found


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over `SMOOTHING` of the values; the window is cut off at the ends."""
    half = int(len(values) * SMOOTHING / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def thin(series: Series) -> Series:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    parts = min(len(series.steps), MAX_POINTS)
    chunks = np.array_split(np.arange(len(series.steps)), parts)
    steps, values = (np.array([column[c].mean() for c in chunks]) for column in (series.steps, series.values))
    return Series(series.name, steps, values)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most ``count`` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    raw = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def line_chart(series: Sequence[Series], label: str, last: float, mark: tuple[float, str] | None = None) -> str:
    """An SVG of the curves over generator steps: each faint as measured, bold smoothed.

    Args:
      label: what is shown, for those who cannot see it.
      last: the step at which the axis, which begins at 0, ends.
      mark: a step and what begins there, drawn as a dashed line.
    """
    curves = [thin(s) for s in series]
    x0, x1 = 0.0, float(max(last, 1))
    y0, y1 = _span(np.concatenate([curve.values for curve in curves]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in ticks(y0, y1, 6):
        y = place(x0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x0, x1, 6):
        parts.append(f'<text x="{place(value, y0)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:g}</text>')
    if mark is not None and x0 <= mark[0] <= x1:
        parts.append(_mark(place(mark[0], y0)[0], mark[1]))
    for i, curve in enumerate(curves):
        raw = [place(x, y) for x, y in zip(curve.steps, curve.values)]
        bold = [place(x, y) for x, y in zip(curve.steps, smooth(curve.values))]
        parts.append(f'<path class="raw s{i % 8}" d="{_path(raw)}"/><path class="line s{i % 8}" d="{_path(bold)}"/>')
        if len(raw) == 1:
            parts.append(f'<circle class="dot s{i % 8}" cx="{raw[0][0]:.1f}" cy="{raw[0][1]:.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def _span(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value with a little air; never empty."""
    low, high = float(values.min()), float(values.max())
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def _mark(x: float, text: str) -> str:
    near_end = x > WIDTH - RIGHT - 120
    anchor, shift = ("end", -5) if near_end else ("start", 5)
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return f'{line}<text class="mark" x="{x + shift:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
