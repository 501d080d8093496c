"""Line charts and intervals as inline SVG, coloured by the page's CSS variables for light and dark mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from rlhf_jax.evaluation.report.html import percent, short, text

Points = Sequence[tuple[float, float]]

MOST_POINTS = 300
SMOOTHED_FROM = 24
TOP, BOTTOM, LEFT, RIGHT = 12, 34, 44, 14


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      name: in the legend.
      colour: name in the page's palette.
      points: (x, y) pairs.
      axis: "left" or "right".
      dashed: draw a dashed line.
      dots: mark the points.
    """

    name: str
    colour: str
    points: Points
    axis: str = "left"
    dashed: bool = False
    dots: bool = False

    @property
    def noisy(self) -> bool:
        """True if the curve is drawn twice: raw and faint, and smoothed."""
        return len(self.points) >= SMOOTHED_FROM and not self.dots


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Reduce to at most `most` points by averaging neighbours."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Points) -> Points:
    """Running mean over about a tenth of the curve, with a narrower window at the start, a one-sided one at the end."""
    reach = max(1, len(points) // 20)
    out = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i)
        window = points[i - near : i + near + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high] at steps of 1, 2 or 5 times a power of ten, about `most` of them at most."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    lines: Iterable[Line],
    *,
    title: str,
    x: str = "step",
    y: str = "",
    right: str = "",
    references: Sequence[tuple[str, float]] = (),
    width: int = 480,
    height: int = 270,
    legend: bool = True,
) -> str:
    """A chart of curves over steps; "" if no line has a point.

    Args:
      lines: curves.
      title: caption.
      x: label of the horizontal axis.
      y: unit of the left axis.
      right: unit of the right axis.
      references: (name, level) of horizontal lines on the left axis.
      width: in pixels.
      height: in pixels.
      legend: add a legend with the last values.
    """
    lines = [dataclasses.replace(line, points=thinned(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    axes = {axis: [line for line in lines if line.axis == axis] for axis in ("left", "right")}
    steps = [step for line in lines for step, _ in line.points]
    edge = width - (LEFT if axes["right"] else RIGHT)
    across = scale_of(steps, LEFT, edge, margin=0.0)
    floor = height - BOTTOM
    parts = []
    for at in ticks(across.low, across.high, 5 if width < 600 else 8):
        parts.append(f'<text class="tick middle" x="{across(at):.1f}" y="{floor + 16}">{_tick(at)}</text>')
    parts.append(f'<text class="tick end" x="{edge}" y="{height - 3}">{text(x)}</text>')
    up = {}
    for axis, members in axes.items():
        heights = [v for line in members for _, v in line.points]
        heights += [level for _, level in references] if axis == "left" else []
        if not heights:
            continue
        up[axis] = scale = scale_of(heights, floor, TOP + 14)
        place, css = (LEFT - 6, "tick end") if axis == "left" else (edge + 6, "tick")
        for at in ticks(scale.low, scale.high, 5):
            if axis == "left" or not axes["left"]:
                parts.append(f'<path class="grid" d="M{LEFT} {scale(at):.1f}H{edge}"/>')
            parts.append(f'<text class="{css}" x="{place}" y="{scale(at) + 3.5:.1f}">{_tick(at)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{edge}"/>')
    parts.append(f'<text class="tick" x="4" y="{TOP}">{text(y)}</text>')
    if axes["right"]:
        parts.append(f'<text class="tick end" x="{width - 4}" y="{TOP}">{text(right)}</text>')
    for _, level in references:
        parts.append(f'<path class="reference" d="M{LEFT} {up["left"](level):.1f}H{edge}"/>')
    for line in lines:
        parts.append(_curve(line, across, up[line.axis]))
    told = "; ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    told += "".join(f"; {name} {short(round(level, 3))}" for name, level in references)
    caption = f"<figcaption><b>{text(title)}</b>{_legend(lines, references) if legend else ''}</figcaption>"
    return f"<figure>{caption}{_picture(width, height, f'{title}: {told}', parts)}</figure>"


def interval_chart(rows: Iterable[tuple[str, str, float, tuple[float, float] | None]], *, width: int = 480) -> str:
    """A chart of shares with their intervals on an axis from 0 to 1, with a line at 0.5; "" without rows.

    Args:
      rows: (name, colour, share, (low, high) of its 95% interval or None).
      width: in pixels.
    """
    rows = list(rows)
    if not rows:
        return ""
    pitch = 70
    floor = pitch * len(rows) - 8
    across = Scale(0.0, 1.0, 8, width - 8)
    parts = []
    for at, css in ((0.0, ""), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        name = "even" if at == 0.5 else f"{at:.0%}"
        parts.append(f'<text class="tick {css}" x="{across(at):.1f}" y="{floor + 16}">{name}</text>')
    told = []
    for i, (name, colour, share, interval) in enumerate(rows):
        y = pitch * i + 44
        for at in (0, 0.25, 0.75, 1):
            parts.append(f'<path class="grid" d="M{across(at):.1f} {y - 16}v32"/>')
        parts.append(f'<path class="axis" d="M{across(0):.1f} {y}H{across(1):.1f}"/>')
        parts.append(f'<path class="reference" d="M{across(0.5):.1f} {y - 16}v32"/>')
        figure = percent(share)
        if interval:
            low, high = across(interval[0]), across(interval[1])
            figure += f" ({percent(interval[0])} to {percent(interval[1])})"
            drawn = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 6}v12M{high:.1f} {y - 6}v12"
            parts.append(f'<path class="whisker c-{colour}" d="{drawn}"/>')
        parts.append(f'<circle class="dot c-{colour}" cx="{across(share):.1f}" cy="{y}" r="6"/>')
        parts.append(f'<text class="name" x="8" y="{y - 26}">{text(name)}</text>')
        parts.append(f'<text class="name end strong" x="{width - 8}" y="{y - 26}">{figure}</text>')
        told.append(f"{name}: {figure}")
    label = "Win rates with 95% intervals. " + "; ".join(told)
    return f"<figure>{_picture(width, floor + 22, label, parts)}</figure>"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Linear map from [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _picture(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'


def scale_of(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """The scale of an axis from `start` to `end` in pixels, with a margin on both sides as a share of the range."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    if high == low:
        margin = 0.5
    return Scale(low - margin * spread, high + margin * spread, start, end)


def _tick(value: float) -> str:
    return short(round(value, 10)).replace("-", "\N{MINUS SIGN}")


def _curve(line: Line, across: Scale, up: Scale) -> str:
    def path(points: Points) -> str:
        return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)

    css = f"line c-{line.colour}" + (" dashed" if line.dashed else "")
    out = f'<path class="{css}" d="{path(smoothed(line.points) if line.noisy else line.points)}"/>'
    if line.noisy:
        out = f'<path class="{css} faint" d="{path(line.points)}"/>' + out
    if line.dots or len(line.points) == 1:
        out += "".join(
            f'<circle class="dot c-{line.colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in line.points
        )
    return out


def _legend(lines: Sequence[Line], references: Sequence[tuple[str, float]]) -> str:
    items = []
    for line in lines:
        css = f"c-{line.colour}" + (" dashed" if line.dashed else "")
        items.append((css, line.name, (smoothed(line.points) if line.noisy else line.points)[-1][1]))
    # Reference levels are named in the legend, since labels next to their lines would overlap curves.
    items += [("level", name, round(level, 3)) for name, level in references]
    parts = []
    for css, name, value in items:
        parts.append(f'<li><i class="swatch {css}"></i>{text(name)} <span class="last">{short(value)}</span></li>')
    return f'<ul class="legend">{"".join(parts)}</ul>'
