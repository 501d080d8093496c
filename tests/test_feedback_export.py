"""Exports: each form is read back as it was meant, nothing disappears uncounted, and the bytes stay the same."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest

from rlhf_jax.data import Comparison, Ledger, Message, Ranking, read_records
from rlhf_jax.data.records import Demonstration
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.export import FORMS, consensus_ranks, export
from rlhf_jax.feedback.records import Item, Judgement
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.runs.atomic_files import Damaged, verify
from tests.cases import case

pytestmark = pytest.mark.feedback

TURNS = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Why?"))
CHAT = make_item("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:", ["a", "b", "c"], turns=TURNS)
TEXT = make_item("def f(", [" x)", " y)", "é\u2028 z)"], sources=["one", "two", "one"])
QUIZ = make_item("q", ["1", "2"], kind="quiz", gold=[1, 2])
NONE = frozenset[str]()
JUDGEMENTS = [
    Judgement(
        CHAT.id, "bob", (2, 1, 2), (3, None, 2), (NONE, NONE, frozenset({"other", "harmful"})), seconds=3.5, at=9
    ),
    Judgement(TEXT.id, "ann", (1, 3, 9), seconds=2.0, at=8),
    Judgement(TEXT.id, "bob", (3, 1, 2)),
    Judgement(CHAT.id, "ann", (1, 1, 1)),
    Judgement(CHAT.id, "cy", (), skip="unclear"),
    Judgement(QUIZ.id, "ann", (1, 2)),
    Judgement(TEXT.id, "ai:judge", (1, 2, 3)),
]
ITEMS = [QUIZ, CHAT, TEXT]
FIRST = min((CHAT, TEXT), key=lambda item: item.id)


def records(path: Path) -> list:
    ledger = Ledger()
    found = read_records(path, "rankings", ledger)
    assert ledger.accepted == 0 and not [line for line in ledger.decisions if line.what == "dropped"]
    return found


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def in_order(*of_chat_and_text: list) -> list:
    return [one for part in sorted(of_chat_and_text, key=lambda part: part[0][0]) for _, one in part]


def test_rankings(tmp_path: Path) -> None:
    manifest = export(ITEMS, JUDGEMENTS, tmp_path / "out")
    wanted = in_order(
        [(CHAT.id, Ranking(CHAT.prompt, (" a", " b", " c"), (2, 1, 2), turns=TURNS))],
        [
            (TEXT.id, Ranking(TEXT.prompt, TEXT.responses, (1, 2, 3))),
            (TEXT.id, Ranking(TEXT.prompt, TEXT.responses, (3, 1, 2))),
        ],
    )
    assert records(tmp_path / "out" / "rankings.jsonl") == wanted
    assert manifest["counts"] == {
        "judgements": 7,
        "rows": 3,
        "items": 2,
        "left_out": {"all ranks are tied": 1, "by a model": 1, "of a quiz item": 1, "skipped": 1},
        "pairs_left_out": {},
        "rows_of": {"ann": 1, "bob": 2},
    }
    content = (tmp_path / "out" / "rankings.jsonl").read_bytes()
    assert manifest["files"] == {"rankings.jsonl": hashlib.sha256(content).hexdigest()}
    of_chat = next(row for row in rows(tmp_path / "out" / "rankings.jsonl") if row["item"] == CHAT.id)
    assert of_chat == {
        "prompt": [turn._asdict() for turn in TURNS],
        "responses": ["a", "b", "c"],
        "ranks": [2, 1, 2],
        "item": CHAT.id,
        "labeller": "bob",
        "seconds": 3.5,
        "ratings": [3, None, 2],
        "flags": [[], [], ["harmful", "other"]],
    }


def test_comparisons_and_trl(tmp_path: Path) -> None:
    pairs = in_order(
        [(CHAT.id, Comparison(CHAT.prompt, " b", f" {other}", turns=TURNS)) for other in "ac"],
        [
            (TEXT.id, Comparison(TEXT.prompt, TEXT.responses[best], TEXT.responses[worst]))
            for best, worst in [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (1, 2)]
        ],
    )
    for form in ("comparisons", "trl"):
        manifest = export(ITEMS, JUDGEMENTS, tmp_path / form, form=form)
        assert records(tmp_path / form / f"{form}.jsonl") == pairs
        assert manifest["counts"]["rows"] == 8 and manifest["counts"]["pairs_left_out"] == {"tied": 1}
    found = rows(tmp_path / "trl" / "trl.jsonl")
    chat = [row for row in found if row["item"] == CHAT.id]
    assert chat[1]["chosen"] == [{"role": "assistant", "content": "b"}] and chat[1]["prompt"][0]["role"] == "user"
    assert (chat[1]["ratings_chosen"], chat[1]["ratings_rejected"]) == (None, 2)
    assert (chat[1]["flags_chosen"], chat[1]["flags_rejected"]) == ([], ["harmful", "other"])
    text = next(row for row in found if row["item"] == TEXT.id)
    assert (text["prompt"], text["chosen"], text["sources_rejected"]) == ("def f(", " x)", "two")


def test_transcripts(tmp_path: Path) -> None:
    told = make_item("\n\nHuman: Go\n\nAssistant:", [" off", " on"])
    # Their transcripts begin with the human, so a system text has no place in one.
    split = make_item(
        "Be.\n\nHuman: Go\n\nAssistant:", ["1", "2"], turns=[Message("system", "Be."), Message("user", "Go")]
    )
    # An answer that goes on with turns of its own would read back as those turns.
    on = make_item("\n\nHuman: Q\n\nAssistant:", ["a\n\nHuman: z\n\nAssistant: q", "b"], turns=[Message("user", "Q")])
    said = [*JUDGEMENTS, *(Judgement(item.id, "ann", (2, 1)) for item in (told, split, on))]
    manifest = export([*ITEMS, told, split, on], said, tmp_path, form="hh")
    found = rows(tmp_path / "hh.jsonl")
    by_item = {row["item"]: (row["chosen"], row["rejected"]) for row in found}
    assert by_item[told.id] == ("\n\nHuman: Go\n\nAssistant: on", "\n\nHuman: Go\n\nAssistant: off")
    assert by_item[CHAT.id][0] == CHAT.prompt + " b"
    assert by_item[TEXT.id][0].startswith("\n\nHuman: def f(\n\nAssistant: ")
    assert manifest["counts"]["pairs_left_out"] == {"no transcript says it": 2, "tied": 1}
    assert Comparison(told.prompt, " on", " off", turns=(Message("user", "Go"),)) in records(tmp_path / "hh.jsonl")


def test_demonstrations(tmp_path: Path) -> None:
    hh = make_item("\n\nHuman: Go\n\nAssistant:", [" off", " on"])
    word, code, line = make_item("Once", []), make_item("f(", ["x", "y"]), make_item("Q:\n", ["A"])
    said = [
        *JUDGEMENTS,
        Judgement(CHAT.id, "dy", (1, 1, 1), demonstration="é\n\nlines", corrects=1, rationale="all wrong"),
        Judgement(hh.id, "ann", (1, 2), demonstration="stay"),
        Judgement(word.id, "ann", (), demonstration="upon"),
        Judgement(code.id, "ann", (1, 2), demonstration="z"),
        Judgement(line.id, "ann", (), demonstration="A", corrects=0),
        Judgement(line.id, "bob", (), skip="no", demonstration="unfinished"),
    ]
    wanted = [
        (CHAT.id, Demonstration(CHAT.prompt, " é\n\nlines", turns=TURNS)),
        (hh.id, Demonstration(hh.prompt, " stay")),
        (word.id, Demonstration("Once", " upon")),
        (code.id, Demonstration("f(", "z")),
        (line.id, Demonstration("Q:\n", "A")),
    ]
    manifest = export([*ITEMS, hh, word, code, line], said, tmp_path, form="demonstrations")
    path = tmp_path / "demonstrations.jsonl"
    ledger = Ledger()
    assert read_records(path, "demonstrations", ledger) == [
        record for _, record in sorted(wanted, key=lambda one: one[0])
    ]
    assert manifest["counts"]["left_out"] == {
        "by a model": 1, "no answer written": 4, "of a quiz item": 1, "skipped": 2,
    }  # fmt: skip
    assert manifest["counts"]["items"] == manifest["counts"]["rows"] == 5
    (of_chat,) = (row for row in rows(path) if row["item"] == CHAT.id)
    assert of_chat == {
        "prompt": [turn._asdict() for turn in TURNS],
        "completion": [{"role": "assistant", "content": "é\n\nlines"}],
        "item": CHAT.id,
        "labeller": "dy",
        "seconds": 0.0,
        "corrects": "b",
        "rationale": "all wrong",
    }
    # They stay out of the other forms.
    assert export([*ITEMS, line], [said[-2], *JUDGEMENTS], tmp_path)["counts"]["left_out"]["a demonstration"] == 1
    with pytest.raises(UserError, match="consensus: expected none for demonstrations"):
        export(ITEMS, JUDGEMENTS, tmp_path, form="demonstrations", consensus=True)


def test_responses_that_were_cut_stay_marked(tmp_path: Path) -> None:
    cut = make_item("p", [" a", " b", " c"], ended=[True, False, True])
    chat = make_item("\n\nHuman: q\n\nAssistant:", ["a", "b"], turns=[Message("user", "q")], ended=[False, True])
    said = [Judgement(cut.id, "ann", (1, 2, 3)), Judgement(chat.id, "ann", (2, 1))]
    for form in [form for form in FORMS if form != "demonstrations"]:
        for consensus in (False, True):
            with case((form, consensus)):
                export([cut, chat], said, tmp_path / form, form=form, consensus=consensus)
                found = records(tmp_path / form / f"{form}.jsonl")
                if form == "rankings":
                    assert sorted(record.ended for record in found) == [(False, True), (True, False, True)]
                else:
                    marks = {(record.chosen, record.rejected): tuple(record.ended or (True, True)) for record in found}
                    assert marks == {
                        (" a", " b"): (True, False),
                        (" a", " c"): (True, True),
                        (" b", " c"): (False, True),
                        (" b", " a"): (True, False),
                    }


def test_the_same_judgements_are_the_same_bytes(tmp_path: Path) -> None:
    for form in FORMS:
        with case(form):
            folder, content = tmp_path / form, []
            for seed in range(3):
                items, said = list(ITEMS), [dataclasses.replace(j, at=seed) for j in JUDGEMENTS]
                random.Random(seed).shuffle(items)
                random.Random(seed).shuffle(said)
                export(items, said, folder, form=form)
                content.append({path.name: path.read_bytes() for path in folder.iterdir()})
            assert content[0] == content[1] == content[2] and set(content[0]) == {"manifest.json", f"{form}.jsonl"}
            verify(folder)
            (folder / f"{form}.jsonl").write_bytes(b"{}")
            with pytest.raises(Damaged):
                verify(folder)


def test_consensus(tmp_path: Path) -> None:
    # Wins less losses: (2, 0, -2) and (-2, 2, 0) are (0, 2, -2) together; twice the first are (2, 2, -4).
    assert consensus_ranks([(1, 2, 3), (3, 1, 2)], [1, 1]) == (2, 1, 3)
    assert consensus_ranks([(1, 2, 3), (3, 1, 2)], [2, 1]) == (1, 1, 2)
    assert consensus_ranks([(1, 2), (2, 1)], [0.1 + 0.2, 0.3]) == (1, 1)
    said = [
        Judgement(
            TEXT.id,
            "ann",
            (1, 2, 3),
            (7, 5, None),
            (frozenset({"other"}), NONE, NONE),
            seconds=1.5,
            comments=("short", "", "né\n1"),
            rationale="As asked.",
        ),
        Judgement(TEXT.id, "bob", (3, 1, 2), (4, 5, None), (NONE, NONE, NONE), seconds=2.0, comments=("", "", "no")),
        Judgement(TEXT.id, "cy", (3, 1, 2)),
        Judgement(CHAT.id, "ann", (1, 1, 2)),
        Judgement(CHAT.id, "bob", (2, 2, 1)),
    ]
    manifest = export(ITEMS, said, tmp_path, consensus=True)
    (row,) = rows(tmp_path / "rankings.jsonl")
    assert (row["ranks"], row["labeller"], row["labellers"]) == ([2, 1, 2], "consensus", ["ann", "bob", "cy"])
    assert (row["ratings"], row["flags"], row["seconds"]) == ([5.5, 5.0, None], [["other"], [], []], 3.5)
    assert manifest["counts"]["left_out"] == {"tied by the consensus": 2}
    # What people wrote is kept, with their names, in pairs too.
    assert row["comments"] == [{"ann": "short"}, {}, {"ann": "né\n1", "bob": "no"}]
    assert row["rationale"] == {"ann": "As asked."}
    export(ITEMS, said, tmp_path, consensus=True, form="trl")
    first, _ = rows(tmp_path / "trl.jsonl")
    assert (first["comments_chosen"], first["comments_rejected"]) == ({}, {"ann": "short"})
    assert first["rationale"] == {"ann": "As asked."}


def test_a_model_is_exported_once_it_agrees_with_people(tmp_path: Path) -> None:
    items = [Item(f"{n:03}", "p", ("x", "y")) for n in range(120)]

    def said(people: int, alike: int) -> list[Judgement]:
        person = [Judgement(item.id, "ann", (1, 2)) for item in items[:people]]
        return person + [
            Judgement(item.id, "ai:judge", (1, 2) if n < alike else (2, 1)) for n, item in enumerate(items)
        ]

    with pytest.raises(UserError, match=r"ai:judge: expected 100 or more pairs that people ordered too .*, got 99"):
        export(items, said(99, 120), tmp_path, models=True)
    with pytest.raises(
        UserError, match=r"ai:judge: expected agreement with people of 0.65.*, got 0.640 \[.*\] on 100 pairs"
    ):
        export(items, said(100, 64), tmp_path, models=True)
    assert not list(tmp_path.iterdir())
    manifest = export(items, said(100, 65), tmp_path, models=True)
    assert manifest["models"] == {"ai:judge": {"agreement": 0.65, "pairs": 100}}
    assert manifest["counts"]["rows_of"] == {"ai:judge": 120, "ann": 100}
    assert export(items, said(100, 0), tmp_path)["counts"]["left_out"] == {"by a model": 120}


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"expected an empty folder or an earlier export, got thesis\.txt in it"):
        export(ITEMS, JUDGEMENTS, tmp_path)
    # A prompt and a response that reading takes for something else: said, not written.
    odd = Item("odd", "\n\nAssistant: b", ("b", "c"), turns=(Message("assistant", "b"),))
    with pytest.raises(UserError, match="item odd: its prompt or responses do not survive"):
        export([odd], [Judgement("odd", "ann", (1, 2))], tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
