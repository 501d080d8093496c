"""Building blocks of the page: escaped text, formatted numbers, tables, and a run's figures by dotted key."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = {
    "pretrain": "Pretrain",
    "sft": "SFT",
    "reward": "Reward",
    "ppo": "PPO",
    "preference": "Preference",
}


def text(value: object) -> str:
    """Escape a value for HTML; unprintable characters become �."""
    whole = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join(c if c.isprintable() or c in "\n " else "\N{REPLACEMENT CHARACTER}" for c in whole))


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal: 81.6%."""
    return f"{100 * share:.1f}%"


def short(value: float) -> str:
    """Format a number in about four characters: 1,234 or 0.05 or 3.2e-7."""
    if value == 0 or (value.is_integer() and abs(value) < 1e9):
        return f"{value:,.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as 7 min 32 s, or 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Figures:
    """Values of summary.json by dotted key, flat or nested; None for a missing value or one of the wrong type."""

    def __init__(self, summary: Mapping[str, Any]) -> None:
        self._summary = summary

    def value(self, key: str) -> Any:
        if key in self._summary:
            return self._summary[key]
        value: Any = self._summary
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def number(self, key: str) -> float | None:
        return number(self.value(key))

    def interval(self, key: str) -> tuple[float, float] | None:
        pair = self.value(key)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return None
        low, high = number(pair[0]), number(pair[1])
        return None if low is None or high is None else (low, high)

    def shown(self, key: str, form: str = "{:.2f}") -> str | None:
        """The number as text, or None; "%" formats a percentage."""
        value = self.number(key)
        if value is None:
            return None
        return percent(value) if form == "%" else form.format(value)


Cell = str | tuple[str, str]


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, hidden: bool = False
) -> str:
    """A table of HTML cells, with the first cell of each row as its header.

    Args:
      caption: of the table.
      head: column headers.
      rows: cells, already escaped.
      words: number of leading text columns; the others are numeric and right-aligned.
      hidden: show the caption to screen readers only.
    """
    css = [""] * words + [' class="n"'] * (len(head) - words)
    body = ""
    for row in rows:
        cells = "".join(f"<td{css[i]}>{row[i]}</td>" for i in range(1, len(row)))
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    if not body:
        return ""
    columns = "".join(f'<th scope="col"{mark}>{name}</th>' for name, mark in zip(head, css, strict=True))
    mark = ' class="hidden"' if hidden else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption{mark}>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def side_by_side(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table of texts in columns of equal width, which becomes a list on a narrow screen; "" without rows.

    Args:
      caption: for screen readers.
      head: column headers.
      rows: cells; the first of a row is its header. A cell is HTML, or (HTML, class of the cell).
    """
    body = ""
    for row in rows:
        cells = f'<th scope="row" role="rowheader">{row[0]}</th>'
        for name, cell in zip(head[1:], row[1:], strict=True):
            content, css = (cell, "") if isinstance(cell, str) else cell
            mark = f' class="{css}"' if css else ""
            cells += f'<td role="cell"{mark} data-label="{name}">{content}</td>'
        body += f'<tr role="row">{cells}</tr>'
    if not body:
        return ""
    columns = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in head)
    return (
        f'<table class="answers" role="table"><caption class="hidden">{caption}</caption>'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def answer(value: object, score: float | None = None, *, name: str = "score", best: bool = False) -> str:
    """The HTML of an answer, with its score under it.

    Args:
      value: its text.
      score: of the answer, None for none.
      name: of the score, for screen readers.
      best: mark it as the highest of its row.
    """
    shown = text(value).strip() or '<i class="none">nothing</i>'
    if score is None:
        return shown
    star = '<span title="highest of the row">★</span> ' if best else ""
    signed = f"{score:.2f}".replace("-", "\N{MINUS SIGN}")
    css = "gold best" if best else "gold"
    return f'{shown}<span class="{css}">{star}<span class="hidden">{name} </span>{signed}</span>'


def section(name: str, title: str, *parts: str, lead: str = "") -> str:
    """A section of the page with a heading; "" if all its parts are empty."""
    content = "".join(parts)
    if not content:
        return ""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{lead}{content}</section>'


def details(summary: str, content: str) -> str:
    """Folded content; "" without content."""
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def page(title: str, body: str) -> str:
    """A self-contained page, from an escaped title and HTML."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    # The policy guarantees that a browser neither loads nor runs anything for this page.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>\n{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
