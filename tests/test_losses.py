"""The losses: by hand for value and gradient, against naive loops, and at the edges."""

from collections.abc import Callable
from functools import partial
from math import comb, exp, inf, log, nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import (
    clipped_surrogate,
    clipped_value_loss,
    next_token_loss,
    ordered_pairs,
    pairwise_loss,
    ranking_loss,
)
from rlhf_jax.masked import masked_mean
from tests.conftest import WAYS

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("strict_dtypes")]

surrogate = partial(clipped_surrogate, clip=0.2)
value_loss = partial(clipped_value_loss, clip=0.2)
GARBAGE = [nan, inf, -inf, 1e30, -1e30, 1000.0]


def check(function: Callable, inputs: list, argnums: tuple, losses: list, slopes: list) -> None:
    """In each way, a case a row: value and gradient of function(*row), for the inputs in argnums, as by hand."""
    for name, way in WAYS.items():
        value, gradient = way(jax.value_and_grad(function, argnums))(*map(np.array, inputs))
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, losses, rtol=2e-6, atol=1e-7, err_msg=name)
        for i, slope in enumerate(slopes):
            np.testing.assert_allclose(gradient[i], slope, rtol=2e-6, atol=1e-7, err_msg=f"{name}, input {i}")


def test_next_token_by_hand() -> None:
    # Slope: softmax(logits) - [i = target]. e^logits = 1, 2, 5, 8, sum 16: -ln(8/16) = ln 2.
    # Equal logits: ln 4. 1000 nats behind: 1000, finite. -inf leaves two ids: ln 2, and no slope for what cannot occur.
    logits = [
        [log(1), log(2), log(5), log(8)],
        [3.0, 3.0, 3.0, 3.0],
        [0.0, -500.0, 1000.0, 0.0],
        [-inf, 0.0, 0.0, -inf],
    ]
    slopes = [[1 / 16, 2 / 16, 5 / 16, -8 / 16], [-3 / 4, 1 / 4, 1 / 4, 1 / 4], [-1, 0, 1, 0], [0, -1 / 2, 1 / 2, 0]]
    check(next_token_loss, [logits, [3, 0, 0, 1]], (0,), [log(2), log(4), 1000, log(2)], [slopes])


def test_pairwise_by_hand() -> None:
    # d = chosen - rejected, loss -ln σ(d), slope σ(d) - 1 for chosen and 1 - σ(d) for rejected.
    # σ(0) = 1/2, σ(ln 3) = 3/4, σ(-ln 3) = 1/4; at d = -10⁴ the loss is 10⁴ with slope -1, at 10⁴ both are 0.
    chosen = [2.0, 1.0 + log(3), -log(3), 0.0, 5e3]
    rejected = [2.0, 1.0, 0.0, 1e4, -5e3]
    slope = np.array([-1 / 2, -1 / 4, -3 / 4, -1, 0])
    check(pairwise_loss, [chosen, rejected], (0, 1), [log(2), log(4 / 3), log(4), 1e4, 0], [slope, -slope])


