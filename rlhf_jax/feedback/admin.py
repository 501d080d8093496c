"""Statistics for the admin page as plain JSON: throughput, progress, agreement, disagreements and win rates."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.feedback.agreement import report
from rlhf_jax.feedback.judged import join
from rlhf_jax.feedback.records import FLAGS, Item, Judgement
from rlhf_jax.feedback.store import AI, Store, item_of
from rlhf_jax.feedback.win_rates import win_rates

# Agreement is computed from this many items, those judged last, to keep the page fast.
RECENT = 2000
RESAMPLES = 200
SHOWN = 20
HOURS = 24
LATEST = 30
MOST_CHARACTERS = 100
"""Characters of prompt and responses per second above which nobody can have read them: 1,000 words a minute."""
STUCK = (600.0, 5.0)
"""A labeller is stuck on an item after this number of seconds and this multiple of their own median time."""


def throughput(store: Store, now: float) -> dict[str, Any]:
    """Counts and times of every labeller, and the number of judgements in each of the last 24 hours, oldest first."""
    hours = [0] * HOURS
    for (at,) in store.db.execute("SELECT at FROM judgements WHERE at > ? AND skip = ''", (now - HOURS * 3600,)):
        hours[max(HOURS - 1 - int((now - at) // 3600), 0)] += 1
    rows = store.db.execute(
        "SELECT l.name, l.role, l.screening, l.paused, count(j.number), coalesce(sum(j.skip <> ''), 0), max(j.at), "
        "coalesce(sum(j.at > ? AND j.skip = ''), 0) FROM labellers l LEFT JOIN judgements j ON j.labeller = l.number "
        "GROUP BY l.number ORDER BY l.number",
        (now - 3600,),
    ).fetchall()
    people = [
        {
            "name": name,
            "role": role,
            "screening": screening,
            "paused": bool(paused),
            "judged": judged - skipped,
            "skipped": skipped,
            "last": last,
            "last_hour": last_hour,
            **_pace(store, name, now),
        }
        for name, role, screening, paused, judged, skipped, last, last_hour in rows
    ]
    return {"hours": hours, "people": people}


def progress(store: Store, wanted: int) -> dict[str, Any]:
    """Number of items of each kind, and of tasks that have `wanted` judgements."""
    kinds = dict(store.db.execute("SELECT kind, count(*) FROM items GROUP BY kind").fetchall())
    done = store.db.execute(
        "SELECT sum(n >= ?1), sum(min(n, ?1)) FROM (SELECT count(*) AS n FROM judgements j "
        "JOIN labellers l ON l.number = j.labeller JOIN items i ON i.number = j.item "
        "WHERE j.skip = '' AND l.role <> 'model' AND i.kind = 'task' GROUP BY j.item)",
        (wanted,),
    ).fetchone()
    tasks = kinds.get("task", 0)
    return {
        "items": {kind: kinds.get(kind, 0) for kind in ("task", "calibration", "quiz")},
        "finished": done[0] or 0,  # SQL's sum over no rows is null
        "judged": done[1] or 0,
        "wanted": tasks * wanted,
    }


def recent(store: Store, limit: int = RECENT) -> tuple[list[Item], list[Judgement]]:
    """The items judged last, without quiz items, and all their judgements."""
    rows = store.db.execute(
        "SELECT i.id, i.kind, i.content FROM items i WHERE i.number IN "
        "(SELECT item FROM judgements GROUP BY item ORDER BY max(number) DESC LIMIT ?) AND i.kind <> 'quiz' "
        "ORDER BY i.number",
        (limit,),
    )
    items = [item_of(*row) for row in rows]
    ids = {item.id for item in items}
    return items, [judgement for judgement in store.each_judgement() if judgement.item in ids]


def agreement(
    items: Sequence[Item], judgements: Sequence[Judgement], flag_names: Sequence[str] = FLAGS
) -> dict[str, Any]:
    """The report of `agreement.report`, and the win rates of items that name their sources."""
    return {
        "agreement": report(join(items, judgements), flag_names=flag_names, resamples=RESAMPLES),
        "win_rates": win_rates(items, judgements, flag_names),
        "items": len(items),
        "most": RECENT,
    }


def disagreements(items: Iterable[Item], judgements: Iterable[Judgement], shown: int = SHOWN) -> list[dict[str, Any]]:
    """Items with the most disagreement, by the share of ordered pairs on which two people's orders differ."""
    by_item: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.ranks and not judgement.labeller.startswith(AI):
            by_item[judgement.item].append(judgement)
    known = {item.id: item for item in items}
    measured = [(_turned(given), id) for id, given in by_item.items() if len(given) > 1]
    worst = sorted((pair for pair in measured if pair[0] > 0), key=lambda pair: (-pair[0], pair[1]))[:shown]
    return [
        {
            "disagreement": share,
            **{name: value for name, value in vars(known[id]).items() if name != "turns"},
            "turns": [{"role": turn.role, "content": turn.text} for turn in known[id].turns],
            "judgements": [
                {
                    "labeller": judgement.labeller,
                    "ranks": judgement.ranks,
                    "ratings": judgement.ratings,
                    "flags": [sorted(names) for names in judgement.flags],
                    "comments": judgement.comments,
                    "rationale": judgement.rationale,
                }
                for judgement in by_item[id]
            ],
        }
        for share, id in worst
    ]


