"""What is judged and what is said of it: the records that travel between store, page, statistics and export."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf_jax.data.dialogues import Message

RATINGS = range(1, 8)
FLAGS = (
    "fails_instruction",
    "hallucination",
    "harmful",
    "inappropriate",
    "bad_advice",
    "other",
)
MOST_RESPONSES = 9
Form = Literal["rankings", "comparisons", "trl", "hh"]
PRINCIPLE = "Choose the response that helps the reader more, is true as far as one can tell, and harms nobody."


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt with K = 2 … 9 responses to compare.

    id: stable, from the content. prompt: text, or turns where it was given as messages. sources: which run or model
    each response came from, hidden from labellers; () if unknown. kind: "task" for so many labellers, "calibration" for
    every labeller, or "quiz", whose gold ranks screen them. gold: ranks, 1 is best, () if unknown.
    """

    id: str
    prompt: str
    responses: tuple[str, ...]
    turns: tuple[Message, ...] = ()
    sources: tuple[str, ...] = ()
    kind: str = "task"
    gold: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one labeller said of one item, in the order of its responses.

    ranks: 1 is best, equal ranks are ties; () if the item was skipped. ratings: 1 to 7, None where not given.
    flags: names from FLAGS for each response. skip: why the item was skipped, "" if it was not. seconds: spent on it.
    at: Unix time when it was finished. labeller: a person's name, or "ai:…" for a model.
    """

    item: str
    labeller: str
    ranks: tuple[int, ...]
    ratings: tuple[int | None, ...] = ()
    flags: tuple[frozenset[str], ...] = ()
    skip: str = ""
    seconds: float = 0.0
    at: float = 0.0
