"""Settings of the labelling page: what a file may say, and how a mistake in one is told."""

import json
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judged import judgement_row, read_judgements
from rlhf_jax.feedback.page import Page, parse_page, read_page
from rlhf_jax.feedback.records import FLAG_WORDS, Judgement
from tests.cases import case

pytestmark = pytest.mark.feedback

YAML = """
title: Two answers
instructions: |
  # Guide
  **Read** both.
question: Which is kinder? # not the longer one
flags: {off_topic: Off topic, unsafe: Unsafe}
scale:
  points: 5
  labels: {1: Useless, 5: Excellent}
markdown: false
"""
OWN = Page(
    title="Two answers",
    instructions="# Guide\n**Read** both.\n",
    question="Which is kinder?",
    flags={"off_topic": "Off topic", "unsafe": "Unsafe"},
    points=5,
    labels={1: "Useless", 5: "Excellent"},
    markdown=False,
)


def test_a_page_in_yaml_and_in_json(tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(YAML)
    assert read_page(path) == OWN
    path.write_text("\ufeff" + json.dumps(OWN.settings()), encoding="utf-8")
    assert read_page(path) == OWN == parse_page("", OWN.settings())
    path.write_text("question: Why?")
    assert read_page(path) == Page(question="Why?") and read_page(path).flags == FLAG_WORDS
    path.write_text("flags: {}\nscale: {points: 0}")
    assert read_page(path) == Page(flags={}, points=0) and list(read_page(path).ratings) == []


WRONG = [
    ("", "page.yaml: expected a mapping with title, .*, got nothing"),
    ("- a", "page.yaml: expected a mapping with title, .*, got a list of 1"),
    ("a: [", "page.yaml:1: expected YAML or JSON, got .*"),
    ("title: x\n\ttitle: y", "page.yaml:2: expected YAML or JSON, got "),
    ("title: a\nflags:\n  bad: Bad\n  bad: Worse", "page.yaml:4: field 'bad': expected it once, got it twice"),
    ("flags: {yes: Yes}", "page.yaml:1: expected text as the name of a field, got the truth value true; quote it"),
    ("flag: {}", "page.yaml: field 'flag': expected one of the fields title, .*, got an unknown field"),
    ("scale: {point: 5}", "field 'scale.point': expected one of the fields points, labels, got an unknown field"),
    ("title: ''", "field 'title': expected text, got nothing"),
    ("title: 5", "field 'title': expected text, in quotes .*, got the number 5"),
    ("title: 2026-01-01", "field 'title': expected text, in quotes"),
    ("question: null", "field 'question': expected text, .*, got nothing"),
    ("instructions: " + "x" * 50_001, "field 'instructions': expected at most 50,000 characters, got 50,001"),
    ("flags: [bad]", "field 'flags': expected a mapping of names to words, got a list of 1"),
    ("flags:", "field 'flags': expected a mapping of names to words, got nothing"),
    ("flags: {Off Topic: x}", "field 'flags': expected names of 1 to 40 small letters, .*, got the text \"Off Topic\""),
    ("flags: {1: x}", "field 'flags': expected names .*, got the number 1"),
    ("flags: {bad: 5}", "field 'flags.bad': expected text, .*, got the number 5"),
    ("flags: {" + ", ".join(f"f{n}: x" for n in range(21)) + "}", "field 'flags': expected at most 20, got 21 of them"),
    ("scale: 5", "field 'scale': expected a mapping .*, got the number 5"),
    ("scale: {points: 1}", "field 'scale.points': expected 2 to 9, or 0 for no ratings, got the number 1"),
    ("scale: {points: 10}", "field 'scale.points': expected 2 to 9"),
    ("scale: {points: true}", "field 'scale.points': expected 2 to 9, .*, got the truth value true"),
    ("scale: {points: 5.0}", "field 'scale.points': expected 2 to 9"),
    ("scale: {labels: {8: x}}", "field 'scale.labels': expected words for points from 1 to 7, got the number 8"),
    ("scale: {labels: {best: x}}", "field 'scale.labels': expected words for points .*, got the text \"best\""),
    ("markdown: 1", "field 'markdown': expected true or false, got the number 1"),
]


def test_mistakes_name_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    for row in WRONG:
        with case(row) as (content, words):
            path.write_text(content)
            with pytest.raises(UserError, match=words) as error:
                read_page(path)
            assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    path.write_bytes(b"title: \xff")
    with pytest.raises(UserError, match=r"page\.yaml: expected a file in UTF-8"):
        read_page(path)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        read_page(tmp_path / "none.yaml")


def test_judgements_on_a_page_of_ones_own(tmp_path: Path) -> None:
    said = Judgement("a", "ann", (1, 2), (5, None), (frozenset({"unsafe"}), frozenset()), rationale="why")
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps(judgement_row(said)))
    assert read_judgements([path], OWN) == [said]
    with pytest.raises(UserError, match=r"said.jsonl:1: field 'flags\[0\]': expected names among fails_instruction"):
        read_judgements([path])
    path.write_text(json.dumps(judgement_row(said) | {"ratings": [6, None]}))
    with pytest.raises(UserError, match=r"field 'ratings\[0\]': expected 1 to 5 or null, got the number 6"):
        read_judgements([path], OWN)
