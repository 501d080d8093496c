"""The template, HH-RLHF transcripts, and Gopher's heuristic."""

import itertools
import time

import pytest

from rlhf_jax.data import extract_dialogues
from rlhf_jax.data.dialogues import Message, is_hh, render, render_prompt, split_hh, split_shared
from rlhf_jax.data.gopher import as_messages
from tests.cases import case

pytestmark = pytest.mark.core

TRANSCRIPT = "\n\nHuman: hi\n\nAssistant:  two spaces\n\nmore\n\nHuman: Human: quoted\n\nAssistant: yes"
U, A = "user", "assistant"


def test_a_transcript_comes_back_from_its_turns() -> None:
    turns = split_hh(TRANSCRIPT)
    assert turns == [(U, "hi"), (A, " two spaces\n\nmore"), (U, "Human: quoted"), (A, "yes")]
    assert render(turns) == TRANSCRIPT
    assert render_prompt(turns[:1]) == "\n\nHuman: hi\n\nAssistant:"
    assert split_hh("Before" + TRANSCRIPT)[0] == ("system", "Before")
    assert render(split_hh("Before" + TRANSCRIPT)) == "Before" + TRANSCRIPT
    assert split_hh("Human: no blank lines before") == [(U, "no blank lines before")]


def test_what_a_transcript_is() -> None:
    assert is_hh(TRANSCRIPT) and is_hh(TRANSCRIPT.lstrip())
    assert not is_hh("\n\nHuman: nobody answers") and not is_hh("Text.\n\nAssistant: x") and not is_hh("")


def m(text: str) -> list[Message]:
    """ "Uab Ac" -> messages."""
    return [Message(U if part[0] == "U" else A, part[1:]) for part in text.split()]


PARTS = [
    ("Ua Ab", "Ua Ac", "Ua", (" b", " c")),
    ("Ua Ab Uc Ad", "Ua Ab Uc Ae", "Ua Ab Uc", (" d", " e")),
    ("Ua Ab Uc Ad", "Ua Ae", "Ua", (" b\n\nHuman: c\n\nAssistant: d", " e")),
    # One is the beginning of the other: the last answer of the shorter is compared with the rest of the longer.
    ("Ua Ab Uc Ad", "Ua Ab", "Ua", (" b\n\nHuman: c\n\nAssistant: d", " b")),
    # They part where the human speaks: the answer before is part of what is compared.
    ("Ua Ab Uc Ad", "Ua Ab Ue Ad", "Ua", (" b\n\nHuman: c\n\nAssistant: d", " b\n\nHuman: e\n\nAssistant: d")),
]


def test_where_two_dialogues_part() -> None:
    for row in PARTS:
        with case(row) as (chosen, rejected, shared, rests):
            assert split_shared(m(chosen), m(rejected)) == (m(shared), *rests)


def test_dialogues_that_share_no_prompt() -> None:
    assert split_shared(m("Ua Ab"), m("Uc Ad")) is None
    assert split_shared(m("Aa"), m("Ab")) == ([], " a", " b")


def talk(first: str, second: str, turns: int, between: str = "\n\n") -> str:
    return between.join(f"{second if turn % 2 else first} turn {turn}" for turn in range(turns))


SPEAKERS = [
    ("Gopher:", "User:", ("Gopher", "User")),
    ("Dr Smith -", "Bob —", ("Dr Smith", "Bob")),
    ("Q.", "A.", ("Q", "A")),
    ("Dr. Smith:", "Dr. Jones:", ("Dr. Smith", "Dr. Jones")),
    ("Q: Yes.", "A: No.", ("Q", "A")),
]


def test_a_dialogue_is_found() -> None:
    for row in itertools.product(["\n\n", "\n", "\n \n\n", "\r\n\r\n"], SPEAKERS):
        with case(row) as (between, (first, second, speakers)):
            found = extract_dialogues("An introduction.\n\n" + talk(first, second, 7, between) + "\n\nThe end.")
            assert len(found) == 1 and len(found[0]) == 7
            assert tuple(turn.speaker for turn in found[0][:2]) == speakers
            assert [turn.text[-6:] for turn in found[0]] == [f"turn {n}" for n in range(7)]


NO_DIALOGUE = [
    "",
    talk("Q:", "A:", 5),
    talk("Q:", "Q:", 8),  # one prefix
    talk("Q", "A", 8),  # no separator
    talk("12:30", "13:45", 8),  # no name
    talk("1.", "2.", 8),
    "\n\n".join(f"{name}: x" for name in "ABCABCABC"),  # three people
    talk("Q:", "A:", 5) + "\n\nA word from us.\n\n" + talk("Q:", "A:", 5),  # broken off
    "\n\n".join(["A sentence. Another."] * 8),
]


def test_no_dialogue() -> None:
    for text in NO_DIALOGUE:
        with case(text):
            assert extract_dialogues(text) == []


def test_two_dialogues_and_where_each_ends() -> None:
    text = talk("Q:", "A:", 6) + "\n\n" + talk("Ann:", "Bob:", 8)
    assert [[turn.speaker for turn in found] for found in extract_dialogues(text)] == [
        ["Q", "A"] * 3,
        ["Ann", "Bob"] * 4,
    ]
    # A second paragraph of one speaker's starts a run anew.
    assert len(extract_dialogues("A: x\n\nA: y\n\n" + talk("Q:", "A:", 6))[0]) == 7


def test_wrapped_paragraphs_stay_whole() -> None:
    text = "\n\n".join(["Q: is this\nwrapped: or not?", "A: it\nis"] * 3)
    assert extract_dialogues(text)[0][:2] == [("Q", "is this\nwrapped: or not?"), ("A", "it\nis")]


def test_the_longer_reading_counts() -> None:
    # Read by lines, the dialogue ends where a turn is wrapped; read by blank lines, it goes on.
    text = talk("Q:", "A:", 10).replace("turn 6", "turn\n6")
    assert [len(found) for found in extract_dialogues(text)] == [10]
    # One to a line in a block of its own, and blank lines around: only the lines are turns.
    assert [len(found) for found in extract_dialogues("Q: x\n\n" + talk("A:", "Q:", 8, "\n") + "\n\nA: y")] == [10]


def test_its_messages() -> None:
    found = extract_dialogues(talk("Q:", "A:", 6))[0]
    assert as_messages(found)[:2] == [(U, "turn 0"), (A, "turn 1")]


def test_no_text_takes_quadratic_time() -> None:
    start = time.process_time()
    for text in (
        talk("A:", "A:", 20_000),
        talk("A:", "B:", 20_000),
        "x" * 10**6,
        "\n " * 10**5,
        "End\nQ: a\nA: b\n" * 9000,
    ):
        extract_dialogues(text)
    extract_dialogues(("Q: x\nA: y\n" * 3 + "End\n") * 4000)
    assert time.process_time() - start < 10  # takes 1 s
