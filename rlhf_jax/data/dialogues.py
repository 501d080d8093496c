"""Dialogues as messages and as text: the Human / Assistant template and HH-RLHF transcripts.

The template is that of HH-RLHF (Bai et al. 2022), so that its transcripts and a user's messages get the same text:

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
    """A turn of a dialogue. role: "system" (the first turn only), "user" or "assistant"."""

    role: str
    content: str


def render_message(message: Message) -> str:
    """Renders header, space and content; a system message has no header."""
    return message.content if message.role == "system" else f"{HEADERS[message.role]} {message.content}"


def render(messages: Sequence[Message]) -> str:
    """Renders the dialogue as text."""
    return "".join(render_message(message) for message in messages)


def render_prompt(messages: Sequence[Message]) -> str:
    """Renders the dialogue with the header of the assistant's answer, which starts with a space."""
    return render(messages) + HEADERS["assistant"]


def is_hh(text: str) -> bool:
    """True for an HH-RLHF transcript: it starts with a human turn and has an assistant turn."""
    headers = [match.group(1) for match in _HEADER.finditer(text)]
    return text.lstrip().startswith("Human:") and "Assistant" in headers


def split_hh(transcript: str) -> list[Message]:
    """Splits an HH-RLHF transcript into turns; text before the first is a system message. The inverse of `render`."""
    before, *parts = _HEADER.split(transcript)
    messages = [Message("system", before)] if before.strip() else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message("user" if speaker == "Human" else "assistant", content.removeprefix(" ")))
    return messages


def render_answer(messages: Sequence[Message]) -> str:
    """Renders an assistant's message, and any that follow it, as text that continues `render_prompt`."""
    return render(messages).removeprefix(HEADERS["assistant"])


def shared_turns(talks: Sequence[Sequence[Message]]) -> int | None:
    """Number of turns before the first assistant turn at which dialogues diverge; None if they diverge elsewhere.

    Of equal dialogues, and of one alone, all but the last answer are shared.
    """
    shared = min(map(len, talks)) - 1
    shared = next((at for at in range(shared) if any(talk[at] != talks[0][at] for talk in talks)), shared)
    while shared >= 0 and not all(talk[shared].role == "assistant" for talk in talks):
        shared -= 1
    return None if shared < 0 else shared


def split_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[list[Message], str, str] | None:
    """Splits two dialogues that diverge at an assistant turn into (shared turns, rest of chosen, rest of rejected).

    The rests are text that continues `render_prompt(shared)`. None if the two do not diverge at an assistant turn.
    """
    shared = shared_turns([chosen, rejected])
    if shared is None:
        return None
    return list(chosen[:shared]), render_answer(chosen[shared:]), render_answer(rejected[shared:])
