"""One device, eight by jit, eight by pmap, microbatches: the same gradients of all objectives, masks uneven."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.arrays import PreferenceBatch, RankingBatch, Rollout, TokenBatch, TrainState
from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.optim import global_count, gradient_step, make_optimizer, new_state
from rlhf_jax.parallel.mesh import copied, jit_update, make_mesh, outline, place, pmap_update, shard_rows
from rlhf_jax.runs.loop import compile_seconds
from rlhf_jax.stages import ppo, preference, pretrain, reward, sft
from rlhf_jax.stages.ppo import Networks
from tests.random_params import random_params

pytestmark = pytest.mark.speed

CONFIG = ModelConfig(vocab_size=13, context=12, width=8, layers=1, heads=2, ffn_width=16)
MODEL, SCORER = Transformer(CONFIG), Transformer(CONFIG, scalar=True)
ROWS, LENGTH, RESPONSE = 16, 12, 7

# Gives the gradient away as its state, and changes no parameter.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def uneven_mask(random: np.random.Generator, length: int) -> np.ndarray:
    """From rows of nothing (both rows of the first device) to full ones."""
    kept = np.array([0, 0, 1, 1, 1, 2, 1, length, length, length, 2, 1, 1, length, length, 1])
    return np.arange(length) < kept[:, None]


def token_batch(random: np.random.Generator) -> TokenBatch:
    tokens = random.integers(0, 13, (ROWS, LENGTH), np.int32)
    segments = np.where(np.arange(LENGTH) < 5, 1, 2) * np.ones((ROWS, 1), np.int32)
    mask = uneven_mask(random, LENGTH)
    mask[:, [0, 5]] = False
    return TokenBatch(*map(jnp.asarray, (tokens, segments.astype(np.int32), mask)))


def ranking_batch(random: np.random.Generator) -> RankingBatch:
    tokens = random.integers(0, 13, (ROWS, 4, LENGTH), np.int32)
    lengths = random.integers(1, LENGTH + 1, (ROWS, 4, 1))
    exist = np.arange(4) < random.integers(2, 5, (ROWS, 1))
    ranks = random.integers(1, 4, (ROWS, 4), np.int32)
    ranks[:6] = 1  # only ties: prompts without a pair
    return RankingBatch(*map(jnp.asarray, (tokens, np.arange(LENGTH) < lengths, ranks, exist)))


def rollout(random: np.random.Generator) -> Rollout:
    response = uneven_mask(random, RESPONSE)
    response[:, 0] = True  # a response has at least one token
    prompt = np.arange(LENGTH - RESPONSE) >= random.integers(0, 5, (ROWS, 1))
    shape = (ROWS, RESPONSE)
    numbers = [random.normal(size=shape).astype(np.float32) for _ in range(5)]
    return Rollout(
        tokens_BT=jnp.asarray(random.integers(0, 13, (ROWS, LENGTH), np.int32)),
        mask_BT=jnp.asarray(np.concatenate([prompt, response], axis=1)),
        response_mask_BR=jnp.asarray(response),
        logp_BR=jnp.asarray(-2.6 + 0.3 * numbers[0]),
        ref_logp_BR=jnp.asarray(numbers[1]),
        value_BR=jnp.asarray(numbers[2]),
        advantage_BR=jnp.asarray(numbers[3]),
        target_BR=jnp.asarray(numbers[4]),
        score_B=jnp.zeros(ROWS),
    )


def preference_batch(random: np.random.Generator) -> PreferenceBatch:
    ranking = ranking_batch(random)
    mask = np.asarray(ranking.mask_BKT) & (np.arange(LENGTH) >= random.integers(0, 4, (ROWS, 1, 1)))
    unrelated = token_batch(random)
    # Most of the baseline's rows on half of the devices.
    exist = (np.arange(ROWS) % 4 < 2) | (np.arange(ROWS) < 4)
    return PreferenceBatch(
        ranking, jnp.asarray(mask), dataclasses.replace(unrelated, loss_mask_BT=unrelated.loss_mask_BT & exist[:, None])
    )


def make_preference(microbatches: int = 1, axis_name: str | None = None) -> Callable:
    """KTO: its objective has all parts, and its baseline is a mean over the global batch."""
    config = preference.Config(method="kto", batch=ROWS, microbatches=microbatches, sft_coef=0.1)
    update = preference.make_update(MODEL, RECORDER, config, axis_name=axis_name)
    # A reference so sure of itself that the policy finds most tokens more likely: the baseline is not 0.
    frozen = preference.Frozen(jax.tree.map(jnp.asarray, random_params(MODEL, 3, 5.0)))
    return lambda state, batch: update(state, batch, frozen)


def make_ppo(**settings: Any) -> Callable:
    config = ppo.Config(batch=ROWS)

    def update(state: TrainState, part: Rollout) -> tuple[TrainState, dict]:
        count = global_count(part.response_mask_BR, settings.get("axis_name"))
        networks, (rows, _) = Networks(MODEL, SCORER), ppo.episode_rows(part, packed=False)
        return gradient_step(
            state, lambda p, rows, _: ppo.objective(networks, p, rows, count, config), rows, RECORDER, **settings
        )

    return update


OBJECTIVES: dict[str, tuple[Callable, Callable, Callable]] = {
    "pretrain": (lambda **s: pretrain.make_update(MODEL, RECORDER, **s), token_batch, lambda p: p["policy"]),
    "sft": (lambda **s: sft.make_update(MODEL, RECORDER, **s), token_batch, lambda p: p["policy"]),
    "reward": (lambda **s: reward.make_update(SCORER, RECORDER, **s), ranking_batch, lambda p: p["critic"]),
    "preference": (make_preference, preference_batch, lambda p: p["policy"]),
    "ppo": (make_ppo, rollout, lambda p: p),
}


WAYS: dict[str, Callable] = {
    "8 by pmap": lambda make: pmap_update(make(axis_name="data"), 8),
    "4 microbatches": lambda make: jit_update(make(microbatches=4), make_mesh(1)),
    "data=2,fsdp=2,tensor=2": lambda make: jit_update(make(), make_mesh(2, 2, 2)),
}
# On a mesh an objective's code is that of one device, and PPO has both networks: these with it alone.
MORE_MESHES: dict[str, Callable] = {
    "8 by jit": lambda make: jit_update(make(), make_mesh(8)),
    "fsdp=8": lambda make: jit_update(make(), make_mesh(fsdp=8)),
}


@functools.cache
def params() -> dict:
    return {"policy": random_params(MODEL, 0, 2.0), "critic": random_params(SCORER, 1, 2.0)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_do_not_depend_on_the_devices(name: str) -> None:
    make, make_batch, part_of = OBJECTIVES[name]
    batch = jax.tree.map(np.asarray, make_batch(np.random.default_rng(0)))

    def gradient(step: Callable, batch: Any = batch) -> tuple[Any, dict]:
        own = part_of(params())
        state, metrics = step(new_state(own, jax.tree.map(np.zeros_like, own), 0), batch)
        return jax.tree.map(np.asarray, state.opt_state), {k: float(v) for k, v in metrics.items()}

    one_device = jit_update(make(), make_mesh(1))
    alone, facts = gradient(one_device)
    assert facts.get("kl_baseline", 1.0) > 0.5
    size = max(np.abs(x).max() for x in jax.tree.leaves(alone))
    assert size > 0.01
    for way, make_step in (WAYS | (MORE_MESHES if name == "ppo" else {})).items():
        other, other_facts = gradient(make_step(make))
        for right, found in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(found, right, atol=1e-5, err_msg=way)
        # The norm is that of the gradient which stands above: held against it, not against a norm of other rounding.
        assert other_facts["grad_norm"] == pytest.approx(float(optax.tree.norm(other)), rel=1e-6), way
        assert other_facts == pytest.approx(facts | {"grad_norm": other_facts["grad_norm"]}, rel=1e-5, abs=1e-6), way
    # The masks are uneven enough that the usual mistake, a mean of the devices' means, would show. The mean of a device
    # is that of its two rows said eight times, which the same program computes.
    parts = [
        gradient(one_device, jax.tree.map(lambda x: x[2 * i + np.arange(ROWS) % 2], batch))[0]  # noqa: B023
        for i in range(8)
    ]
    wrong = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, wrong)
    assert max(jax.tree.leaves(errors)) > 0.1 * size


def test_jit_and_pmap_give_the_same_state() -> None:
    # ε large: where a gradient is 0 but for rounding, Adam would blow the rounding up.
    optimizer = make_optimizer(OptimConfig(learning_rate=0.01, warmup_steps=0, epsilon=1e-3), 4)
    states, start, mesh = [], params()["policy"], make_mesh(8)
    opt_state = jax.jit(optimizer.init)(start)
    for step in (
        jit_update(pretrain.make_update(MODEL, optimizer), mesh),
        pmap_update(pretrain.make_update(MODEL, optimizer, axis_name="data"), 8),
    ):
        state = copied(place(new_state(start, opt_state, 7), mesh), mesh)
        for seed in (0, 1):
            state, _ = step(state, token_batch(np.random.default_rng(seed)))
        states.append(state)
    first, second = states
    assert int(first.step) == int(second.step) == 2
    np.testing.assert_array_equal(jax.random.key_data(first.key), jax.random.key_data(second.key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first.params, second.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first.opt_state, second.opt_state)
    assert jax.tree.map(jnp.shape, first.params) == jax.tree.map(jnp.shape, second.params)
    assert np.abs(np.asarray(first.params["embedding"]) - start["embedding"]).max() > 0.005


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    batch = {"x": np.zeros((13, 2))}
    with pytest.raises(UserError, match="batch 13 is not divisible by 8 devices; use --batch 8"):
        shard_rows(batch, make_mesh(8))
    with pytest.raises(UserError, match="batch 13 is not divisible by 4 devices; use --batch 12"):
        pmap_update(lambda state, batch: (state, {}), 4)(new_state({}, None, 0), batch)
    with pytest.raises(UserError, match="devices: expected 9, got 8"):
        make_mesh(9)


def test_a_batch_is_spread_by_rows() -> None:
    spread = shard_rows({"x": np.arange(16.0).reshape(16, 1)}, make_mesh(8))["x"]
    assert sorted(float(s.data[0, 0]) for s in spread.addressable_shards) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert all(s.data.shape == (2, 1) for s in spread.addressable_shards)


def test_what_is_compiled_for_an_outline_is_what_runs() -> None:
    optimizer, start = make_optimizer(OptimConfig(), 4), params()["policy"]
    batch = jax.tree.map(np.asarray, token_batch(np.random.default_rng(0)))

    def objective(params: Any, part: TokenBatch, _: jax.Array) -> tuple[jax.Array, dict]:
        return jnp.mean(part.tokens_BT) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), {}

    def make() -> TrainState:
        return new_state(start, optimizer.init(start), 0)

    for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(**axes)
        update = jit_update(lambda state, part: gradient_step(state, objective, part, optimizer), mesh)
        sketch = outline(make, mesh)
        assert int(sketch.step) == 0, axes
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((sketch.params, sketch.opt_state))), axes
        before = compile_seconds()
        update.prepare(sketch, batch)
        assert compile_seconds() > before, axes
        state = place(jax.tree.map(jnp.copy, make()), mesh)
        before = compile_seconds()
        update(state, batch)
        assert compile_seconds() == before, axes
