"""Records from JSONL files, in the field names of TRL's dataset formats, and from HH-RLHF transcripts.

kind            fields of a row
text            text (or messages)
demonstrations  prompt, completion (or response); or messages
dialogues       messages
comparisons     prompt, chosen, rejected; or chosen and rejected with a common prefix; or HH-RLHF transcripts
rankings        prompt, responses, ranks (a file may mix rankings and comparisons, for either kind)
prompts         prompt; or the prompt of a comparison, or messages up to the last answer

A prompt may be text or a list of messages, {"role": "system" | "user" | "assistant", "content": text}; so may a
response. A malformed row is an error; one from which nothing can be learned is dropped and recorded in the ledger.
Every row that is read is later recorded there as kept, cut or dropped, by this file or by encode.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, overload

from rlhf_jax.data.dialogues import ROLES, Message, is_hh, render, render_prompt, split_hh, split_shared
from rlhf_jax.data.jsonl import describe, read_rows
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompt, Ranking, Record, Text
from rlhf_jax.errors import UserError

Kind = Literal["text", "demonstrations", "dialogues", "comparisons", "rankings", "prompts"]
Paths = str | Path | Iterable[str | Path]
MAX_RESPONSES = 9
_Exchange = tuple[str, tuple[Message, ...], list[str]]  # prompt, its turns if given as messages, responses


@overload
def read_records(paths: Paths, kind: Literal["text"], ledger: Ledger) -> list[Text]: ...
@overload
def read_records(paths: Paths, kind: Literal["demonstrations"], ledger: Ledger) -> list[Demonstration | Dialogue]: ...
@overload
def read_records(paths: Paths, kind: Literal["dialogues"], ledger: Ledger) -> list[Dialogue]: ...
@overload
def read_records(
    paths: Paths, kind: Literal["comparisons", "rankings"], ledger: Ledger
) -> list[Comparison | Ranking]: ...
@overload
def read_records(paths: Paths, kind: Literal["prompts"], ledger: Ledger) -> list[Prompt]: ...
def read_records(paths: Paths, kind: Kind, ledger: Ledger) -> Any:
    """Reads all rows of the files as records of a kind, in order. A duplicate row is kept, with a remark in the ledger.

    Raises:
      UserError: `file:line: field 'x': expected …, got …` for a malformed row, and for a file without rows.
    """
    records: list[Record] = []
    seen: set[Record] = set()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        empty = True
        for where, fields in read_rows(path):
            empty = False
            ledger.read(where)
            try:
                record = _record(_Row(where, fields), kind)
            except _Useless as useless:
                ledger.drop(where, str(useless))
                continue
            if record in seen:
                ledger.remark(where, "the same as an earlier row")
            seen.add(record)
            records.append(record)
        if empty:
            raise UserError(f"{path}: expected one JSON object on each line, got a file without rows")
    return records


class _Useless(Exception):
    """A well-formed row from which nothing can be learned; the message is the reason."""


class _Row:
    """The fields of one row, with errors that name file, line and field."""

    def __init__(self, where: str, fields: dict[str, Any]):
        self.where = where
        self.fields = fields

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def missing(self, expected: str) -> UserError:
        there = ", ".join(map(repr, list(self.fields)[:12])) or "none"
        return UserError(f"{self.where}: field {expected}: missing; the row's fields are {there}")

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

    def messages(self, name: str) -> tuple[Message, ...]:
        return self.as_messages(name, self.value(name))

    def as_messages(self, name: str, value: Any) -> tuple[Message, ...]:
        """Parses the messages in a field, or in a part of one.

        Args:
          name: the field's name in errors.
        """
        if not isinstance(value, list) or not value:
            raise self.wrong(name, describe(value), "a list of at least one message")
        messages = []
        for number, message in enumerate(value):
            place = f"{name}[{number}]"
            if not isinstance(message, dict):
                raise self.wrong(place, describe(message), 'a message {"role": …, "content": …}')
            for key in ("role", "content"):
                if key not in message:
                    raise self.missing(f"'{place}.{key}'")
                if not isinstance(message[key], str):
                    raise self.wrong(f"{place}.{key}", describe(message[key]), "text")
            if message["role"] not in ROLES:
                raise self.wrong(f"{place}.role", describe(message["role"]), f"one of {', '.join(ROLES)}")
            if message["role"] == "system" and number:
                raise self.wrong(
                    f"{place}.role", "a system message in the middle", "a system message only in first place"
                )
            messages.append(Message(message["role"], message["content"]))
        return tuple(messages)


def _record(row: _Row, kind: Kind) -> Record:
    match kind:
        case "text":
            return _text(row)
        case "demonstrations":
            whole = "messages" in row and "completion" not in row and "response" not in row
            return _dialogue(row) if whole else _demonstration(row)
        case "dialogues":
            return _dialogue(row)
        case "comparisons" | "rankings":
            has_ranks = "responses" in row or "ranks" in row
            if not has_ranks and "chosen" not in row and "rejected" not in row:
                raise row.missing("'chosen' and 'rejected', or 'responses' and 'ranks'")
            return _ranking(row) if has_ranks else _comparison(row)
        case "prompts":
            return _prompt(row)
        case _:
            raise ValueError(
                f"kind: expected text, demonstrations, dialogues, comparisons, rankings or prompts, got {kind!r}"
            )


def _text(row: _Row) -> Text:
    text = render(row.messages("messages")) if "messages" in row and "text" not in row else row.text("text")
    if not text.strip():
        raise _Useless("empty text")
    return Text(text, row.where)


def _dialogue(row: _Row) -> Dialogue:
    messages = row.messages("messages")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise _Useless("no assistant turn")
    if not all(answer.strip() for answer in answers):
        raise _Useless("an empty assistant turn")
    return Dialogue(messages, row.where)


def _demonstration(row: _Row) -> Demonstration:
    names = [name for name in ("completion", "response") if name in row]
    if len(names) != 1:
        if names:
            raise row.wrong("completion", "both", "either it or 'response'")
        raise row.missing("'completion'")
    prompt, turns, (completion,) = _exchange(row, [(names[0], row.value(names[0]))])
    if not completion.strip():
        raise _Useless(f"empty {names[0]}")
    return Demonstration(prompt, completion, row.where, turns)


def _comparison(row: _Row) -> Comparison:
    prompt, turns, (chosen, rejected) = _pair(row)
    if chosen == rejected:
        raise _Useless("chosen equals rejected")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise _Useless(f"empty {name} response")
    return Comparison(prompt, chosen, rejected, row.where, turns)


def _pair(row: _Row) -> _Exchange:
    """Prompt and both responses of a comparison, in any of its formats."""
    chosen, rejected = row.value("chosen"), row.value("rejected")
    transcripts = isinstance(chosen, str) and isinstance(rejected, str) and is_hh(chosen) and is_hh(rejected)
    if "prompt" in row and not (transcripts and row.fields["prompt"] == ""):
        return _exchange(row, [("chosen", chosen), ("rejected", rejected)])
    if transcripts:
        return _shared_turns(split_hh(chosen), split_hh(rejected))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _shared_turns(row.messages("chosen"), row.messages("rejected"))
    texts = [row.text("chosen"), row.text("rejected")]
    if texts[0] == texts[1]:
        raise _Useless("chosen equals rejected")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    # The prompt ends before the last white space that both share, so that no word is split.
    cut = max((place for place, (character, _) in enumerate(alike) if character.isspace()), default=0)
    return texts[0][:cut], (), [text[cut:] for text in texts]


def _ranking(row: _Row) -> Ranking:
    responses, ranks = row.value("responses"), row.value("ranks")
    if not isinstance(responses, list):
        raise row.wrong("responses", describe(responses), "a list")
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise row.wrong("ranks", describe(ranks), f"a list of {len(responses)}, one for each response")
    for number, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise row.wrong(f"ranks[{number}]", describe(rank), "a whole number from 1, the best")
    prompt, turns, texts = _exchange(row, [(f"responses[{n}]", value) for n, value in enumerate(responses)])
    if not 2 <= len(texts) <= MAX_RESPONSES:
        raise _Useless(f"expected 2 to {MAX_RESPONSES} responses, got {len(texts)}")
    if len(set(ranks)) == 1:
        raise _Useless("all ranks are tied")
    if len(set(texts)) == 1:
        raise _Useless("all responses are equal")
    if not all(text.strip() for text in texts):
        raise _Useless("an empty response")
    places = sorted(
        set(ranks)
    )  # renumbered 1, 2, … without gaps: only the order counts, and a file may use any integers
    return Ranking(prompt, tuple(texts), tuple(places.index(rank) + 1 for rank in ranks), row.where, turns)


def _prompt(row: _Row) -> Prompt:
    if "prompt" in row:
        prompt, turns, _ = _exchange(row, [])
    elif "chosen" in row:
        prompt, turns, _ = _pair(row)
    elif "messages" in row:
        messages = list(row.messages("messages"))
        while messages and messages[-1].role == "assistant":
            messages.pop()
        prompt, turns = render_prompt(messages) if messages else "", tuple(messages)
    else:
        raise row.missing("'prompt'")
    if not prompt.strip():
        raise _Useless("empty prompt")
    columns = {name: value for name, value in row.fields.items() if name != "prompt"}
    return Prompt(prompt, row.where, turns, columns)


def _exchange(row: _Row, responses: Sequence[tuple[str, Any]]) -> _Exchange:
    """Prompt and responses of a row with a separate field for the prompt."""
    prompt = row.value("prompt")
    if isinstance(prompt, str) and not any(isinstance(value, list) for _, value in responses):
        texts = []
        for name, value in responses:
            if not isinstance(value, str):
                raise row.wrong(name, describe(value), "text")
            texts.append(value)
        # Full transcripts that begin with the prompt, given next to it.
        if prompt and all(is_hh(text) and text.startswith(prompt) for text in texts):
            texts = [text.removeprefix(prompt) for text in texts]
        return prompt, (), texts
    if not isinstance(prompt, str | list):
        raise row.wrong("prompt", describe(prompt), "text or a list of messages")
    turns = (Message("user", prompt),) if isinstance(prompt, str) else row.messages("prompt")
    return render_prompt(turns), turns, [_answer(row, name, value, turns) for name, value in responses]


def exchange(where: str, prompt: Any, responses: Sequence[Any]) -> _Exchange:
    """Prompt, its messages, and responses, each given as in a row of a file: text or messages.

    Args:
      where: name of the source in errors.
      prompt: text, or messages.
      responses: text, or the assistant's message.

    Raises:
      UserError: naming `where` and the field, for anything else.
    """
    return _exchange(_Row(where, {"prompt": prompt}), [("response", response) for response in responses])


def _answer(row: _Row, name: str, value: Any, turns: tuple[Message, ...]) -> str:
    """Text of a response to messages, given as text, as the assistant's message, or as the full dialogue."""
    if isinstance(value, str):
        return f" {value}"
    messages = row.as_messages(name, value)
    if messages[: len(turns)] == turns:
        messages = messages[len(turns) :]
    if len(messages) != 1 or messages[0].role != "assistant":
        got = "messages of " + ", ".join(message.role for message in messages) if messages else "the prompt alone"
        raise row.wrong(name, got, "one message of the assistant")
    return f" {messages[0].content}"


def _shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> _Exchange:
    """Prompt and the two responses of two full dialogues."""
    if chosen == rejected:
        raise _Useless("chosen equals rejected")
    parts = split_shared(chosen, rejected)
    if parts is None:
        raise _Useless("chosen and rejected do not diverge at an assistant turn")
    shared, *texts = parts
    return render_prompt(shared), tuple(shared), texts
