"""Charts as SVG files: bars, curves and clouds of points with error bars, side by side in panels.

A file needs nothing beside itself, is sharp at any size, follows the reader's light or dark setting, and is the same
byte for byte for the same numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from dmdr_jax.evaluation.curves import ticks

WIDTH, HEIGHT = 380, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42
BAR, BAR_LEFT, LETTER = 24, 20, 7.1  # pixels: of a bar, beside its names, of a letter
KEY_LINE, NAME_HEIGHT = 17, 13
NAMES = 6  # beside points; where there are more, numbers stand there and the names below
COLORS = ("#0f6f78", "#c4622d", "#6b55b8", "#7d8b2f", "#b3376b", "#3c6fc4", "#8a6d3b", "#4d4d4d")

STYLE = """
 .paper{fill:#fff} text{font:12px system-ui,sans-serif;fill:#545d66} .title{font-weight:600;fill:#1d2329}
 .grid{stroke:#e2e0d9} .axis{stroke:#9aa1a8} .whisker{stroke:#1d2329;stroke-width:1.2} .seed{fill:#1d2329;opacity:.5}
 .line{fill:none;stroke-width:2} .band{opacity:.16} .ring{fill:none;stroke-width:1.5}
 .level{stroke:#545d66;stroke-width:1.2;stroke-dasharray:5 4}
 @media(prefers-color-scheme:dark){.paper{fill:#14181b} text{fill:#a5aeb5} .title{fill:#e6e8e6} .grid{stroke:#313a40}
 .axis{stroke:#6d767d} .whisker{stroke:#e6e8e6} .seed{fill:#e6e8e6} .level{stroke:#a5aeb5}}
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A number with its standard error, and what each seed gave."""

    name: str
    value: float
    error: float = math.nan
    seeds: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Point:
    """A number at a place, with its standard error; ``name`` is written beside it where it is not empty."""

    x: float
    y: float
    error: float = math.nan
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
    """Points that belong together; joined by a line or not."""

    name: str
    points: tuple[Point, ...]
    joined: bool = True


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its elements in its own coordinates."""

    width: float
    height: float
    elements: tuple[str, ...]


def write_svg(panels: Sequence[Panel], label: str, columns: int = 2) -> str:
    """The panels in rows of ``columns``, as the text of a file."""
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(sum(panel.width for panel in row) for row in rows)
    parts, top = [], 0.0
    for row in rows:
        left = 0.0
        for panel in row:
            parts.append(f'<g transform="translate({_n(left)} {_n(top)})">{"".join(panel.elements)}</g>')
            left += panel.width
        top += max(panel.height for panel in row)
    size = f'viewBox="0 0 {_n(width)} {_n(top)}" width="{_n(width)}" height="{_n(top)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
    return "\n".join(
        [head, f"<style>{STYLE}</style>", '<rect class="paper" width="100%" height="100%"/>', *parts, "</svg>\n"]
    )


# --- bars ----------------------------------------------------------------------------------------------------------


def bar_panel(title: str, bars: Sequence[Bar]) -> Panel:
    """Horizontal bars from 0, whiskers of one standard error, a dot for each seed."""
    left = BAR_LEFT + LETTER * max(len(bar.name) for bar in bars)
    right = left + WIDTH - LEFT - RIGHT
    ends = [v for bar in bars for v in (bar.value + _finite(bar.error), bar.value - _finite(bar.error), *bar.seeds)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    high = high if high > low else 1.0
    height = TOP + BAR * len(bars)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [_text(left, 16, title, "title")]
    for tick in ticks(low, high, 5):
        parts.append(_line("grid", x(tick), TOP - 4, x(tick), height))
        parts.append(_text(x(tick), height + 16, f"{tick:g}", anchor="middle"))
    for i, bar in enumerate(bars):
        y = TOP + BAR * i
        start, end = sorted((x(0.0), x(bar.value)))
        box = f'x="{_n(start)}" y="{_n(y + 3)}" width="{_n(end - start)}" height="{BAR - 8}"'
        parts.append(f'<rect {box} rx="2" fill="{_color(i)}" opacity=".75"/>')
        parts.append(_text(left - 8, y + BAR / 2 + 3, bar.name, anchor="end"))
        middle = y + BAR / 2 - 1
        parts += [_dot("seed", x(v), middle, 2) for v in bar.seeds if len(bar.seeds) > 1]
        if math.isfinite(bar.error):
            parts.append(_line("whisker", x(bar.value - bar.error), middle, x(bar.value + bar.error), middle))
    return Panel(right + RIGHT, height + 26, tuple(parts))


# --- curves and clouds -----------------------------------------------------------------------------------------------


def xy_panel(
    title: str,
    series: Sequence[Series],
    x_name: str,
    log_x: bool = False,
    key: bool = True,
    level: tuple[str, float] | None = None,
) -> Panel:
    """Points of several series, their errors as bands (joined) or whiskers; a key below, and what many points are.

    Args:
      level: the name and value of something to compare with, a broken line all the way across.
    """
    points = [point for one in series for point in one.points]
    seen = points if level is None else [*points, Point(points[0].x, level[1])]
    place = _axes(seen, log_x)
    parts = [_text(LEFT, 16, title, "title"), *_grid(seen, place, log_x)]
    if level is not None:
        y = place(points[0].x, level[1])[1]
        parts.append(_line("level", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(WIDTH - RIGHT, y - 4 if y > TOP + 12 else y + 13, level[0], anchor="end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, anchor="middle"))
    numbers = _numbers(series)
    for i, one in enumerate(series):
        parts += _joined(one, place, _color(i)) if one.joined else _cloud(_named(one, numbers), place, _color(i))
    height: float = HEIGHT
    for name, number in numbers.items():
        parts.append(_text(LEFT + 14, height + 10, number, anchor="end"))
        parts.append(_text(LEFT + 20, height + 10, name))
        height += KEY_LINE
    if key and len(series) > 1:
        for i, one in enumerate(series):
            y = height + 12 + KEY_LINE * i
            parts.append(f'<rect x="{LEFT}" y="{y - 8}" width="14" height="4" rx="2" fill="{_color(i)}"/>')
            parts.append(_text(LEFT + 20, y - 2, one.name))
        height += KEY_LINE * len(series) + 8
    return Panel(WIDTH, height, tuple(parts))


def _numbers(series: Sequence[Series]) -> dict[str, str]:
    """What stands beside points in place of their names, where there are too many names."""
    names = [point.name for one in series if not one.joined for point in one.points if point.name]
    return {name: str(i) for i, name in enumerate(names, 1)} if len(names) > NAMES else {}


def _named(series: Series, numbers: Mapping[str, str]) -> Series:
    points = (dataclasses.replace(point, name=numbers.get(point.name, point.name)) for point in series.points)
    return dataclasses.replace(series, points=tuple(points))


Place = Callable[[float, float], tuple[float, float]]


def _axes(points: Sequence[Point], log_x: bool) -> Place:
    """From numbers to pixels; the span is that of the points with a little air."""
    xs = [math.log10(p.x) if log_x else p.x for p in points]
    ys = [v for p in points for v in (p.y - _finite(p.error), p.y + _finite(p.error))]
    (x0, x1), (y0, y1) = _span(xs), _span(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) if log_x else x) - x0
        return (
            LEFT + across / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    return place


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def _grid(points: Sequence[Point], place: Place, log_x: bool) -> list[str]:
    ys = [v for p in points for v in (p.y - _finite(p.error), p.y + _finite(p.error))]
    xs = [p.x for p in points]
    parts = []
    for tick in ticks(*_span(ys), 6):
        y = place(xs[0], tick)[1]
        parts.append(_line("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    for tick in _log_ticks(min(xs), max(xs)) if log_x else ticks(*_span(xs), 6):
        x = place(tick, ys[0])[0]
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            parts.append(_line("axis", x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4))
            parts.append(_text(x, HEIGHT - BOTTOM + 17, f"{tick:g}", anchor="middle"))
    return parts


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [f * 10.0**p for p in powers for f in factors]


def _joined(series: Series, place: Place, color: str) -> list[str]:
    """A line with a band of one standard error around it."""
    parts = []
    known = [p for p in series.points if math.isfinite(p.error)]
    if len(known) > 1:
        upper = [place(p.x, p.y + p.error) for p in known]
        lower = [place(p.x, p.y - p.error) for p in reversed(known)]
        parts.append(f'<path class="band" fill="{color}" d="{_path([*upper, *lower])}Z"/>')
    middle = [place(p.x, p.y) for p in series.points]
    parts.append(f'<path class="line" stroke="{color}" d="{_path(middle)}"/>')
    return parts + [f'<circle cx="{_n(x)}" cy="{_n(y)}" r="2.5" fill="{color}"/>' for x, y in middle]


def _cloud(series: Series, place: Place, color: str) -> list[str]:
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for p in sorted(series.points, key=lambda p: -p.y):
        x, y = place(p.x, p.y)
        if math.isfinite(p.error):
            parts.append(_line("whisker", x, place(p.x, p.y - p.error)[1], x, place(p.x, p.y + p.error)[1]))
        parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4" fill="{color}"/>')
        width = LETTER * len(p.name)
        near_end = x > WIDTH - RIGHT - width - 10
        start = x - 8 - width if near_end else x + 8
        row = _free_row(y + 4, start, start + width, taken)
        taken.append((row, start, start + width))
        parts.append(_text(x - 8 if near_end else x + 8, row, p.name, anchor="end" if near_end else "start"))
    return parts


def _free_row(y: float, start: float, end: float, taken: Sequence[tuple[float, float, float]]) -> float:
    """The first height from ``y`` down where a name from start to end covers none of those that are there."""
    for row, left, right in sorted(taken):
        if abs(row - y) < NAME_HEIGHT and left < end and start < right:
            y = row + NAME_HEIGHT
    return y


# --- elements --------------------------------------------------------------------------------------------------------


def _finite(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _n(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{named}>{escape(text)}</text>' if text else ""


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _dot(kind: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="{kind}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
