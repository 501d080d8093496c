"""Schedules by hand, an optimizer step that refuses what is not finite, and gradients that are sums of shares."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.masked import masked_mean
from rlhf_jax.model import Transformer, init_params, stack_blocks, unstack_blocks
from rlhf_jax.optim import (
    apply_gradient,
    decayed,
    first_key,
    global_count,
    gradient_step,
    make_optimizer,
    make_schedule,
    new_state,
    summed_gradients,
)
from tests.cases import case
from tests.random_params import random_params

pytestmark = pytest.mark.core


def rates(steps: int = 8, **changes) -> list[float]:
    schedule = make_schedule(OptimConfig(**({"learning_rate": 0.8, "warmup_steps": 4} | changes)), steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps + 2))).tolist()


def test_schedules_by_hand() -> None:
    # Warm-up over 4 steps: 0.2, 0.4, 0.6, 0.8; no step is wasted on a rate of 0. Then 4 steps down to a tenth.
    warmup = [0.2, 0.4, 0.6, 0.8]
    np.testing.assert_allclose(rates(schedule="constant"), [*warmup, *[0.8] * 6], rtol=1e-6)
    np.testing.assert_allclose(
        rates(schedule="linear"), [*warmup, 0.8, 0.8 - 0.18, 0.8 - 0.36, 0.8 - 0.54, 0.08, 0.08], rtol=1e-6
    )
    # (1 + cos(π i/4))/2 of the way: 1, 0.853553, 0.5, 0.146447, 0, of 0.72 above 0.08.
    cosine = [0.8, 0.08 + 0.72 * 0.853553, 0.44, 0.08 + 0.72 * 0.146447, 0.08, 0.08]
    np.testing.assert_allclose(rates(schedule="cosine"), [*warmup, *cosine], rtol=1e-5)
    np.testing.assert_allclose(rates(2, schedule="linear", warmup_steps=0), [0.8, 0.44, 0.08, 0.08], rtol=1e-6)
    np.testing.assert_allclose(rates(2, schedule="linear", warmup_steps=1), [0.8, 0.8, 0.08, 0.08], rtol=1e-6)


applied = jax.jit(apply_gradient, static_argnums=0)


def test_first_steps_by_hand() -> None:
    # Adam's first step is the rate times the sign, whatever the size; matrices also shrink by rate times decay.
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    params = {"matrix": jnp.array([[1.0, -2.0]]), "vector": jnp.array([4.0])}
    gradient = {"matrix": jnp.array([[0.3, 7.0]]), "vector": jnp.array([-9.0])}
    optimizer = make_optimizer(config, 10)
    params, _, facts = applied(optimizer, gradient, optimizer.init(params), params)
    np.testing.assert_allclose(params["matrix"], [[1 - 0.1 - 0.05, -2 - 0.1 + 0.1]], rtol=1e-5)
    np.testing.assert_allclose(params["vector"], [4 + 0.1], rtol=1e-5)
    np.testing.assert_allclose(facts["grad_norm"], np.sqrt(0.09 + 49 + 81), rtol=1e-6)
    assert float(facts["skipped"]) == 0.0


def test_stacked_layers_decay_as_separate_ones_do() -> None:
    settings = OptimConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, epsilon=0.1)
    optimizer = make_optimizer(settings, 10)
    config = ModelConfig(vocab_size=5, context=4, width=4, layers=2, heads=2, norm="layer", bias=True)
    separate = random_params(Transformer(config, scalar=True), 0, 1.5)
    lora = {"lora_a": np.ones((4, 1), np.float32), "lora_b": np.ones((1, 4), np.float32)}
    for block in ("block_0", "block_1"):
        for norm in (name for name in separate[block] if "norm" in name):
            separate[block][norm]["scale"] += 0.5
        separate[block]["attention"]["query"] |= lora
    separate["score"]["bias"] += 0.5
    tokens = np.array([[1, 2, 3, 4], [0, 0, 1, 4]])
    steps = {}
    for scanned in (False, True):
        model = Transformer(dataclasses.replace(config, scan_layers=scanned), scalar=True)

        @jax.jit
        def step(separate: Any, model: Transformer = model) -> Any:
            params = stack_blocks(separate, config) if model.config.scan_layers else separate
            gradient = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, tokens) ** 2))(params)
            return unstack_blocks(apply_gradient(optimizer, gradient, optimizer.init(params), params)[0], config)

        steps[scanned] = step(separate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), steps[True], steps[False])


def test_the_gradient_is_clipped_as_a_whole() -> None:
    # (3, 4) of norm 5 clipped to 1 is (0.6, 0.8); Adam keeps a tenth of it as its first moment.
    optimizer = make_optimizer(OptimConfig(clip_norm=1.0), 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, opt_state, facts = applied(optimizer, gradient, optimizer.init(params), params)
    moments = next(part.mu for part in opt_state if hasattr(part, "mu"))
    np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.06, 0.08], rtol=1e-5)
    assert float(facts["grad_norm"]) == 5.0


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1), 10)
    start = {"a": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    params, opt_state, _ = applied(optimizer, start, jax.jit(optimizer.init)(start), start)
    state = new_state(params, opt_state, 0)

    @jax.jit
    def step(state: Any, bad: jax.Array) -> Any:
        rows = jnp.ones((2, 1))
        return gradient_step(state, lambda p, x, key: (jnp.sum(p["b"]) * bad, {}), rows, optimizer)

    for bad in (np.float32(np.nan), np.float32(np.inf)):
        poisoned = start | {"b": np.array([1.0, bad], np.float32)}
        new_params, new_opt_state, facts = applied(optimizer, poisoned, opt_state, params)
        jax.tree.map(np.testing.assert_array_equal, (new_params, new_opt_state), (params, opt_state))
        assert float(facts["skipped"]) == 1.0, bad
        # The loop goes on: the step is counted, so the next batch is another one.
        after, metrics = step(state, bad)
        assert int(after.step) == 1 and float(metrics["skipped"]) == 1.0, bad
        jax.tree.map(np.testing.assert_array_equal, after.params, params)


def test_a_loss_or_new_parameters_that_are_not_finite_change_nothing() -> None:
    params = {"a": np.ones(2, np.float32)}

    def step(rate: float, loss: float) -> tuple[Any, Any, dict]:
        """A step whose gradient is 1 whatever the loss."""
        optimizer = make_optimizer(OptimConfig(learning_rate=rate, warmup_steps=0, clip_norm=0.0), 10)
        state = new_state(params, jax.jit(optimizer.init)(params), 0)

        def objective(p: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
            return jnp.sum(p["a"]) + jax.lax.stop_gradient(x[0]), {}

        after, metrics = jax.jit(lambda s: gradient_step(s, objective, np.float32([loss]), optimizer))(state)
        return state, after, metrics

    for row in ((0.1, np.nan), (0.1, -np.inf), (1e20, 0.0), (3e38, 0.0)):
        with case(row):
            before, after, metrics = step(*row)
            jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (params, before.opt_state))
            assert float(metrics["skipped"]) == 1.0 and int(after.step) == 1
            assert np.isfinite(metrics["param_norm"]) == (row[0] == 0.1)
    _, after, metrics = step(0.1, 0.0)
    np.testing.assert_allclose(after.params["a"], [0.9, 0.9], rtol=1e-5)
    assert float(metrics["skipped"]) == 0.0
    np.testing.assert_allclose(metrics["param_norm"], 0.9 * np.sqrt(2), rtol=1e-5)


def test_weight_decay_by_name() -> None:
    # Stacked scales and biases are matrices, [layers, width].
    shrinks = {
        "embedding": {"": (4, 2)},
        "position_embedding": {"": (4, 2)},
        "unembedding": {"": (2, 4)},
        "blocks": {"query": {"kernel": (3, 2, 2), "lora_a": (3, 2, 1), "lora_b": (3, 1, 2)}},
        "block_0": {"up": {"kernel": (2, 2)}},
        "score": {"kernel": (2, 1)},
    }
    stays = {
        "blocks": {"attention_norm": {"scale": (3, 2), "bias": (3, 2)}, "query": {"bias": (3, 2)}},
        "block_0": {"ffn_norm": {"scale": (2,), "bias": (2,)}},
        "final_norm": {"scale": (2,)},
        "score": {"bias": (1,)},
    }
    for wanted, shapes in ((True, shrinks), (False, stays)):
        tree: Any = jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
        tree = {name: value[""] if "" in value else value for name, value in tree.items()}
        found = jax.tree_util.tree_leaves_with_path(decayed(tree))
        assert [path for path, leaf in found if leaf != wanted] == []


def test_microbatches_sum_shares() -> None:
    # Loss (w x)² over the kept ones of x = 1 … 6, weight 2: mean of 4 x² over {1, 2, 3, 6} is 50, its slope 50.
    x, mask = np.arange(1, 7, dtype=np.float32), np.array([True, True, True, False, False, True])

    def summed(w: Any, x: Any, mask: Any, microbatches: int) -> tuple[jax.Array, dict]:
        count = global_count(mask)

        def objective(w: jax.Array, part: tuple, key: jax.Array) -> tuple[jax.Array, dict]:
            facts = {"kept": masked_mean(part[0], part[1], count=count)}
            return masked_mean((w * part[0]) ** 2, part[1], count=count), facts

        return summed_gradients(objective, w, (x, mask), jax.random.key(0), microbatches=microbatches)

    two, numbers = np.float32(2), (1, 2, 3, 6)
    every = jax.jit(lambda w, x, mask: [summed(w, x, mask, n) for n in numbers])(two, x, mask)
    for slope, metrics in every:
        np.testing.assert_allclose([slope, metrics["loss"], metrics["kept"]], [50, 50, 3], rtol=1e-6)
    with pytest.raises(ValueError, match="6 rows are not divisible by 4 microbatches"):
        summed(two, x, mask, 4)


def test_each_share_has_a_key_of_its_own() -> None:
    def objective(w: jax.Array, part: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        return w * jax.random.uniform(key), {}

    def draws(way: Callable, microbatches: int, axis_name: str | None) -> float:
        def gradient(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
            return summed_gradients(objective, w, x, key, microbatches=microbatches, axis_name=axis_name)[0]

        return float(np.ravel(jax.jit(way(gradient))(jnp.float32(1), jnp.ones((2, 2)), jax.random.key(0)))[0])

    def both(first: jax.Array, second: jax.Array) -> Any:
        assert first != second
        return pytest.approx(float(first) + float(second), rel=1e-6)

    @jax.jit
    def expected(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        folded = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(2))
        return jax.vmap(jax.random.uniform)(jax.random.split(key)), jax.vmap(jax.random.uniform)(folded)

    split, folded = map(np.asarray, expected(jax.random.key(0)))
    assert draws(lambda f: f, 2, None) == both(*split)
    assert draws(lambda f: jax.vmap(f, (None, 0, None), axis_name="data"), 1, "data") == both(*folded)


def test_the_same_parameters_decay_whether_stacked_or_not() -> None:
    """In each kind of block, by shapes alone."""
    small: dict[str, Any] = {"vocab_size": 5, "context": 4, "width": 8, "layers": 2, "heads": 2}
    kinds: tuple[dict[str, Any], ...] = (
        {"qk_norm": True, "kv_heads": 1},
        {"post_norms": True, "norm_offset": True, "activation": "geglu"},
        {"norm": "layer", "bias": True, "positions": "learned", "activation": "gelu", "tied": False},
        {"norm": "layer", "residual": "parallel_shared", "qkv_bias": True},
    )
    for kind in kinds:
        for scalar in (False, True):
            with case((kind, scalar)):
                config = ModelConfig(**small, **kind)
                shapes = jax.eval_shape(lambda: init_params(Transformer(config, scalar), jax.random.key(0)))  # noqa: B023
                params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
                separate, stacked = decayed(params), decayed(stack_blocks(params, config))
                assert stacked["blocks"] == separate["block_0"] == separate["block_1"]
                named = {
                    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(separate)
                }
                assert all(leaf != ("scale" in name or "bias" in name) for name, leaf in named.items())
                assert {True, False} == set(named.values())


def test_what_is_drawn_before_the_first_step_has_keys_of_its_own() -> None:
    # A split of a key is what folding in 0, 1, … makes of it, which is how steps get theirs.
    seed = 5
    steps = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(seed), step))(jnp.arange(8))
    keys = [jax.random.key(seed), *steps, *jax.random.split(steps[1]), *(first_key(seed, n) for n in range(3))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_impossible_settings_are_refused() -> None:
    for name, value in (
        ("learning_rate", -1.0),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", float("nan")),
    ):
        with pytest.raises(ValueError, match=name):
            OptimConfig(**{name: value})  # type: ignore[arg-type]
