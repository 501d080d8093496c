"""Pictures of experiments as SVG files that stand alone: shares as stacked bars, and curves with error bars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from rlhf_jax.evaluation.intervals import Estimate
from rlhf_jax.evaluation.report.charts import scale_of, ticks
from rlhf_jax.evaluation.report.html import short, text

INK, GREY, FAINT = "#26303b", "#5b6470", "#e3e7ec"
PALETTE = ("#1b6ca8", "#c2571a", "#2b7a4b", "#8a4fa3", "#b8860b", "#566573", "#c0392b", "#138d90", "#7b8b2a")


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of a panel.

    Attributes:
      name: in the legend.
      points: (x, y) pairs.
      spreads: (low, high) of each point, on the y axis; () for none.
      dots: mark the points.
      dashed: draw a dashed line.
      colour: number in the palette.
    """

    name: str
    points: Sequence[tuple[float, float]]
    spreads: Sequence[tuple[float, float]] = ()
    dots: bool = True
    dashed: bool = False
    colour: int = 0

    @classmethod
    def of(cls, name: str, places: Iterable[tuple[float, Estimate]], **drawn: Any) -> Self:
        """Estimates, each at its x, with their intervals."""
        found = list(places)
        points, spreads = [(x, one.value) for x, one in found], [(one.low, one.high) for _, one in found]
        return cls(name, points, spreads, **drawn)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes of their own with one or more series.

    Attributes:
      title: above it.
      x: label of the horizontal axis.
      series: the curves.
    """

    title: str
    x: str
    series: Sequence[Series]


def shares(title: str, panels: Sequence[str], rows: Mapping[str, Sequence[Sequence[Estimate]]]) -> str:
    """Bars of right, abstained and made-up shares, one row per arm and one panel per kind of question.

    Args:
      title: of the picture.
      panels: their titles.
      rows: name of the arm -> for each panel (right, abstained, made up); () leaves the panel empty.
    """
    left, wide, gap, pitch, top = 300, 270, 52, 34, 74
    width, height = left + len(panels) * (wide + gap), top + pitch * len(rows) + 34
    kinds = (("right", "#2b7a4b"), ("abstained", "#cfd5dc"), ("made up", "#c0392b"))
    parts = []
    for place, (name, colour) in enumerate(kinds):
        x = left + 92 * place
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 17, 44, name))
    for number, panel in enumerate(panels):
        start = left + number * (wide + gap)
        parts.append(_text(start, top - 8, panel, weight="bold"))
        for at in (0.0, 0.25, 0.5, 0.75, 1.0):
            mark = start + wide * at
            parts.append(f'<path d="M{mark:.1f} {top}V{height - 30}" stroke="{FAINT}"/>')
            parts.append(_text(mark, height - 14, f"{at:.0%}", anchor="middle", colour=GREY))
        for row, (name, found) in enumerate(rows.items()):
            y = top + pitch * row + 5
            if number == 0:
                parts.append(_text(left - 10, y + 16, name, anchor="end"))
            if not found[number]:
                continue
            edge = float(start)
            for estimate, (_, colour) in zip(found[number], kinds, strict=True):
                length = wide * estimate.value
                parts.append(f'<rect x="{edge:.1f}" y="{y}" width="{length:.1f}" height="22" fill="{colour}"/>')
                edge += length
            right, _, made_up = found[number]
            parts.append(_whisker(start + wide * right.low, start + wide * right.high, y + 7))
            parts.append(_whisker(start + wide * (1 - made_up.high), start + wide * (1 - made_up.low), y + 15))
    return _svg(width, height, title, parts)


def curves(title: str, panels: Sequence[Panel], *, wide: int = 420, high: int = 300) -> str:
    """Panels side by side, each with its legend below.

    Args:
      title: of the picture.
      panels: the panels; those without a point are left out.
      wide: width of a panel.
      high: height of its axes.
    """
    panels = [panel for panel in panels if any(series.points for series in panel.series)]
    legend = 18 * max((len(panel.series) for panel in panels), default=0)
    height = 56 + high + 44 + legend
    parts = [part for i, panel in enumerate(panels) for part in _panel(panel, 56 + i * (wide + 60), 56, wide, high)]
    return _svg(len(panels) * (wide + 60) + 10, height, title, parts)


def _panel(panel: Panel, left: float, top: float, wide: float, high: float) -> list[str]:
    xs = [x for series in panel.series for x, _ in series.points]
    ys = [y for series in panel.series for _, y in series.points]
    ys += [end for series in panel.series for pair in series.spreads for end in pair if math.isfinite(end)]
    across = scale_of(xs, left, left + wide, margin=0.0)
    up = scale_of(ys, top + high, top, margin=0.05)
    parts = [_text(left, top - 10, panel.title, weight="bold")]
    for at in ticks(up.low, up.high):
        parts.append(f'<path d="M{left:.1f} {up(at):.1f}h{wide}" stroke="{FAINT}"/>')
        parts.append(_text(left - 6, up(at) + 4, short(round(at, 10)), anchor="end", colour=GREY))
    for at in ticks(across.low, across.high):
        parts.append(_text(across(at), top + high + 17, short(round(at, 10)), anchor="middle", colour=GREY))
    parts.append(_text(left + wide, top + high + 34, panel.x, anchor="end", colour=GREY))
    for row, series in enumerate(panel.series):
        colour = PALETTE[series.colour % len(PALETTE)]
        points = [(across(x), up(y)) for x, y in series.points]
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        if points:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for (x, _), (low, upper) in zip(points, series.spreads, strict=False):
            if math.isfinite(low):
                parts.append(f'<path d="M{x:.1f} {up(low):.1f}V{up(upper):.1f}" stroke="{colour}"/>')
        if series.dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>' for x, y in points]
        y = top + high + 52 + 18 * row
        parts.append(f'<path d="M{left} {y - 4}h18" stroke="{colour}" stroke-width="3"{dash}/>')
        parts.append(_text(left + 24, y, series.name))
    return parts


def _whisker(low: float, high: float, y: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    drawn = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 3}v6M{high:.1f} {y - 3}v6"
    return f'<path d="{drawn}" stroke="{INK}" fill="none"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "", colour: str = INK) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{bold}>{text(words)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="13">\n<title>{text(title)}</title>\n'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>\n'
        f"{_text(10, 20, title, weight='bold')}\n{body}\n</svg>\n"
    )
