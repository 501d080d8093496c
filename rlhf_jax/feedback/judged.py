"""Items and judgements as JSONL, and their checked join.

An item is {"id", "prompt": text or messages, "responses", "sources", "kind", "gold", "ended"}; a judgement is {"item",
"labeller", "ranks", "ratings", "flags": a list of names for each response, "skip", "seconds", "at", "comments": one for
each response, "rationale", "demonstration", "corrects"}. Fields with a default in records.py are optional.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.data.dialogues import Message, prompt_row, render_prompt
from rlhf_jax.data.jsonl import describe
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import cut_marks
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tables import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.page import Page
from rlhf_jax.feedback.records import MOST_RESPONSES, Item, Judgement
from rlhf_jax.feedback.tasks import read_tasks

KINDS = ("task", "calibration", "quiz")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Items by id, and judgements paired with their items, sorted by (item, labeller)."""

    items: dict[str, Item]
    judgements: tuple[tuple[Item, Judgement], ...]

    @property
    def labellers(self) -> tuple[str, ...]:
        """Names of all labellers, people and models, in alphabetical order."""
        return tuple(sorted({judgement.labeller for _, judgement in self.judgements}))


def join(items: Iterable[Item], judgements: Iterable[Judgement]) -> Judged:
    """Pair each judgement with its item.

    Raises:
      UserError: for two items with the same id, a judgement of an unknown item, ranks, ratings or flags that are not
        one per response, and two judgements of one item by one labeller.
    """
    known: dict[str, Item] = {}
    for item in items:
        if known.setdefault(item.id, item) != item:
            raise UserError(f"item {item.id}: expected unique ids, got two items with this one")
    pairs = []
    seen: set[tuple[str, str]] = set()
    for judgement in judgements:
        where = f"judgement of item {judgement.item} by {judgement.labeller}"
        if judgement.item not in known:
            raise UserError(
                f"{where}: expected one of the {len(known)} items given, got an unknown item; give the items that were "
                "judged"
            )
        item = known[judgement.item]
        if (judgement.item, judgement.labeller) in seen:
            raise UserError(f"{where}: expected one judgement, got two; keep the later one")
        seen.add((judgement.item, judgement.labeller))
        count = len(item.responses)
        ranked = count if count > 1 else 0
        if len(judgement.ranks) != ranked and (judgement.ranks or not judgement.skip):
            raise UserError(f"{where}: ranks: expected {ranked}, one for each response, got {len(judgement.ranks)}")
        several = (("ratings", judgement.ratings), ("flags", judgement.flags), ("comments", judgement.comments))
        for name, values in several:
            if values and len(values) != count:
                raise UserError(f"{where}: {name}: expected {count}, one for each response, got {len(values)}")
        pairs.append((item, judgement))
    pairs.sort(key=lambda pair: (pair[0].id, pair[1].labeller))
    return Judged(known, tuple(pairs))


def read_items(paths: Iterable[str | Path], ledger: Ledger | None = None) -> list[Item]:
    """Read items from JSONL files; a file whose first row has no id is read by `read_tasks`, with the ledger.

    Raises:
      UserError: with file, line and field.
    """
    items: list[Item] = []
    for path in paths:
        first = next(read_rows(path), None)
        if first is not None and "id" not in first[1]:
            items += read_tasks([path], ledger=ledger)
        else:
            items += [_item(where, row) for where, row in read_rows(path)]
    return items


def read_judgements(paths: Iterable[str | Path], page: Page | None = None) -> list[Judgement]:
    """Read judgements from JSONL files.

    Args:
      paths: of the files.
      page: flags and rating scale; by default the page's own.

    Raises:
      UserError: with file, line and field.
    """
    page = page or Page()
    return [_judgement(where, row, page) for path in paths for where, row in read_rows(path)]


def item_row(item: Item) -> dict[str, Any]:
    """The JSON object that `read_items` reads as this item."""
    asked: dict[str, Any] = prompt_row(item.turns) if item.turns else {"prompt": item.prompt}
    row = {"id": item.id, **asked, "responses": list(item.responses), "kind": item.kind}
    more = (("sources", item.sources), ("gold", item.gold), ("ended", item.ended))
    return row | {name: list(values) for name, values in more if values}


