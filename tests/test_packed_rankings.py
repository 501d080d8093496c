"""Rankings with each prompt written once, and several prompts in a row, against a row of its own for each response."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.data.batches import PackedRankingRows, RankingRows
from rlhf_jax.logprobs import ranking_scores
from rlhf_jax.model import Transformer
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.trainers import reward
from tests.random_params import initialized

pytestmark = pytest.mark.speed


def rankings() -> RankingRows:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        prompt = random.integers(0, 11, random.integers(0, 6)).tolist()
        count = int(random.integers(2, 5))
        responses = [prompt + random.integers(0, 11, random.integers(1, 6)).tolist() for _ in range(count)]
        rows.append((responses, random.integers(1, 4, count).tolist()))
    # The first response is how the second begins: it ends within what they have in common.
    rows += [([[1, 2, 3], [1, 2, 3, 4]], [1, 2]), ([[5], [6, 7]], [2, 1])]
    return RankingRows(rows, 16, pad_id=10)


def test_rows_by_hand() -> None:
    rows = RankingRows([([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]], [2, 1, 3]), ([[7], [8, 9]], [1, 2])], 8)
    batch = PackedRankingRows(rows).batch(np.arange(2))
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 3, 6], [7, 8, 9, 0, 0, 0, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 2, 2, 3, 4, 4], [2, 3, 3, 0, 0, 0, 0]]
    assert batch.at_BMK.tolist() == [[[3, 4, 6]], [[0, 2, 0]]]
    assert batch.ranks_BK.tolist() == [[2, 1, 3], [1, 2, 0]]
    assert batch.mask_BK.tolist() == [[True] * 3, [True, True, False]]
    packed = PackedRankingRows(rows, 2).batch(np.array([1, 0]))
    assert packed.tokens_BT.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 3, 6] + [0] * 6]
    assert packed.segment_ids_BT.tolist() == [[2, 3, 3, 5, 5, 6, 6, 7, 8, 8] + [0] * 6]
    assert packed.at_BMK.tolist() == [[[0, 2, 0], [6, 7, 9]]]
    assert packed.ranks_BK.tolist() == [[1, 2, 0], [2, 1, 3]]
    assert packed.mask_BK.tolist() == [[True, True, False], [True] * 3]


def test_rows_are_as_long_as_the_buckets_that_hold_them() -> None:
    # The longest row has 7 tokens; buckets that do not hold it are added to.
    cases: tuple[tuple[tuple[int, ...], int], ...] = (((), 7), ((8,), 8), ((9, 16), 9), ((5,), 7))
    for buckets, length in cases:
        rows = RankingRows([([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]], [2, 1, 3])], 8, buckets=buckets)
        assert PackedRankingRows(rows).row_length(np.arange(1)) == length, buckets
    # Four prompts to a row: steps of an eighth of the next power of two, unless a bucket holds the row.
    for responses, buckets, length in (
        (30, (), 240),
        (32, (), 256),
        (33, (), 288),
        (33, (300,), 300),
        (33, (64,), 288),
    ):
        ids = [[*range(responses)], [0, *range(2, responses + 1)]]
        ranked = PackedRankingRows(RankingRows([(ids, [1, 2])] * 9, 64, buckets=buckets), 4)
        assert int(ranked.lengths[0]) == 2 * responses - 1
        assert ranked.row_length(np.arange(4)) == length, (responses, buckets)


@functools.cache
def parameters(config: ModelConfig) -> dict[str, Any]:
    model = Transformer(config, scalar=True)
    return jax.tree.map(lambda x: 3 * np.asarray(x), initialized(model, jax.random.key(0)))


def test_scores_and_an_update_are_the_same() -> None:
    # 4 responses of up to 5 tokens behind a prompt of 5: a shared row may be longer than the context.
    apart = rankings().batch(np.arange(8))
    packed = [PackedRankingRows(rankings(), pack).batch(np.arange(8)) for pack in (1, 4)]
    # A layer of a window below one that sees all; positions that are turned, and positions that are added.
    for changes in ({"layers": 2, "windows": (3, 0)}, {"layers": 1, "positions": "learned"}):
        config = ModelConfig(vocab_size=11, context=16, width=16, heads=2, kv_heads=1, **changes)
        model, params = Transformer(config, scalar=True), parameters(config)
        assert all(batch.tokens_BT.shape[1] > config.context for batch in packed)
        # ε large: where a gradient is 0 but for rounding, Adam would blow the rounding up.
        optimizer = make_optimizer(OptimConfig(learning_rate=0.01, warmup_steps=0, epsilon=1e-2), 2)
        update = reward.make_update(model, optimizer)

        @jax.jit
        def scores_and_update(params: Any, batch: Any, model=model, optimizer=optimizer, update=update) -> Any:
            state = new_state(params, optimizer.init(params), 0)
            return ranking_scores(model, params, batch), *update(state, batch)

        found = [jax.device_get(scores_and_update(params, batch)) for batch in (apart, *packed)]
        scores, states, metrics = zip(*found)
        expected = np.where(apart.mask_BK, scores[0], 0.0)
        assert np.abs(expected).max() > 1, changes
        for at in (1, 2):
            np.testing.assert_allclose(scores[at], expected, rtol=1e-5, atol=1e-4, err_msg=str(changes))
            assert float(metrics[at]["loss"]) == pytest.approx(float(metrics[0]["loss"]), rel=1e-5), changes
            assert int(metrics[at]["tokens"]) < int(metrics[0]["tokens"]), changes
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), states[at].params, states[0].params)


def test_figures_of_a_reward_model_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "FEWEST_RESPONSES", 2)
    config = ModelConfig(vocab_size=11, context=16, width=16, layers=1, heads=2)
    model, params = Transformer(config, scalar=True), parameters(config)
    # Batches of three: the last one of eight prompts has one that was there already.
    cases = ((3, 0), (3, 1), (6, 3))  # batch, pack
    apart, shared, packed = (reward.accuracy(model, params, rankings(), *case) for case in cases)
    assert packed == shared == apart and 0 < apart[0] < 1 and apart[1] > 10
    found = [reward.score_mean_and_scale(model, params, rankings(), *case) for case in cases]
    assert abs(found[0][0]) > 0.1
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-4)
