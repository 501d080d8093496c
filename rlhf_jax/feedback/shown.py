"""The order in which a labeller sees an item's responses: answers become judgements, and judgements drafts again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.page import Page
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.store import dense, refuse_judgement

LONGEST_SKIP = 500
MOST_SECONDS = 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """A labeller's answer, with responses in the order shown; the fields are those of Judgement."""

    item: str
    ranks: tuple[int, ...] = ()
    ratings: tuple[int | None, ...] = ()
    flags: tuple[tuple[str, ...], ...] = ()
    skip: str = ""
    seconds: float = 0.0
    comments: tuple[str, ...] = ()
    rationale: str = ""
    demonstration: str = ""
    corrects: int | None = None


def shuffle(responses: int, seed: str) -> tuple[int, ...]:
    """A fixed order of an item's responses for each seed, of which a labeller and an item have their own."""

    def place(response: int) -> bytes:
        return hashlib.sha256(f"{seed}\n{response}".encode()).digest()

    return tuple(sorted(range(responses), key=place))


def judgement_of(
    answer: Answer, item: Item, labeller: str, order: Sequence[int], page: Page, *, now: float, started: float
) -> Judgement:
    """The judgement of an answer, in the item's own order of responses; the labeller got the item when it `started`.

    Raises:
      UserError: if the answer does not fit the item.
    """
    if len(answer.skip) > LONGEST_SKIP:
        raise UserError(f"skip: expected at most {LONGEST_SKIP} characters, got {len(answer.skip)}")
    if not 0 <= answer.seconds <= MOST_SECONDS:
        raise UserError(f"seconds: expected 0 to {MOST_SECONDS:.0f}, got {answer.seconds}")
    judgement = Judgement(
        item=item.id,
        labeller=labeller,
        ranks=answer.ranks,
        ratings=answer.ratings,
        flags=tuple(frozenset(names) for names in answer.flags),
        skip=answer.skip.strip(),
        comments=tuple(map(str.strip, answer.comments)) if any(map(str.strip, answer.comments)) else (),
        rationale=answer.rationale.strip(),
        demonstration=answer.demonstration.rstrip(),
        corrects=answer.corrects if answer.demonstration.strip() else None,
        # The page's clock is not trusted: nobody can take longer than the lease has existed.
        seconds=round(min(answer.seconds, max(now - started, 0.0) + 1.0), 3),
        at=now,
    )
    refuse_judgement(judgement, len(item.responses), page)
    return dataclasses.replace(
        judgement,
        ranks=_own(dense(judgement.ranks), order),
        ratings=_own(judgement.ratings, order),
        flags=_own(judgement.flags, order),
        comments=_own(judgement.comments, order),
        corrects=None if judgement.corrects is None else order[judgement.corrects],
    )


def draft_of(
    order: Sequence[int],
    ranks: Sequence[int],
    ratings: Sequence[int | None],
    flags: Sequence[Any],
    more: Mapping[str, Any],
    *,
    seconds: float,
) -> dict[str, Any]:
    """The draft from which the page shows a judgement again; the other arguments are the judgement's columns."""
    texts = dict(more)
    if "comments" in texts:
        texts["comments"] = _shown(texts["comments"], order)
    if "corrects" in texts:
        texts["corrects"] = order.index(texts["corrects"])
    return {
        "tiers": _tiers(_shown(ranks, order)),
        "ratings": _shown(ratings, order),
        "flags": _shown(flags, order),
        "seconds": seconds,
        **texts,
    }


def _own(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    """Convert values from the order shown to the item's own order."""
    if not values:
        return ()
    own = [values[0]] * len(order)
    for shown, place in enumerate(order):
        own[place] = values[shown]
    return tuple(own)


def _shown(values: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Convert values from the item's own order to the order shown."""
    return [values[place] for place in order] if values else []


def _tiers(ranks: Sequence[int]) -> list[list[int]]:
    """Responses of each rank, the best first: [[0], [1, 2]] for the ranks 1, 2, 2."""
    return [[place for place, rank in enumerate(ranks) if rank == tier] for tier in sorted(set(ranks))]
