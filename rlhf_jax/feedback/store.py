"""The contents of a labelling folder as records: items, labellers with their tokens, and judgements.

`queue.py` assigns items to labellers; judgements from elsewhere, e.g. a model's, are added by `record`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rlhf_jax.data.dialogues import FullMessage
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.database import FILE, connect, transaction
from rlhf_jax.feedback.page import Page, parse_page
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.files import sync_folder

Role = Literal["labeller", "admin", "model"]
AI = "ai:"
LONGEST = {"demonstration": 20_000, "rationale": 5_000, "comments": 2_000}
"""Characters in the texts of a judgement."""
_NAME = re.compile(r"[\w.@+ -]{1,80}")


@dataclasses.dataclass(frozen=True)
class Labeller:
    """A person or a model.

    Attributes:
      number: in the database.
      name: as the admin gave it.
      role: of the account.
      screening: "open" until the quiz is finished, then "passed" or "failed".
      paused: 1 if the admin gives the labeller no work for now.
    """

    number: int
    name: str
    role: Role
    screening: str
    paused: int = 0


class Store:
    """The database of one labelling folder, with one writer and any number of readers."""

    def __init__(self, folder: Path, *, read_only: bool = False, checked: bool = False) -> None:
        """Open a folder.

        Args:
          folder: created by a writer if it is missing.
          read_only: open as a reader.
          checked: skip the integrity check, for a folder that was just checked.

        Raises:
          UserError: if the folder is not a labelling folder, damaged, or of another version.
        """
        if read_only and not (folder / FILE).exists():
            raise UserError(f"{folder}: expected a labelling folder, as made by `rlhf-jax label`, got no {FILE} in it")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.db = connect(folder / FILE, read_only=read_only, checked=checked)
        (self.salt,) = self.db.execute("SELECT value FROM about WHERE name = 'salt'").fetchone()
        if not read_only:
            sync_folder(folder)

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def beside(self) -> Store:
        """A new read-only connection to the same folder, for another thread."""
        return Store(self.folder, read_only=True, checked=True)

    def add_items(self, items: Iterable[Item]) -> int:
        """Add items and return the number of new ones; stored items are not changed.

        Raises:
          UserError: for an item that cannot be compared, or is stored with another kind or other gold ranks.
        """
        added = 0
        with transaction(self.db):
            for item in items:
                _refuse_item(item)
                found = self.db.execute("SELECT kind, content FROM items WHERE id = ?", (item.id,)).fetchone()
                if found is None:
                    self.db.execute(
                        "INSERT INTO items (id, kind, responses, content) VALUES (?, ?, ?, ?)",
                        (item.id, item.kind, len(item.responses), _content(item)),
                    )
                    added += 1
                elif found[0] != item.kind:
                    raise UserError(f"item {item.id}: expected kind {found[0]}, as stored, got {item.kind}")
                elif item.gold and tuple(json.loads(found[1])["gold"]) != item.gold:
                    raise UserError(f"item {item.id}: expected gold ranks as stored, got {list(item.gold)}")
        return added

    def ask_first(self, ids: Sequence[str]) -> None:
        """Move tasks to the front of the queue, in this order; the others keep their order.

        Raises:
          UserError: for an id that is not a task's.
        """
        with transaction(self.db):
            rows = self.db.execute("SELECT id, number FROM items WHERE kind = 'task' ORDER BY number")
            numbers: dict[str, int] = dict(rows)
            for id in ids:
                if id not in numbers:
                    raise UserError(
                        f"item {id}: expected one of the folder's tasks, got an unknown id in the order to ask in"
                    )
            order = dict.fromkeys([*ids, *numbers])
            self.db.execute("CREATE TEMP TABLE moves (old INTEGER PRIMARY KEY, new INTEGER NOT NULL)")
            self.db.executemany("INSERT INTO moves VALUES (?, ?)", zip((numbers[id] for id in order), numbers.values()))
            # Other tables refer to items by number. Numbers are negative in between, so that no two rows share one.
            self.db.execute("PRAGMA defer_foreign_keys = ON")
            for table in ("items", "leases", "judgements", "withdrawn"):
                column = "number" if table == "items" else "item"
                self.db.execute(
                    f"UPDATE {table} SET {column} = -(SELECT new FROM moves WHERE old = {column}) "
                    f"WHERE {column} IN (SELECT old FROM moves)"
                )
                self.db.execute(f"UPDATE {table} SET {column} = -{column} WHERE {column} < 0")
            self.db.execute("DROP TABLE moves")
            self.db.execute("UPDATE labellers SET cursor = 0")

    def items(self) -> list[Item]:
        """All items, in the order of the queue."""
        rows = self.db.execute("SELECT id, kind, content FROM items ORDER BY number")
        return [item_of(*row) for row in rows]

    def judgements(self) -> list[Judgement]:
        """All judgements that were not withdrawn, in the order of arrival."""
        return list(self.each_judgement())

    def each_judgement(self, after: int = 0) -> Iterator[Judgement]:
        """Judgements that were not withdrawn, after the one with this number."""
        rows = self.db.execute(
            f"{_JUDGEMENTS} WHERE j.number > ? ORDER BY j.number",
            (after,),
        )
        yield from (_judgement_of(*row) for row in rows)

    def record(self, judgements: Iterable[Judgement]) -> int:
        """Add judgements that were not made on the page, and return the number of new ones.

        Judgements by models do not count towards the labellers per task. One that is stored already changes nothing.

        Raises:
          UserError: for a judgement that does not fit an item here, or differs in any field from the stored one.
        """
        added = 0
        page = self.page()
        with transaction(self.db):
            for judgement in judgements:
                row = self.db.execute("SELECT number, responses FROM items WHERE id = ?", (judgement.item,)).fetchone()
                if row is None:
                    raise UserError(
                        f"item {judgement.item}: expected one of the folder's items, got a judgement of an unknown one"
                    )
                refuse_judgement(judgement, row[1], page)
                labeller = self._labeller(
                    judgement.labeller, "model" if judgement.labeller.startswith(AI) else "labeller"
                )
                found = self.db.execute(
                    f"{_JUDGEMENTS} WHERE j.item = ? AND j.labeller = ?", (row[0], labeller.number)
                ).fetchone()
                if found is None:
                    insert_judgement(self.db, row[0], labeller.number, judgement)
                    if labeller.role != "model" and not judgement.skip:
                        self.db.execute("UPDATE items SET held = held + 1 WHERE number = ?", (row[0],))
                    added += 1
                elif (stored := _judgement_of(*found)) != judgement:
                    field = next(name for name in vars(stored) if vars(stored)[name] != vars(judgement)[name])
                    raise UserError(
                        f"item {judgement.item}: field {field!r}: expected the judgement by {judgement.labeller} as "
                        f"stored, got another: {vars(judgement)[field]!r}, stored is {vars(stored)[field]!r}; record "
                        "it under another labeller's name, or reject the stored one on the admin's page first"
                    )
        return added

    def page(self) -> Page:
        """Settings of the page."""
        row = self.db.execute("SELECT value FROM about WHERE name = 'page'").fetchone()
        return Page() if row is None else parse_page(f"{self.folder}", json.loads(row[0]))

    def set_page(self, page: Page) -> None:
        """Keep settings of the page with the folder.

        Raises:
          UserError: if judgements in the folder have flags that the page lacks, or ratings on another scale.
        """
        used = "SELECT DISTINCT flag.value FROM judgements j, json_each(j.flags) r, json_each(r.value) flag"
        missing = sorted({name for (name,) in self.db.execute(used)} - page.flags.keys())
        if missing:
            raise UserError(
                f"page: field 'flags': expected the flags that judgements in {self.folder} have, got none named "
                f"{', '.join(missing)}; keep them, or use another folder"
            )
        rated = "SELECT EXISTS (SELECT 1 FROM judgements j, json_each(j.ratings) r WHERE r.value IS NOT NULL)"
        if page.points != (points := self.page().points) and self.db.execute(rated).fetchone()[0]:
            raise UserError(
                f"page: field 'scale.points': expected {points}, on which answers in {self.folder} were rated, got "
                f"{page.points}; keep it, or use another folder"
            )
        with transaction(self.db):
            self.db.execute("INSERT OR REPLACE INTO about VALUES ('page', ?)", (json.dumps(page.settings()),))

    def add_labeller(self, name: str, role: Role = "labeller") -> Labeller:
        """The labeller of this name, created if new.

        Raises:
          UserError: for an invalid name, or a stored labeller with another role.
        """
        if not _NAME.fullmatch(name) or name != name.strip():
            raise UserError(f"labeller: expected 1 to 80 letters, digits, spaces and . _ @ + -, got {name[:100]!r}")
        with transaction(self.db):
            return self._labeller(name, role)

    def labellers(self) -> list[Labeller]:
        """All labellers, in the order in which they were added."""
        rows = self.db.execute("SELECT number, name, role, screening, paused FROM labellers ORDER BY number")
        return [Labeller(*row) for row in rows]

    def new_token(self, labeller: Labeller) -> str:
        """Make a new token for the labeller. Only its hash is stored, so it cannot be shown again."""
        token = secrets.token_urlsafe(24)
        with transaction(self.db):
            self.db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (_hash(token), labeller.number, time.time()))
        return token

    def revoke(self, labeller: Labeller) -> None:
        """Delete all tokens of the labeller."""
        with transaction(self.db):
            self.db.execute("DELETE FROM tokens WHERE labeller = ?", (labeller.number,))

    def has_token(self, labeller: Labeller) -> bool:
        """True if the labeller has a token to sign in with."""
        return self.db.execute("SELECT 1 FROM tokens WHERE labeller = ?", (labeller.number,)).fetchone() is not None

    def by_token(self, token: str) -> Labeller | None:
        """The labeller that a token belongs to, None for an unknown token."""
        # The look-up is by hash, so its duration reveals nothing about valid tokens.
        row = self.db.execute(
            "SELECT l.number, l.name, l.role, l.screening, l.paused FROM tokens t "
            "JOIN labellers l ON l.number = t.labeller WHERE t.sha256 = ?",
            (_hash(token),),
        ).fetchone()
        return None if row is None else Labeller(*row)

    def _labeller(self, name: str, role: Role) -> Labeller:
        self.db.execute(
            "INSERT INTO labellers (name, role, added) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (name, role, time.time()),
        )
        row = self.db.execute(
            "SELECT number, name, role, screening, paused FROM labellers WHERE name = ?", (name,)
        ).fetchone()
        labeller = Labeller(*row)
        if labeller.role != role:
            raise UserError(f"labeller {name!r}: expected the role {labeller.role}, as stored, got {role}")
        return labeller


def item_of(id: str, kind: str, content: str) -> Item:
    """Make an item from its columns."""
    fields = json.loads(content)
    return Item(
        id=id,
        prompt=fields["prompt"],
        responses=tuple(fields["responses"]),
        turns=tuple(FullMessage.of(turn) for turn in fields["turns"]),
        sources=tuple(fields["sources"]),
        kind=kind,
        gold=tuple(fields["gold"]),
        ended=tuple(fields.get("ended", ())),
    )


def insert_judgement(db: sqlite3.Connection, item: int, labeller: int, judgement: Judgement) -> None:
    """Insert a judgement's row, inside the caller's transaction."""
    db.execute(
        "INSERT INTO judgements (item, labeller, ranks, ratings, flags, skip, seconds, at, more) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            item,
            labeller,
            json.dumps(judgement.ranks),
            json.dumps(judgement.ratings),
            json.dumps([sorted(names) for names in judgement.flags]),
            judgement.skip,
            judgement.seconds,
            judgement.at,
            json.dumps({name: value for name in MORE if (value := vars(judgement)[name]) not in _NOTHING}),
        ),
    )


MORE = ("comments", "rationale", "demonstration", "corrects")
_NOTHING: tuple[object, ...] = ((), "", None)
_JUDGEMENTS = (
    "SELECT i.id, l.name, j.ranks, j.ratings, j.flags, j.skip, j.seconds, j.at, j.more FROM judgements j "
    "JOIN items i ON i.number = j.item JOIN labellers l ON l.number = j.labeller"
)


def _judgement_of(
    item: str, name: str, ranks: str, ratings: str, flags: str, skip: str, seconds: float, at: float, more: str
) -> Judgement:
    """Make a judgement from the columns of _JUDGEMENTS."""
    texts = json.loads(more)
    if "comments" in texts:
        texts["comments"] = tuple(texts["comments"])
    return Judgement(
        item=item,
        labeller=name,
        ranks=tuple(json.loads(ranks)),
        ratings=tuple(json.loads(ratings)),
        flags=tuple(frozenset(names) for names in json.loads(flags)),
        skip=skip,
        seconds=seconds,
        at=at,
        **texts,
    )


def refuse_judgement(judgement: Judgement, responses: int, page: Page) -> None:
    """Check a judgement of an item with this number of responses.

    Raises:
      UserError: naming the field that does not fit.
    """
    if judgement.skip:
        if judgement.ranks:
            raise UserError("ranks: expected ranks or a reason to skip, got both")
    elif responses < 2:
        if judgement.ranks:
            raise UserError(f"ranks: expected none, as there is nothing to compare, got {list(judgement.ranks)}")
        if not judgement.demonstration.strip():
            raise UserError("demonstration: expected an answer to the prompt, or a reason to skip, got neither")
    elif len(judgement.ranks) != responses or not all(1 <= rank <= responses for rank in judgement.ranks):
        otherwise = "" if judgement.ranks else ", or a reason to skip"
        raise UserError(
            f"ranks: expected {responses} numbers from 1 (best) to {responses}{otherwise}, got {list(judgement.ranks)}"
        )
    texts = (("ratings", judgement.ratings), ("flags", judgement.flags), ("comments", judgement.comments))
    for name, values in texts:
        if values and len(values) != responses:
            raise UserError(f"{name}: expected {responses}, one for each response, got {len(values)}")
    for rating in judgement.ratings:
        if rating is not None and rating not in page.ratings:
            raise UserError(f"ratings: expected {f'1 to {page.points}' if page.points else 'none'}, got {rating}")
    for flag in sorted(frozenset().union(*judgement.flags)):
        if flag not in page.flags:
            raise UserError(f"flags: expected some of {', '.join(page.flags) or 'none'}, got {flag[:40]!r}")
    for name, most in LONGEST.items():
        value = vars(judgement)[name]
        longest = max(map(len, (value,) if isinstance(value, str) else value), default=0)
        if longest > most:
            raise UserError(f"{name}: expected at most {most:,} characters, got {longest:,}")
    if judgement.corrects is not None and not (0 <= judgement.corrects < responses and judgement.demonstration):
        raise UserError(
            f"corrects: expected the place of one of {responses} responses, with a demonstration, got "
            f"{judgement.corrects}"
        )


def dense(ranks: Sequence[int]) -> tuple[int, ...]:
    """Renumber ranks without gaps (1, 2, …), keeping their order and ties."""
    places = sorted(set(ranks))
    return tuple(places.index(rank) + 1 for rank in ranks)


def _refuse_item(item: Item) -> None:
    if len(item.responses) > 9 or (len(item.responses) < 2 and item.kind != "task"):
        raise UserError(
            f"item {item.id}: expected 2 to 9 responses, or none or one for a demonstration, got {len(item.responses)}"
        )
    if item.kind == "quiz" and len(set(item.gold)) < 2:
        raise UserError(
            f"item {item.id}: expected gold ranks that differ, by which a quiz is marked, got {list(item.gold)}"
        )
    for name, values in (("gold ranks", item.gold), ("sources", item.sources), ("ended", item.ended)):
        if values and len(values) != len(item.responses):
            raise UserError(f"item {item.id}: expected {len(item.responses)} {name}, got {len(values)}")


def _content(item: Item) -> str:
    fields = {
        "prompt": item.prompt,
        "turns": [turn.stored() for turn in item.turns],
        "responses": item.responses,
        "sources": item.sources,
        "gold": item.gold,
        # Folders from before responses were marked as cut have no such field.
        **({"ended": item.ended} if item.ended else {}),
    }
    return json.dumps(fields, ensure_ascii=False)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
