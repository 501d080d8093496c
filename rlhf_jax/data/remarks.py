"""Remarks on rows that are used and deserve a look: duplicates, contradictions, and prompts without text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rlhf_jax.data.records import Comparison, Demonstration, Ranking, Record

SAME = "the same as an earlier row"
EMPTY_PROMPT = "an empty prompt: the answer is learned as a text without a question"


class Remarks:
    """Looks at the records of a file in their order."""

    def __init__(self) -> None:
        self._seen: set[Record] = set()
        # (prompt, better, worse) -> where it was read.
        self._verdicts: dict[tuple[object, ...], str] = {}

    def of(self, record: Record) -> Iterator[str]:
        """Yields the remarks on a record."""
        if record in self._seen:
            yield SAME
        self._seen.add(record)
        if isinstance(record, Demonstration) and not record.prompt.strip():
            yield EMPTY_PROMPT
        if isinstance(record, Comparison | Ranking):
            yield from self._contradictions(record)

    def _contradictions(self, record: Comparison | Ranking) -> Iterator[str]:
        opposite = None
        for better, worse in _verdicts(record):
            opposite = opposite or self._verdicts.get((record.prompt, record.turns, worse, better))
            self._verdicts.setdefault((record.prompt, record.turns, better, worse), record.where)
        if opposite:
            yield f"the opposite of {opposite}: the same two responses the other way round"


def _verdicts(record: Comparison | Ranking) -> Iterator[tuple[object, object]]:
    """Pairs (better, worse) of responses; one that was cut off, or that has other messages after it, is another one."""
    texts = (record.chosen, record.rejected) if isinstance(record, Comparison) else record.responses
    ranks = (1, 2) if isinstance(record, Comparison) else record.ranks
    ended = record.ended or (True,) * len(texts)
    rests = record.rests or ((),) * len(texts)
    each = list(zip(ranks, zip(texts, ended, rests, strict=True), strict=True))
    for (first_rank, first), (second_rank, second) in itertools.combinations(each, 2):
        if first_rank != second_rank:
            yield (first, second) if first_rank < second_rank else (second, first)
