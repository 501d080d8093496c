"""The six kinds of record that the stages train on, whatever file or program they come from.

In each, `where` is "file:line" or the name of another source, for the ledger and for errors; it is ignored in
comparisons, so records with the same content are equal. `prompt` is text that the response follows directly. `turns` is
the same prompt as messages, if it was given that way: then every assistant turn in it ends with eos, as in training,
which text cannot express. `rests` are the responses as messages, if one has several: dialogues that diverge before
their last answer, or with calls of tools. `ended` is False for a response that was cut at the length limit: it is
trained on as it stands, without the end token. For several responses it has one value each, or () if all ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data.dialogues import Message


@dataclasses.dataclass(frozen=True)
class Text:
    """A document to pretrain on. messages: a dialogue, with `text` as its rendering for people."""

    text: str
    where: str = dataclasses.field(default="", compare=False)
    messages: tuple[Message, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to sample responses for. columns: further fields of its row, for reward functions."""

    prompt: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion that a person wrote. rest: the completion as a message, if it has calls of tools."""

    prompt: str
    completion: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()
    ended: bool = True
    rest: tuple[Message, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt, of which a person chose one."""

    prompt: str
    chosen: str
    rejected: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()
    rests: tuple[tuple[Message, ...], ...] = ()
    ended: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Responses to a prompt with a rank each; 1 is best, equal ranks are ties."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()
    rests: tuple[tuple[Message, ...], ...] = ()
    ended: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation; each of the assistant's turns is a demonstration, but for those at the places `unlearned`."""

    messages: tuple[Message, ...]
    where: str = dataclasses.field(default="", compare=False)
    unlearned: tuple[int, ...] = ()


def texts_of(record: Record) -> Iterator[str]:
    """Yields all texts of a record."""
    if isinstance(record, Text):
        yield record.text
    elif isinstance(record, Dialogue):
        yield from (message.text for message in record.messages)
    else:
        yield record.prompt
        if isinstance(record, Demonstration):
            yield record.completion
        elif isinstance(record, Comparison):
            yield from (record.chosen, record.rejected)
        elif isinstance(record, Ranking):
            yield from record.responses
        if isinstance(record, Comparison | Ranking):
            yield from (message.content for rest in record.rests for message in rest)


def cut_marks(ended: Sequence[bool]) -> tuple[bool, ...]:
    """`ended` of several responses as records hold it: () if all of them ended."""
    return () if all(ended) else tuple(ended)


Prompted = Prompt | Demonstration | Comparison | Ranking
Record = Text | Dialogue | Prompted


def have_messages(records: Iterable[object]) -> bool:
    """True if one of the records was given as messages, which are rendered as a dialogue."""
    return any(isinstance(r, Dialogue) or (isinstance(r, Prompted) and len(r.turns) > 0) for r in records)
