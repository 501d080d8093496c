"""Estimates of KL and the adaptive coefficient: by hand, in expectation, and at the edges."""

from functools import partial
from math import expm1, inf, log, nan
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.kl import adapt_kl_coef, kl_estimate
from rlhf_jax.masked import masked_mean
from tests.conftest import WAYS

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("strict_dtypes")]

L = log(2)
# d = log π_ref - log π = -ln 2, ln 2, 0. k1 = -d; k2 = d²/2; k3 = e^d - 1 - d: 1/2 - 1 + ln 2, 2 - 1 - ln 2, 0.
LOGP, REF_LOGP = [log(1 / 2), log(1 / 4), -3.0], [log(1 / 4), log(1 / 2), -3.0]
BY_HAND: dict[str, tuple[list[float], list[float]]] = {
    # values, slopes in log π: 1, -d and 1 - e^d; those in log π_ref are the opposite.
    "k1": ([L, -L, 0], [1, 1, 1]),
    "k2": ([L * L / 2, L * L / 2, 0], [L, -L, 0]),
    "k3": ([L - 1 / 2, 1 - L, 0], [1 / 2, -1, 0]),
}


estimate = jax.jit(kl_estimate, static_argnames="estimator")


def test_estimates_by_hand() -> None:
    def every(logp: jax.Array, ref_logp: jax.Array) -> dict[str, Any]:
        return {
            name: jax.value_and_grad(partial(kl_estimate, estimator=name), (0, 1))(logp, ref_logp) for name in BY_HAND
        }

    for name, way in WAYS.items():
        found = way(every)(np.array(LOGP), np.array(REF_LOGP))
        for estimator, (values, slopes) in BY_HAND.items():
            value, (slope, ref_slope) = found[estimator]
            np.testing.assert_allclose(value, values, rtol=2e-6, err_msg=f"{name} {estimator}")
            np.testing.assert_allclose(slope, slopes, rtol=2e-6, err_msg=f"{name} {estimator}")
            np.testing.assert_allclose(ref_slope, -np.array(slopes), rtol=2e-6, err_msg=f"{name} {estimator}")


def test_estimates_are_the_naive_loop() -> None:
    logp, ref_logp = np.random.default_rng(0).normal(-3, 1, (2, 50))
    naive = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: expm1(d) - d}
    for estimator, function in naive.items():
        value = estimate(np.float32(logp), np.float32(ref_logp), estimator=estimator)
        # d is a difference of numbers near -3, of which float32 keeps 2e-7.
        np.testing.assert_allclose(value, [function(b - a) for a, b in zip(logp, ref_logp)], rtol=1e-5, atol=2e-6)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    # The expectation over π is a sum over its three outcomes: KL = Σ π log(π/π_ref).
    policy, reference = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.4, 0.1])
    kl = sum(policy * np.log(policy / reference))
    estimates = {
        name: np.asarray(estimate(np.float32(np.log(policy)), np.float32(np.log(reference)), estimator=name))
        for name in BY_HAND
    }
    np.testing.assert_allclose(policy @ estimates["k1"], kl, rtol=1e-5)
    np.testing.assert_allclose(policy @ estimates["k3"], kl, rtol=1e-5)
    assert abs(policy @ estimates["k2"] - kl) > 0.01
    d = np.float32(np.linspace(-1, 1, 10_001) ** 7)
    assert np.all(np.asarray(estimate(np.zeros_like(d), d, estimator="k3")) >= 0)


def test_garbage_in_masked_slots_leaves_no_trace() -> None:
    mask, clean = np.array([True, False]), [np.array([-1.0, 0.0]), np.array([-1.5, 0.0])]

    def means(logp: jax.Array, ref_logp: jax.Array) -> dict[str, jax.Array]:
        return {name: masked_mean(kl_estimate(logp, ref_logp, estimator=name), mask) for name in BY_HAND}

    def graded(logp: jax.Array, ref_logp: jax.Array) -> dict[str, Any]:
        return {name: jax.value_and_grad(lambda *x, n=name: means(*x)[n], (0, 1))(logp, ref_logp) for name in BY_HAND}

    graded = jax.jit(graded)
    kept = jax.device_get(graded(*clean))
    for garbage in [nan, inf, -inf, 1e30, -1e30, 1000.0, -1000.0]:
        for i in range(2):
            dirty = jax.device_get(graded(*[np.where(mask, x, garbage) if i == j else x for j, x in enumerate(clean)]))
            # By estimator: the value and its slopes.
            jax.tree.map(partial(np.testing.assert_array_equal, err_msg=f"{garbage} in input {i}"), dirty, kept)
    for estimator, (value, _) in graded(np.array([nan, 0.0]), clean[1]).items():
        assert np.isnan(value), estimator


def test_gradients_are_the_differences() -> None:
    def every(logp: jax.Array, ref_logp: jax.Array) -> list[jax.Array]:
        return [kl_estimate(logp, ref_logp, estimator=name) for name in BY_HAND]

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = [jnp.array(x, jnp.float64) for x in ([-1.0, -2.0], [-1.5, -0.5])]
        check_grads(jax.jit(every), inputs, order=1)


def test_narrow_inputs_give_float32() -> None:
    by_hand = {"k1": -1.0, "k2": 0.5, "k3": expm1(1.0) - 1.0}  # d = 1
    for dtype in (jnp.bfloat16, jnp.int32):
        for estimator, expected in by_hand.items():
            value = estimate(np.array([-5], dtype), np.array([-4], dtype), estimator=estimator)
            assert value.dtype == jnp.float32, (dtype, estimator)
            np.testing.assert_allclose(value, [expected], rtol=1e-6, err_msg=f"{dtype} {estimator}")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"logp \(2,\).*ref_logp \(2, 1\)"):
        kl_estimate(np.ones(2), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"expected 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(np.ones(2), np.ones(2), estimator="k4")


def test_coefficient_by_hand() -> None:
    # β = 0.1, target 6, n/horizon = 64/640 = 0.1: β (1 + 0.1 error).
    # KL 6.6: error 0.1, 0.1 · 1.01. KL 6: unchanged. KL 60 and 0: errors 9 and -1, clipped: 0.1 · (1 ± 0.02).
    # Slope in KL: β/target · n/horizon = 0.1/6 · 0.1 where not clipped.
    adapt = partial(adapt_kl_coef, target=6.0, horizon=640, episodes=64)
    for name, way in WAYS.items():
        kl_coef, slope = way(jax.value_and_grad(adapt, 1))(np.full(4, 0.1), np.array([6.6, 6.0, 60.0, 0.0]))
        np.testing.assert_allclose(kl_coef, [0.101, 0.1, 0.102, 0.098], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(slope, [0.01 / 6, 0.01 / 6, 0, 0], rtol=1e-6, err_msg=name)


def test_coefficient_of_narrow_inputs_is_float32() -> None:
    # n = horizon, so β times KL/target. bfloat16 holds 0.5 and 6.625, not their quotients.
    kl_coef, kl = np.array(0.5, jnp.bfloat16), np.array(6.625, jnp.bfloat16)
    kl_coef = jax.jit(partial(adapt_kl_coef, target=6.0, horizon=512, episodes=512))(kl_coef, kl)
    assert kl_coef.dtype == jnp.float32
    np.testing.assert_allclose(kl_coef, 0.5 * 6.625 / 6.0, rtol=1e-6)
