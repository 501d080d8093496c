"""Records of items and judgements, shared by the store, the page, the statistics and the export."""

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

    Attributes:
      id: derived from the content.
      prompt: text; with `turns`, their rendering.
      responses: K texts.
      turns: the prompt's messages, () for a prompt given as text.
      sources: run or model of each response, hidden from labellers; () if unknown.
      kind: "task" for a set number of labellers, "calibration" for every labeller, or "quiz", whose gold ranks screen
        labellers.
      gold: reference ranks, 1 is best; () if unknown.
      ended: False for a response that was cut at the length limit; () if all ended.
    """

    id: str
    prompt: str
    responses: tuple[str, ...]
    turns: tuple[Message, ...] = ()
    sources: tuple[str, ...] = ()
    kind: str = "task"
    gold: tuple[int, ...] = ()
    ended: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One labeller's judgement of one item, in the order of its responses.

    Attributes:
      item: id of the item.
      labeller: a person's name, or "ai:…" for a model.
      ranks: 1 is best, equal ranks are ties; () if the item was skipped.
      ratings: 1 to 7, None where not given.
      flags: names from FLAGS for each response.
      skip: reason for skipping the item, "" if it was judged.
      seconds: time spent on the item.
      at: Unix time of the judgement.
    """

    item: str
    labeller: str
    ranks: tuple[int, ...]
    ratings: tuple[int | None, ...] = ()
    flags: tuple[frozenset[str], ...] = ()
    skip: str = ""
    seconds: float = 0.0
    at: float = 0.0
