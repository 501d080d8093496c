"""Inputs of a run: data ledger, time and speed, settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.evaluation.report.curves import Rows, points
from rlhf_jax.evaluation.report.html import (
    STAGES,
    Figures,
    details,
    duration,
    number,
    percent,
    section,
    short,
    table,
    text,
)

MOST_SOURCES = 25
MOST_REASONS = 40


def ledgers(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Section of the rows kept, cut, dropped and held out in each stage, by source and by reason."""
    totals, reasons, sources = [], [], []
    for stage, ledger in found.items():
        files = _mapping(ledger.get("files"))
        names = ("kept", "cut", "dropped", "held_out")
        counts = {name: sum(_count(_mapping(c), name) for c in files.values()) for name in names}
        total, tokens, books = (_count(ledger, name) for name in ("total", "tokens", "books"))
        if total:
            row = (f"{count:,.0f}" for count in (total, *counts.values(), tokens))
            totals.append((STAGES[stage], *row, short(float(f"{books:.2g}"))))
        for what, by_reason in _mapping(ledger.get("reasons")).items():
            reasons += [(_count({"n": n}, "n"), STAGES[stage], what, why) for why, n in _mapping(by_reason).items()]
        if len(files) > 1:
            sources.append(_sources(STAGES[stage], files))
    reasons.sort(key=lambda reason: -reason[0])
    why = [(stage, text(what), text(reason), f"{rows:,.0f}") for rows, stage, what, reason in reasons[:MOST_REASONS]]
    return section(
        "ledger",
        "Data ledger",
        table("Rows and tokens", ("Stage", "Rows", "Kept", "Cut", "Dropped", "Held out", "Tokens", "Books"), totals),
        table("Reasons for rows cut, dropped, held out or noted", ("Stage", "What", "Reason", "Rows"), why, words=3),
        details("Rows by source", "".join(sources)),
        lead="Every row of data is kept, cut, dropped or held out for a recorded reason. A book is 67,000 tokens.",
    )


def _sources(stage: str, files: Mapping[str, Any]) -> str:
    names = ("kept", "cut", "dropped", "held_out", "tokens")
    order = sorted(files, key=lambda file: -_count(_mapping(files[file]), "tokens"))
    rows = []
    for file in order[:MOST_SOURCES]:
        rows.append((text(file), *(f"{_count(_mapping(files[file]), name):,.0f}" for name in names)))
    if len(order) > MOST_SOURCES:
        rest = order[MOST_SOURCES:]
        sums = (sum(_count(_mapping(files[file]), name) for file in rest) for name in names)
        rows.append((f"{len(rest):,} more", *(f"{count:,.0f}" for count in sums)))
    return table(stage, ("Source", "Kept", "Cut", "Dropped", "Held out", "Tokens"), rows)


def time(figures: Figures, metrics: Mapping[str, Rows]) -> str:
    """Section of the time of each stage as bars, with its speed."""
    spent = {str(stage): number(s) for stage, s in _mapping(figures.value("stage_seconds")).items()}
    seconds = {stage: s for stage, s in spent.items() if s is not None}
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = []
    for stage, value in seconds.items():
        bar = f'<span class="bar" style="width:{100 * value / longest:.1f}%"></span>'
        speed, peak = (_median(metrics.get(stage, ()), name) for name in ("tokens_per_second", "peak_share"))
        rows.append(
            (
                text(STAGES.get(stage, stage.replace("_", " ").capitalize())),
                f'<span class="track" aria-hidden="true">{bar}</span><span class="time">{duration(value)}</span>',
                f"{speed:,.0f}" if speed is not None else "–",
                percent(peak) if peak is not None else "–",
            )
        )
    whole = figures.number("wall_seconds")
    return section(
        "time",
        "Time and speed",
        table("Time and speed by stage", ("Stage", "Time", "Tokens per second", "Share of peak"), rows, hidden=True),
        lead=(f"{duration(whole)} in all. " if whole is not None else "")
        + "Speeds are medians; the peak is the measured peak of matrix products on this machine.",
    )


def settings(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Section of all settings of every stage, folded."""
    parts = []
    for stage, config in configs.items():
        rows = [(f"<code>{text(key)}</code>", f"<code>{text(value)}</code>") for key, value in flat(config)]
        listed = table(STAGES[stage], ("Setting", "Value"), rows, words=2, hidden=True)
        parts.append(details(STAGES[stage], listed))
    return section("settings", "Settings", *parts, lead="From each stage’s config.json.")


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of nested settings."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            shown = "–" if value in (None, "", [], {}) else str(value)
            # 12 of a fingerprint's 64 characters suffice to tell it from any other.
            yield f"{prefix}{key}", f"{shown[:12]}…" if len(shown) == 64 and shown.isalnum() else shown


def _median(rows: Rows, name: str) -> float | None:
    values = [value for _, value in points(rows, name)]
    return statistics.median(values) if values else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(counts: Mapping[str, Any], name: str) -> float:
    count = number(counts.get(name))
    return count if count is not None else 0.0
