"""The labelling folder: every item to as many people as are wanted, never twice to one, nothing lost or doubled."""

import contextlib
import dataclasses
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data.dialogues import Message
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.database import FILE, folder_lock
from rlhf_jax.feedback.page import Page
from rlhf_jax.feedback.queue import Assignment, Conflict, Queue, Rules
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.shown import Answer
from rlhf_jax.feedback.store import Labeller, Store
from tests.cases import case

pytestmark = pytest.mark.feedback


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def items(count: int, kind: str = "task", responses: int = 3) -> list[Item]:
    gold = tuple(range(1, responses + 1)) if kind == "quiz" else ()
    return [
        Item(f"{kind}{n}", f"prompt {n}", tuple(f"answer {k}" for k in range(responses)), kind=kind, gold=gold)
        for n in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "labels")) as opened:
        yield opened


def given(queue: Queue, labeller: Labeller) -> Assignment:
    assignment = queue.assign(labeller)
    assert assignment is not None
    return assignment


def rank(queue: Queue, labeller: Labeller, request: str, ranks: tuple[int, ...] = (1, 2, 3)) -> str:
    """Ranks whatever the labeller is given, in the order shown, and says what it was."""
    item = given(queue, labeller).item.id
    queue.judge(labeller, request, Answer(item, ranks))
    return item


DIFFERENT: dict[str, Any] = {
    "ranks": (1, 2),
    "ratings": (1, 7),
    "flags": (frozenset({"other"}), frozenset({"harmful", "other"})),
    "seconds": 3.0,
    "at": 10.0,
    "comments": (),
    "rationale": "",
    "demonstration": "x",
    "corrects": None,
}


def test_items_and_judgements_come_back_as_they_were(store: Store) -> None:
    wanted = [
        Item("a", "p\u2028é\x00", ("x", "y"), sources=("runs/one", "runs/two")),
        Item("c", "q", ("x", "y"), ended=(True, False)),
        Item("b", "", ("x", "y", "z"), turns=(Message("user", "hi"),), kind="quiz", gold=(1, 2, 2)),
    ]
    assert store.add_items(wanted) == 3 and store.add_items(wanted) == 0
    assert store.items() == wanted
    said = Judgement(
        "a",
        "ann",
        (2, 1),
        (None, 7),
        (frozenset(), frozenset({"harmful", "other"})),
        seconds=2.5,
        at=9.0,
        comments=("", "why?"),
        rationale="y is right",
        demonstration="x and y",
        corrects=1,
    )
    skipped = Judgement("b", "ai:judge", (), skip="too long", at=10.0)
    assert store.record([said, skipped]) == 2 and store.record([said]) == 0
    assert store.judgements() == [said, skipped]
    store.close()
    with contextlib.closing(Store(store.folder)) as again, contextlib.closing(again.beside()) as beside:
        assert again.items() == wanted and again.judgements() == [said, skipped]
        assert beside.judgements() == [said, skipped]
        # A repeated judgement is the same in every field, or it is an error that names the field; nothing changes.
        for field, value in DIFFERENT.items():
            with case(field):
                words = f"item a: field '{field}': expected the judgement by ann as stored, got another"
                with pytest.raises(UserError, match=words):
                    again.record([Judgement("b", "new", (1, 2, 2)), dataclasses.replace(said, **{field: value})])
                assert again.judgements() == [said, skipped]


REFUSED_ITEMS = [
    (Item("x", "p", ("one",) * 10), "expected 2 to 9 responses, or none or one for a demonstration, got 10"),
    (Item("x", "p", ("one",), kind="calibration"), "expected 2 to 9 responses, .*, got 1"),
    (Item("x", "p", ("one", "two"), kind="quiz"), r"expected gold ranks that differ, .*, got \[\]"),
    (Item("x", "p", ("one", "two"), gold=(1, 2, 3)), "expected 2 gold ranks, got 3"),
    (Item("x", "p", ("one", "two"), ended=(False,)), "expected 2 ended, got 1"),
    (Item("task0", "p", ("one", "two"), kind="calibration"), "expected kind task, as stored, got calibration"),
]


def test_items_that_cannot_be_compared_are_refused(store: Store) -> None:
    for row in REFUSED_ITEMS:
        with case(row) as (item, words):
            store.add_items(items(1))
            with pytest.raises(UserError, match=words):
                store.add_items([*items(3), item])
            assert len(store.items()) == 1


