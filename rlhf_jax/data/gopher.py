"""Extraction of dialogues from web text by Gopher's heuristic.

Source: Rae et al. 2021, appendix on dialogue data (arXiv:2112.11446).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.data.dialogues import Message

MIN_TURNS = 6
MAX_PREFIX = 48  # characters; longer ones are sentences, not names

# Separators that end a prefix, most reliable first: "Gopher:", "Dr Smith -", "Q.". The colon in "12:30" or "http://"
# does not count.
_SEPARATORS = (re.compile(r":(?![/\d])"), re.compile(r"\s[-–—](?=\s|$)"), re.compile(r"\.(?=\s|$)"))


class Turn(NamedTuple):
    """One paragraph of a dialogue. speaker: its prefix without the separator. text: the rest, stripped."""

    speaker: str
    text: str


class _Run(NamedTuple):
    """A dialogue with its character range in the document."""

    start: int
    end: int
    turns: list[Turn]


class _Paragraph(NamedTuple):
    """A paragraph, stripped, with the offset of its first character in the document."""

    start: int
    text: str


def extract_dialogues(text: str) -> list[list[Turn]]:
    """Extracts all runs of at least 6 consecutive paragraphs in which two speakers alternate, in text order.

    Every paragraph of a run has a prefix that ends in a separator, as in "Gopher: …", "Dr Smith - …", "Q. …"; the even
    ones share one prefix, the odd ones another. Paragraphs are separated by blank lines, or are single lines; where the
    two readings overlap, the longer run is kept.
    """
    runs = [*_runs(_paragraphs(text, r"\n[^\S\n]*\n")), *_runs(_paragraphs(text, r"\n"))]
    taken: list[_Run] = []  # in text order, without overlaps
    for run in sorted(runs, key=lambda run: -len(run.turns)):  # stable sort: among equals, the blank-line reading wins
        place = bisect.bisect(taken, run.start, key=lambda other: other.start)
        if (place == 0 or taken[place - 1].end <= run.start) and (place == len(taken) or run.end <= taken[place].start):
            taken.insert(place, run)
    return [run.turns for run in taken]


def as_messages(dialogue: Sequence[tuple[str, str]]) -> list[Message]:
    """Converts a dialogue to messages, with its first speaker as the user and the second as the assistant."""
    return [Message("assistant" if place % 2 else "user", text) for place, (_, text) in enumerate(dialogue)]


def _paragraphs(text: str, boundary: str) -> list[_Paragraph]:
    found, start = [], 0
    for end, following in [*(match.span() for match in re.finditer(boundary, text)), (len(text), len(text))]:
        block = text[start:end]
        if block.strip():
            found.append(_Paragraph(start + len(block) - len(block.lstrip()), block.strip()))
        start = following
    return found


def _runs(paragraphs: Sequence[_Paragraph]) -> Iterator[_Run]:
    """Yields the maximal runs, left to right, without overlaps."""
    prefixes = [_prefixes(paragraph.text) for paragraph in paragraphs]
    first = 0
    while first + MIN_TURNS <= len(paragraphs):
        shared = [prefixes[first], prefixes[first + 1]]  # candidate prefixes of the even and of the odd paragraphs
        end = first + 2
        while _differ(shared) and end < len(paragraphs):
            parity = (end - first) % 2
            common = [prefix for prefix in shared[parity] if prefix in prefixes[end]]
            if not common:
                break
            shared[parity] = common
            end += 1
        if end - first < MIN_TURNS or not _differ(shared):
            first += 1
            continue
        names = [shared[0][0], shared[1][0]]
        turns = [_turn(paragraphs[place].text, names[(place - first) % 2]) for place in range(first, end)]
        yield _Run(paragraphs[first].start, paragraphs[end - 1].start + len(paragraphs[end - 1].text), turns)
        first = end


def _prefixes(text: str) -> list[str]:
    """Candidate prefixes of a paragraph, most likely first."""
    head = text.partition("\n")[0][: MAX_PREFIX + 2]
    ends = [match.end() for separator in _SEPARATORS for match in separator.finditer(head)]
    return [head[:end] for end in ends if end <= MAX_PREFIX and any(map(str.isalpha, head[:end]))]


def _differ(shared: Sequence[Sequence[str]]) -> bool:
    return bool(shared[0]) and bool(shared[1]) and shared[0][0] != shared[1][0]


def _turn(text: str, prefix: str) -> Turn:
    return Turn(prefix.rstrip(":.-–— \t"), text.removeprefix(prefix).strip())
