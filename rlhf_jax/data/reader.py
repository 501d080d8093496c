"""Records from files of rows, in the forms that datasets are published in.

kind            fields of a row
text            text (or messages)
demonstrations  prompt, completion; or messages
dialogues       messages
comparisons     prompt, chosen, rejected; or chosen and rejected as full dialogues or HH-RLHF transcripts
rankings        prompt, responses, ranks (a file may mix rankings and comparisons, for either kind)
prompts         prompt; or the prompt of any other row, or messages up to the last answer

These are TRL's names. forms.py has the others (of Alpaca, ShareGPT and so on) and the one rule for how a prompt is
rendered; rows.py what a message may hold. A response that was cut at the length limit is marked: "ended": false beside
a completion, "ended_chosen" and "ended_rejected" beside a comparison, "ended" with one value for each response beside a
ranking. A malformed row, or one that cannot be read with certainty, is an error; one from which nothing can be learned
is dropped and recorded in the ledger. Every row that is read is later recorded there as kept, cut or dropped, by this
file or by encode.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

from rlhf_jax.data.dialogues import TOOL, Message, render
from rlhf_jax.data.forms import (
    COMPLETIONS,
    DIALOGUES,
    dialogue_field,
    exchange_of,
    prompt_alone,
    prompt_fields,
    renamed,
)
from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompt, Ranking, Record, Text, cut_marks
from rlhf_jax.data.remarks import Remarks
from rlhf_jax.data.rows import Row, Turns, Useless, is_empty
from rlhf_jax.data.tables import read_rows
from rlhf_jax.data.verdicts import refuse_cut, refuse_opposite, refuse_unpaired, tie
from rlhf_jax.errors import UserError

Kind = Literal["text", "demonstrations", "dialogues", "comparisons", "rankings", "prompts"]
Paths = str | Path | Iterable[str | Path]
Columns = Iterable[str]
MAX_RESPONSES = 9


@overload
def read_records(paths: Paths, kind: Literal["text"], ledger: Ledger, *, columns: Columns = ()) -> list[Text]: ...
@overload
def read_records(
    paths: Paths, kind: Literal["demonstrations"], ledger: Ledger, *, columns: Columns = ()
) -> list[Demonstration | Dialogue]: ...
@overload
def read_records(
    paths: Paths, kind: Literal["dialogues"], ledger: Ledger, *, columns: Columns = ()
) -> list[Dialogue]: ...
@overload
def read_records(
    paths: Paths, kind: Literal["comparisons", "rankings"], ledger: Ledger, *, columns: Columns = ()
) -> list[Comparison | Ranking]: ...
@overload
def read_records(paths: Paths, kind: Literal["prompts"], ledger: Ledger, *, columns: Columns = ()) -> list[Prompt]: ...
def read_records(paths: Paths, kind: Kind, ledger: Ledger, *, columns: Columns = ()) -> Any:
    """Reads all rows of the files as records of a kind, in order.

    Duplicates, opposites of earlier rows and empty prompts of demonstrations are kept, with a remark in the ledger.

    Args:
      paths: JSONL files, tables in CSV or TSV with a header, or for kind "text" plain text (tables.py).
      kind: of the records.
      ledger: of the rows.
      columns: "FIELD=COLUMN" for each field that the rows have under another name.

    Raises:
      UserError: `file:line: field 'x': expected …, got …` for a malformed row, and for a file without rows.
    """
    records: list[Record] = []
    remarks = Remarks()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        empty = True
        for where, fields in read_rows(path):
            empty = False
            ledger.read(where)
            try:
                record = record_of(where, renamed(where, fields, columns), kind)
            except Useless as useless:
                ledger.drop(where, str(useless))
                continue
            for reason in remarks.of(record):
                ledger.remark(where, reason)
            records.append(record)
        if empty:
            raise UserError(f"{path}: expected one JSON object on each line, got a file without rows")
    return records


def record_of(where: str, fields: dict[str, Any], kind: Kind) -> Record:
    """The record in the fields of a row.

    Raises:
      UserError: for a malformed row.
      Useless: for one from which nothing can be learned.
    """
    row = Row(where, fields)
    if kind == "text" and not is_empty(row.fields.get("text")):
        row.refuse_weights()
    else:
        row.refuse_unread()
    match kind:
        case "text":
            return _text(row)
        case "demonstrations":
            refuse_unpaired(row, (*COMPLETIONS, *DIALOGUES))
            return _demonstration(row) if dialogue_field(row) is None else _dialogue(row)
        case "dialogues":
            return _dialogue(row)
        case "comparisons" | "rankings":
            has_ranks = "responses" in row or "ranks" in row
            has_pair = "chosen" in row or "rejected" in row
            if not has_ranks and not has_pair:
                refuse_unpaired(row, (*COMPLETIONS, *DIALOGUES))
                raise row.missing("'chosen' and 'rejected', or 'responses' and 'ranks'")
            if has_ranks and has_pair:
                raise row.wrong("responses", "'chosen' or 'rejected' as well", "a ranking or a comparison alone")
            return _ranking(row) if has_ranks else _comparison(row)
        case "prompts":
            return _prompt(row)
        case _:
            raise ValueError(
                f"kind: expected text, demonstrations, dialogues, comparisons, rankings or prompts, got {kind!r}"
            )


def _text(row: Row) -> Text:
    # An empty text beside a dialogue is the column of other rows.
    name = dialogue_field(row) if is_empty(row.fields.get("text")) else None
    messages: tuple[Message, ...] = ()
    if name is None:
        text = row.text("text")
        refuse_cut(row)
        if not row.ended("ended"):
            raise row.wrong("ended", "false", "true beside a text, as each is taught with its end; leave the row out")
    else:
        turns = _whole_dialogue(row, name)
        if False in turns.learned:
            raise row.wrong(name, "a turn that is not to be learned", "no weight 0 or train false, as all is learned")
        messages = row.with_context(turns.messages)
        text = render(messages)
    if not text.strip():
        raise Useless("empty text")
    return Text(text, row.where, messages)


def _dialogue(row: Row) -> Dialogue:
    turns = _whole_dialogue(row, dialogue_field(row) or "messages")
    messages = row.with_context(turns.messages)
    added = len(messages) - len(turns.messages)
    answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
    unlearned = tuple(at for at in answers if turns.learned[at - added] is False)
    if not answers:
        raise Useless("no assistant turn")
    if len(unlearned) == len(answers):
        raise Useless("no assistant turn that is to be learned")
    if not all(messages[at].text.strip() for at in answers):
        raise Useless("an empty assistant turn")
    return Dialogue(messages, row.where, unlearned)


def _whole_dialogue(row: Row, name: str) -> Turns:
    """The row's dialogue, if the row says no more: a prompt beside it is its beginning, and no answer is beside it."""
    turns = row.turns(name)
    refuse_unpaired(row, (*COMPLETIONS, *DIALOGUES))
    if both := row.among(COMPLETIONS[:2]):
        raise row.wrong(both[0], f"{name!r} as well", "one field with the answer; remove one")
    refuse_cut(row)
    if not row.ended("ended"):
        raise row.wrong(
            "ended", "false", "true in a dialogue; use 'prompt' and 'completion' for an answer that was cut"
        )
    if not all(is_empty(row.fields[prompt]) for prompt in prompt_fields(row)):
        exchange_of(row, [])
    return turns


