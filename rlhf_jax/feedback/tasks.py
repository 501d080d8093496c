"""Items to label, from JSONL files.

A row has a prompt, as text or messages, and `responses`, each text or an assistant message; or it is a comparison in
any form that training reads (data/reader.py). `ranks`, or chosen over rejected, become gold ranks on request; `sources`
may name the model of each response. After a prompt given as messages a response is the content of the next assistant
message; after a prompt given as text it continues the text directly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.dialogues import ROLES, Message, render_prompt
from rlhf_jax.data.jsonl import describe, read_rows
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import read_records
from rlhf_jax.data.records import Comparison
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


def read_demonstration_tasks(paths: Iterable[str | Path]) -> list[Item]:
    """Read prompts whose answer a labeller writes, or corrects where the row has one; duplicate rows become one item.

    Raises:
      UserError: `file:line: field 'x': expected …, got …`, and for a file without rows.
    """
    items: dict[str, Item] = {}
    for path in paths:
        empty = True
        for where, row in read_rows(path):
            empty = False
            prompt, turns = _prompt(where, row)
            if not prompt.strip():
                raise _wrong(where, row, "prompt", "a prompt to answer")
            for name in ("responses", "chosen", "rejected"):
                if name in row:
                    raise UserError(
                        f"{where}: field {name!r}: expected at most one answer to correct, as 'response' or "
                        "'completion', got several; give the file to --data"
                    )
            given = [name for name in ("response", "completion") if row.get(name) is not None]
            if len(given) > 1:
                raise UserError(
                    f"{where}: field 'response': expected either it or 'completion', got both; leave one out"
                )
            answers = [_response(where, name, row[name]) for name in given]
            item = make_item(prompt, [answer for answer in answers if answer.strip()], turns=turns)
            items.setdefault(item.id, item)
        if empty:
            raise UserError(f"{path}: expected one JSON object on each line, got no rows to label")
    return list(items.values())


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
    return make_item(record.prompt, responses, turns=record.turns, kind=kind, gold=(1, 2) if gold else ())


def _of_row(where: str, row: dict[str, Any], kind: str, gold: bool) -> Item:
    prompt, turns = _prompt(where, row)
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
    return make_item(
        prompt,
        responses,
        turns=turns,
        sources=sources,
        kind=kind,
        gold=_gold(where, row, len(values)) if gold else (),
    )


def _prompt(where: str, row: dict[str, Any]) -> tuple[str, tuple[Message, ...]]:
    """Text of a prompt, and its messages, () for one given as text."""
    prompt, turns = row.get("prompt"), tuple[Message, ...]()
    if isinstance(prompt, list) and prompt:
        turns = tuple(_message(where, f"prompt[{number}]", value) for number, value in enumerate(prompt))
        prompt = render_prompt(turns)
    if not isinstance(prompt, str):
        raise _wrong(where, row, "prompt", "text or a list of messages")
    return prompt, turns


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
