"""Items to label, from JSONL files.

A row has a prompt and `responses`, or it is a comparison, in any form that training reads (data/reader.py). `ranks`, or
chosen over rejected, become gold ranks on request; `sources` may name the model of each response, and `ended` (or
ended_chosen, ended_rejected) tells which were not cut at the length limit. After a prompt of messages a response is the
content of the next assistant message; after a prompt that is text it continues the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.forms import COMPLETIONS, dialogue_field, exchange_of, prompt_alone, prompt_fields
from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import read_records
from rlhf_jax.data.records import Comparison, cut_marks
from rlhf_jax.data.rows import Row, Useless
from rlhf_jax.data.tables import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import MOST_RESPONSES, Item
from rlhf_jax.feedback.store import dense

DUPLICATE = "the same prompt and responses as in an earlier row"


def make_item(
    prompt: str,
    responses: Sequence[str],
    *,
    turns: Sequence[Message] = (),
    sources: Sequence[str] = (),
    kind: str = "task",
    gold: Sequence[int] = (),
    ended: Sequence[bool] = (),
) -> Item:
    """Make an item whose id is a hash of its prompt and responses, so that equal content has the same id everywhere."""
    content = json.dumps([prompt, [turn.stored() for turn in turns], responses], ensure_ascii=False)
    id = hashlib.sha256(content.encode()).hexdigest()[:20]
    return Item(id, prompt, tuple(responses), tuple(turns), tuple(sources), kind, dense(gold), cut_marks(ended))


def read_tasks(
    paths: Iterable[str | Path], *, kind: str = "task", gold: bool = False, ledger: Ledger | None = None
) -> list[Item]:
    """Read items from files; duplicate rows become one item.

    Args:
      paths: JSONL files.
      kind: of the items.
      gold: use ranks as gold ranks, which a quiz requires.
      ledger: of the rows; those that are no item of their own are dropped in it.

    Raises:
      UserError: `file:line: field 'x': expected …, got …`, and for a file without rows that can be labelled.
    """
    items: dict[str, Item] = {}
    ledger = ledger if ledger is not None else Ledger()
    for path in paths:
        read = list(_read(path, kind, gold, ledger))
        if not read:
            why = "no rows to label"
            if ledger.decisions and ledger.decisions[-1].where.startswith(f"{path}:"):
                why = f"none to label, the last at {ledger.decisions[-1].where}: {ledger.decisions[-1].reason}"
            raise UserError(f"{path}: expected one JSON object on each line, got {why}")
        for where, item in read:
            if item.id in items:
                ledger.drop(where, DUPLICATE)
            else:
                ledger.keep(where)
                items[item.id] = item
    return list(items.values())


def _read(path: str | Path, kind: str, gold: bool, ledger: Ledger) -> Iterator[tuple[str, Item]]:
    """The items of a file's rows, with file and line; the reader of comparisons drops those that say nothing."""
    if compares(path):
        for record in read_records(path, "comparisons", ledger):
            yield record.where, _of_comparison(record, kind, gold)
        return
    for where, row in read_rows(path):
        ledger.read(where)
        yield where, _of_row(where, row, kind, gold)


def read_demonstration_tasks(paths: Iterable[str | Path], *, ledger: Ledger | None = None) -> list[Item]:
    """Read prompts whose answer a labeller writes, or corrects where the row has one; duplicate rows become one item.

    Args:
      paths: JSONL files.
      ledger: of the rows; duplicates are dropped in it.

    Raises:
      UserError: `file:line: field 'x': expected …, got …`, and for a file without rows.
    """
    items: dict[str, Item] = {}
    ledger = ledger if ledger is not None else Ledger()
    for path in paths:
        empty = True
        for where, row in read_rows(path):
            empty = False
            ledger.read(where)
            checked = _checked(where, row)
            for name in checked.among(("responses", "chosen", "rejected")):
                raise UserError(
                    f"{where}: field {name!r}: expected at most one answer to correct, as 'response' or "
                    "'completion', got several; give the file to --data"
                )
            given = checked.among(COMPLETIONS)
            if len(given) > 1:
                raise UserError(
                    f"{where}: field {given[1]!r}: expected either it or {given[0]!r}, got both; leave one out"
                )
            prompt, turns, answers = _asked(checked, [(name, row[name]) for name in given])
            if not prompt.strip():
                raise _wrong(where, row, "prompt", "a prompt to answer")
            item = make_item(prompt, [answer for answer in answers if answer.strip()], turns=turns)
            if item.id in items:
                ledger.drop(where, DUPLICATE)
            else:
                ledger.keep(where)
                items[item.id] = item
        if empty:
            raise UserError(f"{path}: expected one JSON object on each line, got no rows to label")
    return list(items.values())