def _demonstration(row: Row) -> Demonstration | Dialogue:
    names = row.among(COMPLETIONS)
    if len(names) != 1:
        if names == ["completion", "response"]:
            raise row.wrong("completion", "both", "either it or 'response'")
        if names:
            raise row.wrong(names[1], f"{names[0]!r} as well", "one field with the answer; remove or rename one")
        raise row.missing("'completion'")
    found = exchange_of(row, [(names[0], row.value(names[0]))])
    (completion,), rest = found.texts, found.rests[0] if found.rests else ()
    if not completion.strip():
        raise Useless(f"empty {names[0]}")
    row.refuse_ends("a completion")
    refuse_cut(row)
    row.refuse_thoughts()
    if len(rest) > 1:
        return _dialogue_of(row, names[0], found.turns, rest)
    return Demonstration(found.prompt, completion, row.where, found.turns, row.ended("ended"), rest)


def _dialogue_of(row: Row, name: str, turns: tuple[Message, ...], rest: tuple[Message, ...]) -> Dialogue:
    """A completion with calls and their results, of which only the assistant's turns are learned."""
    if any(message.role != "assistant" and message.role != TOOL for message in rest):
        got = "messages of " + ", ".join(message.role for message in rest)
        raise row.wrong(name, got, "one message of the assistant; give dialogues as 'messages'")
    if not row.ended("ended"):
        raise row.wrong("ended", "false", f"true beside several messages in {name!r}")
    unlearned = tuple(at for at, message in enumerate(turns) if message.role == "assistant")
    return Dialogue((*turns, *rest), row.where, unlearned)


