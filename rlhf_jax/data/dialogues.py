"""Dialogues as messages and as text: the Human / Assistant template and HH-RLHF transcripts.

The template is that of HH-RLHF (Bai et al. 2022), so that its transcripts and a user's messages get the same text:

    system text

    Human: question

    Assistant: answer
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.tokenizers.chat_template import TOOLS

ROLES = ("system", "user", "assistant")
TOOL = "tool"
HEADERS = {"system": "", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
_HEADER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class Message(NamedTuple):
    """A turn of a dialogue.

    role: "system" (the first turn only), "user" or "assistant". With a chat template that renders tools also "tool",
    for the result of a call, and before all others "tools": its content is JSON of the tools that may be called.
    """

    role: str
    content: str

    @property
    def text(self) -> str:
        """The content as a person reads it, with the calls that follow it."""
        return self.content

    def as_row(self) -> dict[str, Any]:
        """The message as files and chat templates have it."""
        return self._asdict()

    def stored(self) -> tuple[str, ...]:
        """The texts that `FullMessage.of` makes the message of."""
        return tuple(self)


class FullMessage(Message):
    """A turn with more than a role and a content: an assistant's calls, or the call that a tool's result belongs to.

    more: JSON of the object with these keys, and of a null content; `content` is then empty.
    """

    more: str

    def __new__(cls, role: str, content: str, more: str) -> FullMessage:
        message = super().__new__(cls, role, content)
        message.more = more
        return message

    def __getnewargs__(self) -> tuple[str, ...]:
        return self.stored()

    @classmethod
    def of(cls, texts: Sequence[str]) -> Message:
        """The message of its `stored` texts."""
        return Message(*texts) if len(texts) == 2 else cls(*texts)

    @property
    def text(self) -> str:
        calls = json.loads(self.more).get("tool_calls", [])
        return "\n".join(filter(None, [self.content, *(json.dumps(call, ensure_ascii=False) for call in calls)]))

    def as_row(self) -> dict[str, Any]:
        return {**self._asdict(), **json.loads(self.more)}

    def stored(self) -> tuple[str, ...]:
        return (*self, self.more)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FullMessage) and self.stored() == other.stored()

    def __ne__(self, other: object) -> bool:
        # A tuple has its own, which does not ask __eq__.
        return not self == other

    def __hash__(self) -> int:
        return hash(self.stored())

    def __repr__(self) -> str:
        return f"FullMessage{self.stored()!r}"


def prompt_row(turns: Sequence[Message]) -> dict[str, Any]:
    """The fields of a row that has the turns as its prompt."""
    messages = [message.as_row() for message in turns if message.role != TOOLS]
    tools = {message.role: json.loads(message.content) for message in turns if message.role == TOOLS}
    return {"prompt": messages, **tools}


def of_tools(message: Message) -> str | None:
    """The key of a row or of a message that only a chat template can render; None for a message of text."""
    if message.role in (TOOLS, TOOL):
        return "tools" if message.role == TOOLS else "role"
    return "tool_calls" if isinstance(message, FullMessage) else None


def render_message(message: Message) -> str:
    """Renders header, space and content; a system message has no header."""
    if message.role in (TOOLS, TOOL):
        return f"\n\n{message.role.capitalize()}: {message.text}"
    return message.text if message.role == "system" else f"{HEADERS[message.role]} {message.text}"


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
