"""Assignment of items to labellers: leases, the quiz, calibration, drafts, judgements and undo.

A labeller gets the screening quiz first, then the calibration items, which everybody judges, then tasks in order. A
task is given out until enough people have judged it or hold a lease on it. A lease that is not renewed lapses, and the
item goes to somebody else. Every change carries a request id made by the page, so that a post whose response was lost
can be sent again: it gets the same reply, and nothing is counted twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.database import transaction
from rlhf_jax.feedback.records import Item
from rlhf_jax.feedback.shown import Answer, draft_of, judgement_of, shuffle
from rlhf_jax.feedback.store import Labeller, Store, insert_judgement, item_of

MOST_LEFT = 999
"""Items left for a labeller are counted to this number, which keeps the page fast however many there are."""


class Paused(Exception):
    """A post by a labeller whom the admin has paused; the page keeps what was written."""


class Conflict(Exception):
    """A request that conflicts with the current state; the page then asks for the next item."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings of the assignment.

    Attributes:
      wanted: labellers per task.
      lease: seconds without activity after which an item goes to somebody else.
      pass_mark: share of the quiz's ordered pairs that must be right.
    """

    wanted: int = 1
    lease: float = 1800.0
    pass_mark: float = 0.7


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The item on a labeller's page.

    Attributes:
      item: the item.
      order: indices of its responses in the order shown.
      draft: saved part of the answer, None without one.
      revision: number of the draft.
    """

    item: Item
    order: tuple[int, ...]
    draft: dict[str, Any] | None
    revision: int


