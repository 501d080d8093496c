"""The reward model's own figures, beside its losses (test_losses.py) and shared prompts (test_shared_prompts.py)."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.data.batches import RaggedRows, RankingRows
from rlhf_jax.evaluation import heldout
from rlhf_jax.evaluation.heldout import _in_batches, row_scores, scores_of
from rlhf_jax.evaluation.warnings import end_warnings
from rlhf_jax.model import Transformer
from rlhf_jax.trainers import reward
from tests.cases import case
from tests.random_params import initialized

pytestmark = pytest.mark.core


def test_mean_and_scale_are_of_the_responses_that_exist_to_prompts_taken_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Transformer(ModelConfig(vocab_size=11, context=8, width=8, layers=1, heads=1), scalar=True)
    params = jax.tree.map(lambda x: 3 * np.asarray(x), initialized(model, jax.random.key(0)))
    rows = RankingRows(
        [
            ([[1], [2]], [1, 2]),
            ([[3], [4]], [1, 2]),
            ([[5], [6], [7]], [1, 2, 3]),
            ([[8], [9]], [1, 2]),
            ([[1], [3]], [2, 1]),
        ],
        8,
    )
    scores = scores_of(model, params, rows, batch_size=5)
    every = np.concatenate([scores[i, : len(ranks)] for i, (_, ranks) in enumerate(rows.rows)])
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 11)
    assert reward.score_mean_and_scale(model, params, rows, 2) == pytest.approx((every.mean(), every.std()), abs=1e-6)
    monkeypatch.setattr(reward, "REFERENCE_PROMPTS", 3)
    some = np.concatenate([scores[0, :2], scores[2], scores[4, :2]])
    assert reward.score_mean_and_scale(model, params, rows, 2) == pytest.approx((some.mean(), some.std()), abs=1e-6)
    # Also where a model is packed, where one prompt is there and where its scores are far from 0.
    monkeypatch.setattr(reward, "REFERENCE_PROMPTS", 99)
    shifted = params | {"score": params["score"] | {"bias": params["score"]["bias"] - 20}}
    for given, wanted, pack in ((params, every, 2), (shifted, every - 20, 0), (shifted, every - 20, 1)):
        found = reward.score_mean_and_scale(model, given, rows, 2, pack)
        assert found == pytest.approx((wanted.mean(), wanted.std()), abs=1e-5)
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 3)
    one = dataclasses.replace(rows, rows=rows.rows[2:3])
    assert reward.score_mean_and_scale(model, params, one, 2) == pytest.approx(
        (scores[2].mean(), scores[2].std()), abs=1e-6
    )
    # Too few to tell, or none.
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 12)
    assert reward.score_mean_and_scale(model, params, rows, 2) == (None, None)
    assert reward.score_mean_and_scale(model, params, None, 2) == (None, None)


def test_what_a_missing_end_does_to_a_score_and_whether_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(ModelConfig(vocab_size=11, context=8, width=8, layers=1, heads=1), scalar=True)
    params = jax.tree.map(lambda x: 3 * np.asarray(x), initialized(model, jax.random.key(0)))
    ended = [[1, 2, 9], [3, 10], [4, 5, 6, 9]]
    # Neither one that does not end nor one that is its end alone counts.
    rows = RankingRows([([ended[0], [7, 8]], [1, 2]), ([ended[1], [9], ended[2]], [1, 2, 3])], 8)
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 3)

    def scored(ids: list[int]) -> float:
        return float(row_scores(model, params, RaggedRows([(ids, [True] * len(ids))], 8), batch_size=1)[0])

    mean = float(np.mean([scored(ids[:-1]) - scored(ids) for ids in ended]))
    assert reward.without_end(model, params, rows, (9, 10), 0.5, 2) == pytest.approx(mean / 0.5, abs=1e-5)
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 4)
    assert reward.without_end(model, params, rows, (9, 10), 0.5, 2) is None
    for change, missing_end, score, pays in (
        (2.4, "subtract", -1.0, "it scores a response 2.4 standard deviations higher without its end token, of which "),
        (2.4, "keep", -1.0, "--episode.missing-end keep takes off 0: not to end pays"),
        (2.4, "replace", -1.0, ""),
        (0.9, "subtract", -1.0, ""),
        (-0.1, "keep", 0.0, ""),
        (None, "keep", 0.0, ""),
    ):
        with case((change, missing_end)):
            found = end_warnings(change, missing_end, score)
            assert len(found) == bool(pays) and pays in "".join(found)


def test_every_row_is_evaluated_once_whatever_the_batch() -> None:
    rows = RaggedRows([([n], [True]) for n in range(5)], 8)
    for batch in (1, 2, 4, 5, 7):
        counted = [int(n) for _, indices, counted_B in _in_batches(rows, batch) for n in indices[counted_B]]
        assert counted == list(range(5)), batch


def test_short_rows_are_padded_to_a_length_of_their_own_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [40, 3, 16, 17, 5, 33, 2, 4]
    rows = RaggedRows([([n] * n, [True] * n) for n in lengths], 64)

    def shapes(flops: float) -> list[tuple[int, list[int], int]]:
        return [
            (batch.tokens_BT.shape[1], [lengths[i] for i in indices], int(counted.sum()))
            for batch, indices, counted in _in_batches(rows, 3, flops)
        ]

    # Three rows at a time: the first batch could be of 16 in place of 48, the second of 48 as the last.
    order = [[2, 3, 4], [5, 16, 17], [33, 40, 2]]
    assert shapes(0.0) == [(48, one, count) for one, count in zip(order, (3, 3, 2), strict=True)]
    monkeypatch.setattr(heldout, "COMPILATION", 95.0)
    # 32 in place of 48 for six rows saves 96 tokens, 16 in place of 32 for three of them 48.
    assert [length for length, _, _ in shapes(1.0)] == [32, 32, 48]
    assert [length for length, _, _ in shapes(2.0)] == [16, 32, 48]
    model = Transformer(ModelConfig(vocab_size=64, context=64, width=8, layers=1, heads=1), scalar=True)
    params = jax.tree.map(lambda x: 3 * np.asarray(x), initialized(model, jax.random.key(0)))
    one_shape = row_scores(model, params, rows, batch_size=3)
    monkeypatch.setattr(heldout, "COMPILATION", 0.0)
    np.testing.assert_allclose(row_scores(model, params, rows, batch_size=3), one_shape, rtol=1e-5, atol=1e-6)


def test_without_demonstrations_no_score_is_shifted() -> None:
    params = {"score": {"bias": np.zeros(1)}}
    found, shift = reward.centred(Transformer(ModelConfig(), scalar=True), params, RaggedRows([], 8), 2)
    assert found is params and shift == 0.0
