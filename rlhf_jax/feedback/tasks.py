"""Items to label, from JSONL files.

A row has a prompt, as text or messages, and `responses`, each text or an assistant message; or it is a comparison in
any form that training reads (data/reader.py). `ranks`, or chosen over rejected, become gold ranks on request; `sources`
may name the model of each response, and `ended` (or ended_chosen, ended_rejected) tells which were not cut at the
length limit. After a prompt given as messages a response is the content of the next assistant
message; after a prompt given as text it continues the text directly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.dialogues import ROLES, Message, render_prompt
from rlhf_jax.data.jsonl import describe, read_rows
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import read_records
from rlhf_jax.data.records import Comparison, cut_marks
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import MOST_RESPONSES, Item
from rlhf_jax.feedback.store import dense


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
    content = json.dumps([prompt, turns, responses], ensure_ascii=False)
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
                ledger.drop(where, "the same prompt and responses as in an earlier row")
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


def compares(path: str | Path) -> bool:
    """True if the first row of a file is a comparison."""
    for _, row in read_rows(path):
        return "chosen" in row
    return False


def _of_comparison(record: Any, kind: str, gold: bool) -> Item:
    if not isinstance(record, Comparison):
        raise UserError(f"{record.where}: expected comparisons only, as in the other rows, got a ranking")
    responses = [record.chosen, record.rejected]
    if record.turns:
        responses = [response.removeprefix(" ") for response in responses]
    ranks = (1, 2) if gold else ()
    return make_item(record.prompt, responses, turns=record.turns, kind=kind, gold=ranks, ended=record.ended)


def _of_row(where: str, row: dict[str, Any], kind: str, gold: bool) -> Item:
    prompt, turns = row.get("prompt"), tuple[Message, ...]()
    if isinstance(prompt, list) and prompt:
        turns = tuple(_message(where, f"prompt[{number}]", value) for number, value in enumerate(prompt))
        prompt = render_prompt(turns)
    if not isinstance(prompt, str):
        raise _wrong(where, row, "prompt", "text or a list of messages")
    values = row.get("responses")
    if not isinstance(values, list) or not 2 <= len(values) <= MOST_RESPONSES:
        raise _wrong(where, row, "responses", f"a list of 2 to {MOST_RESPONSES}, or 'chosen' and 'rejected'")
    responses = [_response(where, f"responses[{number}]", value) for number, value in enumerate(values)]
    for number, response in enumerate(responses):
        if not response.strip():
            raise UserError(f"{where}: field 'responses[{number}]': expected text, got an empty response")
    if len(set(responses)) == 1:
        raise UserError(f"{where}: field 'responses': expected responses that differ, got the same text everywhere")
    sources = row.get("sources", [])
    if not isinstance(sources, list) or len(sources) not in (0, len(values)) or not _all(sources, str):
        raise _wrong(where, row, "sources", f"a list of {len(values)} names, one for each response")
    ended = row.get("ended")
    ended = [] if ended is None else ended
    if not isinstance(ended, list) or len(ended) not in (0, len(values)) or {*map(type, ended)} - {bool}:
        raise _wrong(where, row, "ended", f"a list of {len(values)}, true or false for each response")
    return make_item(
        prompt,
        responses,
        turns=turns,
        sources=sources,
        kind=kind,
        gold=_gold(where, row, len(values)) if gold else (),
        ended=ended,
    )


def _gold(where: str, row: dict[str, Any], count: int) -> list[int]:
    ranks = row.get("ranks", row.get("gold"))
    if not isinstance(ranks, list) or len(ranks) != count or not _all(ranks, int) or min(ranks) < 1:
        raise _wrong(
            where, row, "ranks", f"a list of {count} whole numbers from 1 (best), since gold ranks are requested"
        )
    if len(set(ranks)) == 1:
        raise UserError(f"{where}: field 'ranks': expected gold that orders at least one pair, got all ranks tied")
    return ranks


def _message(where: str, place: str, value: Any) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise UserError(
            f'{where}: field {place!r}: expected a message {{"role": …, "content": …}}, got {describe(value)}'
        )
    if value["role"] not in ROLES:
        raise UserError(
            f"{where}: field '{place}.role': expected one of {', '.join(ROLES)}, got {describe(value['role'])}"
        )
    if not isinstance(value["content"], str):
        raise UserError(f"{where}: field '{place}.content': expected text, got {describe(value['content'])}")
    return Message(value["role"], value["content"])


def _response(where: str, place: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    messages = value if isinstance(value, list) else [value]
    if len(messages) == 1 and isinstance(messages[0], dict):
        message = _message(where, place, messages[0])
        if message.role == "assistant":
            return message.content
    raise UserError(f"{where}: field {place!r}: expected text or one assistant message, got {describe(value)}")


def _wrong(where: str, row: dict[str, Any], name: str, expected: str) -> UserError:
    got = describe(row[name]) if name in row else f"nothing; the row's fields are {', '.join(map(repr, row)) or 'none'}"
    return UserError(f"{where}: field {name!r}: expected {expected}, got {got}")


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
