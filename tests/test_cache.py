"""Rounded caches: how large they are, how far they move a logit, and what is drawn from them."""

import contextlib
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
from rlhf_jax.layers.kv_cache import Cache, Int8, empty_cache, to_int8, write
from rlhf_jax.model import Transformer, stack_blocks
from rlhf_jax.parallel.mesh import make_mesh, place, shard_rows
from tests.random_params import initialized

SMALL: dict[str, Any] = {"vocab_size": 23, "context": 24, "width": 16, "heads": 4}
KINDS = {
    "gpt2": ModelConfig.gpt2(**SMALL, layers=1),
    "llama": ModelConfig(**SMALL, layers=2, kv_heads=2, windows=(3, 0), qk_norm=True, attention_softcap=5.0),
}
ROUNDED: tuple[CacheDtype, ...] = ("bfloat16", "int8")
LENGTH = 15

pytestmark = pytest.mark.speed


@functools.cache
def network(kind: str) -> tuple[Transformer, dict]:
    """A model of that kind and parameters whose logits differ by several nats."""
    model = Transformer(KINDS[kind])
    return model, jax.tree.map(lambda x: jnp.asarray(1.5 * np.asarray(x)), initialized(model, jax.random.key(1)))


def half_step(x: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding to nearest moves each of the numbers [..., head]."""
    if dtype == "bfloat16":  # eight significant bits
        return np.abs(x) * 2.0**-8
    return np.broadcast_to(np.abs(x).max(axis=-1, keepdims=True) / 254, x.shape)


@functools.cache
def slopes(kind: str) -> Any:
    """tokens [T] -> (d logits [T, V] / d what is written to the cache, and that), for keys and values of each layer."""
    model, params = network(kind)

    def logits(errors: list[jax.Array], tokens_T: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        left, held = list(errors), []

        def shifted(buffer: Any, new: jax.Array, start: Any) -> Any:
            held.append(new)
            return write(buffer, new + left.pop(0), start)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_file, "write", shifted)
            out, _ = model.apply({"params": params}, tokens_T[None], cache=empty_cache(model.config, 1, LENGTH))
        return out[0], held

    shape = (1, model.config.key_heads, LENGTH, model.config.head_size)
    none = [np.zeros(shape, np.float32)] * (2 * model.config.layers)
    return functools.partial(jax.jit(jax.jacrev(logits, has_aux=True)), none)


def bounds(kind: str, tokens_T: np.ndarray) -> dict[CacheDtype, np.ndarray]:
    """The most that a cache rounded in each way moves each logit [T, V], to first order.

    Each number of the cache is wrong by at most half a step, and a logit moves by no more than the sum over all of them
    of |d logit / d number| times that.
    """
    found, held = jax.tree.map(np.asarray, slopes(kind)(jnp.asarray(tokens_T)))
    assert len(held) == 2 * KINDS[kind].layers
    return {
        dtype: sum(
            np.einsum("tvbgsd,bgsd->tv", np.abs(s), half_step(x, dtype)) for s, x in zip(found, held, strict=True)
        )
        for dtype in ROUNDED
    }


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: dict, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnums=0)
def step(model: Transformer, params: dict, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return model.apply({"params": params}, tokens, cache=cache)


def decoded(kind: str, tokens: np.ndarray, dtype: CacheDtype) -> np.ndarray:
    """Logits [B, T, V], five tokens at a time; one by one they are decoded in the tests of `generate`."""
    cache, parts = jax.jit(lambda: empty_cache(KINDS[kind], len(tokens), LENGTH, dtype))(), []
    for part in np.split(tokens, range(5, LENGTH, 5), axis=1):
        logits, cache = step(*network(kind), jnp.asarray(part), cache)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def test_cached_decoding_is_the_full_forward_to_within_the_rounding() -> None:
    tokens = np.random.default_rng(0).integers(0, 23, (20, LENGTH), np.int32)
    kinds: dict[str, tuple[CacheDtype, ...]] = {"gpt2": ("int8",), "llama": ROUNDED}
    for kind, dtypes in kinds.items():
        full = np.asarray(forward(*network(kind), jnp.asarray(tokens)))
        most = bounds(kind, tokens[0])
        for dtype in dtypes:
            moved = np.abs(decoded(kind, tokens, dtype) - full)[0]
            # 1e-4 of float32, as without rounding.
            assert np.all(moved <= most[dtype] + 1e-4), (kind, dtype)
            # All this is worth something: the bound is small beside the logits, and the cache is rounded.
            assert most[dtype].max() < 0.5 * full.std() and moved.max() > 1e-3, (kind, dtype)
        np.testing.assert_allclose(decoded(kind, tokens, "model"), full, atol=1e-4, err_msg=kind)


def test_greedy_tokens_are_the_same_where_the_rounding_cannot_change_them() -> None:
    model, params = network("llama")
    prompts = np.random.default_rng(1).integers(0, 23, (20, 5), np.int32)

    def greedy(dtype: CacheDtype) -> np.ndarray:
        mask, key = jnp.ones(prompts.shape, bool), jax.random.key(0)
        settings: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": (), "pad_id": 0, "temperature": 0.0}
        out = generate(model, params, jnp.asarray(prompts), mask, key, cache_dtype=dtype, **settings)
        return np.asarray(out.tokens)

    exact, rounded = greedy("model"), {dtype: greedy(dtype) for dtype in ROUNDED}
    sure = dict.fromkeys(ROUNDED, 0)
    tokens_BT = np.concatenate([prompts, exact], axis=1)
    logits_BRV = np.asarray(forward(model, params, jnp.asarray(tokens_BT)))[:, 4:-1]
    for row, tokens in enumerate(tokens_BT):
        best, columns, logits = exact[row], np.arange(10), logits_BRV[row]
        behind = logits[columns, best][:, None] - logits
        for dtype, most in bounds("llama", tokens).items():
            most = most[4:-1]
            close = (behind <= most + most[columns, best][:, None]) & (np.arange(23) != best[:, None])
            safe = int(np.append(close.any(axis=1), True).argmax())
            np.testing.assert_array_equal(rounded[dtype][row, :safe], exact[row, :safe], err_msg=dtype)
            sure[dtype] += safe
    assert min(sure.values()) >= 30


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


def test_bytes_of_a_cache() -> None:
    for scan in (False, True):
        config = ModelConfig(vocab_size=7, context=64, width=128, layers=3, heads=4, kv_heads=2, scan_layers=scan)

        def size(dtype: CacheDtype, config: ModelConfig = config) -> int:
            cache = jax.eval_shape(lambda: empty_cache(config, 5, 40, dtype))
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.keys, cache.values)))

        # Keys and values, layers, rows, key heads, slots, head.
        assert size("model") == 4 * (2 * 3 * 5 * 2 * 40 * 32), scan
        assert size("bfloat16") == size("model") // 2, scan
        # A scale of four bytes beside the 32 of a vector.
        assert size("int8") == size("model") // 4 + 4 * (2 * 3 * 5 * 2 * 40), scan


def prompts_and_mask() -> tuple[np.ndarray, np.ndarray]:
    prompts = np.random.default_rng(3).integers(0, 23, (16, 5), np.int32)
    return prompts, np.arange(5) >= (np.arange(16) % 4)[:, None]


def call_of(dtype: CacheDtype, *, scan: bool = False, mesh: Any = None, **changes: Any) -> tuple[tuple, dict[str, Any]]:
    """What `generate` is called with."""
    model, params = network("llama")
    if scan:
        model = Transformer(dataclasses.replace(model.config, scan_layers=True))
        params = jax.tree.map(np.asarray, jax.jit(stack_blocks, static_argnums=1)(params, model.config))
    prompts = tuple(map(jnp.asarray, prompts_and_mask()))
    if mesh is not None:
        params, prompts = place(params, mesh), shard_rows(prompts, mesh)
    settings: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": (1, 2), "pad_id": 0, "cache_dtype": dtype} | changes
    return (model, params, *prompts, jax.random.key(4)), settings


@functools.cache
def sampled(dtype: CacheDtype, **changes: Any) -> Any:
    arguments, settings = call_of(dtype, **changes)
    return jax.tree.map(np.asarray, generate(*arguments, **settings))


def test_every_way_of_sampling_rounds_alike() -> None:
    exact, mesh = sampled("model"), make_mesh(data=2, fsdp=2, tensor=2)
    ways: tuple[tuple[CacheDtype, dict[str, Any]], ...] = (
        ("bfloat16", {"scan": True, "segments": 2}),
        ("bfloat16", {"slots": 5}),
        ("int8", {"scan": True, "slots": 5}),
        ("int8", {"decode_parts": 2, "segments": 2, "mesh": mesh}),
    )
    for dtype, changes in ways:
        plain = sampled(dtype)
        with jax.set_mesh(changes["mesh"]) if "mesh" in changes else contextlib.nullcontext():
            out = sampled(dtype, **changes)
        np.testing.assert_array_equal(out.tokens, plain.tokens, err_msg=str(changes))
        np.testing.assert_array_equal(out.mask, plain.mask, err_msg=str(changes))
        np.testing.assert_allclose(out.logp, plain.logp, atol=1e-4, err_msg=str(changes))
        same = (plain.tokens == exact.tokens).all(axis=1)
        assert same.any() and np.abs(plain.logp - exact.logp)[same].max() > 1e-3, changes


def carried(jaxpr: Any) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all that loops carry."""
    found: set[tuple[str, tuple[int, ...]]] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            found |= {(str(out.aval.dtype), out.aval.shape) for out in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= carried(inner)
    return found


def test_the_loop_carries_the_rounded_cache_alone() -> None:
    def run(dtype: CacheDtype, **changes: Any) -> set[tuple[str, int]]:
        arguments, settings = call_of(dtype, **changes)
        model, *arrays = arguments
        program = jax.jit(lambda *arrays: generate(model, *arrays, **settings)).trace(*arrays)
        return {(kind, shape[-1]) for kind, shape in carried(program.jaxpr.jaxpr) if len(shape) == 4}

    for changes in ({}, {"slots": 5}):
        assert run("model", **changes) == {("float32", 4)}, changes
        assert run("bfloat16", **changes) == {("bfloat16", 4)}, changes
        assert run("int8", **changes) == {("int8", 4), ("float32", 1)}, changes


def test_a_stream_is_the_same_from_a_rounded_cache() -> None:
    whole, (arguments, settings) = sampled("int8"), call_of("int8")
    columns = list(stream(*arguments, **settings))
    np.testing.assert_array_equal(np.stack([c[0] for c in columns], axis=1), whole.tokens[:, : len(columns)])
    assert (whole.tokens != sampled("model").tokens).any()


def test_what_is_no_dtype_of_a_cache_is_refused() -> None:
    wrong: Any = "int4"
    with pytest.raises(ValueError, match="cache_dtype: expected one of model, bfloat16, int8, got 'int4'"):
        sampled(wrong)
    cache = jax.eval_shape(lambda: empty_cache(KINDS["gpt2"], 1, 4, "int8"))
    assert isinstance(cache.keys[0], Int8)
