"""The prompt of a row and the answers to it, by one rule for all kinds of record.

A prompt is text that its answers continue as it stands, if the row has it as text in `prompt` and its answers, if any,
as text. In every other form it is turns: a list of messages, dialogues with their last answers, HH-RLHF transcripts, a
question under another name (`instruction` with `input`, `question`, `problem`, `query`, `input`), a row with a system
message or tools, and text beside answers that are messages, which is the user's turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.dialogues import (
    TOOL,
    FullMessage,
    Message,
    is_hh,
    render_answer,
    render_prompt,
    shared_turns,
    split_hh,
)
from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.rows import SYSTEMS, Row, Useless, is_empty
from rlhf_jax.data.written import refuse_written
from rlhf_jax.errors import UserError

PROMPTS = ("prompt", "instruction", "question", "problem", "query", "input")
COMPLETIONS = ("completion", "response", "output", "answer", "solution")
DIALOGUES = ("messages", "conversations")
# Parts of a question that datasets keep beside it.
BESIDE = (
    "context",
    "choices",
    "options",
    "passage",
    "passages",
    "document",
    "documents",
    "article",
    "paragraph",
    "story",
)
GROUPS = (PROMPTS, COMPLETIONS, DIALOGUES, ("chosen",), ("rejected",), ("responses",), ("ranks",), ("text",))
PROMPT_HINT = f"; it is read from one of {', '.join(PROMPTS)}, or from messages"
Answers = Sequence[tuple[str, Any]]  # (name for errors, value)
Talk = tuple[Message, ...]


class Exchange(NamedTuple):
    """A prompt with answers to it.

    prompt: text. turns: the prompt as messages, () for a prompt that is text. texts: each continues `prompt`.
    rests: the answers as messages, () unless one of them has more than the assistant's one turn, or has calls.
    """

    prompt: str
    turns: Talk
    texts: list[str]
    rests: tuple[Talk, ...]


class _Asked(NamedTuple):
    """The field of the prompt. text: if it is text. turns: what it is as turns, without the row's system message."""

    name: str
    text: str | None
    turns: Talk
    plain: bool


def exchange_of(row: Row, answers: Answers) -> Exchange:
    """The row's prompt, and the answers of some of its fields.

    Raises:
      UserError: if the row has no prompt, or one that cannot be told from its answers with certainty.
      Useless: if the prompt is empty, or the answers do not belong to the same turns.
    """
    found = _exchange(row, answers)
    for others in _answers_of_messages(row):
        # Read as another kind of record, the row has the same prompt.
        if [name for name, _ in others] != [name for name, _ in answers] and _exchange(row, others)[:2] != found[:2]:
            raise row.wrong(others[0][0], "others", "messages that begin with the prompt that the row has as well")
    return found


def prompt_alone(row: Row) -> Exchange:
    """The prompt of a row as `exchange_of` has it with any answers; of a dialogue, the turns up to its last answer."""
    pair, responses = row.among(("chosen", "rejected")), row.fields.get("responses")
    answers: Answers = [(name, row.fields[name]) for name in pair] or _numbered(responses)
    answers = answers or next(iter(_answers_of_messages(row)), [])
    name = dialogue_field(row)
    if answers or name is None or not all(is_empty(row.fields[own]) for own in prompt_fields(row)):
        return exchange_of(row, answers)
    turns = row.turns(name).messages
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise Useless("empty prompt")
    turns = row.with_context(turns)
    return Exchange(render_prompt(turns), turns, [], ())


def renamed(where: str, fields: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """The fields of a row with those that are under other names, each given as "FIELD=COLUMN", in their places.

    The row's further fields for the prompt or for the answer are left out, since it is said which one counts.
    """
    pairs = [entry.partition("=")[::2] for entry in columns]
    if not pairs:
        return fields
    for field, column in pairs:
        if field not in (*sum(GROUPS, ()), *SYSTEMS):
            known = ", ".join((*sum(GROUPS, ()), *SYSTEMS))
            raise UserError(f"columns: expected fields among {known}, got {field!r}")
        if column not in fields:
            raise Row(where, fields).missing(repr(column), f"; columns say that it is {field!r}")
    named = {name for field, _ in pairs for group in GROUPS if field in group for name in group}
    left_out = named.union(column for _, column in pairs)
    rest = {name: value for name, value in fields.items() if name not in left_out}
    return rest | {field: fields[column] for field, column in pairs}


def dialogue_field(row: Row) -> str | None:
    """Name of the row's field with a dialogue."""
    names = row.among(DIALOGUES)
    if len(names) > 1:
        raise row.wrong(names[1], f"{names[0]!r} as well", "one field with the dialogue; remove one")
    return names[0] if names else None


def prompt_fields(row: Row) -> list[str]:
    """Names of the row's fields with the prompt: one, or Alpaca's instruction and input; [] if there is none."""
    names = row.among(PROMPTS)
    if len(names) > 1:
        names = [name for name in names if not is_empty(row.fields[name])] or names[:1]
    if len(names) > 1 and names != ["instruction", "input"]:
        raise row.wrong(names[1], f"{names[0]!r} as well", "one field with the prompt; remove or rename one")
    _refuse_beside(row, names)
    return names


def _refuse_beside(row: Row, names: Sequence[str]) -> None:
    """Raises UserError for a passage or for choices beside a question that does not have their text in it."""
    fields = [*(name for name in names if not is_empty(row.fields[name])), *row.among(DIALOGUES)]
    asked = "\n".join(text for name in fields or ("chosen", "rejected") for text in _texts(row.fields.get(name)))
    for name in row.among(BESIDE):
        value = row.fields[name]
        if not is_empty(value) and not all(text.strip() in asked for text in _texts(value)):
            use = f"use {names[0]!r} for all of the text" if names else "use its text in the messages"
            raise row.wrong(name, describe(value), f"a question that has its text in it; {use}, or remove the field")


def _texts(value: object) -> list[str]:
    """The texts and numbers in a value, however deep in lists and objects."""
    if isinstance(value, list | dict):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts(part)]
    return [] if value is None else [str(value)]