def _turned(given: Sequence[Judgement]) -> float:
    turned, pairs = 0, 0
    for one, other in itertools.combinations(given, 2):
        for a, b in itertools.combinations(range(len(one.ranks)), 2):
            first, second = one.ranks[a] - one.ranks[b], other.ranks[a] - other.ranks[b]
            pairs += bool(first and second)
            turned += first * second < 0
    return turned / pairs if pairs else 0.0


_LENGTH = (
    "length(i.content ->> '$.prompt') + (SELECT coalesce(sum(length(r.value)), 0) FROM json_each(i.content, "
    "'$.responses') r)"
)


def _pace(store: Store, name: str, now: float) -> dict[str, Any]:
    """Median time of the last 200 judgements, how many were too fast to have been read, and whether work is stuck."""
    rows = store.db.execute(
        f"SELECT j.seconds, {_LENGTH} FROM judgements j JOIN items i ON i.number = j.item "
        "WHERE j.labeller = (SELECT number FROM labellers WHERE name = ?) AND j.skip = '' "
        "ORDER BY j.number DESC LIMIT 200",
        (name,),
    ).fetchall()
    median = statistics.median(seconds for seconds, _ in rows) if rows else None
    (started,) = store.db.execute(
        "SELECT max(x.started) FROM leases x JOIN labellers l ON l.number = x.labeller "
        "WHERE l.name = ? AND x.live AND x.expires > ?",
        (name, now),
    ).fetchone()
    on_item = None if started is None else now - started
    return {
        "median_seconds": median,
        "too_fast": sum(too_fast(*row) for row in rows),
        "paced": len(rows),
        "on_item": on_item,
        "stuck": on_item is not None and on_item > max(STUCK[0], STUCK[1] * (median or 0.0)),
    }


def too_fast(seconds: float, characters: int) -> bool:
    """True if nobody can have read so much in this time; the page counts whole seconds, so one more is allowed."""
    return (seconds + 1) * MOST_CHARACTERS < characters


def skips(store: Store, limit: int = LATEST) -> dict[str, Any]:
    """How often each reason to skip was given, and the latest skips."""
    reasons = store.db.execute(
        "SELECT skip, count(*) FROM judgements WHERE skip <> '' GROUP BY skip ORDER BY count(*) DESC, skip LIMIT ?",
        (limit,),
    ).fetchall()
    return {"reasons": reasons, "latest": _latest(store, "j.skip <> ''", limit)}


def latest(store: Store, limit: int = LATEST) -> list[dict[str, Any]]:
    """The latest judgements, without skips and those of the quiz."""
    return _latest(store, "j.skip = '' AND i.kind <> 'quiz'", limit)


def _latest(store: Store, which: str, limit: int) -> list[dict[str, Any]]:
    rows = store.db.execute(
        f"SELECT i.id, l.name, i.content ->> '$.prompt', j.ranks, j.skip, j.seconds, j.at, j.more, {_LENGTH} "
        "FROM judgements j JOIN items i ON i.number = j.item JOIN labellers l ON l.number = j.labeller "
        f"WHERE {which} ORDER BY j.number DESC LIMIT ?",
        (limit,),
    )
    return [
        {
            "item": item,
            "labeller": name,
            "prompt": prompt.strip()[-200:],
            "ranks": json.loads(ranks),
            "skip": skip,
            "seconds": seconds,
            "at": at,
            "too_fast": not skip and not name.startswith(AI) and too_fast(seconds, characters),
            **{"comments": [], "rationale": "", "demonstration": ""},
            **json.loads(more),
        }
        for item, name, prompt, ranks, skip, seconds, at, more, characters in rows
    ]
