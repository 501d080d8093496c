"""Agreement: hand-derived figures, reference libraries on random tables with gaps, and intervals that cover."""

import itertools
import json
import warnings
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score  # type: ignore[import-untyped]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what pandas says of its own future
    from statsmodels.stats import inter_rater  # type: ignore[import-untyped]

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import agreement as ag
from rlhf_jax.feedback.judged import item_row, join, judgement_row, read_items, read_judgements
from rlhf_jax.feedback.records import FLAGS, Item, Judgement
from tests.cases import case

pytestmark = pytest.mark.feedback

DRAWN = {"resamples": 40}


def table(values: np.ndarray, item: np.ndarray | None = None) -> ag.Table:
    names = tuple("abcdefgh"[: values.shape[1]])
    return ag.Table(np.asarray(values, float), np.arange(len(values)) if item is None else item, names)


def random_table(seed: int, units: int = 60, labellers: int = 4, categories: int = 5, gaps: float = 0.3) -> np.ndarray:
    """Labellers who say what is so, one away now and then, and nothing now and then."""
    random = np.random.default_rng(seed)
    true = random.integers(1, categories + 1, (units, 1))
    said = np.clip(true + random.integers(-1, 2, (units, labellers)), 1, categories).astype(float)
    said[random.random(said.shape) < gaps] = np.nan
    return said


def value(estimate: ag.Estimate | None) -> float:
    assert estimate is not None and estimate.low <= estimate.high
    return estimate.value


def test_alpha_is_the_reference_librarys() -> None:
    for row in itertools.product(ag.LEVELS, range(5)):
        with case(row) as (level, seed):
            said = random_table(seed, labellers=2 + seed)
            wanted = krippendorff.alpha(reliability_data=said.T, level_of_measurement=level)
            assert value(ag.krippendorff_alpha(table(said), level, **DRAWN)) == pytest.approx(wanted, abs=1e-12)


def test_kappas_are_the_reference_libraries() -> None:
    for seed in range(5):
        with case(seed):
            said = random_table(seed, gaps=0.0)
            counts, _ = inter_rater.aggregate_raters(said.astype(int))
            assert value(ag.fleiss_kappa(table(said), **DRAWN)) == pytest.approx(
                inter_rater.fleiss_kappa(counts), abs=1e-12
            )
            gappy = random_table(seed, labellers=2)
            both = ~np.isnan(gappy).any(axis=1)
            wanted = cohen_kappa_score(*gappy[both].astype(int).T)
            estimate = ag.cohen_kappa(table(gappy), **DRAWN)
            assert value(estimate) == pytest.approx(wanted, abs=1e-12)
            assert estimate is not None and estimate.units == both.sum()


def test_a_resample_is_the_statistic_of_the_units_drawn() -> None:
    # Items of one unit and of three: the interval's ends are those of a loop that draws the items one by one.
    said = random_table(7, units=40)
    item = np.repeat(np.arange(20), np.tile([1, 3], 10))
    estimate = ag.krippendorff_alpha(table(said, item), "ordinal", resamples=50, seed=3)
    items = np.unique(item[np.sum(~np.isnan(said), axis=1) > 1])
    times = np.random.default_rng(3).multinomial(len(items), np.full(len(items), 1 / len(items)), size=50)
    alphas = []
    for row in times:
        drawn = np.concatenate([said[item == id] for id, n in zip(items, row) for _ in range(n)])
        alphas.append(krippendorff.alpha(reliability_data=drawn.T, level_of_measurement="ordinal"))
    assert estimate is not None
    np.testing.assert_allclose([estimate.low, estimate.high], np.quantile(alphas, [0.025, 0.975]), atol=1e-12)


def test_intervals_cover() -> None:
    # Two labellers who agree on 73% of pairs: 95% of 200 intervals should hold it, give or take 1.5%.
    hits = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        alike = random.random(150) < 0.73
        first = random.choice([-1.0, 1.0], 150)
        estimate = ag.agreement(table(np.stack([first, np.where(alike, first, -first)], axis=1)), resamples=200)
        assert estimate is not None
        hits += estimate.low <= 0.73 <= estimate.high
    assert 0.90 <= hits / 200 <= 0.99


ITEMS = [
    Item("1", "p", ("x", "y", "z"), kind="calibration", gold=(1, 2, 3)),
    Item("2", "p", ("x", "y")),
]
SAID = [
    Judgement("1", "ann", (1, 2, 3), (7, None, 1), (frozenset(), frozenset({"harmful"}), frozenset()), seconds=4.0),
    Judgement("1", "bob", (1, 3, 2), (6, 5, 1), (frozenset(),) * 3, seconds=2.0),
    Judgement("1", "cy", (1, 1, 2), seconds=9.0),
    Judgement("2", "ann", (2, 1), seconds=6.0),
    Judgement("2", "bob", (), skip="both are empty"),
    Judgement("2", "cy", (2, 1)),
]