def test_ranking_by_hand() -> None:
    # From above: -ln σ is ln 2 at 0, ln 4/3 at ln 3, ln 4 at -ln 3; slopes of the winner -1/2, -1/4, -3/4.
    # 1. Two responses, ranks 2 and 1, d = 0 - ln 3: ln 4.
    # 2. A middle one is absent: pair (2, 0) alone, d = ln 3: ln 4/3.
    # 3. Ranks 1, 2, 2: pairs (0, 1) with d = -ln 3 and (0, 2) with d = 0; the tie is dropped:
    #    (ln 4 + ln 2)/2 = 3/2 ln 2; slopes (-3/4 - 1/2)/2, (3/4)/2, (1/2)/2.
    # 4. Ranks 3, 1, 2, d(1, 2) = 0, d(1, 0) = d(2, 0) = -10⁴: (ln 2 + 2 · 10⁴)/3; slopes (1 + 1)/3,
    #    (-1/2 - 1)/3, (1/2 - 1)/3.
    # 5. All tied, 6. one response, 7. none: no pair, 0.
    a = log(3)
    scores = [[a, 0, nan], [0, nan, a], [0, a, 0], [1e4, 0, 0], [1, 2, 3], [1, nan, nan], [nan, nan, nan]]
    ranks = [[2, 1, 0], [2, 1, 1], [1, 2, 2], [3, 1, 2], [1, 1, 1], [1, 2, 3], [1, 2, 3]]
    mask = [[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    losses = [log(4), log(4 / 3), 1.5 * log(2), (log(2) + 2e4) / 3, 0, 0, 0]
    slopes = [[3 / 4, -3 / 4, 0], [1 / 4, 0, -1 / 4], [-5 / 8, 3 / 8, 2 / 8], [4 / 6, -3 / 6, -1 / 6]] + 3 * [[0, 0, 0]]

    def loss_of_one(scores, ranks, mask):
        return ranking_loss(scores[None], ranks[None], mask[None])[0]

    check(loss_of_one, [scores, ranks, np.array(mask, bool)], (0,), losses, [slopes])


def test_clipped_surrogate_by_hand() -> None:
    # -min(ρ A, clip(ρ, 0.8, 1.2) A); the slope in ln ρ is -ρ A where the first is chosen, 0 where the clip is.
    cases = [
        # ρ, A, loss, slope
        (1.0, 2.0, -2.0, -2.0),
        (1.1, -3.0, 3.3, 3.3),
        (1.5, 2.0, -2.4, 0.0),  # min(3, 2.4): no gain from going further
        (1.5, -2.0, 3.0, 3.0),  # min(-3, -2.4): the loss of going there is felt
        (0.5, 2.0, -1.0, -1.0),  # min(1, 1.6)
        (0.5, -2.0, 1.6, 0.0),  # min(-1, -1.6)
        (0.5, 0.0, 0.0, 0.0),
        (exp(500), 1.0, -1.2, 0.0),  # ρ is beyond float32, its clip is not
    ]
    ratio, advantage, losses, slopes = (list(column) for column in zip(*cases))
    check(surrogate, [np.log(ratio), advantage], (0, 1), losses, [slopes, np.zeros(8)])


def test_clipped_value_by_hand() -> None:
    # Half the larger of (v - R)² and (v' - R)², v' = clip(v, v_old - 0.2, v_old + 0.2); slope v - R for the first.
    cases = [
        # v, v_old, R, loss, slope
        (1.0, 1.1, -1.0, 2.0, 2.0),  # v' = v
        (1.5, 1.0, 2.0, 0.32, 0.0),  # (-0.5)² and (1.2 - 2)²: the clip
        (1.5, 1.0, 1.0, 0.125, 0.5),  # 0.5² and 0.2²
        (0.5, 1.0, 0.0, 0.32, 0.0),  # 0.5² and 0.8²: the clip
        (0.5, 1.0, 1.0, 0.125, -0.5),  # (-0.5)² and (-0.2)²
        (2.0, 2.0, 2.0, 0.0, 0.0),
    ]
    value, old_value, target, losses, slopes = (list(column) for column in zip(*cases))
    check(value_loss, [value, old_value, target], (0, 1, 2), losses, [slopes, np.zeros(6), np.zeros(6)])


def test_next_token_is_the_naive_loop() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (2, 5, 11)), rng.integers(0, 11, (2, 5))
    expected = [[-log(exp(row[t]) / sum(map(exp, row))) for row, t in zip(*pair)] for pair in zip(logits, targets)]
    loss = jax.jit(next_token_loss)(logits, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_ranking_is_the_naive_loop() -> None:
    # Two prompts for each K from 2 to 9, six ranks for up to nine, the absent responses anywhere in the row.
    rng = np.random.default_rng(0)
    mask = np.stack([rng.permutation(9) < k for k in range(2, 10) for _ in range(2)])
    scores, ranks = np.where(mask, rng.normal(0, 2, mask.shape), nan), rng.integers(1, 7, mask.shape)
    expected, pairs = [], []
    for r, rank, kept in zip(scores, ranks, mask):
        total, count = 0.0, 0
        for i in range(9):
            for j in range(9):
                if kept[i] and kept[j] and rank[i] < rank[j]:
                    total, count = total - log(1 / (1 + exp(r[j] - r[i]))), count + 1
        expected.append(total / max(count, 1))
        pairs.append(count)
    assert 0 < pairs[-1] < comb(9, 2)  # there are ties
    loss = jax.jit(ranking_loss)(scores, ranks, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(jax.jit(ordered_pairs)(ranks, mask)).sum(axis=(1, 2)), pairs)


def test_clipped_losses_are_the_naive_loop() -> None:
    a, b, c = np.random.default_rng(0).normal(0, 0.5, (3, 40))
    expected = [-min(exp(x) * y, min(max(exp(x), 0.8), 1.2) * y) for x, y in zip(a, b)]
    loss = jax.jit(surrogate)(a, b)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    expected = [max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2) / 2 for v, o, r in zip(a, b, c)]
    loss = jax.jit(value_loss)(a, b, c)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


# Every input is some way from the kinks, on both sides of each.
AWAY_FROM_KINKS: dict[str, tuple[Callable, list]] = {
    "next_token": (lambda x: next_token_loss(x, jnp.array([2, 0])), [[[0.3, -1.0, 2.0], [1.0, 0.0, -2.0]]]),
    "pairwise": (pairwise_loss, [[1.0, -2.0, 0.0], [0.5, 3.0, 0.0]]),
    "ranking": (
        lambda x: ranking_loss(x, jnp.array([[1, 2, 2, 3]]), jnp.array([[True, True, True, False]])),
        [[[0.5, -1.0, 2.0, 9.0]]],
    ),
    "surrogate": (lambda x: surrogate(x, jnp.array([1.0, -1.0, 2.0, -2.0])), [[0.4, 0.4, -0.4, 0.05]]),
    "value": (lambda x: value_loss(x, jnp.ones(4), jnp.array([0.0, 3.0, 1.0, 1.5])), [[0.9, 1.6, 1.6, 0.5]]),
}


def test_gradients_are_the_differences() -> None:
    def every(inputs: dict[str, list]) -> dict[str, jax.Array]:
        return {name: loss(*inputs[name]) for name, (loss, _) in AWAY_FROM_KINKS.items()}

    # float64, where differences are exact enough to see a wrong slope; strictness is for our code, not for theirs.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = {name: [jnp.array(x, jnp.float64) for x in given] for name, (_, given) in AWAY_FROM_KINKS.items()}
        check_grads(jax.jit(every), [inputs], order=1)


def masked_losses() -> dict[str, tuple[Callable, list[np.ndarray]]]:
    """Mean losses whose second row and last column are masked, as functions of inputs [2, 3] (or [2, 3, 4])."""
    mask = np.array([[True, True, False], [False, False, False]])
    three = [np.array([[0.1, -0.6, 0.3], [0.2, 0.4, -0.5]]) * factor for factor in (1.0, 1.5, -1.0)]
    logits = np.arange(24.0).reshape(2, 3, 4) / 7
    return {
        "next_token": (lambda x: masked_mean(next_token_loss(x, jnp.array([[0, 1, 2], [3, 2, 1]])), mask), [logits]),
        "pairwise": (lambda *x: masked_mean(pairwise_loss(*x), mask), three[:2]),
        "ranking": (lambda x: jnp.mean(ranking_loss(x, jnp.array([[1, 2, 3], [1, 2, 3]]), mask)), three[:1]),
        "surrogate": (lambda *x: masked_mean(surrogate(*x), mask), three[:2]),
        "value": (lambda *x: masked_mean(value_loss(*x), mask), three),
    }


def test_garbage_in_masked_slots_leaves_no_trace() -> None:
    for name, (loss, inputs) in masked_losses().items():
        kept = np.array([[True, True, False], [False, False, False]])
        kept = kept[..., None] if inputs[0].ndim == 3 else kept
        graded = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs)))))
        value, slopes = jax.device_get(graded(*inputs))
        assert np.any(slopes[0]), name
        for garbage in GARBAGE:
            for i in range(len(inputs)):
                case = f"{name}, {garbage} in input {i}"
                dirty = [np.where(kept, x, garbage) if i == j else x for j, x in enumerate(inputs)]
                dirty_value, dirty_slopes = jax.device_get(graded(*dirty))
                np.testing.assert_array_equal(dirty_value, value, err_msg=case)
                for dirty_slope, slope in zip(dirty_slopes, slopes):
                    np.testing.assert_array_equal(dirty_slope, slope, err_msg=case)
                    np.testing.assert_array_equal(np.where(kept, 0.0, dirty_slope), 0.0, err_msg=case)