def _exchange(row: Row, answers: Answers) -> Exchange:
    for name, value in answers:
        if not isinstance(value, str | list | dict):
            raise row.wrong(name, describe(value), "text")
        refuse_written(row, name, value)
    asked = _asked(row, answers)
    talks = _talks(row, asked, answers)
    given = [talk for talk in talks if talk is not None]
    if asked is not None and asked.plain and not given:
        return _continued(asked.text or "", [value for _, value in answers])
    full = bool(given) and len(given) == len(talks) and _whole(given)
    if asked is not None:
        # Messages of the assistant first answer the prompt beside them, unless it is among them after a greeting.
        full = full and all(talk[0].role != "assistant" or _said(asked.text, talk) for talk in given)
    # Several full dialogues say themselves where they part; the prompt beside them may be the first of their turns.
    begun = asked is not None and _begin(given, asked.turns) and (asked.text is None or len(talks) == 1)
    if asked is not None and (begun or not full):
        if asked.text is not None and not asked.text.strip():
            raise Useless("empty prompt")
        turns = asked.turns
        rests = [_rest(row, name, value, talk, turns) for (name, value), talk in zip(answers, talks, strict=True)]
    else:
        turns, rests = _shared(row, answers, talks)
        if asked is not None:
            _refuse_other(row, asked, turns, alone=len(talks) == 1)
    turns = row.with_context(turns)
    if answers and turns and turns[-1].role == "assistant":
        raise row.wrong(
            asked.name if asked else answers[0][0], "the assistant's turn as the last of the prompt", "the user's"
        )
    beside = dialogue_field(row)
    if beside is not None and row.with_context(row.turns(beside).messages)[: len(turns)] != turns:
        raise row.wrong(beside, "others", "messages that begin with the prompt that the row has as well")
    texts = [render_answer(rest) for rest in rests]
    further = any(len(rest) > 1 or isinstance(rest[0], FullMessage) for rest in rests)
    return Exchange(render_prompt(turns), turns, texts, tuple(rests) if further else ())


def _asked(row: Row, answers: Answers) -> _Asked | None:
    """The prompt's field; None if the prompt is in the answers alone."""
    names = prompt_fields(row)
    if len(names) == 2:
        text = "\n".join(part for part in map(row.text, names) if part.strip())
        return _Asked(names[0], text, (Message("user", text),), plain=False)
    name = dialogue_field(row)
    if not names or (name is not None and is_empty(row.fields[names[0]])):
        if name is None or not answers:
            return None
        # What the answers answer ends with the user or a tool's result; another dialogue is a copy of one of theirs.
        turns = row.turns(name).messages
        return _Asked(name, None, turns, plain=False) if turns[-1].role in ("user", TOOL) else None
    value = row.fields[names[0]]
    refuse_written(row, names[0], value, asked=True)
    if isinstance(value, str):
        if name is not None:
            return _Asked(names[0], value, _up_to(row, names[0], value, row.turns(name).messages), plain=False)
        plain = names[0] == "prompt" and not (row.has_system or row.has_tools or _answers_of_messages(row))
        return _Asked(names[0], value, (Message("user", value),), plain)
    if not isinstance(value, list):
        raise row.wrong(names[0], describe(value), "text or a list of messages")
    turns, learned = row.turns(names[0])
    if turns[-1].role == "assistant":
        raise row.wrong(names[0], "the assistant's turn in last place", "messages that end with the user's turn")
    if any(name in COMPLETIONS for name, _ in answers):
        _refuse_learned(row, names[0], learned)
    return _Asked(names[0], None, turns, plain=False)


def _refuse_learned(row: Row, name: str, learned: Sequence[bool | None]) -> None:
    """Raises UserError for a turn before a completion that is said to be learned, as the completion alone is."""
    if True in learned:
        raise row.wrong(
            name, "a turn to learn before the answer", "no weight 1 or train true there; give dialogues as 'messages'"
        )


def _numbered(responses: object) -> Answers:
    if not isinstance(responses, list):
        return []
    return [(f"responses[{number}]", value) for number, value in enumerate(responses)]


