"""Decisions of the admin: a labeller pauses, and judgements are rejected, whose items go back into the queue."""

from __future__ import annotations

from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.database import transaction
from rlhf_jax.feedback.queue import Conflict, Queue, digest_of
from rlhf_jax.feedback.shown import LONGEST_SKIP
from rlhf_jax.feedback.store import Labeller


def pause(queue: Queue, labeller: Labeller, paused: bool) -> None:
    """Give a labeller no more work, or work again.

    The item on a paused labeller's page goes to others; its draft stays.
    """
    db = queue.store.db
    with transaction(db):
        db.execute("UPDATE labellers SET paused = ? WHERE number = ?", (int(paused), labeller.number))
        if paused:
            held = db.execute(
                "SELECT number, item FROM leases WHERE labeller = ? AND live", (labeller.number,)
            ).fetchall()
            for lease, item in held:
                db.execute("UPDATE leases SET live = 0 WHERE number = ?", (lease,))
                queue.hold(item, -1)


def reject(
    queue: Queue, admin: Labeller, request: str, labeller: Labeller, why: str, item: str | None = None
) -> dict[str, Any]:
    """Withdraw judgements of a labeller; they stay in the folder with the reason, and their items are open again.

    Anybody may get the items, the same labeller included unless paused. Judgements of the quiz stay.

    Args:
      queue: of the folder.
      admin: who rejects.
      request: id made by the page; a repeated request gets the same reply and changes nothing.
      labeller: whose judgements.
      why: the reason.
      item: id of an item; by default all of the labeller's judgements.

    Returns:
      The number of judgements, as {"rejected": …}.

    Raises:
      Conflict: if there is no such judgement.
      UserError: without a reason.
    """
    if not why.strip() or len(why) > LONGEST_SKIP:
        raise UserError(f"why: expected a reason of 1 to {LONGEST_SKIP} characters, got {len(why.strip())}")
    db = queue.store.db
    digest = digest_of(["reject", labeller.number, item, why])
    with transaction(db):
        earlier = queue.earlier(admin, request, digest)
        if earlier is not None:
            return earlier
        rows = db.execute(
            "SELECT j.number, j.item, j.skip, i.kind FROM judgements j JOIN items i ON i.number = j.item "
            "WHERE j.labeller = ?1 AND i.kind <> 'quiz' AND (?2 IS NULL OR i.id = ?2)",
            (labeller.number, item),
        ).fetchall()
        if not rows:
            raise Conflict("there is no such judgement; those of the quiz stay")
        for judgement, number, skip, _ in rows:
            queue.withdraw(judgement, queue.clock(), f"rejected: {why.strip()}")
            if labeller.role != "model" and not skip:
                queue.hold(number, -1)
            # The labeller's cursor has passed a skipped item, which nobody holds.
            db.execute("UPDATE labellers SET cursor = min(cursor, ?) WHERE number = ?", (number - 1, labeller.number))
        reply = {"rejected": len(rows)}
        queue.keep(admin, request, digest, reply)
    if labeller.role != "model":
        queue.judged -= sum(kind == "task" and not skip for _, _, skip, kind in rows)
    return reply
