"""Records of items and judgements, shared by the store, the page, the statistics and the export."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf_jax.data.dialogues import Message

RATINGS = range(1, 8)
FLAG_WORDS = {
    "fails_instruction": "Fails the instruction",
    "hallucination": "Hallucination",
    "harmful": "Harmful",
    "inappropriate": "Inappropriate",
    "bad_advice": "Advice it should not give",
    "other": "Other problem",
}
"""Words on the page for each flag, unless a page's own settings (page.py) name others."""
FLAGS = tuple(FLAG_WORDS)
MOST_RESPONSES = 9
Form = Literal["rankings", "comparisons", "trl", "hh", "demonstrations"]
PRINCIPLE = "Choose the response that helps the reader more, is true as far as one can tell, and harms nobody."


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt with K = 2 … 9 responses to compare; or with none, or one to correct, for a demonstration.

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
      ranks: 1 is best, equal ranks are ties; () if the item was skipped, or has fewer than two responses.
      ratings: on the page's scale, by default 1 to 7; None where not given.
      flags: names of the page's flags, by default from FLAGS, for each response.
      skip: reason for skipping the item, "" if it was judged.
      seconds: time spent on the item.
      at: Unix time of the judgement.
      comments: on each response, "" where not given; () without any.
      rationale: why the labeller judged so.
      demonstration: an answer to the prompt that the labeller wrote, "" for none.
      corrects: index of the response that the demonstration started from, None if it was written from nothing.
    """

    item: str
    labeller: str
    ranks: tuple[int, ...]
    ratings: tuple[int | None, ...] = ()
    flags: tuple[frozenset[str], ...] = ()
    skip: str = ""
    seconds: float = 0.0
    at: float = 0.0
    comments: tuple[str, ...] = ()
    rationale: str = ""
    demonstration: str = ""
    corrects: int | None = None
