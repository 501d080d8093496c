"""The simulated labeller: its score by hand, and rankings whose noise is what it is said to be."""

import numpy as np
import pytest

from rlhf_jax.demo.gold_score import gold_score, noise_for_agreement, rank, virtues_of
from rlhf_jax.demo.relevance import Usage

pytestmark = pytest.mark.demo

USAGE = Usage(frozenset("return true if the posix path is used for spawn a of it".split()))
PROMPT = " use posix spawn (args) ->"


def test_virtues_and_score_by_hand() -> None:
    cases = [
        (" Return True if posix spawn is used.", "finished topic known concise fluent"),
        (" Return the posix path.", "finished topic known concise fluent"),  # one of the name's three words is enough
        (" Return the path.", "finished known concise fluent"),  # none of them
        (" return the posix path.", "topic known concise fluent"),  # no capital
        (" Return the posix path", "topic known concise fluent"),  # no full stop
        (" Return the path. Spawn it.", "topic known concise fluent"),  # two sentences
        (" Return the posix xyzzy.", "finished topic concise fluent"),  # a word that is none
        (" Return the args.", "finished known concise fluent"),  # a word of the question's is one
        (" Return posix.", "finished topic known fluent"),  # two words
        (" Return the path path.", "finished known concise"),
        (" Posix path if it is the posix spawn.", "finished topic known concise"),
        (" Posix path if it is used for the posix.", "finished topic known"),  # nine words, one of them twice
        (" Is it a it is it.", "finished known concise fluent"),  # stop words may come again
        (" ...", ""),
        ("", ""),
    ]
    for response, virtues in cases:
        found = virtues_of(PROMPT, response, USAGE)
        assert " ".join(name for name, has in found._asdict().items() if has) == virtues, response
        score = gold_score(PROMPT, response, USAGE)
        assert score == pytest.approx(1 + 1.2 * len(virtues.split()), abs=1e-12), response


def test_an_answer_without_an_end_is_not_finished() -> None:
    response = " Return True if posix spawn is used."
    assert virtues_of(PROMPT, response, USAGE, ended=False) == (False, True, True, True, True)
    assert gold_score(PROMPT, response, USAGE, ended=False) == pytest.approx(1 + 1.2 * 4, abs=1e-12)


def test_three_to_eight_words_are_concise() -> None:
    for words, concise in ((2, False), (3, True), (8, True), (9, False)):
        said = [f"b{i}" for i in range(words)]
        assert virtues_of(PROMPT, f" {' '.join(said)}.", USAGE).concise is concise, words


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


def test_two_labellers_agree_as_often_as_asked() -> None:
    for agreement in (0.73, 0.6):
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
