"""The six kinds of record that the stages learn from, whatever file or program they came from.

In each, `where` is "file:line" or the name of another source, for the ledger and for errors; two records with the same
content are equal wherever they came from. `prompt` is text that a response follows with nothing between. `turns` is the
same prompt as messages, where it was given so: then every assistant turn in it ends with eos, as it does in training,
which text cannot say.
"""

from __future__ import annotations

import dataclasses

from rlhf_jax.data.dialogues import Message


@dataclasses.dataclass(frozen=True)
class Text:
    """A document to pretrain on."""

    text: str
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to sample responses for."""

    prompt: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion that a person wrote."""

    prompt: str
    completion: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt, of which a person chose one."""

    prompt: str
    chosen: str
    rejected: str
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Responses to a prompt with a rank each; 1 is best, equal ranks are ties."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    where: str = dataclasses.field(default="", compare=False)
    turns: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation; each of the assistant's turns is a demonstration."""

    messages: tuple[Message, ...]
    where: str = dataclasses.field(default="", compare=False)


Prompted = Prompt | Demonstration | Comparison | Ranking
Record = Text | Dialogue | Prompted
