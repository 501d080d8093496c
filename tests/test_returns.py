"""KL-penalised rewards and generalized advantages: by hand, against naive loops, and at the edges."""

from collections.abc import Callable
from functools import partial
from math import nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.returns import (
    generalized_advantages,
    greedy_baseline_advantages,
    group_advantages,
    kl_penalized_reward,
    leave_one_out_advantages,
)
from tests.conftest import WAYS

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("strict_dtypes")]

GARBAGE = [nan, np.inf, -np.inf, 1e30]


def test_reward_by_hand() -> None:
    # β = 0.5. log π - log π_ref is (0.2, -0.4, 0.6) where kept, the score 3 is on the last kept token:
    # (-0.5 · 0.2, -0.5 · -0.4, -0.5 · 0.6 + 3) = (-0.1, 0.2, 2.7). Slope of the sum: ∓0.5 a token, 1 for the score,
    # -(0.2 - 0.4 + 0.6) = -0.4 for β.
    # The second row ends at its second token, the third has no token for its score.
    logp = np.array([[-1.0, -2.0, -1.4, nan], [-1.0, -2.0, nan, nan], [nan, nan, nan, nan]])
    ref_logp = np.array([[-1.2, -1.6, -2.0, nan], [-1.2, -1.6, nan, nan], [nan, nan, nan, nan]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    score, kl_coef = np.array([3.0, -1.0, 7.0]), np.array([0.5, 0.5, 0.5])

    def sum_and_all(logp, ref_logp, score, kl_coef, mask):
        reward = kl_penalized_reward(logp[None], ref_logp[None], score[None], mask[None], kl_coef=kl_coef)[0]
        return jnp.sum(reward), reward

    expected = np.array([[-0.1, 0.2, 2.7, 0], [-0.1, -0.8, 0, 0], [0, 0, 0, 0]])
    for name, way in WAYS.items():
        graded = way(jax.value_and_grad(sum_and_all, (0, 1, 2, 3), has_aux=True))
        (_, reward), slopes = graded(logp, ref_logp, score, kl_coef, mask)
        np.testing.assert_allclose(reward, expected, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(slopes[0], -0.5 * mask, err_msg=name)
        np.testing.assert_allclose(slopes[1], 0.5 * mask, err_msg=name)
        np.testing.assert_allclose(slopes[2], [1, 1, 0], err_msg=name)
        np.testing.assert_allclose(slopes[3], [-0.4, 0.2, 0], atol=1e-6, err_msg=name)


def test_advantages_by_hand() -> None:
    # γ = λ = 1/2, r = (1, 2, 3), V = (1, 2, 4), and V past the end is 0:
    #   δ_2 = 3 - 4 = -1, δ_1 = 2 + 4/2 - 2 = 2, δ_0 = 1 + 2/2 - 1 = 1
    #   A_2 = -1, A_1 = 2 - 1/4 = 1.75, A_0 = 1 + 1.75/4 = 1.4375; R = A + V.
    # A_0 = δ_0 + δ_1/4 + δ_2/16, so its slopes are (1, 1/4, 1/16) in r and (-1, 1/2 - 1/4, 1/8 - 1/16) in V.
    # The second row ends at its second token: δ_1 = 2 - 2 = 0, δ_0 = 1, A = (1, 0). The third is empty.
    reward = np.array([[1.0, 2.0, 3.0, nan], [1.0, 2.0, nan, nan], [nan, nan, nan, nan]])
    value = np.array([[1.0, 2.0, 4.0, nan], [1.0, 2.0, nan, nan], [nan, nan, nan, nan]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)

    def first_and_all(reward, value, mask):
        advantage, target = generalized_advantages(reward[None], value[None], mask[None], gamma=0.5, lam=0.5)
        return advantage[0, 0], (advantage[0], target[0])

    expected = (
        [[1.4375, 1.75, -1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        [[2.4375, 3.75, 3, 0], [2, 2, 0, 0], [0, 0, 0, 0]],
        [[1, 1 / 4, 1 / 16, 0], [1, 1 / 4, 0, 0], [0, 0, 0, 0]],
        [[-1, 1 / 4, 1 / 16, 0], [-1, 1 / 4, 0, 0], [0, 0, 0, 0]],
    )
    for name, way in WAYS.items():
        graded = way(jax.value_and_grad(first_and_all, (0, 1), has_aux=True))
        (_, both), slopes = graded(reward, value, mask)
        for what, found, by_hand in zip(("advantage", "target", "slope", "slope"), (*both, *slopes), expected):
            np.testing.assert_allclose(found, np.array(by_hand), err_msg=f"{what}, {name}")


def episodes() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two [6, 5] arrays with NaN past the end, scores, the lengths 0 to 5, and the mask."""
    rng = np.random.default_rng(0)
    length = np.arange(6)
    mask = np.arange(5) < length[:, None]
    return *np.where(mask, rng.normal(size=(2, 6, 5)), nan), rng.normal(size=6), length, mask


def test_reward_is_the_naive_loop() -> None:
    logp, ref_logp, score, length, mask = episodes()
    expected = np.zeros((6, 5))
    for row in range(6):
        for t in range(length[row]):
            expected[row, t] = -0.3 * (logp[row, t] - ref_logp[row, t]) + (score[row] if t == length[row] - 1 else 0)
    reward = jax.jit(partial(kl_penalized_reward, kl_coef=0.3))(*map(np.float32, (logp, ref_logp, score)), mask)
    np.testing.assert_allclose(reward, expected, rtol=1e-5, atol=1e-6)


def test_advantages_are_the_naive_sum() -> None:
    reward, value, _, length, mask = episodes()
    advantages = jax.jit(generalized_advantages)
    # λ = 1: A + V is the discounted sum of what follows. λ = 0: A is δ. γ = 1 and λ = 0.95 are the recipe's.
    for gamma, lam in ((1.0, 0.95), (0.9, 1.0), (0.9, 0.0)):
        expected = np.zeros((6, 5))
        for row, n in enumerate(length):
            v = [*value[row, :n], 0.0]
            for t in range(n):
                for k in range(t, n):
                    expected[row, t] += (gamma * lam) ** (k - t) * (reward[row, k] + gamma * v[k + 1] - v[k])
        advantage, target = advantages(np.float32(reward), np.float32(value), mask, gamma=gamma, lam=lam)
        case = f"gamma {gamma}, lam {lam}"
        np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6, err_msg=case)
        np.testing.assert_allclose(target, np.where(mask, expected + value, 0), rtol=1e-5, atol=1e-6, err_msg=case)


def rewards(logp, ref_logp, mask):
    return kl_penalized_reward(logp, ref_logp, np.array([3.0, 5.0], np.float32), mask, kl_coef=0.5)


def advantages(reward, value, mask):
    return jnp.stack(generalized_advantages(reward, value, mask, gamma=0.9, lam=0.95))


def test_garbage_in_masked_slots_leaves_no_trace() -> None:
    mask = np.array([[True, True, False], [False, False, False]])
    clean = [np.array([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0]]), np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])]
    for function in (rewards, advantages):
        graded = jax.jit(jax.value_and_grad(lambda *inputs, f=function: jnp.sum(jnp.sin(f(*inputs, mask))), (0, 1)))
        value, slopes = jax.device_get(graded(*clean))
        assert np.all(np.abs(np.array(slopes)[:, 0, 0]) > 0), function
        for garbage in GARBAGE:
            for i in range(2):
                case = f"{function.__name__}, {garbage} in input {i}"
                dirty = [np.where(mask, x, garbage) if i == j else x for j, x in enumerate(clean)]
                dirty_value, dirty_slopes = jax.device_get(graded(*dirty))
                np.testing.assert_array_equal(dirty_value, value, err_msg=case)
                np.testing.assert_array_equal(dirty_slopes, slopes, err_msg=case)
                np.testing.assert_array_equal(dirty_slopes[i][~mask], 0.0, err_msg=case)


def test_gradients_are_the_differences() -> None:
    mask = np.array([[True, True, False], [True, True, True]])
    inputs = np.random.default_rng(0).normal(size=(2, 2, 3))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        both = jax.jit(lambda a, b: [rewards(a, b, mask), advantages(a, b, mask)])
        check_grads(both, [jnp.array(x, jnp.float64) for x in inputs], order=1)


def test_narrow_inputs_give_float32_and_lose_nothing() -> None:
    mask = np.ones((1, 2), bool)
    rewarded = jax.jit(partial(kl_penalized_reward, kl_coef=0.1))
    advanced = jax.jit(partial(generalized_advantages, gamma=0.5, lam=0.5))
    for dtype in (jnp.bfloat16, jnp.int32):
        a, b, score = np.array([[-2, -3]], dtype), np.array([[-3, -1]], dtype), np.array([4], dtype)
        # -0.1 · (1, -2) = (-0.1, 0.2), and 4 on the last: an array of the score's integers would hold (0, 4).
        reward = rewarded(a, b, score, mask)
        assert reward.dtype == jnp.float32, dtype
        np.testing.assert_allclose(reward, [[-0.1, 4.2]], rtol=1e-6, err_msg=str(dtype))
        # δ = (-2 + 0.5 · -1 + 3, -3 + 1) = (0.5, -2), A_0 = 0.5 + 0.25 · -2 = 0.
        advantage, target = advanced(a, b, mask)
        assert advantage.dtype == target.dtype == jnp.float32, dtype
        np.testing.assert_allclose(advantage, np.array([[0, -2]]), err_msg=str(dtype))
        np.testing.assert_allclose(target, np.array([[-3, -3]]), err_msg=str(dtype))


def test_the_score_is_not_rounded_to_the_log_probabilities() -> None:
    logp, score, mask = jnp.array([[0]], jnp.bfloat16), jnp.array([1.001]), np.array([[True]])
    reward = jax.jit(partial(kl_penalized_reward, kl_coef=0.1))(logp, logp, score, mask)
    np.testing.assert_allclose(reward, [[1.001]], rtol=1e-6)  # bfloat16 would have 1


def test_shapes_that_differ_are_named() -> None:
    X23, X21, X2, X3 = np.ones((2, 3)), np.ones((2, 1)), np.ones(2), np.ones(3)
    MASK = np.ones((2, 3), bool)
    rows: tuple[tuple[Callable, str], ...] = (
        (lambda: kl_penalized_reward(X23, X21, X2, MASK, kl_coef=0.1), r"logp \(2, 3\).*ref_logp \(2, 1\)"),
        (lambda: kl_penalized_reward(X23, X23, X2, MASK[:, :1], kl_coef=0.1), r"logp \(2, 3\).*mask \(2, 1\)"),
        (lambda: kl_penalized_reward(X23, X23, X3, MASK, kl_coef=0.1), r"score \(3,\).*mask \(2,\)"),
        (lambda: kl_penalized_reward(X23, X23, X21, MASK, kl_coef=0.1), r"score \(2, 1\).*mask \(2,\)"),
        (lambda: generalized_advantages(X23, X21, MASK, gamma=1, lam=1), r"reward \(2, 3\).*value \(2, 1\)"),
        (lambda: generalized_advantages(X23, X23, MASK[:1], gamma=1, lam=1), r"reward \(2, 3\).*mask \(1, 3\)"),
    )
    for call, message in rows:
        with pytest.raises(ValueError, match=message):
            call()


def test_advantages_of_groups_by_hand() -> None:
    # Two prompts with three responses each. Leave one out of (1, 2, 6): 1 - 4, 2 - 3.5, 6 - 1.5. Mean 3, squares
    # 4 + 1 + 9 = 14, deviation √7 with K - 1. Equal rewards have no advantage, and no deviation to divide by.
    reward = jnp.array([1, 2, 6, 5, 5, 5], jnp.bfloat16)
    root = np.sqrt(7.0) + 1e-4
    cases: list[tuple[Callable, list[float]]] = [
        (leave_one_out_advantages, [-3, -1.5, 4.5, 0, 0, 0]),
        (group_advantages, [-2 / root, -1 / root, 3 / root, 0, 0, 0]),
        (partial(group_advantages, scale=False), [-2, -1, 3, 0, 0, 0]),
        (greedy_baseline_advantages, [0, 1, 5, 0, 0, 0]),
    ]
    found = jax.jit(lambda reward: [function(reward, samples=3) for function, _ in cases])(reward)
    for (function, expected), advantage in zip(cases, found, strict=True):
        assert advantage.dtype == jnp.float32
        np.testing.assert_allclose(advantage, expected, rtol=1e-6, err_msg=str(function))
        for bad in (1, 4):
            with pytest.raises(ValueError, match=rf"samples: expected a divisor of the \(6,\) rewards .*, got {bad}"):
                function(reward, samples=bad)
