"""The two reducers: by hand, with garbage where nothing is kept, and over devices that keep unevenly many slots."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.masked import masked_mean, masked_whiten
from tests.conftest import WAYS

pytestmark = pytest.mark.core

GARBAGE = [np.nan, np.inf, -np.inf, 1e30]
NAN = np.nan


def test_mean_by_hand() -> None:
    x = np.array([[1.0, 2.0, NAN, 6.0], [NAN, -5.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    # (1 + 2 + 6)/3; -5/1; 0 where nothing is kept. The slope is 1/count in kept slots.
    slopes = np.array([[1 / 3, 1 / 3, 0, 1 / 3], [0, 1, 0, 0], [0, 0, 0, 0]])
    for name, way in WAYS.items():
        mean, slope = way(jax.value_and_grad(masked_mean))(x, mask)
        np.testing.assert_allclose(mean, [3, -5, 0], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(slope, slopes, rtol=1e-6, err_msg=name)


# m = mean, s = standard deviation of the kept ones, y = (x - m)/s; dy_0/dx_j = ([j = 0] - 1/n - y_0 y_j/n)/s.
# 1, 5: m = 3, s² = (4 + 4)/2 = 4, y = -1, 1. Two values are whitened to -1 and 1 whatever they are: slope 0.
# 0, 0, 3: m = 1, s² = (1 + 1 + 4)/3 = 2, y = (-1, -1, 2)/√2. dy_0/dx_0 = (1 - 1/3 - 1/6)/√2 = 1/(2√2),
#   dy_0/dx_1 = (-1/3 - 1/6)/√2 = -1/(2√2), dy_0/dx_2 = (-1/3 + 1/3)/√2 = 0.
# 7 alone: x - m = 0. Nothing: 0. (Slope of 7 alone: (1 - 1 - 0)/√ε = 0.)
X = [[1.0, NAN, 5.0, NAN], [0.0, 0.0, 3.0, NAN], [7.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]]
KEPT = [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
R2 = np.sqrt(2.0)
WHITE = [[-1, 0, 1, 0], [-1 / R2, -1 / R2, 2 / R2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
MEAN = [[3, 0, 3, 0], [1, 1, 1, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
SLOPE = [[0, 0, 0, 0], [0.5 / R2, -0.5 / R2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_whitening_by_hand() -> None:
    def first_and_all(keep_mean, x, mask):
        white = masked_whiten(x, mask, keep_mean=keep_mean)
        return white[0], white

    def both(x, mask):
        return [jax.value_and_grad(partial(first_and_all, keep), has_aux=True)(x, mask) for keep in (False, True)]

    x, mask = np.array(X), np.array(KEPT, bool)
    count = np.maximum(np.sum(KEPT, axis=1, keepdims=True), 1)
    first_kept = np.array(KEPT)[:, :1]
    for name, way in WAYS.items():
        for keep_mean, ((_, white), slope) in enumerate(way(both)(x, mask)):
            case = f"{name}, keep_mean {keep_mean}"
            np.testing.assert_allclose(white, WHITE + keep_mean * np.array(MEAN), atol=1e-6, err_msg=case)
            expected = SLOPE + keep_mean * first_kept * np.array(KEPT) / count
            np.testing.assert_allclose(slope, expected, atol=1e-6, err_msg=case)


def test_whitening_is_the_naive_loop() -> None:
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3.0, 2.0, (5, 7)), rng.random((5, 7)) < 0.6
    kept = [x[i, j] for i in range(5) for j in range(7) if mask[i, j]]
    mean = sum(kept) / len(kept)
    variance = sum((value - mean) ** 2 for value in kept) / len(kept)
    expected = [[(x[i, j] - mean) / variance**0.5 if mask[i, j] else 0.0 for j in range(7)] for i in range(5)]
    white = jax.jit(masked_whiten)(x, mask)
    np.testing.assert_allclose(white, expected, rtol=1e-5, atol=1e-6)


def test_garbage_in_masked_slots_leaves_no_trace() -> None:
    mask = np.array([[True, False, True], [False, True, True]])
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for reduce in (masked_mean, masked_whiten):
        graded = jax.jit(jax.value_and_grad(lambda x, r=reduce: jnp.sum(jnp.sin(r(x, mask)))))
        clean = jax.device_get(graded(np.where(mask, x, 0.0)))
        assert np.isfinite(clean[0])
        for garbage in GARBAGE:
            case = f"{reduce.__name__}, {garbage}"
            dirty = jax.device_get(graded(np.where(mask, x, garbage)))
            np.testing.assert_array_equal(dirty[0], clean[0], err_msg=case)
            np.testing.assert_array_equal(dirty[1], clean[1], err_msg=case)
            np.testing.assert_array_equal(dirty[1][~mask], 0.0, err_msg=case)


def test_a_kept_nan_shows() -> None:
    assert np.isnan(jax.jit(masked_mean)(np.array([1.0, NAN]), np.array([True, True])))


def test_narrow_inputs_are_reduced_in_float32() -> None:
    # 257 ones and 255 zeros: their sum is not a bfloat16, overflows uint8, and their mean is no integer.
    mask = np.ones(512, bool)
    both = jax.jit(lambda x, mask: (masked_mean(x, mask), masked_whiten(x, mask)))
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_):
        mean, white = both((np.arange(512) < 257).astype(dtype), mask)
        assert mean.dtype == white.dtype == jnp.float32, dtype
        np.testing.assert_allclose(mean, 257 / 512, rtol=1e-6, err_msg=str(dtype))
        # A share p of ones has variance p (1 - p).
        expected = (1 - 257 / 512) / np.sqrt(257 / 512 * 255 / 512)
        np.testing.assert_allclose(np.asarray(white)[0], expected, rtol=1e-5, err_msg=str(dtype))


def test_shapes_that_differ_are_named() -> None:
    for reduce in (masked_mean, masked_whiten):
        with pytest.raises(ValueError, match=r"x \(2, 3\).*mask \(2, 1\)"):
            reduce(np.ones((2, 3)), np.ones((2, 1), bool))


# Device i keeps i of its 7 slots: the first nothing, the last all.
UNEVEN = np.arange(7) < np.arange(8)[:, None]
DATA = np.where(UNEVEN, np.random.default_rng(0).normal(size=(8, 7)), NAN).astype(np.float32)


def squares(weight: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.square(weight * x - 1.0)


def test_shares_of_uneven_devices_sum_to_the_mean() -> None:
    def share(weight, x, mask):
        return masked_mean(squares(weight, x), mask, "devices")

    def summed(weight, x, mask):
        return jax.lax.psum(jax.value_and_grad(share)(weight, x, mask), "devices")

    # No NaN here: the slope of the weight is a sum of 0 · x over the masked slots.
    data = np.where(UNEVEN, DATA, np.float32(0.5))
    expected = jax.jit(jax.value_and_grad(lambda weight: masked_mean(squares(weight, data), UNEVEN)))(2.0)
    by_pmap = jax.device_get(jax.pmap(summed, "devices", in_axes=(None, 0, 0))(2.0, data, UNEVEN))
    for device in range(8):
        np.testing.assert_allclose(by_pmap[0][device], expected[0], rtol=1e-6)
        np.testing.assert_allclose(by_pmap[1][device], expected[1], rtol=1e-6)


def test_shares_of_uneven_microbatches_sum_to_the_mean() -> None:
    mean = jax.jit(masked_mean)
    shares = [mean(x, mask, count=UNEVEN.sum()) for x, mask in zip(DATA, UNEVEN)]
    np.testing.assert_allclose(sum(map(np.asarray, shares)), mean(DATA, UNEVEN), rtol=1e-6)


def test_devices_are_whitened_together() -> None:
    def whitened(axis_name, x, mask):
        return [masked_whiten(x, mask, axis_name, keep_mean=keep_mean) for keep_mean in (False, True)]

    by_pmap = jax.pmap(partial(whitened, "devices"), "devices")(DATA, UNEVEN)
    for keep_mean, (found, expected) in enumerate(zip(by_pmap, jax.jit(partial(whitened, None))(DATA, UNEVEN))):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=f"keep_mean {keep_mean}")
