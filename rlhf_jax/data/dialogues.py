"""Dialogues as messages and as text: the Human / Assistant template, HH-RLHF transcripts, and Gopher's heuristic.

The template is Anthropic's (Bai et al. 2022), so that their transcripts and anybody's messages read alike:

    system text

    Human: question

    Assistant: answer
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

ROLES = ("system", "user", "assistant")
HEADERS = {"system": "", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
_HEADER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class Message(NamedTuple):
    """One turn. role: "system" (the first turn only), "user" or "assistant"."""

    role: str
    content: str


def render_message(message: Message) -> str:
    """Header, space, content; a system text stands alone."""
    return message.content if message.role == "system" else f"{HEADERS[message.role]} {message.content}"


def render(messages: Sequence[Message]) -> str:
    """The dialogue as text."""
    return "".join(render_message(message) for message in messages)


def render_prompt(messages: Sequence[Message]) -> str:
    """The dialogue up to the place where the assistant answers; the answer starts with a space."""
    return render(messages) + HEADERS["assistant"]


def is_hh(text: str) -> bool:
    """Whether text is an HH-RLHF transcript: it starts with a turn of the human's and has one of the assistant's."""
    headers = [match.group(1) for match in _HEADER.finditer(text)]
    return text.lstrip().startswith("Human:") and "Assistant" in headers


def split_hh(transcript: str) -> list[Message]:
    """The turns of an HH-RLHF transcript; text before the first is the system's. Undone by `render`."""
    before, *parts = _HEADER.split(transcript)
    messages = [Message("system", before)] if before.strip() else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message("user" if speaker == "Human" else "assistant", content.removeprefix(" ")))
    return messages


def split_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[list[Message], str, str] | None:
    """(shared turns, rest of chosen, rest of rejected) of two dialogues that part at a turn of the assistant's.

    The rests are text to stand after `render_prompt(shared)`. None if the two do not part at such a turn.
    """
    limit = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    while shared >= 0 and not chosen[shared].role == rejected[shared].role == "assistant":
        shared -= 1
    if shared < 0:
        return None
    return list(chosen[:shared]), _rest(chosen[shared:]), _rest(rejected[shared:])


def _rest(messages: Sequence[Message]) -> str:
    return render(messages).removeprefix(HEADERS["assistant"])