class Queue:
    """Assignment of a store's items, which only one object may do at a time."""

    def __init__(self, store: Store, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        """Open the queue of a store; `clock` returns Unix time in seconds."""
        self.store, self.rules, self.clock = store, rules, clock
        self.page = store.page()
        self._db = store.db
        self.refresh()

    def refresh(self) -> None:
        """Take up new items, and another number of labellers per task than before."""
        with transaction(self._db):
            self._db.execute("UPDATE labellers SET cursor = 0")
        self.tasks, self.calibrations, self.quizzes = (
            self._count("SELECT count(*) FROM items WHERE kind = ?", kind) for kind in ("task", "calibration", "quiz")
        )
        self.judged = self._count(
            "SELECT count(*) FROM judgements j JOIN labellers l ON l.number = j.labeller "
            "JOIN items i ON i.number = j.item WHERE j.skip = '' AND l.role <> 'model' AND i.kind = 'task'"
        )

    def assign(self, labeller: Labeller) -> Assignment | None:
        """The labeller's current item, or else the next one; None without one, and for one who failed or is paused."""
        if labeller.paused:
            return None
        now = self.clock()
        held = self._held(labeller, now)
        if held is not None:
            return held
        with transaction(self._db):
            self._lapse(now)
            self._take_up(labeller, now)
        return self._held(labeller, now)

    def save_draft(self, labeller: Labeller, item: str, draft: Mapping[str, Any], revision: int) -> None:
        """Save an unfinished answer and renew its lease; an older revision than the saved one changes nothing.

        Raises:
          Conflict: if the item is no longer the labeller's.
        """
        with transaction(self._db):
            number = self._number(item)
            changed = self._db.execute(
                "UPDATE leases SET draft = iif(revision < ?1, ?2, draft), revision = max(revision, ?1), "
                "expires = max(expires, ?3) WHERE item = ?4 AND labeller = ?5",
                (revision, json.dumps(draft), self.clock() + self.rules.lease, number, labeller.number),
            )
            if not changed.rowcount:
                raise Conflict("this item is no longer yours")

    def judge(self, labeller: Labeller, request: str, answer: Answer) -> dict[str, Any]:
        """Store an answer to the labeller's item; a repeated request gets the same reply and changes nothing.

        Raises:
          Conflict: if the item is not the labeller's, or the request's id was used for another answer.
          Paused: if the admin has paused the labeller; so does `undo`.
          UserError: for an answer that does not fit the item.
        """
        if labeller.paused:
            raise Paused("the admin has paused your work; what you wrote is kept on this page")
        with transaction(self._db):
            digest = digest_of(dataclasses.astuple(answer))
            earlier = self.earlier(labeller, request, digest)
            if earlier is not None:
                return earlier
            now = self.clock()
            number = self._number(answer.item)
            lease = self._db.execute(
                "SELECT live, started FROM leases WHERE item = ? AND labeller = ?", (number, labeller.number)
            ).fetchone()
            if lease is None:
                raise Conflict("this item is not yours, or you have judged it")
            item = self._item(number)
            judgement = judgement_of(
                answer, item, labeller.name, self.order(labeller, item), self.page, now=now, started=lease[1]
            )
            insert_judgement(self._db, number, labeller.number, judgement)
            self._db.execute("DELETE FROM leases WHERE item = ? AND labeller = ?", (number, labeller.number))
            self.hold(number, (not judgement.skip) - lease[0])
            screening = self._screen(labeller) if item.kind == "quiz" else labeller.screening
            reply = {"item": item.id, "judged": self._judged_by(labeller), "screening": screening}
            self.keep(labeller, request, digest, reply)
        self.judged += item.kind == "task" and not judgement.skip
        return reply

    def undo(self, labeller: Labeller, request: str) -> dict[str, Any]:
        """Withdraw the labeller's last judgement and put its item on the page again, with the judgement as draft.

        Raises:
          Conflict: if there is no judgement, or it belongs to a finished quiz.
        """
        if labeller.paused:
            raise Paused("the admin has paused your work")
        with transaction(self._db):
            earlier = self.earlier(labeller, request, "undo")
            if earlier is not None:
                return earlier
            now = self.clock()
            row = self._db.execute(
                "SELECT j.number, j.item, j.ranks, j.ratings, j.flags, j.skip, j.seconds, j.more FROM judgements j "
                "WHERE j.labeller = ? ORDER BY j.number DESC LIMIT 1",
                (labeller.number,),
            ).fetchone()
            if row is None:
                raise Conflict("there is nothing to undo")
            judgement, number, ranks, ratings, flags, skip, seconds, more = row
            item = self._item(number)
            if item.kind == "quiz" and self._screening(labeller) != "open":
                raise Conflict("the screening questions are over and stay as they are")
            self.withdraw(judgement, now, "undone")
            columns = [json.loads(column) for column in (ranks, ratings, flags, more)]
            draft = draft_of(self.order(labeller, item), *columns, seconds=seconds)
            self._db.execute(
                "INSERT INTO leases (item, labeller, started, expires, live, draft, revision) "
                "VALUES (?, ?, ?, ?, 1, ?, 1)",
                (number, labeller.number, now - seconds, now + self.rules.lease, json.dumps(draft)),
            )
            self.hold(number, int(bool(skip)))
            reply = {"item": item.id, "judged": self._judged_by(labeller), "screening": self._screening(labeller)}
            self.keep(labeller, request, "undo", reply)
        self.judged -= item.kind == "task" and not skip
        return reply

    def order(self, labeller: Labeller, item: Item) -> tuple[int, ...]:
        """Order of the responses on the labeller's page."""
        return shuffle(len(item.responses), f"{self.store.salt}\n{item.id}\n{labeller.name}")

    def progress(self, labeller: Labeller) -> dict[str, Any]:
        """Counts for the labeller's page."""
        quiz = labeller.screening == "open" and self.quizzes > 0
        return {
            "mine": self._judged_by(labeller),
            "undoable": self._count("SELECT EXISTS (SELECT 1 FROM judgements WHERE labeller = ?)", labeller.number) > 0,
            "left": self._left(labeller),
            "most_left": MOST_LEFT,
            "judged": self.judged,
            "wanted": self.tasks * self.rules.wanted,
            "quiz": [self._seen(labeller, "quiz"), self.quizzes] if quiz else None,
        }

    def _held(self, labeller: Labeller, now: float) -> Assignment | None:
        """The item of the labeller's newest lease, if it is live for at least half of its time."""
        row = self._db.execute(
            "SELECT i.id, i.kind, i.content, x.draft, x.revision FROM leases x JOIN items i ON i.number = x.item "
            "WHERE x.number = (SELECT max(number) FROM leases WHERE labeller = ?) AND x.live AND x.expires > ?",
            (labeller.number, now + self.rules.lease / 2),
        ).fetchone()
        if row is None:
            return None
        item = item_of(*row[:3])
        return Assignment(item, self.order(labeller, item), None if row[3] is None else json.loads(row[3]), row[4])

    def _lapse(self, now: float) -> None:
        """Let expired leases lapse, which frees their items for others; drafts are kept."""
        lapsed = self._db.execute("SELECT number, item FROM leases WHERE live = 1 AND expires <= ?", (now,)).fetchall()
        for lease, item in lapsed:
            self._db.execute("UPDATE leases SET live = 0 WHERE number = ?", (lease,))
            self.hold(item, -1)

    def _take_up(self, labeller: Labeller, now: float) -> None:
        """Renew the labeller's newest lease, or else lease the next item if there is one."""
        while True:
            row = self._db.execute(
                "SELECT x.number, x.live, i.number, i.kind, i.held FROM leases x JOIN items i ON i.number = x.item "
                "WHERE x.labeller = ? ORDER BY x.number DESC LIMIT 1",
                (labeller.number,),
            ).fetchone()
            if row is None:
                break
            lease, live, item, kind, held = row
            if live or kind != "task" or held < self.rules.wanted:
                # Work on a lapsed item starts again, except for the time that its draft has taken.
                self._db.execute(
                    "UPDATE leases SET started = iif(live, started, max(started, ?1 - coalesce(draft ->> '$.seconds', "
                    "0))), live = 1, expires = ?2 WHERE number = ?3",
                    (now, now + self.rules.lease, lease),
                )
                self.hold(item, 1 - live)
                return
            # Others have judged the item meanwhile.
            self._db.execute("DELETE FROM leases WHERE number = ?", (lease,))
        number = self._next(labeller)
        if number is not None:
            self._db.execute(
                "INSERT INTO leases (item, labeller, started, expires, live) VALUES (?, ?, ?, ?, 1)",
                (number, labeller.number, now, now + self.rules.lease),
            )
            self.hold(number, 1)

    def _next(self, labeller: Labeller) -> int | None:
        screening = self._screening(labeller)
        if screening == "open":
            quiz = self._unseen(labeller, "quiz", 0)
            if quiz is not None:
                return quiz
            # All quiz items are answered, or the folder has no quiz.
            screening = self._screen(labeller)
        if screening == "failed":
            return None
        calibration = self._unseen(labeller, "calibration", 0)
        if calibration is not None:
            return calibration
        (cursor,) = self._db.execute("SELECT cursor FROM labellers WHERE number = ?", (labeller.number,)).fetchone()
        task = self._unseen(labeller, "task", cursor)
        if task is not None:
            self._db.execute("UPDATE labellers SET cursor = ? WHERE number = ?", (task, labeller.number))
        return task

    def _unseen(self, labeller: Labeller, kind: str, cursor: int) -> int | None:
        """The first item of a kind after the cursor that the labeller may get."""
        row = self._db.execute(
            "SELECT i.number FROM items i WHERE i.kind = ? AND i.number > ? AND (i.held < ? OR i.kind <> 'task') "
            "AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = i.number AND j.labeller = ?) "
            "ORDER BY i.number LIMIT 1",
            (kind, cursor, self.rules.wanted, labeller.number),
        ).fetchone()
        return None if row is None else int(row[0])

    def hold(self, item: int, change: int) -> None:
        """Change an item's number of leases and judgements, inside the caller's transaction."""
        if change:
            self._db.execute("UPDATE items SET held = held + ? WHERE number = ?", (change, item))
        if change < 0:
            # Labellers whose cursor passed the item while it was full must find it again.
            self._db.execute("UPDATE labellers SET cursor = ? WHERE cursor >= ?", (item - 1, item))

    def withdraw(self, judgement: int, now: float, why: str) -> None:
        """Move a judgement to those that were withdrawn, inside the caller's transaction."""
        self._db.execute(
            "INSERT INTO withdrawn (number, item, labeller, ranks, ratings, flags, skip, seconds, at, more, withdrawn, "
            "why) SELECT number, item, labeller, ranks, ratings, flags, skip, seconds, at, more, ?, ? "
            "FROM judgements WHERE number = ?",
            (now, why, judgement),
        )
        self._db.execute("DELETE FROM judgements WHERE number = ?", (judgement,))

    def _screen(self, labeller: Labeller) -> str:
        """Pass or fail the labeller once the whole quiz is answered, and return the status."""
        if self._screening(labeller) == "open" and self._seen(labeller, "quiz") == self.quizzes:
            passed = self.quiz_mark(labeller) >= self.rules.pass_mark
            self._db.execute(
                "UPDATE labellers SET screening = ? WHERE number = ?",
                ("passed" if passed else "failed", labeller.number),
            )
        return self._screening(labeller)

    def quiz_mark(self, labeller: Labeller) -> float:
        """Share of the quiz's ordered pairs that the labeller orders as gold; a tie counts half, a skip zero."""
        rows = self._db.execute(
            "SELECT i.content, j.ranks FROM judgements j JOIN items i ON i.number = j.item "
            "WHERE j.labeller = ? AND i.kind = 'quiz'",
            (labeller.number,),
        )
        right, pairs = 0.0, 0
        for content, given in rows:
            gold, ranks = json.loads(content)["gold"], json.loads(given)
            for a, b in itertools.combinations(range(len(gold)), 2):
                if gold[a] != gold[b]:
                    pairs += 1
                    if ranks:
                        right += 0.5 if ranks[a] == ranks[b] else (gold[a] < gold[b]) == (ranks[a] < ranks[b])
        return right / pairs if pairs else 1.0

    def _screening(self, labeller: Labeller) -> str:
        row = self._db.execute("SELECT screening FROM labellers WHERE number = ?", (labeller.number,)).fetchone()
        return str(row[0])

    def _seen(self, labeller: Labeller, kind: str) -> int:
        return self._count(
            "SELECT count(*) FROM items i JOIN judgements j ON j.item = i.number WHERE i.kind = ? AND j.labeller = ?",
            kind,
            labeller.number,
        )

    def _judged_by(self, labeller: Labeller) -> int:
        return self._count("SELECT count(*) FROM judgements WHERE labeller = ? AND skip = ''", labeller.number)

    def _left(self, labeller: Labeller) -> int:
        """Number of items that the labeller may still get, with the one on the page; at most MOST_LEFT + 1."""
        if labeller.paused or self._screening(labeller) == "failed":
            return 0
        unseen = "NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = i.number AND j.labeller = ?1)"
        return self._count(
            f"SELECT count(*) FROM (SELECT 1 FROM items i WHERE i.kind = 'calibration' AND {unseen} UNION ALL "
            "SELECT 1 FROM leases x JOIN items i ON i.number = x.item WHERE x.labeller = ?1 AND i.kind = 'task' "
            "AND (x.live OR i.held < ?2) UNION ALL "
            f"SELECT 1 FROM items i WHERE i.kind = 'task' AND i.held < ?2 AND {unseen} "
            "AND NOT EXISTS (SELECT 1 FROM leases x WHERE x.item = i.number AND x.labeller = ?1) "
            "AND i.number > (SELECT cursor FROM labellers WHERE number = ?1) LIMIT ?3)",
            labeller.number,
            self.rules.wanted,
            MOST_LEFT + 1,
        )

    def _count(self, query: str, *values: object) -> int:
        (count,) = self._db.execute(query, values).fetchone()
        return int(count)

    def _number(self, item: str) -> int:
        row = self._db.execute("SELECT number FROM items WHERE id = ?", (item,)).fetchone()
        if row is None:
            raise Conflict("there is no such item")
        return int(row[0])

    def _item(self, number: int) -> Item:
        row: Sequence[str] = self._db.execute(
            "SELECT id, kind, content FROM items WHERE number = ?", (number,)
        ).fetchone()
        return item_of(*row)

    def earlier(self, labeller: Labeller, request: str, digest: str) -> dict[str, Any] | None:
        """The reply to a request that was answered before, None for a new one.

        Raises:
          Conflict: if the request's id was used for something else.
        """
        row = self._db.execute(
            "SELECT sha256, answer FROM requests WHERE labeller = ? AND request = ?", (labeller.number, request)
        ).fetchone()
        if row is None:
            return None
        if row[0] != digest:
            raise Conflict("this request's id was used for something else")
        reply: dict[str, Any] = json.loads(row[1])
        return reply

    def keep(self, labeller: Labeller, request: str, digest: str, reply: Mapping[str, Any]) -> None:
        """Keep the reply to a request, inside the caller's transaction."""
        try:
            self._db.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?)", (labeller.number, request, digest, json.dumps(reply))
            )
        except sqlite3.IntegrityError:
            raise UserError("request: expected an id of 1 to 64 characters, got an empty or longer one") from None


def digest_of(content: object) -> str:
    """SHA-256 of a request's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