def judgement_row(judgement: Judgement) -> dict[str, Any]:
    """The JSON object that `read_judgements` reads as this judgement; texts that were not given are left out."""
    row = dataclasses.asdict(judgement)
    for name in ("comments", "rationale", "demonstration", "corrects"):
        if row[name] in ((), "", None):
            del row[name]
    return row | {"flags": [sorted(flags) for flags in judgement.flags]}


def _wrong(where: str, field: str, value: object, expected: str) -> UserError:
    got = "nothing" if value is None else describe(value)
    return UserError(f"{where}: field {field!r}: expected {expected}, got {got}")


def _field(
    where: str, row: dict[str, Any], field: str, kind: type | tuple[type, ...], default: Any, expected: str
) -> Any:
    value = row.get(field, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _wrong(where, field, value, expected)
    return value


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(where: str, row: dict[str, Any], field: str, fits: Any, expected: str, default: Any = ()) -> tuple[Any, ...]:
    values = _field(where, row, field, (list, tuple), default, f"a list of {expected}")
    for number, value in enumerate(values):
        if not fits(value):
            raise _wrong(where, f"{field}[{number}]", value, expected)
    return tuple(values)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _rank(value: object) -> bool:
    return _whole(value) and value >= 1  # type: ignore[operator]


def _item(where: str, row: dict[str, Any]) -> Item:
    checked = Row(where, row)
    checked.refuse_unread()
    if checked.has_system:
        raise UserError(
            f"{where}: field 'system': expected an item with it in the prompt's messages, got it beside them"
        )
    prompt = row.get("prompt")
    turns: tuple[Message, ...] = ()
    if isinstance(prompt, list) and prompt:
        turns = checked.with_context(checked.turns("prompt").messages)
        prompt = render_prompt(turns)
    if not isinstance(prompt, str):
        raise _wrong(where, "prompt", prompt, "text or a list of messages")
    responses = _list(where, row, "responses", _text, "text", None)
    if len(responses) > MOST_RESPONSES or (len(responses) < 2 and row.get("kind", "task") != "task"):
        raise _wrong(
            where, "responses", list(responses), f"2 to {MOST_RESPONSES}; fewer for a demonstration's task only"
        )
    sources = _list(where, row, "sources", _text, "text")
    gold = _list(where, row, "gold", _rank, "whole numbers from 1")
    ended = _list(where, row, "ended", lambda value: isinstance(value, bool), "true or false")
    for field, values in (("sources", sources), ("gold", gold), ("ended", ended)):
        if values and len(values) != len(responses):
            raise _wrong(where, field, list(values), f"{len(responses)}, one for each response")
    kind = _field(where, row, "kind", str, "task", f"one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise _wrong(where, "kind", kind, f"one of {', '.join(KINDS)}")
    id = _field(where, row, "id", str, None, "text")
    return Item(id, prompt, responses, turns, sources, kind, gold, cut_marks(ended))


def _judgement(where: str, row: dict[str, Any], page: Page) -> Judgement:
    flags = _list(where, row, "flags", lambda names: isinstance(names, list), "lists of names")
    for number, names in enumerate(flags):
        for name in names:
            if name not in page.flags:
                raise _wrong(where, f"flags[{number}]", name, f"names among {', '.join(page.flags)}")
    rated = f"1 to {page.points} or null" if page.points else "null, as the page has no ratings"
    ratings = _list(where, row, "ratings", lambda one: one is None or (_whole(one) and one in page.ratings), rated)
    corrects = row.get("corrects")
    if corrects is not None and (not _whole(corrects) or corrects < 0):
        raise _wrong(where, "corrects", corrects, "the place of a response, from 0, or null")
    return Judgement(
        item=_field(where, row, "item", str, None, "text"),
        labeller=_field(where, row, "labeller", str, None, "text"),
        ranks=_list(where, row, "ranks", _rank, "whole numbers from 1"),
        ratings=ratings,
        flags=tuple(frozenset(names) for names in flags),
        skip=_field(where, row, "skip", str, "", "text"),
        seconds=float(_field(where, row, "seconds", (int, float), 0.0, "a number")),
        at=float(_field(where, row, "at", (int, float), 0.0, "a number")),
        comments=_list(where, row, "comments", _text, "text"),
        rationale=_field(where, row, "rationale", str, "", "text"),
        demonstration=_field(where, row, "demonstration", str, "", "text"),
        corrects=corrects,
    )