def _answers_of_messages(row: Row) -> list[Answers]:
    """The answers in the row, for each kind of record, that are messages: they decide what its prompt is."""
    several: list[Answers] = [
        [(name, row.fields[name]) for name in row.among(("chosen", "rejected"))],
        _numbered(row.fields.get("responses")),
        *([(name, row.fields[name])] for name in row.among(COMPLETIONS)),
    ]
    return [answers for answers in several if any(_is_messages(value) for _, value in answers)]


def _is_messages(value: object) -> bool:
    """True for a message or a list of them, and not for other lists and objects, such as numbers to check by."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)


def _up_to(row: Row, name: str, text: str, dialogue: Talk) -> Talk:
    """The turns of a dialogue up to the user's turn that is the text of a prompt beside it."""
    for place, message in enumerate(dialogue):
        if _said(text, [message]):
            return dialogue[: place + 1]
    raise row.wrong(name, describe(text), "one of the user's turns of the dialogue beside it")


def _talks(row: Row, asked: _Asked | None, answers: Answers) -> list[Talk | None]:
    """Answers that are messages or transcripts as messages; None for those that are text."""
    texts = [value for _, value in answers if isinstance(value, str)]
    before = asked.text if asked is not None and asked.text is not None else ""
    if len(texts) == len(answers) > 1 and all(map(is_hh, texts)):
        if not (asked is not None and asked.plain and before) or not all(text.startswith(before) for text in texts):
            return [tuple(split_hh(text)) for text in texts]
    talks: list[Talk | None] = []
    for name, value in answers:
        turns = None if isinstance(value, str) else row.as_turns(name, value)
        if turns is not None and turns.learned[-1] is False:
            raise row.wrong(name, "an answer that is not to be learned", "no weight 0 or train false on an answer")
        if turns is not None and name in COMPLETIONS:
            _refuse_learned(row, name, turns.learned[:-1])
        talks.append(None if turns is None else turns.messages)
    return talks


def _whole(talks: Sequence[Talk]) -> bool:
    """True if each talk has its prompt in it."""
    return all(any(message.role == "user" for message in talk) for talk in talks)


def _said(text: str | None, talk: Sequence[Message]) -> bool:
    """True if a text is one of the user's turns."""
    return text is not None and any(role == "user" and content.strip() == text.strip() for role, content in talk)


def _begin(talks: Sequence[Talk], turns: Talk) -> bool:
    return all(talk[: len(turns)] == turns for talk in talks)


def _continued(prompt: str, texts: list[str]) -> Exchange:
    """Answers that continue a text, which they may repeat if they are transcripts."""
    if prompt and texts and all(is_hh(text) and text.startswith(prompt) for text in texts):
        texts = [text.removeprefix(prompt) for text in texts]
    return Exchange(prompt, (), texts, ())


def _rest(row: Row, name: str, value: Any, talk: Talk | None, turns: Talk) -> Talk:
    """The messages that answer the turns, of a text, of the assistant's messages, or of the full dialogue."""
    if talk is None:
        return (Message("assistant", value),)
    rest = talk[len(turns) :] if talk[: len(turns)] == turns else talk
    if not rest or rest[0].role != "assistant" or rest[-1].role != "assistant":
        got = "messages of " + ", ".join(message.role for message in rest) if rest else "the prompt alone"
        raise row.wrong(name, got, "one message of the assistant")
    return rest


def _shared(row: Row, answers: Answers, talks: Sequence[Talk | None]) -> tuple[Talk, list[Talk]]:
    """The turns that full dialogues share, and what follows them in each."""
    whole = [talk for talk in talks if talk is not None]
    if len(whole) < len(talks) and whole:
        name, value = next(answer for answer, talk in zip(answers, talks, strict=True) if talk is not None)
        raise row.wrong(name, describe(value), "text")
    if not whole:
        text = "; where it ends in answers that are text cannot be known" if answers else ""
        raise row.missing("'prompt'", text + PROMPT_HINT)
    if not _whole(whole):
        raise row.missing("'prompt'", PROMPT_HINT)
    shared = shared_turns(whole)
    if shared is None:
        raise Useless(f"{' and '.join(name for name, _ in answers)} do not diverge at an assistant turn")
    if not _whole([whole[0][:shared]]):
        raise Useless(f"{' and '.join(name for name, _ in answers)} share no turn of the user")
    for (name, _), talk in zip(answers, whole, strict=True):
        if talk[-1].role != "assistant":
            raise Useless(f"{name} does not end with an assistant turn")
    return whole[0][:shared], [talk[shared:] for talk in whole]


def _refuse_other(row: Row, asked: _Asked, turns: Talk, *, alone: bool) -> None:
    """Raises UserError if the prompt of full dialogues is not the one that the row has as well."""
    if asked.text is None:
        raise row.wrong(asked.name, "others", "the messages that each answer begins with")
    # A single dialogue does not show where its prompt ends, unless that is before its last answer.
    if asked.text.strip() and not _said(asked.text, turns[-1:] if alone else turns):
        raise row.wrong(asked.name, describe(asked.text), "one of the user's turns that the answers begin with")
