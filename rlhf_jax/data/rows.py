"""The fields of one row and the messages in them, with errors that name file, line and field.

A field that is null counts as absent, in a row and in a message: concatenated datasets have the columns of each other.
A message is {"role": …, "content": …}, or {"from": …, "value": …} as in ShareGPT. An assistant's turn may say that it
is not to be learned, by `weight` 0 or `train` false, and have `tool_calls` (tools.py). Any other key of a message could
change what it says, so it is refused unless it is empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_jax.data.dialogues import ROLES, TOOL, TOOLS, FullMessage, Message
from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.tools import CALL_KEYS, RESULT_KEYS, Malformed, calls_of, further, tools_of
from rlhf_jax.errors import UserError

SPELLINGS = (("role", "content"), ("from", "value"))
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
MARKS = ("weight", "train")
SYSTEMS = ("system", "system_prompt", "system_message")
# They change what a row says or how much it counts. All other fields of a row that no form names are bookkeeping.
MEANINGFUL = (
    *("functions", "tool_calls", "function_call", "reasoning_content", "history", "chat_template"),
    *("chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio"),
)
WEIGHTS = (
    *("loss_mask", "loss_masks", "train_mask", "completion_mask", "assistant_mask", "assistant_masks", "mask"),
    *("sample_weight", "sample_weights", "loss_weight", "loss_weights", "weights"),
)
THOUGHTS = ("reasoning", "thinking")  # beside a completion they belong to it; beside others they may be a judge's
_NOTHING = ("", "[]", "{}", "null")  # a list or an object that some files keep as text


class Useless(Exception):
    """A well-formed row from which nothing can be learned; the message is the reason."""


class Turns(NamedTuple):
    """Messages, and for each whether it is to be learned: True or False where the row says so, else None."""

    messages: tuple[Message, ...]
    learned: tuple[bool | None, ...]


def is_empty(value: object) -> bool:
    """True for a value that says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


