"""Statistics of comparisons: figures by hand, closed forms, and intervals that cover what they claim to."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import best_of_n, best_of_n_kl, best_of_n_weights, expected_best_of_n
from rlhf_jax.evaluation.calibration import by_length, by_margin, verdicts
from rlhf_jax.evaluation.diversity import distinct_n, repetition, self_bleu, words
from rlhf_jax.evaluation.intervals import bootstrap_mean, percentile_interval, resample_counts, wilson
from rlhf_jax.evaluation.overoptimisation import fit_gold, turn_of
from rlhf_jax.evaluation.preferences import compare, length_controlled
from tests.cases import case

pytestmark = pytest.mark.core


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_intervals_cover_what_they_claim() -> None:
    draws, truth = np.random.default_rng(0), 0.6
    wins = draws.binomial(200, truth, 1000) / 200
    of_wilson = np.array([wilson(share, 200) for share in wins]).T
    # Scores of two models whose prompts differ far more than the models: only a paired interval sees the difference.
    prompts, noise = 10 * draws.standard_normal((1000, 200)), draws.standard_normal((2, 1000, 200))
    paired = bootstrap_mean((prompts + 0.3 + noise[0]) - (prompts + noise[1]))
    assert (paired[1] - paired[0]).max() < 0.6
    difference = draws.normal(0.5, 1.0, (1000, 200))
    won = draws.random((1000, 200)) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(difference))))
    found = [length_controlled(y.astype(float), d)[0] for y, d in zip(won, difference, strict=True)]
    fitted = np.array([[one.low, one.high] for one in found]).T
    for name, (low, high), true in (
        ("Wilson", of_wilson, truth),
        ("paired bootstrap", paired, 0.3),
        ("length-controlled", fitted, 1 / (1 + math.exp(-0.4))),
    ):
        with case(name):
            assert 0.93 <= np.mean((low <= true) & (true <= high)) <= 0.97


def test_resamples_are_in_parts_and_their_ends_may_be_infinite() -> None:
    parts = list(resample_counts(2**20, resamples=3, seed=1))
    assert [len(part) for part in parts] == [2, 1] and all((part.sum(axis=1) == 2**20).all() for part in parts)
    assert percentile_interval(np.array([math.inf] * 50 + [1.0] + [2.0] * 49)) == (2.0, math.inf)
    # All units are equal: so is every resample.
    assert bootstrap_mean(np.full(7, 0.25)).tolist() == [0.25, 0.25]


def test_win_rate_with_ties_by_hand() -> None:
    # Wins, loses, ties, wins: 2.5 of 4. The first and the third answer are longer than the other's, the last is equal.
    found = compare(
        np.array([3.0, 1.0, 2.0, 9.0]),
        np.array([1.0, 3.0, 2.0, 8.0]),
        np.array([5.0, 1.0, 5.0, 4.0]),
        np.array([4.0, 4.0, 4.0, 4.0]),
    )
    assert (found.rate.value, found.ties, found.longer, found.prompts) == (0.625, 0.25, 0.625, 4)
    assert (found.rate.low, found.rate.high) == wilson(0.625, 4)
    assert found.bootstrap.value == 0.625 and found.bootstrap.low <= 0.25 and found.bootstrap.high == 1.0
    # Two answers each: 3 beats 2 and 1, 1 loses to 2 and ties with 1.
    several = compare(np.array([[3.0, 1.0]] * 2), np.array([[2.0, 1.0]] * 2), np.ones((2, 2)), np.ones((2, 2)))
    assert (several.rate.value, several.ties, several.longer) == (0.625, 0.25, 0.5)


def test_the_win_rate_at_equal_length_is_that_of_the_closed_form() -> None:
    # No differences in length: the mean, and the interval of a logit, 1 / ((n - 2) p (1 - p)).
    found, effect = length_controlled(np.array([1.0] * 9 + [0.0] * 3), np.zeros(12))
    error = math.sqrt(1 / (10 * 0.75 * 0.25))
    assert found.value == pytest.approx(0.75) and effect == 0.0
    assert logit(found.low) == pytest.approx(logit(0.75) - 1.959964 * error)
    assert logit(found.high) == pytest.approx(logit(0.75) + 1.959964 * error)
    # Wins 90% where longer and 50% where shorter by the same: logits θ ± φ tanh(1) are log 9 and 0.
    outcome = np.array(([1.0] * 9 + [0.0]) * 100 + [1.0, 0.0] * 500)
    found, effect = length_controlled(outcome, np.array([7.0] * 1000 + [-7.0] * 1000))
    assert found.value == pytest.approx(0.75, abs=1e-4)
    assert effect == pytest.approx(math.log(9) / 2 / math.tanh(1), abs=1e-3)
    cases: list[Any] = [
        ("the longer always wins", np.array([1.0, 0.0] * 20), np.array([3.0, -3.0] * 20), 0.5),
        ("always longer by as much", np.array([1.0, 1.0, 1.0, 0.0] * 5), np.full(20, 4.0), 0.75),
        ("two pairs to a prompt", np.array([[1.0, 1.0], [1.0, 0.0]] * 9), np.zeros((18, 2)), 0.75),
        ("all ties", np.full(5, 0.5), np.array([1.0, 2.0, -4.0, 0.0, 1.0]), 0.5),
        ("wins all", np.ones(20), np.arange(20.0), 1.0),
        ("loses all", np.zeros(20), np.arange(20.0), 0.0),
    ]
    for name, outcome, difference, rate in cases:
        with case(name):
            found, _ = length_controlled(outcome, difference)
            assert found.value == pytest.approx(rate, abs=1e-6)
            assert 0 <= found.low <= found.value <= found.high <= 1
    for share in (0.0, 0.5, 1.0):
        found, _ = length_controlled(np.full(20, share), np.arange(20.0))
        assert (found.low, found.high) == wilson(share, 20)
    # The prior keeps the effect of length finite: at the maximum φ = 100 x (20 + 20) (1 - p), x = tanh(1), p = σ(φ x).
    _, effect = length_controlled(np.array([1.0, 0.0] * 20), np.array([3.0, -3.0] * 20))
    x = math.tanh(1)
    assert effect == pytest.approx(100 * 40 * x / (1 + math.exp(effect * x)), rel=1e-6)


def test_words_are_runs_of_letters_and_single_signs() -> None:
    cases: list[Any] = [
        ("Don't STOP, x_1!", ["don", "'", "t", "stop", ",", "x_1", "!"]),
        ("Ünïcode straße\n\u00a0é", ["ünïcode", "strasse", "é"]),
        ("我是abc人 カナ", ["我", "是", "abc", "人", "カ", "ナ"]),
        (" \t\n", []),
    ]
    for text, expected in cases:
        with case(text):
            assert words(text) == expected


def test_distinct_and_repeated_n_grams_by_hand() -> None:
    texts = ["a b a b", "A b", "c"]  # bigrams: ab ba ab, ab
    assert [distinct_n(texts, n) for n in (1, 2, 3, 5)] == [3 / 7, 2 / 4, 1.0, None]
    assert distinct_n([], 1) is None
    # The four-grams of "a b c d a b c d a": abcd bcda cdab dabc abcd bcda.
    assert repetition("a b c d a b c d a") == pytest.approx(2 / 6)
    assert [repetition("a a a", n) for n in (1, 2, 4)] == [pytest.approx(2 / 3), 0.5, 0.0]


def test_self_bleu_by_hand() -> None:
    half = math.sqrt(0.5 * 0.1)  # one of two words, no bigram of one
    whole = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    cases: list[Any] = [
        (["one alone"], None),
        (["the same text", "The same text", "the same TEXT"], 1.0),
        (["a b", "a c"], half),
        # "a a": one of its two a's is in a reference; "a": all of it; "b": nothing.
        (["a a", "a", "b"], (half + 1.0 + 0.1) / 3),
        # The shorter text is in the longer one, and is half as long.
        (["a b", "a b c d"], (math.exp(-1) + whole) / 2),
        (["", "x"], (0.0 + 0.1) / 2),
        (["", "", "x"], (1.0 + 1.0 + 0.1) / 3),
    ]
    for texts, expected in cases:
        with case(texts):
            assert self_bleu(texts) == (None if expected is None else pytest.approx(expected))
    # A reference of the nearest length, the shorter of two: 2 and 4 words around 3.
    assert self_bleu(["a b c", "a b", "a b c d"], 1) == pytest.approx((1 + math.exp(1 - 3 / 2) + 3 / 4) / 3)


def test_calibration_by_hand() -> None:
    three, nineteen = math.log(3), math.log(19)  # σ is 0.75 and 0.95
    bins, error = by_margin(np.array([three, three, three, -three, nineteen, -nineteen, 0.0]))
    assert [(one.predicted, one.observed, one.pairs) for one in bins] == [
        (0.5, 0.5, 1),
        (pytest.approx(0.75), 0.75, 4),
        (pytest.approx(0.95), 0.5, 2),
    ]
    assert error == pytest.approx(2 / 7 * 0.45)
    assert (bins[1].low, bins[1].high) == pytest.approx((0.7, 0.8)) and bins[1].interval == wilson(0.75, 4)
    assert by_margin(np.array([800.0, -800.0]))[0][0].predicted == 1.0
    # A calibrated model: the better answer has the higher score with probability σ(margin).
    draws = np.random.default_rng(0)
    margins = draws.normal(0, 2, 20_000)
    margins *= np.where(draws.random(20_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1) * np.sign(margins)
    assert by_margin(margins)[1] < 0.01 < 0.1 < by_margin(3 * margins)[1]


def test_accuracy_by_length_shows_a_model_that_counts_words() -> None:
    better, worse = np.array([9.0, 8.0, 2.0, 1.0, 5.0, 5.0, 3.0, 6.0]), np.array([1.0, 2, 8, 9, 5, 5, 6, 3])
    found = by_length(better - worse, better, worse)
    assert [(one.low, one.high, one.accuracy, one.longer, one.pairs) for one in found] == [
        (-8.0, -6.0, 0.0, 0.0, 2),
        (-3.0, 0.0, 1 / 3, 1 / 3, 3),  # -3, and twice 0, which counts half
        (3.0, 3.0, 1.0, 1.0, 1),
        (6.0, 8.0, 1.0, 1.0, 2),
    ]
    (alone,) = by_length(np.array([1.0, -1.0, 0.0]), np.ones(3), np.ones(3))
    assert (alone.accuracy, alone.longer, alone.pairs) == (0.5, 0.5, 3)


def test_what_an_accuracy_says() -> None:
    none: Any = ([], 0.0)
    cases: list[Any] = [
        ((0.52, (0.47, 0.57), 0.51, *none), "no better than chance"),
        ((0.55, (0.52, 0.58), 0.51, *none), "below what people's comparisons usually give"),
        ((0.65, (0.62, 0.68), 0.55, *none), "usual range"),
        ((0.9, (0.88, 0.92), 0.55, *none), "agreement of people"),
        ((0.65, (0.62, 0.68), 0.65, *none), '"the longer answer wins"'),
        ((0.65, (0.62, 0.68), 0.55, *by_margin(np.array([9.0] * 65 + [-9.0] * 35))), "over-confident"),
        ((0.9, (0.86, 0.94), 0.55, *by_margin(np.array([0.1] * 90 + [-0.1] * 10))), "under-confident"),
    ]
    for arguments, words_of_it in cases:
        with case(words_of_it):
            assert words_of_it in "; ".join(verdicts(*arguments))


def test_best_of_n_by_hand() -> None:
    assert best_of_n(np.array([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="expected a score for every answer, got NaN"):
        best_of_n(np.array([[1.0, math.nan]]))
    assert [best_of_n_kl(n) for n in (1, 2, 4)] == pytest.approx([0.0, math.log(2) - 0.5, math.log(4) - 0.75])
    # Of 4 samples: the highest is in 1/4, 2/4, 3/4 and all of the subsets of 1 to 4; the next is the highest of those
    # without it, and so on.
    assert best_of_n_weights(4) == pytest.approx(
        np.array([[1 / 4, 1 / 4, 1 / 4, 1 / 4], [0, 1 / 6, 2 / 6, 3 / 6], [0, 0, 1 / 4, 3 / 4], [0, 0, 0, 1]])
    )
    weights = best_of_n_weights(64)
    assert weights.sum(axis=1) == pytest.approx(np.ones(64))
    assert weights[7, 40] == pytest.approx(math.comb(40, 7) / math.comb(64, 8), rel=1e-12)
    # KL of the law of the rank that best-of-n has, from the uniform law: the closed form, for many samples.
    ranks = best_of_n_weights(2000)[3]
    kl = np.sum(ranks[ranks > 0] * np.log(ranks[ranks > 0] * 2000))
    assert kl == pytest.approx(best_of_n_kl(4), abs=5e-3)


def test_the_expected_best_of_n_is_the_mean_over_all_subsets() -> None:
    draws = np.random.default_rng(0)
    proxy, gold = draws.integers(0, 4, (3, 6)).astype(float), draws.standard_normal((3, 6))
    found = expected_best_of_n(proxy, gold)
    for prompt, n in itertools.product(range(3), range(1, 7)):
        with case((prompt, n)):
            means = []
            for subset in itertools.combinations(range(6), n):
                best = max(proxy[prompt, list(subset)])
                means.append(np.mean([gold[prompt, k] for k in subset if proxy[prompt, k] == best]))
            assert found[prompt, n - 1] == pytest.approx(np.mean(means))
    # By its own score: the mean of one sample, and the highest of all.
    assert expected_best_of_n(np.array([[1.0, 2.0, 6.0]])).tolist() == [pytest.approx([3.0, 14 / 3, 6.0])]


def test_fits_of_gold_scores_recover_their_parameters_and_the_turn() -> None:
    d = np.linspace(0.0, 4.0, 12)
    forms: list[Any] = [
        ("best-of-n", d * (2.0 - 0.4 * d), 2.5),
        ("rl", d * (2.0 - 0.8 * np.log(np.maximum(d, 1e-9))), math.exp(1.5)),
    ]
    for form, exact, turn in forms:
        with case(form):
            beta = 0.4 if form == "best-of-n" else 0.8
            fit = fit_gold(form, d, exact)
            assert (fit.alpha.value, fit.beta.value, fit.turn.value) == pytest.approx((2.0, beta, turn))
            assert fit.residual < 1e-12 and fit.units == 1 and fit.alpha.low == pytest.approx(fit.alpha.high)
            assert fit.gold(d) == pytest.approx(exact)
            assert fit.gold(np.array(turn)) >= fit.gold(np.array([turn - 0.1, turn + 0.1])).max()
            # Noisy prompts, some without some points; garbage in those changes nothing.
            noisy = exact + np.random.default_rng(0).normal(0, 0.5, (200, 12))
            noisy[::3, 2:5] = math.nan
            own = np.where(np.isnan(noisy), -1e9, d)
            fit = fit_gold(form, own, noisy)
            for estimate, true in ((fit.alpha, 2.0), (fit.beta, beta), (fit.turn, turn)):
                assert estimate.low < true < estimate.high < 1.1 * true
            assert fit.turned == (form == "best-of-n")  # that of RL, at 4.5, is beyond what was measured
            assert fit == fit_gold(form, own, noisy)
    # A turn within what was measured, at 3.85, but for a few resamples.
    near = fit_gold("best-of-n", d, d * (np.random.default_rng(0).normal(2.0, 0.5, (20, 1)) - 0.26 * d))
    assert near.turn.value < 4 < near.turn.high and not near.turned
    rising = fit_gold("best-of-n", d, d * (1.0 + 0.1 * d))
    assert rising.turn.value == math.inf and not rising.turned
    assert turn_of("best-of-n", np.array([-1.0]), np.array([1.0])).tolist() == [0.0]
    for points, message in (([0.0, 0.0, 2.0], "two or more points"), ([-1.0, 1.0, 2.0], "0 or more, got -1")):
        with case(points), pytest.raises(UserError, match=message):
            fit_gold("rl", np.array(points), np.zeros(3))


def test_intervals_of_a_fit_cover_what_they_claim() -> None:
    d, draws, inside = np.linspace(0.5, 4.0, 6), np.random.default_rng(1), []
    for _ in range(300):
        gold = d * (draws.normal(2.0, 0.3, (40, 1)) - draws.normal(0.4, 0.1, (40, 1)) * d)
        fit = fit_gold("best-of-n", d, gold, resamples=200)
        inside.append((fit.alpha.low <= 2.0 <= fit.alpha.high, fit.turn.low <= 2.5 <= fit.turn.high))
    assert ((np.mean(inside, axis=0) > 0.91) & (np.mean(inside, axis=0) < 0.98)).all()