REFUSED_JUDGEMENTS = [
    (Judgement("none", "ann", (1, 2, 3)), "expected one of the folder's items"),
    (Judgement("task0", "ann", (1, 2)), r"ranks: expected 3 numbers from 1 \(best\) to 3, got \[1, 2\]"),
    (Judgement("task0", "ann", (1, 2, 4)), r"expected 3 numbers from 1 \(best\) to 3"),
    (Judgement("task0", "ann", (1, 2, 3), skip="why"), "ranks: expected ranks or a reason to skip, got both"),
    (Judgement("task0", "ann", (1, 2, 3), (1,)), "ratings: expected 3, one for each response, got 1"),
    (Judgement("task0", "ann", (1, 2, 3), (1, 8, None)), "ratings: expected 1 to 7, got 8"),
    (Judgement("task0", "ann", (1, 2, 3), (), (frozenset({"bad"}),) * 3), "flags: expected some of .*, got 'bad'"),
    (Judgement("task0", "ann", ()), r"ranks: expected 3 numbers .*, or a reason to skip, got \[\]"),
    (Judgement("task0", "ann", (1, 2, 3), comments=("a",)), "comments: expected 3, one for each response, got 1"),
    (Judgement("task0", "ann", (1, 2, 3), rationale="x" * 5001), "rationale: expected at most 5,000 .*, got 5,001"),
    (Judgement("task0", "ann", (1, 2, 3), demonstration="x", corrects=3), "corrects: expected the place of one of 3"),
    (Judgement("write", "ann", (), demonstration=" "), "demonstration: expected an answer to the prompt, or a reason"),
    (Judgement("write", "ann", (1,), demonstration="x"), r"ranks: expected none, as there is nothing to compare"),
]


def test_judgements_that_fit_no_item_are_refused(store: Store) -> None:
    for row in REFUSED_JUDGEMENTS:
        with case(row) as (judgement, words):
            store.add_items([*items(1), Item("write", "p", ("a",))])
            with pytest.raises(UserError, match=words):
                store.record([judgement])
            assert store.judgements() == []


def test_every_commit_is_synced_to_the_disk(store: Store) -> None:
    assert store.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store.db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_tokens_are_kept_as_hashes_only(store: Store) -> None:
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob", "admin")
    token, other = store.new_token(ann), store.new_token(bob)
    assert store.by_token(token) == ann and store.by_token(other) == bob
    assert store.by_token("") is None and store.by_token(token[:-1]) is None and store.by_token("\ud800") is None
    raw = b"".join(path.read_bytes() for path in store.folder.iterdir())
    assert token.encode() not in raw and b"ann" in raw
    store.revoke(ann)
    assert store.by_token(token) is None and not store.has_token(ann) and store.has_token(bob)
    for name in ("", " ann", "a" * 81, "a\nb", "<b>"):
        with pytest.raises(UserError, match="labeller: expected"):
            store.add_labeller(name)
    with pytest.raises(UserError, match="expected the role labeller, as stored, got admin"):
        store.add_labeller("ann", "admin")


