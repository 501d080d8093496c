"""Items to label, from JSONL files.

A row has a prompt and `responses`, or it is a comparison, in any form that training reads (data/reader.py). `ranks`, or
chosen over rejected, become gold ranks on request; `sources` may name the model of each response. After a prompt of
messages a response is the content of the next assistant message; after a prompt that is text it continues the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.forms import dialogue_field, exchange_of, prompt_fields
from rlhf_jax.data.jsonl import describe, read_rows
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import read_records
from rlhf_jax.data.records import Comparison
from rlhf_jax.data.rows import Row, Useless
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
) -> Item:
    """Make an item whose id is a hash of its prompt and responses, so that equal content has the same id everywhere."""
    content = json.dumps([prompt, turns, responses], ensure_ascii=False)
    id = hashlib.sha256(content.encode()).hexdigest()[:20]
    return Item(id, prompt, tuple(responses), tuple(turns), tuple(sources), kind, dense(gold))


def read_tasks(paths: Iterable[str | Path], *, kind: str = "task", gold: bool = False) -> list[Item]:
    """Read items from files; duplicate rows become one item.

    Args:
      paths: JSONL files.
      kind: of the items.
      gold: use ranks as gold ranks, which a quiz requires.

    Raises:
      UserError: `file:line: field 'x': expected …, got …`, and for a file without rows.
    """
    items: dict[str, Item] = {}
    for path in paths:
        if compares(path):
            read = [_of_comparison(record, kind, gold) for record in read_records(path, "comparisons", Ledger())]
        else:
            read = [_of_row(where, row, kind, gold) for where, row in read_rows(path)]
        if not read:
            raise UserError(f"{path}: expected one JSON object on each line, got no rows to label")
        items.update((item.id, item) for item in read if item.id not in items)
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
            "alone, got some that differ before it, which the page cannot show; leave the row out"
        )
    responses = [record.chosen, record.rejected]
    if record.turns:
        responses = [response.removeprefix(" ") for response in responses]
    return make_item(record.prompt, responses, turns=record.turns, kind=kind, gold=(1, 2) if gold else ())


def _of_row(where: str, row: dict[str, Any], kind: str, gold: bool) -> Item:
    checked = Row(where, row)
    checked.refuse_unread()
    row = checked.fields
    if not (prompt_fields(checked) or dialogue_field(checked)):
        raise _wrong(where, row, "prompt", "text or a list of messages")
    values = row.get("responses")
    if not isinstance(values, list) or not 2 <= len(values) <= MOST_RESPONSES:
        raise _wrong(where, row, "responses", f"a list of 2 to {MOST_RESPONSES}, or 'chosen' and 'rejected'")
    try:
        found = exchange_of(checked, [(f"responses[{number}]", value) for number, value in enumerate(values)])
    except Useless as useless:
        raise UserError(f"{where}: field 'prompt': expected a prompt to label responses to, got {useless}") from None
    if found.rests:
        raise UserError(
            f"{where}: field 'responses': expected one message of the assistant each, got more; leave it out"
        )
    responses = [text.removeprefix(" ") for text in found.texts] if found.turns else found.texts
    for number, response in enumerate(responses):
        if not response.strip():
            raise UserError(f"{where}: field 'responses[{number}]': expected text, got an empty response")
    if len(set(responses)) == 1:
        raise UserError(f"{where}: field 'responses': expected responses that differ, got the same text everywhere")
    sources = row.get("sources", [])
    if not isinstance(sources, list) or len(sources) not in (0, len(values)) or not _all(sources, str):
        raise _wrong(where, row, "sources", f"a list of {len(values)} names, one for each response")
    return make_item(
        found.prompt,
        responses,
        turns=found.turns,
        sources=sources,
        kind=kind,
        gold=_gold(where, row, len(values)) if gold else (),
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


def _wrong(where: str, row: dict[str, Any], name: str, expected: str) -> UserError:
    got = describe(row[name]) if name in row else f"nothing; the row's fields are {', '.join(map(repr, row)) or 'none'}"
    return UserError(f"{where}: field {name!r}: expected {expected}, got {got}")


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
