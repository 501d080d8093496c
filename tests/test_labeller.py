"""The simulated labeller: its score by hand, and rankings whose noise is what it is said to be."""

import numpy as np
import pytest

from rlhf_jax.data.labeller import (
    gold_score,
    noise_for_agreement,
    rank,
    same_word,
    topic_words,
    virtues_of,
    words_mentioned,
)

WORDS = frozenset("return true if the posix path is used for spawn a of it".split())
PROMPT = " use posix spawn (args) ->"


@pytest.mark.parametrize(
    ("response", "points"),
    [
        (" Return True if posix spawn is used.", 1 + 2 + 2 + 2),
        (" Return the posix path.", 1 + 2 + 2 + 2),  # one of the name's three words is enough
        (" Return the path.", 1 + 2 + 0 + 2),  # none of them
        (" Return the args.", 1 + 2 + 0 + 2),  # a word of the question's, which is one, but not the name's
        (" return the posix path.", 1 + 0 + 2 + 2),  # no capital
        (" Return the posix xyzzy.", 1 + 2 + 2 + 0),  # a word that is none
        (" Return the xyzzy plugh", 1),  # two of them, no full stop
        (" Return the path. Return.", 1 + 0 + 0 + 2 - 1),  # two sentences, a word twice
        (" Return true.", 1 + 2 + 0 + 2 - 1),  # two words
        (" ...", 1),
        ("", 1),
    ],
)
def test_score_by_hand(response: str, points: float) -> None:
    assert gold_score(PROMPT, response, WORDS) == points


def test_virtues_by_hand() -> None:
    assert virtues_of(PROMPT, " Return the posix path.", WORDS) == (True, True, True)
    assert virtues_of(PROMPT, " Return the posix path.", WORDS, ended=False) == (False, True, True)
    assert virtues_of(PROMPT, " Return the path of xyzzy.", WORDS) == (True, False, False)
    assert virtues_of(PROMPT, " ...", WORDS) == (False, False, False)


def test_an_answer_without_an_end_is_not_finished() -> None:
    assert gold_score(PROMPT, " Return True if posix spawn is used.", WORDS, ended=False) == 1 + 2 + 2


def test_long_answers_cost_a_point() -> None:
    words = [f"b{i}" for i in range(15)]
    known = WORDS | set(words)
    assert gold_score(PROMPT, "Use " + " ".join(words[:13]) + ".", known | {"use"}) == 1 + 2 + 2 + 2
    assert gold_score(PROMPT, "Use " + " ".join(words[:14]) + ".", known | {"use"}) == 1 + 2 + 2 + 2 - 1


def test_topic_is_the_name_or_else_the_arguments() -> None:
    assert topic_words(PROMPT) == ["use", "posix", "spawn"]
    assert topic_words(" is it (url path, ok) ->") == ["url", "path"]
    assert topic_words(" get get the item ->") == ["get", "item"]
    assert topic_words(" f ->") == []
    assert gold_score(" f ->", "Return the path.", WORDS) == 1 + 2 + 2


def test_words_mentioned_are_counted_once_each() -> None:
    assert words_mentioned(PROMPT, " Uses posix, posix.") == (2, 3)
    assert words_mentioned(" f ->", "Return f.") == (0, 0)


@pytest.mark.parametrize(
    ("asked", "word", "same"),
    [
        ("use", "uses", True),
        ("parse", "parsing", True),
        ("files", "file", True),
        ("config", "configuration", True),
        ("configuration", "conf", True),
        ("path", "pat", False),
        ("open", "close", False),
        ("get", "set", False),
    ],
)
def test_same_word(asked: str, word: str, same: bool) -> None:
    assert same_word(asked, word) is same


def test_ranks_are_bradley_terry_in_pairs() -> None:
    # Gold 2, 1, 0 at τ = 2: the first beats the second with σ(1/2) = 0.622, the third with σ(1) = 0.731.
    scores = np.tile([2.0, 1.0, 0.0], (40_000, 1))
    ranks = rank(scores, 2.0, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(ranks, axis=1), np.tile([1, 2, 3], (40_000, 1)))
    # The deviation of a share of 40,000 is 0.0024.
    assert np.mean(ranks[:, 0] < ranks[:, 1]) == pytest.approx(0.6225, abs=0.01)
    assert np.mean(ranks[:, 0] < ranks[:, 2]) == pytest.approx(0.7311, abs=0.01)
    silent = rank(np.array([[1.0, 3.0, 2.0]]), 1e-6, np.random.default_rng(0))
    np.testing.assert_array_equal(silent, [[3, 1, 2]])


@pytest.mark.parametrize("agreement", [0.73, 0.6])
def test_two_labellers_agree_as_often_as_asked(agreement: float) -> None:
    random = np.random.default_rng(1)
    scores = random.normal(size=(8_000, 4)).round()  # many pairs are equal, and are not counted
    noise = noise_for_agreement(scores, agreement)
    first, second = (rank(scores, noise, random) for _ in range(2))
    i, j = np.triu_indices(4, 1)
    differ = scores[:, i] != scores[:, j]
    agree = (first[:, i] < first[:, j]) == (second[:, i] < second[:, j])
    # The deviation of a share of some 35,000 pairs, six a prompt, is below 0.005.
    assert agree[differ].mean() == pytest.approx(agreement, abs=0.01)
    # A pair of equal scores is ordered by chance.
    assert np.mean(~differ) > 0.2 and agree[~differ].mean() == pytest.approx(0.5, abs=0.015)
