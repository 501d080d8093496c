"""The simulated labeller: its score by hand, and rankings whose noise is what it is said to be."""

import numpy as np
import pytest

from rlhf_jax.data.labeller import GoldWeights, gold_score, noise_for_agreement, rank, same_word, topic_words

WORDS = frozenset("return true if the posix path is used for spawn a of".split())
WEIGHTS = GoldWeights(topic=3.0, finished=2.0, known=1.0, repetition=4.0, length=0.5)
PROMPT = " use posix spawn (args) ->"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # All three topic words, finished, all words known.
        (" Return True if posix spawn is used.", 3 + 2 + 1),
        # One of three topic words; not capital, so not finished.
        (" return the posix path.", 3 / 3 + 1),
        # No topic word; no full stop; 2 of 4 words known.
        (" Return the xyzzy plugh", 0.5),
        # Two sentences; nothing said about the function.
        (" Return the path. Return.", 1 - 4 * 1 / 3),
        # Of six words that are no stop words, path comes three times: 2 of 6 are repetitions. Topic: posix.
        (" Return true posix path path path.", 1 + 2 + 1 - 4 * 2 / 6),
        # Two words: one short of three.
        (" Return true.", 2 + 1 - 0.5),
        # No words at all: as three short of three.
        (" ...", -1.5),
        ("", -1.5),
    ],
)
def test_score_by_hand(response: str, expected: float) -> None:
    assert gold_score(PROMPT, response, WORDS, WEIGHTS) == pytest.approx(expected)


def test_an_answer_without_an_end_is_not_finished() -> None:
    response = " Return True if posix spawn is used."
    assert gold_score(PROMPT, response, WORDS, WEIGHTS, ended=False) == pytest.approx(3 + 1)


def test_long_answers_cost_by_the_word() -> None:
    # 16 different words: two over 14. None is known, one is topic.
    response = "Use " + " ".join(f"b{i}" for i in range(15)) + "."
    assert gold_score(PROMPT, response, WORDS, WEIGHTS) == pytest.approx(3 / 3 + 2 - 2 * 0.5)


def test_topic_is_the_name_or_else_the_arguments() -> None:
    assert topic_words(PROMPT) == ["use", "posix", "spawn"]
    assert topic_words(" is it (url path, ok) ->") == ["url", "path"]
    assert topic_words(" get get the item ->") == ["get", "item"]
    assert topic_words(" f ->") == []
    assert gold_score(" f ->", "Return the path.", WORDS, WEIGHTS) == pytest.approx(2 + 1)


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
    scores = random.normal(size=(8_000, 4)).round(1)  # rounded: some pairs are ties, and no labeller is asked them
    noise = noise_for_agreement(scores, agreement)
    first, second = (rank(scores, noise, random) for _ in range(2))
    i, j = np.triu_indices(4, 1)
    differ = scores[:, i] != scores[:, j]
    agree = (first[:, i] < first[:, j]) == (second[:, i] < second[:, j])
    assert agree[differ].mean() == pytest.approx(agreement, abs=0.01)
    assert (scores[:, i] == scores[:, j]).any()