def test_a_kept_nan_shows() -> None:
    bad, good = np.array([nan, 0.0]), np.zeros(2)
    cases: list[tuple[Callable, tuple]]
    cases = [(pairwise_loss, (good, bad)), (surrogate, (bad, good)), (value_loss, (bad, good, good))]
    for loss, inputs in cases:
        np.testing.assert_array_equal(np.isnan(jax.jit(loss)(*inputs)), [True, False])
    assert np.isnan(jax.jit(next_token_loss)(bad, np.array(1)))
    assert np.isnan(jax.jit(ranking_loss)(bad[None], np.array([[1, 2]]), np.ones((1, 2), bool)))


def test_an_id_outside_the_vocabulary_is_nan() -> None:
    # 300 ids: more than uint8 and int8 count. Logit i is i/100, so that no other id has the loss of 0 or 100.
    logits = np.tile(np.arange(300.0) / 100, (2, 1))
    total = log(sum(exp(i / 100) for i in range(300)))
    pair = jax.jit(lambda inside, outside: (next_token_loss(logits, inside), next_token_loss(logits[:, :40], outside)))
    for dtype in (np.int32, np.uint8, np.int8, np.int16):
        outside = np.array([40, 255] if dtype == np.uint8 else [-1, 40], dtype)
        loss, of_outside = pair(np.array([0, 100], dtype), outside)
        np.testing.assert_allclose(loss, [total, total - 1], rtol=1e-5, err_msg=str(dtype))
        np.testing.assert_array_equal(of_outside, [nan, nan], err_msg=str(dtype))


