"""Rounded caches: how large they are, how far they move a logit, and what is drawn from them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import model as model_file
from rlhf_jax.config import CacheDtype, ModelConfig
from rlhf_jax.generate import generate, stream
from rlhf_jax.layers.kv_cache import Int8, empty_cache, to_int8, write
from rlhf_jax.model import Transformer, init_params, stack_blocks
from rlhf_jax.parallel.mesh import make_mesh, place, shard_rows

SMALL: dict[str, Any] = {"vocab_size": 23, "context": 24, "width": 16, "layers": 2, "heads": 4}
KINDS = {
    "gpt2": ModelConfig.gpt2(**SMALL),
    "llama": ModelConfig(**SMALL, kv_heads=2, windows=(3, 0), qk_norm=True, attention_softcap=5.0),
}
ROUNDED: tuple[CacheDtype, ...] = ("bfloat16", "int8")


@functools.lru_cache
def network(kind: str) -> tuple[Transformer, dict]:
    """A model of that kind and parameters whose logits differ by several nats."""
    model = Transformer(KINDS[kind])
    return model, jax.tree.map(lambda x: 1.5 * x, init_params(model, jax.random.key(1)))


def half_step(x: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding to nearest moves each of the numbers [..., head]."""
    if dtype == "bfloat16":  # eight significant bits
        return np.abs(x) * 2.0**-8
    return np.broadcast_to(np.abs(x).max(axis=-1, keepdims=True) / 254, x.shape)


@functools.lru_cache
def slopes(kind: str, length: int) -> Any:
    """tokens [T] -> (d logits [T, V] / d what is written to the cache, and that), for keys and values of each layer."""
    model, params = network(kind)

    def logits(errors: list[jax.Array], tokens_T: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        left, held = list(errors), []

        def shifted(buffer: Any, new: jax.Array, start: Any) -> Any:
            held.append(new)
            return write(buffer, new + left.pop(0), start)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_file, "write", shifted)
            out, _ = model.apply({"params": params}, tokens_T[None], cache=empty_cache(model.config, 1, length))
        return out[0], held

    shape = (1, model.config.key_heads, length, model.config.head_size)
    none = [jnp.zeros(shape)] * (2 * model.config.layers)
    return functools.partial(jax.jit(jax.jacrev(logits, has_aux=True)), none)


def bounds(kind: str, tokens_T: np.ndarray, dtype: str) -> np.ndarray:
    """The most that a rounded cache moves each logit [T, V], to first order.

    Each number of the cache is wrong by at most half a step, and a logit moves by no more than the sum over all of them
    of |d logit / d number| times that.
    """
    found, held = slopes(kind, len(tokens_T))(jnp.asarray(tokens_T))
    assert len(held) == 2 * KINDS[kind].layers
    steps = [half_step(np.asarray(x), dtype) for x in held]
    return sum(np.einsum("tvbgsd,bgsd->tv", np.abs(s), step) for s, step in zip(found, steps, strict=True))


def decoded(kind: str, tokens: np.ndarray, dtype: CacheDtype) -> np.ndarray:
    """Logits [B, T, V]: eight tokens at once, the others one by one."""
    model, params = network(kind)
    step = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    cache, parts = empty_cache(model.config, len(tokens), tokens.shape[1], dtype), []
    for part in np.split(tokens, range(8, tokens.shape[1]), axis=1):
        logits, cache = step(jnp.asarray(part), cache)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "int8"), ("llama", "int8"), ("llama", "bfloat16")])
def test_cached_decoding_is_the_full_forward_to_within_the_rounding(kind: str, dtype: CacheDtype) -> None:
    model, params = network(kind)
    tokens = np.random.default_rng(0).integers(0, 23, (1, 12), np.int32)
    full = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)))
    moved = np.abs(decoded(kind, tokens, dtype) - full)[0]
    most = bounds(kind, tokens[0], dtype)
    # 1e-4 of float32, as without rounding.
    assert np.all(moved <= most + 1e-4)
    # All this is worth something: the bound is small beside the logits, and the cache is rounded.
    assert most.max() < 0.5 * full.std() and moved.max() > 1e-3
    np.testing.assert_allclose(decoded(kind, tokens, "model"), full, atol=1e-4)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_greedy_tokens_are_the_same_where_the_rounding_cannot_change_them(dtype: CacheDtype) -> None:
    model, params = network("llama")
    prompts = np.random.default_rng(1).integers(0, 23, (20, 5), np.int32)

    def greedy(dtype: CacheDtype) -> np.ndarray:
        mask, key = jnp.ones(prompts.shape, bool), jax.random.key(0)
        settings: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": (), "pad_id": 0, "temperature": 0.0}
        out = generate(model, params, jnp.asarray(prompts), mask, key, cache_dtype=dtype, **settings)
        return np.asarray(out.tokens)

    exact, rounded, sure = greedy("model"), greedy(dtype), 0
    forward = jax.jit(functools.partial(model.apply, {"params": params}))
    logits_BRV = np.asarray(forward(jnp.asarray(np.concatenate([prompts, exact], axis=1))))[:, 4:-1]
    for row in range(20):
        tokens = np.concatenate([prompts[row], exact[row]])
        most = bounds("llama", tokens, dtype)[4:-1]
        best, columns, logits = exact[row], np.arange(10), logits_BRV[row]
        behind = logits[columns, best][:, None] - logits
        close = (behind <= most + most[columns, best][:, None]) & (np.arange(23) != best[:, None])
        safe = int(np.append(close.any(axis=1), True).argmax())
        np.testing.assert_array_equal(rounded[row, :safe], exact[row, :safe])
        sure += safe
    assert sure >= 30