def _comparison(row: Row) -> Comparison:
    if isinstance(row.value("chosen"), str) and row.value("chosen") == row.value("rejected"):
        raise Useless("chosen equals rejected")
    refuse_opposite(row)
    if name := tie(row):
        raise Useless(f"a tie, by its field {name!r}")
    found = exchange_of(row, [(name, row.value(name)) for name in ("chosen", "rejected")])
    chosen, rejected = found.texts
    if chosen == rejected:
        raise Useless("chosen equals rejected")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Useless(f"empty {name} response")
    if "ended" in row and (isinstance(row.value("ended"), list) or not row.among(COMPLETIONS)):
        raise row.wrong(
            "ended", describe(row.value("ended")), "'ended_chosen' and 'ended_rejected' beside a comparison"
        )
    ended = cut_marks([row.ended("ended_chosen"), row.ended("ended_rejected")])
    return Comparison(found.prompt, chosen, rejected, row.where, found.turns, rests=found.rests, ended=ended)


def _ranking(row: Row) -> Ranking:
    responses, ranks = row.value("responses"), row.value("ranks")
    if not isinstance(responses, list):
        raise row.wrong("responses", describe(responses), "a list")
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise row.wrong("ranks", describe(ranks), f"a list of {len(responses)}, one for each response")
    for number, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise row.wrong(f"ranks[{number}]", describe(rank), "a whole number from 1, the best")
    found = exchange_of(row, [(f"responses[{n}]", value) for n, value in enumerate(responses)])
    texts = found.texts
    if not 2 <= len(texts) <= MAX_RESPONSES:
        raise Useless(f"expected 2 to {MAX_RESPONSES} responses, got {len(texts)}")
    if len(set(ranks)) == 1:
        raise Useless("all ranks are tied")
    if len(set(texts)) == 1:
        raise Useless("all responses are equal")
    if not all(text.strip() for text in texts):
        raise Useless("an empty response")
    ended = row.fields.get("ended")
    if ended is not None and (not isinstance(ended, list) or len(ended) != len(texts)):
        raise row.wrong("ended", describe(ended), f"a list of {len(texts)}, one for each response")
    for number, value in enumerate(ended or []):
        if not isinstance(value, bool):
            raise row.wrong(f"ended[{number}]", describe(value), "true, or false for a response that was cut")
    # Renumbered 1, 2, … without gaps: only the order counts, and a file may use any integers.
    places = sorted(set(ranks))
    dense = tuple(places.index(rank) + 1 for rank in ranks)
    marks = cut_marks(ended or [])
    return Ranking(found.prompt, tuple(texts), dense, row.where, found.turns, rests=found.rests, ended=marks)


def _prompt(row: Row) -> Prompt:
    found = prompt_alone(row)
    if not found.prompt.strip():
        raise Useless("empty prompt")
    columns = {name: value for name, value in row.fields.items() if name != "prompt"}
    return Prompt(found.prompt, row.where, found.turns, columns)