def test_narrow_inputs_give_float32() -> None:
    ranks, mask = np.array([[1, 2, 3]]), np.array([[True, True, True]])

    @jax.jit
    def every(a: jax.Array, b: jax.Array, c: jax.Array) -> dict[str, jax.Array]:
        return {
            "next_token": next_token_loss(a, jnp.array([1])),
            "ranking": ranking_loss(a, ranks, mask),
            "pairwise": pairwise_loss(a, b),
            "surrogate": surrogate(a, b),
            "value": value_loss(a, b, c),
        }

    inputs = [[[3, 2, 5]], [[1, 2, 4]], [[2, 2, 3]]]
    full = every(*[np.array(x, np.float32) for x in inputs])
    for dtype in (jnp.bfloat16, jnp.int32):
        for name, narrow in every(*[np.array(x, dtype) for x in inputs]).items():
            assert narrow.dtype == jnp.float32, (name, dtype)
            np.testing.assert_array_equal(narrow, full[name], err_msg=f"{name}, {dtype}")


def test_shapes_that_differ_are_named() -> None:
    X23, X2, X21 = np.ones((2, 3)), np.ones(2), np.ones((2, 1))
    rows: tuple[tuple[Callable, tuple, str], ...] = (
        (next_token_loss, (X23, np.array([0, 1, 2])), r"logits \(2, 3\).*targets \(3,\)"),
        (pairwise_loss, (X2, X21), r"chosen \(2,\).*rejected \(2, 1\)"),
        (ranking_loss, (X23, X21, X23), r"scores \(2, 3\).*ranks \(2, 1\)"),
        (ranking_loss, (X23, X23, X21), r"scores \(2, 3\).*mask \(2, 1\)"),
        (ordered_pairs, (X23, X21), r"ranks \(2, 3\).*mask \(2, 1\)"),
        (surrogate, (X23, X21), r"log_ratio \(2, 3\).*advantage \(2, 1\)"),
        (value_loss, (X23, X21, X23), r"value \(2, 3\).*old_value \(2, 1\)"),
        (value_loss, (X23, X23, X21), r"value \(2, 3\).*target \(2, 1\)"),
    )
    for loss, inputs, message in rows:
        with pytest.raises(ValueError, match=message):
            loss(*inputs)