def test_a_vector_is_rounded_to_127_steps_of_its_largest_number() -> None:
    x = jnp.array([[2.54, -1.0, 0.0, 0.011], [0.0, 0.0, 0.0, 0.0], [-1e-3, 5e-4, 1e-4, 0.0]])
    rounded = to_int8(x)
    # Steps of 2.54 / 127 = 0.02 and 1e-3 / 127.
    np.testing.assert_array_equal(rounded.numbers, [[127, -50, 0, 1], [0, 0, 0, 0], [-127, 64, 13, 0]])
    np.testing.assert_allclose(rounded.scale[:, 0], [0.02, 0.0, 1e-3 / 127], rtol=1e-6)
    random = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    rounded = to_int8(jnp.asarray(random))
    wrong = np.abs(np.asarray(rounded.numbers) * np.asarray(rounded.scale) - random)
    assert np.all(wrong <= half_step(random, "int8") * (1 + 1e-5))


@pytest.mark.parametrize("scan", [False, True])
def test_bytes_of_a_cache(scan: bool) -> None:
    config = ModelConfig(vocab_size=7, context=64, width=128, layers=3, heads=4, kv_heads=2, scan_layers=scan)

    def size(dtype: CacheDtype) -> int:
        cache = empty_cache(config, 5, 40, dtype)
        return sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))

    # Keys and values, layers, rows, key heads, slots, head.
    assert size("model") == 4 * (2 * 3 * 5 * 2 * 40 * 32)
    assert size("bfloat16") == size("model") // 2
    # A scale of four bytes beside the 32 of a vector.
    assert size("int8") == size("model") // 4 + 4 * (2 * 3 * 5 * 2 * 40)


def sampled(kind: str, dtype: CacheDtype, *, scan: bool = False, **changes: Any) -> Any:
    model, params = network(kind)
    if scan:
        model = Transformer(dataclasses.replace(model.config, scan_layers=True))
        params = stack_blocks(params, model.config)
    prompts = jax.random.randint(jax.random.key(3), (16, 5), 0, 23)
    mask = jnp.asarray(np.arange(5) >= (np.arange(16) % 4)[:, None])
    settings: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": (1, 2), "pad_id": 0, "cache_dtype": dtype} | changes
    return jax.tree.map(np.asarray, generate(model, params, prompts, mask, jax.random.key(4), **settings))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"scan": True}, "bfloat16"),
        ({"slots": 5}, "bfloat16"),
        ({"scan": True, "slots": 5}, "int8"),
        ({"segments": 3}, "int8"),
        ({"decode_parts": 2, "segments": 3}, "bfloat16"),
    ],
    ids=str,
)
def test_every_way_of_sampling_rounds_alike(changes: dict, dtype: CacheDtype) -> None:
    plain, exact = sampled("llama", dtype), sampled("llama", "model")
    if "decode_parts" in changes:
        model, params = network("llama")
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(mesh):
            prompts = jax.random.randint(jax.random.key(3), (16, 5), 0, 23)
            mask = jnp.asarray(np.arange(5) >= (np.arange(16) % 4)[:, None])
            out = generate(
                model,
                place(params, mesh),
                *shard_rows((prompts, mask), mesh),
                jax.random.key(4),
                max_new_tokens=9,
                stop_ids=(1, 2),
                pad_id=0,
                cache_dtype=dtype,
                **changes,
            )
    else:
        out = sampled("llama", dtype, **changes)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.mask, plain.mask)
    np.testing.assert_allclose(out.logp, plain.logp, atol=1e-4)
    same = (plain.tokens == exact.tokens).all(axis=1)
    assert same.any() and np.abs(plain.logp - exact.logp)[same].max() > 1e-3


def carried(jaxpr: Any) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all that loops carry."""
    found: set[tuple[str, tuple[int, ...]]] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            found |= {(str(out.aval.dtype), out.aval.shape) for out in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= carried(inner)
    return found


@pytest.mark.parametrize("slots", [0, 5])
def test_the_loop_carries_the_rounded_cache_alone(slots: int) -> None:
    model, params = network("llama")
    prompts, mask = jnp.zeros((16, 5), jnp.int32), jnp.ones((16, 5), bool)

    def run(dtype: CacheDtype) -> set[tuple[str, int]]:
        settings: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": (1,), "pad_id": 0, "slots": slots}
        program = jax.make_jaxpr(
            lambda: generate(model, params, prompts, mask, jax.random.key(4), cache_dtype=dtype, **settings)
        )
        return {(kind, shape[-1]) for kind, shape in carried(program().jaxpr) if len(shape) == 4}

    assert run("model") == {("float32", 4)}
    assert run("bfloat16") == {("bfloat16", 4)}
    assert run("int8") == {("int8", 4), ("float32", 1)}


def test_a_stream_is_the_same_from_a_rounded_cache() -> None:
    model, params = network("llama")
    prompts = jax.random.randint(jax.random.key(3), (16, 5), 0, 23)
    mask = jnp.asarray(np.arange(5) >= (np.arange(16) % 4)[:, None])
    whole = sampled("llama", "int8")
    settings: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": (1, 2), "pad_id": 0, "cache_dtype": "int8"}
    columns = list(stream(model, params, prompts, mask, jax.random.key(4), segments=3, **settings))
    np.testing.assert_array_equal(np.stack([c[0] for c in columns], axis=1), whole.tokens[:, : len(columns)])
    exact = sampled("llama", "model")
    assert (whole.tokens != exact.tokens).any()


def test_what_is_no_dtype_of_a_cache_is_refused() -> None:
    wrong: Any = "int4"
    with pytest.raises(ValueError, match="cache_dtype 'int4': wanted one of model, bfloat16, int8"):
        sampled("llama", wrong)
    assert isinstance(empty_cache(KINDS["gpt2"], 1, 4, "int8").keys[0], Int8)