def compares(path: str | Path) -> bool:
    """True if the first row of a file is a comparison."""
    for _, row in read_rows(path):
        return row.get("chosen") is not None
    return False


def _of_comparison(record: Any, kind: str, gold: bool) -> Item:
    if not isinstance(record, Comparison):
        raise UserError(f"{record.where}: expected comparisons only, as in the other rows, got a ranking")
    if record.rests:
        raise UserError(
            f"{record.where}: fields 'chosen' and 'rejected': expected dialogues that differ in their last answer "
            "alone, got some that differ before it or call tools, which the page cannot show; leave the row out"
        )
    responses = [record.chosen, record.rejected]
    if record.turns:
        responses = [response.removeprefix(" ") for response in responses]
    ranks = (1, 2) if gold else ()
    return make_item(record.prompt, responses, turns=record.turns, kind=kind, gold=ranks, ended=record.ended)


def _of_row(where: str, row: dict[str, Any], kind: str, gold: bool) -> Item:
    checked = _checked(where, row)
    values = checked.fields.get("responses")
    if not isinstance(values, list) or not 2 <= len(values) <= MOST_RESPONSES:
        raise _wrong(where, row, "responses", f"a list of 2 to {MOST_RESPONSES}, or 'chosen' and 'rejected'")
    prompt, turns, responses = _asked(checked, [(f"responses[{number}]", value) for number, value in enumerate(values)])
    for number, response in enumerate(responses):
        if not response.strip():
            raise UserError(f"{where}: field 'responses[{number}]': expected text, got an empty response")
    if len(set(responses)) == 1:
        raise UserError(f"{where}: field 'responses': expected responses that differ, got the same text everywhere")
    sources = checked.fields.get("sources", [])
    if not isinstance(sources, list) or len(sources) not in (0, len(values)) or not _all(sources, str):
        raise _wrong(where, row, "sources", f"a list of {len(values)} names, one for each response")
    ended = checked.fields.get("ended", [])
    if not isinstance(ended, list) or len(ended) not in (0, len(values)) or {*map(type, ended)} - {bool}:
        raise _wrong(where, row, "ended", f"a list of {len(values)}, true or false for each response")
    return make_item(
        prompt,
        responses,
        turns=turns,
        sources=sources,
        kind=kind,
        gold=_gold(where, checked.fields, len(values)) if gold else (),
        ended=ended,
    )


def _checked(where: str, fields: dict[str, Any]) -> Row:
    row = Row(where, fields)
    row.refuse_unread()
    if not (prompt_fields(row) or dialogue_field(row)):
        raise _wrong(where, row.fields, "prompt", "text or a list of messages")
    return row


def _asked(row: Row, responses: list[tuple[str, Any]]) -> tuple[str, tuple[Message, ...], list[str]]:
    """Prompt of a row, its messages, () for one given as text, and the texts of these responses."""
    try:
        found = exchange_of(row, responses) if responses else prompt_alone(row)
    except Useless as useless:
        raise UserError(f"{row.where}: field 'prompt': expected a prompt to label, got {useless}") from None
    if found.rests:
        name = responses[0][0].partition("[")[0]
        raise UserError(
            f"{row.where}: field {name!r}: expected one message of the assistant each, without calls of tools, got "
            "more; leave it out"
        )
    return found.prompt, found.turns, [text.removeprefix(" ") if found.turns else text for text in found.texts]


def _gold(where: str, row: dict[str, Any], count: int) -> list[int]:
    ranks = row.get("ranks", row.get("gold"))
    if not isinstance(ranks, list) or len(ranks) != count or not _all(ranks, int) or min(ranks) < 1:
        raise _wrong(
            where, row, "ranks", f"a list of {count} whole numbers from 1 (best), since gold ranks are requested"
        )
    if len(set(ranks)) == 1:
        raise UserError(f"{where}: field 'ranks': expected gold that orders at least one pair, got all ranks tied")
    return ranks


def _wrong(where: str, row: dict[str, Any], name: str, expected: str) -> UserError:
    got = describe(row[name]) if name in row else f"nothing; the row's fields are {', '.join(map(repr, row)) or 'none'}"
    return UserError(f"{where}: field {name!r}: expected {expected}, got {got}")


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
