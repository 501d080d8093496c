"""Held-out rows: an exact share of the distinct prompts, so that no prompt is both trained and evaluated on.

A split by rows would leave other answers to the same prompt, and other people's judgements of the same answers, in the
training data: a reward model then scores well on labels that are noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rlhf_jax.data.batches import PromptRows, RaggedRows, RankingRows
from rlhf_jax.data.dialogues import TOOLS, Message, is_hh, split_hh
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Ranking, Record, Text

R = TypeVar("R", bound=Record)
Encoded = TypeVar("Encoded", RaggedRows, RankingRows, PromptRows)


def prompt_key(record: Record) -> str:
    """The part of a record that must not be on both sides of a split, with white space normalized.

    It is the conversation up to its first answer, so that a later turn stays with the earlier ones, and a prompt given
    as text is the user's message. A document, or the answers to an empty prompt, stand for themselves.
    """
    if isinstance(record, Text):
        parts = [("text", record.text)]
    elif isinstance(record, Dialogue):
        parts = _opening(record.messages)
    elif record.turns:
        parts = _opening(record.turns)
    elif record.prompt.strip():
        parts = _opening(split_hh(record.prompt)) if is_hh(record.prompt) else [("user", record.prompt)]
    else:
        parts = [("answer", text) for text in sorted(_answers(record))]
    return json.dumps([(role, " ".join(content.split())) for role, content in parts])


def held_out_keys(keys: Iterable[str], fraction: float, seed: int = 0) -> set[str]:
    """The keys to hold out: round(fraction x distinct keys), at least 1 of 2 or more, and never all of them.

    They are those with the lowest SHA-256 of seed and key, whatever the order and number of their rows.
    """
    distinct = set(keys)
    count = min(max(round(len(distinct) * fraction), fraction > 0), max(len(distinct) - 1, 0))
    return set(sorted(distinct, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())[:count])


def hold_out(rows: Encoded, fraction: float, *, seed: int, ledger: Ledger) -> tuple[Encoded, Encoded]:
    """Splits encoded rows into (training rows, held-out rows) by the prompt of their sources.

    Rows are split once encoded, so that the share is one of rows that are used.

    Args:
      fraction: share of the distinct prompts to hold out.
      ledger: of the rows, in which the held-out ones no longer count as kept.
    """
    held, reason = _held(rows.sources, fraction, seed, "prompts")
    for place in sorted(held):
        ledger.hold_out(rows.sources[place].where, reason, kept_tokens=_tokens(rows, place))
    return _part(rows, [place for place in range(len(rows)) if place not in held]), _part(rows, sorted(held))


def hold_out_texts(
    texts: Sequence[Text], fraction: float, *, seed: int, ledger: Ledger
) -> tuple[list[Text], list[Text]]:
    """Splits documents into (training documents, held-out documents); equal ones stay together. As `hold_out`."""
    held, reason = _held(texts, fraction, seed, "documents")
    for place in sorted(held):
        ledger.hold_out(texts[place].where, reason)
    return [text for place, text in enumerate(texts) if place not in held], [texts[place] for place in sorted(held)]


def remark_shared(training: Iterable[Record], heldout: Iterable[Record], ledger: Ledger) -> None:
    """Remarks, in the ledger of the held-out rows, on those whose prompt is trained on too."""
    trained = {prompt_key(record) for record in training}
    for record in heldout:
        if prompt_key(record) in trained:
            ledger.remark(record.where, "also trained on: its prompt, or its document, is in the training data")


def _held(records: Sequence[Record], fraction: float, seed: int, what: str) -> tuple[set[int], str]:
    """Places of the records to hold out, and the reason for the ledger with the counts of distinct prompts."""
    keys = [prompt_key(record) for record in records]
    held = held_out_keys(keys, fraction, seed)
    reason = f"{len(held):,} of {len(set(keys)):,} {what}, to evaluate on"
    return {place for place, key in enumerate(keys) if key in held}, reason


def _part(rows: Encoded, places: Sequence[int]) -> Encoded:
    return dataclasses.replace(
        rows, rows=[rows.rows[place] for place in places], sources=[rows.sources[place] for place in places]
    )


def _tokens(rows: RaggedRows | RankingRows | PromptRows, place: int) -> int:
    """Tokens with which the ledger has counted a row."""
    if isinstance(rows, RankingRows):
        return sum(map(len, rows.rows[place][0]))
    return len(rows.rows[place][0]) if isinstance(rows, RaggedRows) else len(rows.rows[place])


def _opening(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The messages up to the first answer to a user, without tools; a greeting is not one."""
    parts: list[tuple[str, str]] = []
    for role, content in messages:
        if role == TOOLS:
            continue
        if role == "assistant" and any(before == "user" for before, _ in parts):
            break
        parts.append((role, content))
    return parts


def _answers(record: Record) -> Sequence[str]:
    if isinstance(record, Demonstration):
        return (record.completion,)
    if isinstance(record, Comparison):
        return record.chosen, record.rejected
    return record.responses if isinstance(record, Ranking) else ()