def test_pairs_by_hand() -> None:
    judged = join(ITEMS, reversed(SAID))
    pairs = ag.preferences(judged, gold=True)
    assert pairs.labellers == ("ann", "bob", "cy", "gold")
    nan = np.nan  # pairs xy, xz, yz of item 1, xy of item 2
    wanted = [[1, 1, 0, 1], [1, 1, 1, 1], [1, -1, 1, 1], [-1, nan, -1, nan]]
    np.testing.assert_array_equal(pairs.values, wanted)
    people = pairs.of("ann", "bob", "cy")
    # Ordered by two: xy by ann, bob: alike. xz: three of three. yz: ann with cy alike, bob with neither. Item 2: alike.
    assert value(ag.agreement(people)) == pytest.approx((1 + 3 + 1 + 1) / (1 + 3 + 3 + 1))
    assert value(ag.agreement_with_others(people, "bob")) == pytest.approx(3 / 5)
    assert value(ag.agreement(pairs.of("cy", "gold"))) == 1.0
    # One item only is shared by these two, so nothing can be said of the spread over items.
    shared = ag.agreement(people.of("ann", "bob"))
    assert shared is not None and (shared.low, shared.value, shared.high, shared.units) == (2 / 3, 2 / 3, 2 / 3, 3)


def test_chance_agreement_does_not_depend_on_which_response_stands_first() -> None:
    # Everybody prefers the first of each pair, as in a file of (chosen, rejected): Cohen's κ of the columns is 0 / 0.
    alike = table(np.ones((10, 2)))
    assert ag.cohen_kappa(alike) is None
    assert value(ag.cohen_kappa(alike.mirrored())) == 1.0
    random = np.random.default_rng(0)
    said = random.choice([-1.0, 0.0, 1.0], (50, 3))
    turned = said * random.choice([-1.0, 1.0], (50, 1))
    for coefficient in (ag.fleiss_kappa, lambda t: ag.krippendorff_alpha(t, "nominal")):
        assert value(coefficient(table(said).mirrored())) == pytest.approx(value(coefficient(table(turned).mirrored())))


def test_report_says_all_and_is_plain() -> None:
    report = ag.report(join(ITEMS, SAID), resamples=20)
    # A skip is no judgement.
    assert (report["items"], report["judgements"], report["skipped"], set(report["flags"])) == (2, 5, 1, set(FLAGS))
    assert report["pairs"]["ties"] == pytest.approx(1 / 11)  # of ann's 4 pairs, bob's 3 and cy's 4
    assert report["labellers"]["ann"]["median_seconds"] == 5.0
    assert report["labellers"]["bob"]["skipped"] == 1
    assert report["labellers"]["bob"]["gold"]["value"] == pytest.approx(2 / 3)
    assert report["labellers"]["cy"]["flags"]["harmful"] is None
    assert report["flags"]["harmful"]["share"] == pytest.approx(1 / 6)
    assert report["matrix"]["agreement"][0][0] is None
    assert report["matrix"]["agreement"][0][1]["value"] == report["matrix"]["agreement"][1][0]["value"]
    assert report["yardstick"]["agreement"] == 0.726


def test_nothing_shared_is_nothing_said() -> None:
    alone = join(ITEMS, [SAID[0]])
    assert ag.agreement(ag.preferences(alone)) is None
    assert ag.krippendorff_alpha(ag.ratings(alone), "interval") is None
    assert ag.report(join(ITEMS, []), resamples=5)["labellers"] == {}


MISFITS = [
    (Judgement("3", "ann", (1, 2)), "judgement of item 3 by ann: expected one of the 2 items given"),
    (Judgement("2", "ann", (1, 2, 3)), "ranks: expected 2, one for each response, got 3"),
    (Judgement("2", "ann", ()), "ranks: expected 2, one for each response, got 0"),
    (Judgement("2", "ann", (1, 2), (7,)), "ratings: expected 2, one for each response, got 1"),
    (Judgement("1", "bob", (1, 2, 3)), "judgement of item 1 by bob: expected one judgement, got two"),
]


def test_a_judgement_that_does_not_fit_is_named() -> None:
    for row in MISFITS:
        with case(row) as (judgement, message), pytest.raises(UserError, match=message):
            join(ITEMS, [SAID[1], judgement])


def test_files(tmp_path: Path) -> None:
    items, said = tmp_path / "items.jsonl", tmp_path / "judgements.jsonl"
    every = [*ITEMS, Item("3", "p", ("x", "y"), ended=(False, True))]
    items.write_text("".join(json.dumps(item_row(item)) + "\n" for item in every))
    said.write_text("".join(json.dumps(judgement_row(judgement)) + "\n" for judgement in SAID))
    assert read_items([items]) == every and read_judgements([said]) == SAID
    said.write_text('{"item": "1", "labeller": "ann", "ranks": [1, 0]}')
    with pytest.raises(UserError, match=r"judgements.jsonl:1: field 'ranks\[1\]': expected whole .*, got the number 0"):
        read_judgements([said])
