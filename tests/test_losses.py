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
    apo_down_loss,
    apo_zero_loss,
    asymmetric_surrogate,
    cispo_loss,
    clipped_surrogate,
    clipped_value_loss,
    divergence_slope,
    dpo_loss,
    exo_loss,
    hinge_loss,
    importance_weight,
    ipo_loss,
    kto_loss,
    nca_loss,
    next_token_loss,
    ordered_pairs,
    orpo_loss,
    pairwise_loss,
    ranking_loss,
    robust_dpo_loss,
    sequence_log_ratio,
    simpo_loss,
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


def test_other_policy_losses_by_hand() -> None:
    # As above with clip(ρ, 0.8, 1.3), and no more than 2|A| where A < 0. CISPO: -min(ρ, 1.3) A ln π, slope in ln π.
    cases = [
        # ρ, A, loss, slope
        (1.25, 2.0, -2.5, -2.5),  # beyond 1.2, within 1.3
        (1.5, 2.0, -2.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (3.0, -2.0, 4.0, 0.0),  # the dual clip, in place of 6
        (3.0, 2.0, -2.6, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        (exp(500), -1.0, 2.0, 0.0),
    ]
    ratio, advantage, losses, slopes = (np.array(column) for column in zip(*cases))
    double = partial(asymmetric_surrogate, clip_low=0.2, clip_high=0.3, dual_clip=2.0)
    check(double, [np.log(ratio), advantage], (0,), losses, [slopes])
    logp, weight = np.full(7, -2.0), np.minimum(ratio, 1.3)
    cispo = partial(cispo_loss, ratio_max=1.3)
    in_logp = -weight * advantage
    check(cispo, [np.log(ratio), logp, advantage], (0, 1, 2), -2 * in_logp, [np.zeros(7), in_logp, np.zeros(7)])
    # A token that was as likely as now weighs 1, one that is three times as likely 2 at most.
    bounded = partial(importance_weight, most=2.0)
    check(bounded, [np.log([0.5, 1.0, 3.0, exp(500)])], (0,), np.array([0.5, 1.0, 2.0, 2.0]), [np.zeros(4)])
    # GSPO: (0.1 - 0.3)/2 = -0.1 at both tokens of the first row; a token has 1/2 of the slope of each.
    log_ratio, mask = np.array([[0.1, -0.3, nan], [nan, nan, nan]]), np.array([[1, 1, 0], [0, 0, 0]], bool)
    found, slope = jax.jit(jax.value_and_grad(lambda x: sequence_log_ratio(x, mask)[0, 0]))(log_ratio)
    np.testing.assert_allclose(found, -0.1, rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(sequence_log_ratio(log_ratio, mask), [[-0.1, -0.1, 0], [0, 0, 0]], rtol=1e-6)


A3 = log(3)  # σ(ln 3) = 3/4, σ' = 3/16


def kto(log_ratio: jax.Array, baseline: jax.Array, desirable: bool) -> jax.Array:
    return kto_loss(log_ratio, jnp.array(desirable), baseline, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)


# (loss, chosen, rejected, value, slope in chosen, slope in rejected); β = 1/2 makes β (2 ln 3) = ln 3.
PREFERENCES: dict[str, tuple[Callable, float, float, float, float, float]] = {
    "dpo": (partial(dpo_loss, beta=0.5), 2 * A3, 0.0, log(4 / 3), -1 / 8, 1 / 8),
    # -0.9 ln 3/4 - 0.1 ln 1/4; slope ½ (-0.9 · 1/4 + 0.1 · 3/4).
    "cdpo": (
        partial(dpo_loss, beta=0.5, label_smoothing=0.1),
        *(2 * A3, 0.0, 0.9 * log(4 / 3) + 0.1 * log(4), -0.075, 0.075),
    ),
    # f' at u = 3 less f' at u = 1, with slopes u f''.
    "forward KL": (
        partial(dpo_loss, beta=1.5 * A3, divergence="forward_kl"),  # 3/2 ln 3 · (2/3 - 0)
        *(A3, 0.0, log(4 / 3), -1.5 * A3 / 12, 1.5 * A3 / 4),  # -β/4 · 1/3 and 1
    ),
    "JS": (
        partial(dpo_loss, beta=A3 / log(1.5), divergence="js"),  # ln 6/4 - ln 1
        *(A3, 0.0, log(4 / 3), -A3 / log(1.5) / 16, A3 / log(1.5) / 8),  # slopes 1/4 and 1/2
    ),
    "α": (
        partial(dpo_loss, beta=A3, divergence="alpha", alpha=0.5),  # u = 4: (1 - 1/2)/½ = 1
        *(log(4), 0.0, log(4 / 3), -A3 / 8, A3 / 4),  # slopes 1/2 and 1
    ),
    # (3/4 ln 4/3 - 1/4 ln 4)/½; slope ½ (-3/4 · 1/4 - 1/4 · 3/4)/½.
    "robust": (
        partial(robust_dpo_loss, beta=0.5, label_smoothing=0.25),
        *(2 * A3, 0.0, 1.5 * log(4 / 3) - 0.5 * log(4), -0.375, 0.375),
    ),
    "ipo": (partial(ipo_loss, beta=0.5), 3.0, 1.0, 1.0, 2.0, -2.0),
    "hinge": (partial(hinge_loss, beta=0.5), 1.0, 0.0, 0.5, -0.5, 0.5),
    "hinge, right": (partial(hinge_loss, beta=0.5), 4.0, 0.0, 0.0, 0.0, 0.0),
    "exo at p": (partial(exo_loss, beta=0.5, label_smoothing=0.25), 2 * A3, 0.0, 0.0, 0.0, 0.0),
    # q = (½, ½): ½ ln 2/3 + ½ ln 2; slope ½ · ¼ (ln 2/3 - ln 2).
    "exo": (partial(exo_loss, beta=0.5, label_smoothing=0.25), 0.0, 0.0, 0.5 * log(4 / 3), -A3 / 8, A3 / 8),
    # -ln 3/4 - ½ ln 1/4 - ½ ln 3/4; slopes ½ (-1/4 + ½ · 3/4) and ½ · ½ · 1/4.
    "nca": (partial(nca_loss, beta=0.5), 2 * A3, -2 * A3, 1.5 * log(4 / 3) + 0.5 * log(4), 1 / 16, 1 / 16),
    "apo-zero": (partial(apo_zero_loss, beta=0.5), 2 * A3, 0.0, 1 / 4 + 1 / 2, -3 / 32, 1 / 8),
    "apo-down": (partial(apo_down_loss, beta=0.5), 2 * A3, 0.0, 3 / 4 + 1 / 4, 0.0, 3 / 32),
    # h = 3 ln 3 beside z = ln 3, which is data.
    "kto, desirable": (partial(kto, desirable=True), 3 * A3, A3, 2 / 4, -2 * 3 / 32, 0.0),
    "kto, undesirable": (partial(kto, desirable=False), 3 * A3, A3, 3 * 3 / 4, 3 * 3 / 32, 0.0),
    # Odds 3 and 1, then 1/3 and 1; the slope of log odds is 1/(1 - p).
    "orpo": (partial(orpo_loss, beta=0.5), log(3 / 4), log(1 / 2), 0.5 * log(4 / 3), -4 / 8, 2 / 8),
    "orpo, wrong": (partial(orpo_loss, beta=0.5), log(1 / 4), log(1 / 2), 0.5 * log(4), -1 / 2, 3 / 4),
    "simpo": (partial(simpo_loss, beta=2.0, margin=A3), A3 - 5, -5.0, log(4 / 3), -1 / 2, 1 / 2),
}


def test_preferences_by_hand() -> None:
    losses = [case[0] for case in PREFERENCES.values()]
    chosen, rejected, values, *slopes = np.array([case[1:] for case in PREFERENCES.values()]).T

    def total(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
        every = jnp.stack([loss(chosen[i], rejected[i]) for i, loss in enumerate(losses)])
        return jnp.sum(every), every

    (_, found), gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(chosen, rejected)
    assert found.dtype == jnp.float32
    for i, name in enumerate(PREFERENCES):
        np.testing.assert_allclose(found[i], values[i], rtol=2e-6, atol=1e-7, err_msg=name)
        for side, slope in zip(gradient, slopes, strict=True):
            np.testing.assert_allclose(side[i], slope[i], rtol=5e-6, atol=2e-7, err_msg=name)
    with pytest.raises(ValueError, match=r"divergence: expected 'reverse_kl', .*, got 'tv'"):
        divergence_slope(jnp.zeros(1), divergence="tv")


def test_preferences_stay_finite_far_from_the_reference() -> None:
    # A probability of 1 has the largest odds of float32; a ratio beyond float32 has no gradient that is not finite.
    far = np.array([1e4, -1e4, 0.0, 200.0])

    def every(far: jax.Array) -> dict[str, tuple]:
        found = {}
        for name, (loss, *_) in PREFERENCES.items():
            logps = name.startswith(("orpo", "simpo"))
            inputs = (-jnp.abs(far), far[::-1] - 1e4) if logps else (far, far[::-1])
            found[name] = jax.vmap(jax.value_and_grad(loss, (0, 1)))(*inputs)
        return found

    for name, (value, slopes) in jax.jit(every)(far).items():
        assert all(np.isfinite(x).all() for x in (value, *slopes)), name


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
    pairs = [row for name, row in PREFERENCES.items() if not name.startswith("kto")]
    return {
        "next_token": (lambda x: masked_mean(next_token_loss(x, jnp.array([[0, 1, 2], [3, 2, 1]])), mask), [logits]),
        "pairwise": (lambda *x: masked_mean(pairwise_loss(*x), mask), three[:2]),
        "ranking": (lambda x: jnp.mean(ranking_loss(x, jnp.array([[1, 2, 3], [1, 2, 3]]), mask)), three[:1]),
        "surrogate": (lambda *x: masked_mean(surrogate(*x), mask), three[:2]),
        "value": (lambda *x: masked_mean(value_loss(*x), mask), three),
        "sequence": (lambda *x: masked_mean(surrogate(sequence_log_ratio(x[0], mask), x[1]), mask), three[:2]),
        "cispo": (lambda p, r, a: masked_mean(cispo_loss(r, p, a, ratio_max=2.0), mask), three),
        "kto": (lambda x: masked_mean(kto_loss(x, mask, jnp.float32(0.1), beta=0.5), mask), three[:1]),
        "preferences": (
            lambda *x: jnp.sum(jnp.stack([masked_mean(row[0](*x), mask) for row in pairs])),
            [x - 1 for x in three[:2]],
        ),
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
