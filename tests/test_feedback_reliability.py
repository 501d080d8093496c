"""Reliability: hand-derived likelihoods, and simulated labellers of known reliability found within the intervals."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from rlhf_jax.feedback import reliability as rel
from rlhf_jax.feedback.agreement import Table
from rlhf_jax.feedback.judged import Judged, join
from rlhf_jax.feedback.records import Item, Judgement
from tests.cases import case

pytestmark = pytest.mark.feedback


def simulated(seed: int, precision: list[float], *, items: int, responses: int, each: int) -> tuple[Judged, np.ndarray]:
    """Plackett-Luce rankings of `items` items by `each` labellers, and the scores they are drawn from."""
    random = np.random.default_rng(seed)
    scores = random.standard_normal((items, responses))
    found, said = [], []
    for number, score in enumerate(scores):
        item = Item(f"{number:05}", "p", tuple("abcdefghi"[:responses]))
        found.append(item)
        for labeller in random.choice(len(precision), each, replace=False):
            utility = precision[labeller] * score + random.gumbel(size=responses)
            ranks = np.argsort(np.argsort(-utility)) + 1
            said.append(Judgement(item.id, f"labeller {labeller}", tuple(ranks.tolist())))
    return join(found, said), scores


def test_likelihood_of_one_pair_by_hand() -> None:
    # Two labellers, one pair, both choose the first: p = E σ(β₁ d) σ(β₂ d), d ~ N(0, 2); the slope in β₁ by quad.
    judged = join([Item("1", "p", ("x", "y"))], [Judgement("1", name, (1, 2)) for name in "ab"])
    rankings = rel._Rankings.of(judged)
    beta = np.array([0.7, 1.9])
    modes, roots = rel._modes(rankings, beta, np.zeros((1, 2)))
    base = rel.ndtri(rel.qmc.Sobol(2, seed=0).random(4096))
    gradient, curvature = rel._derivatives(rankings, beta, modes, roots, base)

    def probability(first: float, second: float) -> float:
        return quad(lambda d: np.exp(-d * d / 4) * expit(first * d) * expit(second * d), -20, 20)[0]

    step = 1e-3
    up, middle, down = (np.log(probability(0.7 + h, 1.9)) for h in (step, 0.0, -step))
    assert gradient[0] == pytest.approx((up - down) / (2 * step), rel=1e-3)
    assert curvature[0, 0] == pytest.approx(-(up - 2 * middle + down) / step**2, abs=2e-3)
    both = [np.log(probability(0.7 + a * step, 1.9 + b * step)) for a, b in itertools.product((1, -1), repeat=2)]
    assert curvature[0, 1] == pytest.approx(-(both[0] - both[1] - both[2] + both[3]) / (4 * step**2), abs=2e-3)
    np.testing.assert_allclose(curvature, curvature.T, atol=1e-12)


def test_ties_say_nothing_about_each_other() -> None:
    # Ranks 1, 1, 2 of three: each of the first two before the third, log σ(s1 - s3) + log σ(s2 - s3).
    judged = join([Item("1", "p", ("x", "y", "z"))], [Judgement("1", "a", (1, 1, 2))])
    logp, _ = rel._choices(rel._Rankings.of(judged), slice(None), np.array([[0.3, -0.2, 1.0]]))
    assert logp[0] == pytest.approx(np.log(expit(-0.7)) + np.log(expit(-1.2)))
    whole = join([Item("1", "p", ("x", "y", "z"))], [Judgement("1", "a", (2, 1, 3))])
    logp, _ = rel._choices(rel._Rankings.of(whole), slice(None), np.array([[0.3, -0.2, 1.0]]))
    e = np.exp([0.3, -0.2, 1.0])
    assert logp[0] == pytest.approx(np.log(e[1] / e.sum() * e[0] / (e[0] + e[2])))


def test_share_of_pairs_that_are_ordered_right() -> None:
    assert rel.share_right(0.0) == 0.5
    assert rel.share_right(1e6) == pytest.approx(1.0, abs=1e-3)
    wanted = 2 * quad(lambda d: np.exp(-d * d / 4) / np.sqrt(4 * np.pi) * expit(1.3 * d), 0, 30)[0]
    assert rel.share_right(1.3) == pytest.approx(wanted, abs=1e-4)
    assert rel.share_right(-1.3) == pytest.approx(1 - wanted, abs=1e-4)


KNOWN = [([0.0, 0.5, 1.0, 1.5, 2.0, 3.0], 120, 3, 3), ([0.5, 1.0, 1.0, 2.0, 4.0], 200, 2, 3)]


def test_known_reliabilities_are_in_the_intervals() -> None:
    for row in KNOWN:
        with case(row) as (precision, items, responses, each):
            hits, values = [], []
            for seed in range(6):
                judged, scores = simulated(seed, precision, items=items, responses=responses, each=each)
                # A quarter of the points of the integral, and of the time; the other tests have all of them.
                found = rel.estimate(judged, points=64)
                own = [found.labellers[f"labeller {n}"] for n in range(len(precision))]
                hits += [one.precision.low <= true <= one.precision.high for one, true in zip(own, precision)]
                values.append([one.precision.value for one in own])
                # Rankings know scores up to a constant for each item.
                estimated = np.array([found.scores[id][0] for id in judged.items])
                apart = (array - array.mean(axis=1, keepdims=True) for array in (estimated, scores))
                assert np.corrcoef(*(array.ravel() for array in apart))[0, 1] > 0.6
            # 95% of 36 or 30 intervals, give or take three deviations of 4%.
            assert 0.83 <= np.mean(hits) <= 1.0
            np.testing.assert_allclose(np.median(values, axis=0), precision, rtol=0.3, atol=0.3)


def test_a_labeller_who_is_upside_down_is_found() -> None:
    judged, _ = simulated(3, [2.0, 2.0, 2.0, -2.0], items=100, responses=3, each=3)
    wrong = rel.estimate(judged).labellers["labeller 3"]
    assert wrong.precision.high < 0 and wrong.right.value < 0.35
    again = rel.estimate(judged).labellers["labeller 3"]
    assert again == wrong


def test_one_labeller_alone_is_as_reliable_as_was_thought_before() -> None:
    # Any ranking of exchangeable responses is as likely at any β: the interval is the prior's.
    judged, _ = simulated(0, [2.0], items=30, responses=3, each=1)
    alone = rel.estimate(judged).labellers["labeller 0"]
    assert alone.right.low < 0.2 and alone.right.high > 0.9 and alone.judgements == 30
    assert rel.estimate(join([], [])) == rel.Estimated({}, {})


def flagged(seed: int, sensitivity: np.ndarray, specificity: np.ndarray, share: float) -> tuple[Table, np.ndarray]:
    random = np.random.default_rng(seed)
    so = random.random(800) < share
    rate = np.where(so[:, None], sensitivity, 1 - specificity)
    values = (random.random(rate.shape) < rate).astype(float)
    values[random.random(rate.shape) < 0.3] = np.nan
    return Table(values, np.arange(len(values)), tuple("abcdef"[: len(sensitivity)])), so


def test_dawid_skene_recovers_known_rates_within_the_intervals() -> None:
    sensitivity, specificity = np.array([0.95, 0.9, 0.8, 0.6, 0.5]), np.array([0.98, 0.8, 0.95, 0.9, 0.7])
    hits, right = [], []
    for seed in range(12):
        table, so = flagged(seed, sensitivity, specificity, 0.25)
        found = rel.dawid_skene(table)
        for n, one in enumerate(found.labellers.values()):
            hits += [
                one.sensitivity.low <= sensitivity[n] <= one.sensitivity.high,
                one.specificity.low <= specificity[n] <= one.specificity.high,
            ]
        hits.append(found.share.low <= 0.25 <= found.share.high)
        known = ~np.isnan(found.probability)
        most = np.nanmean(table.values[known], axis=1) > 0.5
        right.append([np.mean((found.probability[known] > 0.5) == so[known]), np.mean(most == so[known])])
    assert 0.88 <= np.mean(hits) <= 1.0
    of_model, of_majority = np.mean(right, axis=0)
    assert of_model > of_majority + 0.02


def test_dawid_skene_by_hand() -> None:
    # At the end of EM the rates are the weighted shares, a hit and a miss more, of the very probabilities they give.
    table, _ = flagged(1, np.array([0.9, 0.8, 0.7]), np.array([0.9, 0.9, 0.8]), 0.3)
    found = rel.dawid_skene(table)
    known = ~np.isnan(found.probability)
    so, values = found.probability[known], table.values[known]
    assert found.share.value == pytest.approx((so.sum() + 1) / (len(so) + 2), abs=1e-8)
    logp = np.stack([np.full(len(so), np.log(1 - found.share.value)), np.full(len(so), np.log(found.share.value))])
    for n, one in enumerate(found.labellers.values()):
        asked = ~np.isnan(values[:, n])
        hit = (so[asked] @ values[asked, n] + 1) / (so[asked].sum() + 2)
        assert one.sensitivity.value == pytest.approx(hit, abs=1e-8)
        for side, rate in enumerate((1 - one.specificity.value, one.sensitivity.value)):
            logp[side, asked] += np.log(np.where(values[asked, n] > 0, rate, 1 - rate))
    np.testing.assert_allclose(so, expit(logp[1] - logp[0]), atol=1e-8)


def test_nobody_was_asked() -> None:
    empty = rel.dawid_skene(Table(np.full((3, 1), np.nan), np.arange(3), ("a",)))
    assert empty.labellers == {} and np.isnan(empty.probability).all()