class Row:
    """The fields of one row that are not null."""

    def __init__(self, where: str, fields: dict[str, Any]):
        self.where = where
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self._nulls = [name for name, value in fields.items() if value is None]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def among(self, names: tuple[str, ...]) -> list[str]:
        """Those of the names that are fields of the row."""
        return [name for name in names if name in self.fields]

    def missing(self, expected: str, hint: str = "") -> UserError:
        for name in self._nulls:
            if expected == repr(name):
                return self.wrong(name, "null", "text")
        there = ", ".join(map(repr, list(self.fields)[:12])) or "none"
        return UserError(f"{self.where}: field {expected}: missing; the row's fields are {there}{hint}")

    def wrong(self, name: str, got: str, expected: str) -> UserError:
        return UserError(f"{self.where}: field {name!r}: expected {expected}, got {got}")

    def value(self, name: str) -> Any:
        if name not in self.fields:
            raise self.missing(repr(name))
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise self.wrong(name, describe(value), "text")
        return value

    def ended(self, name: str) -> bool:
        """False if the row says that a response was cut; True if it does not say."""
        value = self.fields.get(name, True)
        if not isinstance(value, bool):
            raise self.wrong(name, describe(value), "true, or false for a response that was cut")
        return value

    def turns(self, name: str) -> Turns:
        return self.as_turns(name, self.value(name))

    def as_turns(self, name: str, value: Any) -> Turns:
        """Parses the messages in a field, or in a part of one.

        Args:
          name: the field's name in errors.
        """
        if isinstance(value, dict):
            value = [value]
            places = [name]
        elif not isinstance(value, list) or not value:
            raise self.wrong(name, describe(value), "a list of at least one message")
        else:
            places = [f"{name}[{number}]" for number in range(len(value))]
        messages, learned = [], []
        for number, (place, message) in enumerate(zip(places, value, strict=True)):
            messages.append(self._message(place, message))
            learned.append(self._mark(place, message, messages[-1].role))
            if messages[-1].role == "system" and number:
                raise self.wrong(
                    f"{place}.role", "a system message in the middle", "a system message only in first place"
                )
        return Turns(tuple(messages), tuple(learned))

    @property
    def has_system(self) -> bool:
        return any(not is_empty(self.fields.get(name)) for name in SYSTEMS)

    @property
    def has_tools(self) -> bool:
        return not is_empty(self.fields.get(TOOLS)) and self.fields[TOOLS] not in _NOTHING

    def with_context(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages after the row's own system message and its tools, if fields beside them have some."""
        messages = self._with_system(messages)
        if not self.has_tools:
            return messages
        try:
            return (Message(TOOLS, tools_of(self.fields[TOOLS])), *messages)
        except Malformed as wrong:
            raise self.wrong(f"{TOOLS}{wrong.place}", wrong.got, wrong.expected) from None

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        names = [name for name in SYSTEMS if not is_empty(self.fields.get(name))]
        if not names:
            return messages
        if len(names) > 1:
            raise self.wrong(names[1], f"{names[0]!r} as well", "one field with the system message")
        system = Message("system", self.text(names[0]))
        if messages and messages[0].role == "system":
            if messages[0] != system:
                raise self.wrong(names[0], describe(system.content), "the system message that the messages begin with")
            return messages
        return (system, *messages)

    def refuse_unread(self) -> None:
        """Raises UserError for a field that changes the row's meaning and that no record can hold."""
        self._refuse(MEANINGFUL)
        self.refuse_weights()
        if "responses" in self:
            self.refuse_ends("responses, with one value for each")

    def refuse_thoughts(self) -> None:
        """Raises UserError for thoughts beside a completion, which would be learned without them."""
        self._refuse(THOUGHTS)

    def refuse_weights(self) -> None:
        """Raises UserError for a field that says that the row, or a part of it, counts less than others."""
        self._refuse(WEIGHTS)
        if self.fields.get("weight", 1) != 1 or self.fields.get("weight") is True:
            raise self.wrong("weight", describe(self.fields["weight"]), "1, as every row counts once; remove the field")
        if self.fields.get("train", True) != 1:
            raise self.wrong("train", describe(self.fields["train"]), "rows to train on alone; leave the row out")

    def refuse_ends(self, beside: str) -> None:
        """Raises UserError for the marks of cut responses of a comparison, if the row is none."""
        if not self.among(("chosen", "rejected")):
            for name in self.among(("ended_chosen", "ended_rejected")):
                raise self.wrong(name, describe(self.fields[name]), f"'ended' beside {beside}")

    def _refuse(self, names: tuple[str, ...]) -> None:
        for name in self.among(names):
            value = self.fields[name]
            if not is_empty(value) and not (isinstance(value, str) and value.strip() in _NOTHING):
                raise self.wrong(
                    name,
                    describe(value),
                    "a row without it, as it changes the row's meaning and is not supported; use its text in the "
                    "messages, or leave such rows out",
                )

    def _message(self, place: str, message: Any) -> Message:
        if not isinstance(message, dict):
            raise self.wrong(place, describe(message), 'a message {"role": …, "content": …}')
        given = {key: value for key, value in message.items() if value is not None}
        names = SPELLINGS[1] if "from" in given and "role" not in given else SPELLINGS[0]
        if names == SPELLINGS[0]:
            role = given.get("role")
            calls = CALL_KEYS if role == "assistant" else RESULT_KEYS if role == TOOL else ()
        else:
            calls = ()
        for key, value in given.items():
            if key not in (*names, *MARKS, *calls) and not is_empty(value):
                raise self.wrong(
                    f"{place}.{key}",
                    describe(value),
                    f"a message of {names[0]} and {names[1]}, with {' or '.join(MARKS)} at most; use its text in "
                    f"{names[1]}, or remove the key",
                )
        more = self._further(place, {key: given[key] for key in calls if not is_empty(given.get(key))})
        if "tool_calls" in more and is_empty(given.get("content")):
            given, more = given | {"content": ""}, {"content": None} | more
        for key in names:
            if key not in given:
                raise self.missing(f"'{place}.{key}'")
            if not isinstance(given[key], str):
                raise self.wrong(f"{place}.{key}", describe(given[key]), "text")
        role, content = (given[key] for key in names)
        known = SHAREGPT_ROLES if names == SPELLINGS[1] else {role: role for role in ROLES}
        if role not in known and not (role == TOOL and names == SPELLINGS[0]):
            raise self.wrong(f"{place}.{names[0]}", describe(role), f"one of {', '.join(known)}")
        return FullMessage(role, content, further(more)) if more else Message(known.get(role, role), content)

    def _further(self, place: str, given: dict[str, Any]) -> dict[str, Any]:
        """The keys of a message that only a chat template renders, checked, with the arguments of calls as objects."""
        for key in given:
            if key in RESULT_KEYS and not isinstance(given[key], str):
                raise self.wrong(f"{place}.{key}", describe(given[key]), "text")
        try:
            return given | ({"tool_calls": calls_of(given["tool_calls"])} if "tool_calls" in given else {})
        except Malformed as wrong:
            raise self.wrong(f"{place}.tool_calls{wrong.place}", wrong.got, wrong.expected) from None

    def _mark(self, place: str, message: dict[str, Any], role: str) -> bool | None:
        """Whether a message says that it is to be learned."""
        said = []
        for key in MARKS:
            value = message.get(key)
            if value is None:
                continue
            numeric = isinstance(value, int | float) and not isinstance(value, bool) and value in (0, 1)
            if not (numeric if key == "weight" else isinstance(value, bool)):
                raise self.wrong(f"{place}.{key}", describe(value), "0 or 1" if key == "weight" else "true or false")
            if value and role != "assistant":
                raise self.wrong(
                    f"{place}.{key}", describe(value), "it on the assistant's turns alone, as no others are learned"
                )
            said.append(bool(value))
        if len(set(said)) == 2:
            raise self.wrong(f"{place}.train", "the opposite of its weight", "the same as its weight")
        return said[0] if said else None