def test_a_file_that_is_no_labelling_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"hello " * 1000)
    with pytest.raises(UserError, match="expected the database of a labelling folder, got file is not a database"):
        Store(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    db = sqlite3.connect(other / FILE)
    db.execute("CREATE TABLE t (a)")
    db.close()
    with pytest.raises(UserError, match="got another program's"):
        Store(other)
    Store(tmp_path / "mine").close()
    db = sqlite3.connect(tmp_path / "mine" / FILE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="schema version: expected 1 to 2, got 99"):
        Store(tmp_path / "mine")
    with pytest.raises(UserError, match="expected a labelling folder"):
        Store(tmp_path / "nothing", read_only=True)


def test_a_folder_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    """By a reader too, with all that is in it; numbers of judgements that were withdrawn are not used again."""
    for read_only in (True, False):
        with case(read_only):
            folder = tmp_path / f"{read_only}"
            folder.mkdir()
            with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
                db.executescript((Path(__file__).parent / "labels_version_1.sql").read_text())
                content = '{"prompt": "p", "turns": [], "responses": ["x", "y"], "sources": [], "gold": []}'
                for row in (
                    ("about", "salt", "s"),
                    ("items", 1, "a", "task", 2, content, 1),
                    ("items", 2, "b", "task", 2, content, 0),
                    ("labellers", 7, "ann", "labeller", "open", 0, 1.0),
                    ("leases", 3, 2, 7, 1.0, 9.0, 0, '{"tiers": [[1]]}', 4),
                    ("judgements", 1, 1, 7, "[2, 1]", "[null, 7]", '[[], ["harmful"]]', "", 2.5, 9.0),
                    ("withdrawn", 5, 2, 7, "[1, 2]", "[]", "[]", "", 1.0, 8.0, 9.0),
                    ("requests", 7, "r", "0", "{}"),
                ):
                    db.execute(f"INSERT INTO {row[0]} VALUES ({', '.join('?' * (len(row) - 1))})", row[1:])
                db.execute("UPDATE sqlite_sequence SET seq = 5 WHERE name = 'judgements'")
                db.execute("PRAGMA application_id = 0x524C4846")
                db.execute("PRAGMA user_version = 1")
                db.commit()
            with contextlib.closing(Store(folder, read_only=read_only)) as store:
                said = Judgement(
                    "a", "ann", (2, 1), (None, 7), (frozenset(), frozenset({"harmful"})), seconds=2.5, at=9
                )
                assert store.judgements() == [said] and [item.id for item in store.items()] == ["a", "b"]
            with contextlib.closing(Store(folder)) as store:
                assert store.db.execute("PRAGMA foreign_key_check").fetchall() == []
                assert store.db.execute("PRAGMA foreign_keys").fetchone() == (1,)
                tables = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite%' ORDER BY name"
                with contextlib.closing(Store(tmp_path / "new")) as new:
                    made, fresh = (one.db.execute(tables).fetchall() for one in (store, new))
                assert [(kind, name) for kind, name, _ in made] == [(kind, name) for kind, name, _ in fresh]
                (ann,) = store.labellers()
                queue = Queue(store, Rules())
                assert given(queue, ann).draft == {"tiers": [[1]]}
                queue.judge(ann, "r2", Answer("b", (1, 2), demonstration="better", corrects=0))
                assert store.db.execute("SELECT max(number) FROM judgements").fetchone() == (6,)
                queue.undo(ann, "u")
                assert store.db.execute("SELECT number, why FROM withdrawn").fetchall() == [
                    (5, "undone"),
                    (6, "undone"),
                ]
                invariants(store)


def test_answers_that_labellers_write(store: Store) -> None:
    store.add_items([Item("new", "p", ()), Item("old", "p", ("a b",)), *items(1)])
    ann = store.add_labeller("ann")
    queue = Queue(store, Rules())
    assert given(queue, ann).order == ()
    with pytest.raises(UserError, match="demonstration: expected an answer"):
        queue.judge(ann, "1", Answer("new", demonstration=" \n"))
    queue.judge(ann, "1", Answer("new", demonstration="  indented\n"))
    assert given(queue, ann).item.id == "old"
    queue.judge(ann, "2", Answer("old", demonstration="a c", corrects=0, comments=("typo",)))
    order = given(queue, ann).order
    words = Answer("task0", (1, 2, 3), (), (), "", 0.0, ("first ", "", ""), " clear ", "new", corrects=0)
    queue.judge(ann, "3", words)
    assert [(one.ranks, one.demonstration, one.corrects) for one in store.judgements()[:2]] == [
        ((), "  indented", None),
        ((), "a c", 0),
    ]
    last = store.judgements()[2]
    assert last.corrects == order[0] and last.comments[order[0]] == "first" and last.rationale == "clear"
    queue.undo(ann, "u")  # as it was on the page
    draft = given(queue, ann).draft or {}
    assert (draft["comments"], draft["corrects"], draft["rationale"]) == (["first", "", ""], 0, "clear")
    invariants(store)


def test_a_page_of_ones_own_is_kept_with_the_folder(store: Store) -> None:
    store.add_items(items(2))
    assert store.page() == Page()
    page = Page(question="Which?", flags={"bad": "Bad"}, points=5, labels={1: "low"}, markdown=False)
    store.set_page(page)
    assert store.page() == page
    said = Judgement("task0", "ann", (1, 2, 3), (5, None, 1), (frozenset({"bad"}), frozenset(), frozenset()))
    store.record([said])
    with pytest.raises(UserError, match="ratings: expected 1 to 5, got 7"):
        store.record([dataclasses.replace(said, item="task1", ratings=(7, 1, 1))])
    with pytest.raises(UserError, match=r"page: field 'flags': .*, got none named bad; keep them"):
        store.set_page(Page(points=5))
    with pytest.raises(UserError, match=r"page: field 'scale.points': expected 5, .*, got 7"):
        store.set_page(dataclasses.replace(page, points=7))
    store.set_page(dataclasses.replace(page, title="Other", flags={"new": "New", "bad": "Very bad"}))
    assert store.page().title == "Other"


def test_a_second_process_is_refused_with_the_holders_id(tmp_path: Path) -> None:
    code = "import sys, time, pathlib\nfrom rlhf_jax.feedback.database import folder_lock\n"
    code += "with folder_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(UserError, match=f"process {holder.pid} is serving this folder"), folder_lock(tmp_path):
            pass
        assert time.monotonic() - start < 2
        holder.kill()
    with folder_lock(tmp_path):
        pass


def test_each_task_goes_to_as_many_people_as_are_wanted_and_never_twice_to_one(store: Store) -> None:
    store.add_items(items(5))
    people = [store.add_labeller(name) for name in ("ann", "bob", "cy")]
    queue = Queue(store, Rules(wanted=2))
    seen: Counter[tuple[str, str]] = Counter()
    for turn in range(9):
        for person in people:
            assignment = queue.assign(person)
            if assignment is not None:
                assert queue.assign(person) == assignment
                queue.judge(person, f"{turn}", Answer(assignment.item.id, (1, 1, 2)))
                seen[assignment.item.id, person.name] += 1
    assert set(seen.values()) == {1}
    assert Counter(item for item, _ in seen) == {f"task{n}": 2 for n in range(5)}
    assert queue.progress(people[0])["judged"] == queue.progress(people[0])["wanted"] == 10


def test_a_request_sent_again_is_answered_as_before(store: Store) -> None:
    store.add_items(items(3))
    ann = store.add_labeller("ann")
    queue = Queue(store, Rules())
    item = given(queue, ann).item.id
    first = queue.judge(ann, "r1", Answer(item, (1, 2, 3)))
    assert [queue.judge(ann, "r1", Answer(item, (1, 2, 3))) for _ in range(3)] == [first] * 3
    with pytest.raises(Conflict, match="used for something else"):
        queue.judge(ann, "r1", Answer(item, (3, 2, 1)))
    with pytest.raises(Conflict, match="not yours, or you have judged it"):
        queue.judge(ann, "r2", Answer(item, (1, 2, 3)))
    with pytest.raises(Conflict, match="no such item"):
        queue.judge(ann, "r3", Answer("what", (1, 2, 3)))
    with pytest.raises(Conflict, match="not yours"):
        queue.judge(ann, "r4", Answer("task2", (1, 2, 3)))
    for request in ("", "r" * 65):
        with pytest.raises(UserError, match="request: expected"):
            queue.judge(ann, request, Answer(given(queue, ann).item.id, (1, 2, 3)))
    assert len(store.judgements()) == 1
    undone = queue.undo(ann, "u1")
    assert queue.undo(ann, "u1") == undone and store.judgements() == []


def test_what_is_ranked_on_the_page_is_stored_in_the_items_own_order(store: Store) -> None:
    store.add_items(items(40, responses=4))
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    queue = Queue(store, Rules(wanted=2))
    orders = []
    for person in (ann, bob):
        while (assignment := queue.assign(person)) is not None:
            orders.append(assignment.order)
            assert given(queue, person).order == assignment.order
            # Response 0 is the best and flagged, 1 and 2 are equal, 3 is the worst, wherever they stand on the page.
            own = {0: (1, 7, ("other",)), 1: (2, 4, ()), 2: (2, 4, ()), 3: (9, 1, ())}
            ranks, ratings, flags = zip(*(own[place] for place in assignment.order), strict=True)
            ranks = tuple(min(rank, 4) for rank in ranks)
            queue.judge(person, assignment.item.id, Answer(assignment.item.id, ranks, ratings, flags))
    for judgement in store.judgements():
        assert judgement.ranks == (1, 2, 2, 3) and judgement.ratings == (7, 4, 4, 1)
        assert judgement.flags == (frozenset({"other"}), frozenset(), frozenset(), frozenset())
    assert len(orders) == 80 and len(set(orders)) > 15
    assert orders[:40] != orders[40:]
    firsts = Counter(order[0] for order in orders)
    assert max(firsts.values()) < 35


def test_a_lease_lapses_and_nothing_is_lost(store: Store) -> None:
    store.add_items(items(2))
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    clock = Clock()
    queue = Queue(store, Rules(lease=100.0), clock)
    assert given(queue, ann).item.id == "task0"
    queue.save_draft(ann, "task0", {"tiers": [[1]]}, 3)
    queue.save_draft(ann, "task0", {"tiers": []}, 2)  # one that was overtaken on the way
    assert given(queue, ann).draft == {"tiers": [[1]]}
    assert rank(queue, bob, "b1") == "task1"
    assert queue.assign(bob) is None
    clock.now += 90
    queue.save_draft(ann, "task0", {"tiers": [[2]]}, 4)
    clock.now += 90
    assert queue.assign(bob) is None
    clock.now += 11
    assert given(queue, bob).item.id == "task0"
    # Ann comes back before bob is done: her work is taken, and so is his.
    queue.judge(ann, "a1", Answer("task0", (1, 2, 3)))
    queue.judge(bob, "b2", Answer("task0", (3, 2, 1)))
    assert Counter(j.item for j in store.judgements()) == {"task0": 2, "task1": 1}
    assert queue.assign(ann) is None and queue.assign(bob) is None


def test_a_lapsed_lease_is_taken_up_again_unless_others_were_quicker(store: Store) -> None:
    store.add_items(items(3))
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    clock = Clock()
    queue = Queue(store, Rules(lease=100.0), clock)
    queue.save_draft(ann, given(queue, ann).item.id, {"tiers": [[0]]}, 1)
    clock.now += 500
    assert rank(queue, bob, "b1") == "task0"
    assert given(queue, ann).item.id == "task1"
    with pytest.raises(Conflict, match="no longer yours"):
        queue.save_draft(ann, "task0", {}, 2)
    clock.now += 500
    queue.assign(bob)
    queue.save_draft(ann, "task1", {"tiers": [[0]]}, 1)
    assert given(queue, bob).item.id == "task1"
    clock.now += 500
    assert given(queue, ann).draft == {"tiers": [[0]]}


def test_undo_brings_back_the_item_with_what_was_said_of_it(store: Store) -> None:
    store.add_items(items(4))
    ann = store.add_labeller("ann")
    queue = Queue(store, Rules())
    with pytest.raises(Conflict, match="nothing to undo"):
        queue.undo(ann, "u0")
    first = given(queue, ann).item.id
    queue.judge(ann, "r1", Answer(first, (2, 1, 2), (3, None, 7), (("other",), (), ("harmful",)), seconds=0.5))
    second = given(queue, ann).item.id
    queue.judge(ann, "r2", Answer(second, skip="I do not know enough"))
    third = given(queue, ann).item.id
    queue.save_draft(ann, third, {"tiers": [[2]]}, 1)
    assert queue.undo(ann, "u1")["item"] == second
    assert given(queue, ann).draft == {"tiers": [], "ratings": [], "flags": [], "seconds": 0.0}
    assert queue.undo(ann, "u2")["item"] == first
    assert given(queue, ann).draft == {
        "tiers": [[1], [0, 2]],
        "ratings": [3, None, 7],
        "flags": [["other"], [], ["harmful"]],
        "seconds": 0.5,
    }
    for request, item in (("r3", first), ("r4", second), ("r5", third)):
        assert given(queue, ann).item.id == item
        assert given(queue, ann).draft is not None
        queue.judge(ann, request, Answer(item, (1, 2, 3)))
    assert [judgement.item for judgement in store.judgements()] == [first, second, third]
    assert store.db.execute("SELECT count(*) FROM withdrawn").fetchone() == (2,)


def test_a_skip_leaves_the_item_to_others(store: Store) -> None:
    store.add_items(items(2))
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    queue = Queue(store, Rules())
    queue.judge(ann, "a1", Answer(given(queue, ann).item.id, skip="private"))
    assert rank(queue, ann, "a2") == "task1"
    assert queue.assign(ann) is None
    assert rank(queue, bob, "b1") == "task0"
    assert queue.assign(bob) is None
    with pytest.raises(UserError, match="skip: expected at most 500 characters, got 501"):
        store.add_items([Item("more", "p", ("a", "b", "c"))])
        queue.judge(ann, "a3", Answer(given(queue, ann).item.id, skip="x" * 501))


def test_what_is_left_for_a_labeller(store: Store) -> None:
    store.add_items([*items(3), *items(1, "calibration")])
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    queue = Queue(store, Rules())

    def left(labeller: Labeller) -> tuple[int, int, bool]:
        progress = queue.progress(labeller)
        return progress["left"], progress["mine"], progress["undoable"]

    assert left(ann) == left(bob) == (4, 0, False)
    assert rank(queue, ann, "1") == "calibration0"
    given(queue, ann)  # held by ann, so not left for bob
    assert left(ann) == (3, 1, True) and left(bob) == (3, 0, False)
    queue.judge(ann, "2", Answer("task0", skip="private"))  # no judgement, yet it can be undone
    assert left(ann) == (2, 1, True) and left(bob) == (4, 0, False) and queue.progress(ann)["judged"] == 0
    assert [rank(queue, bob, f"{n}") for n in range(3)] == ["calibration0", "task0", "task1"]
    assert left(ann) == (1, 1, True) and rank(queue, ann, "3") == "task2" and left(ann)[0] == 0


def in_gold_order(assignment: Assignment, *, reverse: bool = False) -> tuple[int, ...]:
    ranks = tuple(place + 1 for place in assignment.order)
    return tuple(4 - rank for rank in ranks) if reverse else ranks


def test_the_quiz_comes_first_and_decides(store: Store) -> None:
    store.add_items([*items(2), *items(2, "quiz"), *items(1, "calibration")])
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    queue = Queue(store, Rules(pass_mark=0.7))
    for number in range(2):
        assert queue.progress(ann)["quiz"] == [number, 2]
        assignment = given(queue, ann)
        assert assignment.item.kind == "quiz"
        if number == 0:
            queue.judge(ann, "wrong", Answer(assignment.item.id, in_gold_order(assignment, reverse=True)))
            queue.undo(ann, "undo")
        reply = queue.judge(ann, f"q{number}", Answer(assignment.item.id, in_gold_order(assignment)))
    assert reply["screening"] == "passed"
    with pytest.raises(Conflict, match="screening questions are over"):
        queue.undo(ann, "again")
    ann = store.labellers()[0]
    assert queue.progress(ann)["quiz"] is None and queue.quiz_mark(ann) == 1.0
    assert [rank(queue, ann, f"a{n}") for n in range(3)] == ["calibration0", "task0", "task1"]
    for number in range(2):
        assignment = given(queue, bob)
        ranks = in_gold_order(assignment) if number else (1, 1, 1)
        assert (
            queue.judge(bob, f"q{number}", Answer(assignment.item.id, ranks))["screening"] == ("open", "passed")[number]
        )
    assert queue.quiz_mark(bob) == 0.75
    assert rank(queue, bob, "b1") == "calibration0"  # though the tasks are done: everybody judges it
    assert queue.assign(bob) is None
    cy = store.add_labeller("cy")
    for number in range(2):
        assignment = given(queue, cy)
        reply = queue.judge(cy, f"q{number}", Answer(assignment.item.id, in_gold_order(assignment, reverse=True)))
    assert reply["screening"] == "failed" and queue.assign(cy) is None


def test_models_keep_no_item_from_people(store: Store) -> None:
    store.add_items(items(2))
    store.record([Judgement(f"task{n}", "ai:judge", (1, 2, 3)) for n in range(2)])
    store.record([Judgement("task1", "from elsewhere", (1, 2, 3))])
    ann = store.add_labeller("ann")
    queue = Queue(store, Rules())
    assert rank(queue, ann, "a1") == "task0"
    assert queue.assign(ann) is None and queue.judged == 2


def test_what_is_asked_first_changes_nothing_that_was_said(store: Store) -> None:
    store.add_items([*items(3), *items(1, "calibration"), *items(9)[3:]])
    ann, bob = store.add_labeller("ann"), store.add_labeller("bob")
    queue = Queue(store, Rules(2))
    assert [rank(queue, ann, request) for request in ("1", "2", "3")] == ["calibration0", "task0", "task1"]
    queue.undo(ann, "4")
    queue.save_draft(ann, "task1", {"tiers": [[2], [0, 1]]}, 9)
    assert rank(queue, bob, "1") == "calibration0"
    store.record([Judgement("task4", "ai:judge", (1, 2, 3))])
    said = store.judgements()
    store.ask_first(["task7", "task4", "task0"])
    assert [item.id for item in store.items() if item.kind == "task"] == [
        f"task{n}" for n in (7, 4, 0, 1, 2, 3, 5, 6, 8)
    ]
    assert store.judgements() == said and store.db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert store.db.execute("SELECT i.id FROM withdrawn w JOIN items i ON i.number = w.item").fetchall() == [("task1",)]
    invariants(store)
    queue = Queue(store, Rules(2))
    # What she has before her stays there, with its draft; then the new order, without what she has answered.
    assert given(queue, ann).draft == {"tiers": [[2], [0, 1]]}
    assert [rank(queue, ann, request) for request in "5678"] == ["task1", "task7", "task4", "task2"]
    assert [rank(queue, bob, request) for request in "2345"] == ["task7", "task4", "task0", "task1"]
    for wrong in ("calibration0", "task99"):
        with pytest.raises(UserError, match=f"item {wrong}: expected one of the folder's tasks"):
            store.ask_first([wrong])


def invariants(store: Store) -> None:
    wrong = store.db.execute(
        "SELECT i.id, i.held FROM items i WHERE i.held <> (SELECT count(*) FROM judgements j JOIN labellers l "
        "ON l.number = j.labeller WHERE j.item = i.number AND j.skip = '' AND l.role <> 'model') "
        "+ (SELECT count(*) FROM leases x WHERE x.item = i.number AND x.live)"
    ).fetchall()
    assert wrong == []
    both = "SELECT count(*) FROM leases x JOIN judgements j ON j.item = x.item AND j.labeller = x.labeller"
    assert store.db.execute(both).fetchone() == (0,)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_people_do_each_item_is_judged_as_often_as_wanted(store: Store, seed: int) -> None:
    random.seed(seed)
    wanted = 1 + seed % 3
    store.db.execute("PRAGMA synchronous = OFF")
    store.add_items([*items(25), *items(2, "calibration")])
    people = [store.add_labeller(f"p{n}") for n in range(5)]
    clock = Clock()
    queue = Queue(store, Rules(wanted=wanted, lease=100.0), clock)
    done: set[str] = set()
    late = 0
    for step in range(3000):
        person = random.choice(people)
        clock.now += random.choice((1, 1, 1, 5, 60, 250)) if step < 400 else 1
        deed = random.random() if step < 400 else 0.9
        assignment = queue.assign(person)
        if step % 20 == 0:
            invariants(store)
        if assignment is None:
            done.add(person.name)
            # Whoever is told that there is nothing more has seen all that is not full.
            left = store.db.execute(
                "SELECT count(*) FROM items i WHERE (i.held < ? OR i.kind <> 'task') AND NOT EXISTS "
                "(SELECT 1 FROM judgements j WHERE j.item = i.number AND j.labeller = ?)",
                (wanted, person.number),
            )
            assert left.fetchone() == (0,)
        if deed < 0.15:
            with contextlib.suppress(Conflict):  # nothing to undo
                queue.undo(person, f"u{step}")
        elif assignment is None:
            continue
        elif deed < 0.25:
            queue.judge(person, f"s{step}", Answer(assignment.item.id, skip="no"))
        elif deed < 0.35:
            clock.now += 300  # the lease lapses under the work, and another may take the item
            other = random.choice([somebody for somebody in people if somebody != person])
            queue.assign(other)
            late += 1
            queue.judge(person, f"j{step}", Answer(assignment.item.id, (1, 2, 3)))
        elif deed < 0.5:
            queue.save_draft(person, assignment.item.id, {"n": step}, step)
        else:
            queue.judge(person, f"j{step}", Answer(assignment.item.id, (1, 2, 3)))
    invariants(store)
    assert done == {person.name for person in people} and late
    counts = Counter(judgement.item for judgement in store.judgements() if not judgement.skip)
    skips = Counter(judgement.item for judgement in store.judgements() if judgement.skip)
    for n in range(25):
        assert counts[f"task{n}"] >= min(wanted, 5 - skips[f"task{n}"])
    assert all(counts[f"calibration{n}"] + skips[f"calibration{n}"] == 5 for n in range(2))
    full = Queue(store, Rules(wanted=wanted), clock)
    assert full.judged == queue.judged == sum(counts[f"task{n}"] for n in range(25))
