"""The simulated labeller: its score by hand, and rankings whose noise is what it is said to be."""

import numpy as np
import pytest

from rlhf_jax.data.labeller import gold_score, noise_for_agreement, rank, virtues_of
from rlhf_jax.data.relevance import Usage

USAGE = Usage(frozenset("return true if the posix path is used for spawn a of it".split()))
PROMPT = " use posix spawn (args) ->"


@pytest.mark.parametrize(
    ("response", "points"),
    [
        (" Return True if posix spawn is used.", 1 + 1.5 + 1.5 + 1.5 + 1.5),
        (" Return the path of posix.", 1 + 1.5 + 1.5 + 1.5 + 1.5),  # one of the name's three words is enough
        (" Return the path of it.", 1 + 1.5 + 0 + 1.5 + 1.5),  # none of them
        (" return the path of posix.", 1 + 0 + 1.5 + 1.5 + 1.5),  # no capital
        (" Return the xyzzy of posix.", 1 + 1.5 + 1.5 + 0 + 1.5),  # a word that is none
        (" Return the args of it.", 1 + 1.5 + 0 + 1.5 + 1.5),  # a word of the question's is one
        (" Return the posix path.", 1 + 1.5 + 1.5 + 1.5 + 0),  # four words
        (" Return the xyzzy plugh", 1),  # nothing of all that
        (" Return the path. Return it.", 1 + 0 + 0 + 1.5 + 1.5 - 0.75),  # two sentences, a word twice
        (" Xyzzy xyzzy", 1),  # a word twice, and no less than 1
        (" ...", 1),
        ("", 1),
    ],
)
def test_score_by_hand(response: str, points: float) -> None:
    assert gold_score(PROMPT, response, USAGE) == points


def test_virtues_by_hand() -> None:
    assert virtues_of(PROMPT, " Return the posix path.", USAGE) == (True, True, True, False)
    assert virtues_of(PROMPT, " Return the path of posix.", USAGE) == (True, True, True, True)
    assert virtues_of(PROMPT, " Return the path of posix.", USAGE, ended=False) == (False, True, True, True)
    assert virtues_of(PROMPT, " Return the path of xyzzy.", USAGE) == (True, False, False, True)
    assert virtues_of(PROMPT, " ...", USAGE) == (False, False, False, False)


def test_an_answer_without_an_end_is_not_finished() -> None:
    assert gold_score(PROMPT, " Return True if posix spawn is used.", USAGE, ended=False) == 1 + 3 * 1.5


@pytest.mark.parametrize(("words", "concise"), [(4, False), (5, True), (10, True), (11, False)])
def test_five_to_ten_words_are_concise(words: int, concise: bool) -> None:
    said = [f"b{i}" for i in range(words)]
    assert virtues_of(PROMPT, f" {' '.join(said)}.", USAGE).concise is concise


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
