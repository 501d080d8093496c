"""The transformer: its size by hand, and all that padding, segments, cache and future must not change."""

import dataclasses
import functools
from math import cos, sin
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig, RopeScaling, from_plain, to_plain
from rlhf_jax.layers.rotary import frequencies, rotate, turns
from rlhf_jax.model import (
    Transformer,
    count_parameters,
    empty_cache,
    init_params,
    positions_of,
    stack_blocks,
    to_scalar_head,
    unstack_blocks,
)

pytestmark = pytest.mark.core

SMALL: dict[str, Any] = {"vocab_size": 37, "context": 24, "width": 16, "layers": 2, "heads": 4}
ONE = SMALL | {"layers": 1}
KINDS = {
    "gpt2": ModelConfig.gpt2(**SMALL),
    "llama": ModelConfig(**SMALL, kv_heads=2, tied=False),
    "tied": ModelConfig(**ONE, kv_heads=1, head_width=6),
    "qwen3": ModelConfig(**ONE, kv_heads=2, head_width=6, qk_norm=True, embedding_scale=4.0),
    "gemma3": ModelConfig(
        **SMALL,
        kv_heads=2,
        head_width=6,
        qk_norm=True,
        norm_offset=True,
        post_norms=True,
        activation="geglu",
        windows=(3, 0),
        rope_local_base=100.0,
        rope_scaling=RopeScaling("linear", 8.0),
        query_scale=0.3,
        attention_softcap=5.0,
        logit_softcap=3.0,
    ),
    "neox": ModelConfig(
        **ONE, norm="layer", activation="gelu_exact", bias=True, rotary_fraction=0.5, residual="parallel", tied=False
    ),
    "stablelm": ModelConfig(**ONE, norm="layer", qkv_bias=True, rotary_fraction=0.5, residual="parallel_shared"),
}


def drawn(model: Transformer, shaken: float = 0.1) -> dict:
    """Parameters as large as fresh ones; biases and scales, fresh 0 and 1, are shaken so that each of them counts."""
    random = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        scale = shaken if name in ("bias", "scale") else model.config.width**-0.5
        if {"out", "down"} & {part.key for part in path}:
            scale *= (2 * model.config.layers) ** -0.5
        start = 1 if name == "scale" and not model.config.norm_offset else 0
        return (start + random.normal(scale=scale, size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


@functools.cache
def example(kind: str) -> tuple[Transformer, dict, np.ndarray]:
    """(model, parameters, rows of tokens) of a kind."""
    model = Transformer(KINDS[kind])
    return model, drawn(model), np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 10), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: dict, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, segment_ids=segments)


def logits_of(model: Transformer, params: dict, tokens: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """Logits of tokens [B, 10], all of one segment if none are given."""
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    return np.asarray(forward(model, params, tokens.astype(np.int32), segments.astype(np.int32)))


def shapes_of(model: Transformer) -> dict:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def test_parameters_by_hand() -> None:
    # GPT-2, width 8, 2 layers, feed-forward 32: a block is 4 (8·8 + 8) of attention, 8·32 + 32 + 32·8 + 8 of
    # feed-forward, 2·16 of norms: 288 + 552 + 32 = 872. Tokens 11·8, positions 6·8, last norm 16.
    gpt2 = ModelConfig.gpt2(vocab_size=11, context=6, width=8, layers=2, heads=2)
    assert count_parameters(shapes_of(Transformer(gpt2))) == 2 * 872 + 88 + 48 + 16
    # GPT-2 itself, 124M.
    true = ModelConfig.gpt2(vocab_size=50257, context=1024, width=768, layers=12, heads=12)
    assert count_parameters(shapes_of(Transformer(dataclasses.replace(true, scan_layers=True)))) == 124_439_808
    # Llama, 4 heads over 1 key head, hidden 8/3·8 = 21.3 -> 32, untied, vocabulary 11 -> 12 rows: a block is
    # 8·8 + 2·8·2 + 8·8 of attention, 3·8·32 of feed-forward, 2·8 of norms: 160 + 768 + 16 = 944.
    llama = ModelConfig(vocab_size=11, context=6, width=8, layers=2, heads=4, kv_heads=1, tied=False, vocab_multiple=4)
    assert count_parameters(shapes_of(Transformer(llama))) == 2 * 944 + 2 * 12 * 8 + 8


def test_left_padding_changes_no_logit() -> None:
    for kind in KINDS:
        model, params, tokens = example(kind)
        alone = logits_of(model, params, tokens)
        mask = np.arange(10) >= np.array([[3], [5], [0]])
        for garbage in (0, 36):
            padded = np.full_like(tokens, garbage)
            for row, pads in enumerate((3, 5, 0)):
                padded[row, pads:] = tokens[row, : 10 - pads]
            logits = logits_of(model, params, padded, mask)
            for row, pads in enumerate((3, 5, 0)):
                np.testing.assert_allclose(logits[row, pads:], alone[row, : 10 - pads], atol=2e-5, err_msg=kind)


def test_a_later_token_changes_no_earlier_logit() -> None:
    for kind in KINDS:
        model, params, tokens = example(kind)
        changed = tokens.copy()
        changed[:, 6] = (changed[:, 6] + 1) % 37
        before, after = logits_of(model, params, tokens), logits_of(model, params, changed)
        np.testing.assert_array_equal(after[:, :6], before[:, :6], err_msg=kind)
        assert np.all(np.abs(after[:, 6:] - before[:, 6:]).max(axis=-1) > 1e-3), kind


def test_packed_documents_do_not_see_each_other() -> None:
    segments = np.array([[1] * 4 + [2] * 3 + [3] * 2 + [0], [1] * 2 + [2] * 8, [1] + [2] * 4 + [3] * 5])
    for kind in KINDS:
        model, params, tokens = example(kind)
        packed = logits_of(model, params, tokens, segments)
        for row, first, last in ((0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 2, 10), (2, 5, 10)):
            # Alone at the start of a row; what follows it there cannot reach back.
            alone = logits_of(model, params, np.roll(tokens, -first, axis=1))
            np.testing.assert_allclose(packed[row, first:last], alone[row, : last - first], atol=2e-5, err_msg=kind)


def test_cached_decoding_equals_the_full_forward() -> None:
    mask = np.arange(10) >= np.array([[2], [1], [0]])
    mask[2, 5] = False  # a prompt padded on its right
    for kind in KINDS:
        model, params, tokens = example(kind)
        full = logits_of(model, params, tokens, mask)
        step = jax.jit(lambda *inputs, model=model: model.apply({"params": inputs[0]}, *inputs[1:3], cache=inputs[3]))
        cache, parts, start = empty_cache(model.config, 3, 14), [], 0
        for size in (4, 4, 1, 1):  # prefill, more at once, token by token
            at = slice(start, start + size)
            logits, cache = step(params, tokens[:, at], mask[:, at], cache)
            parts.append(logits)
            start += size
        found = np.concatenate([np.asarray(part) for part in parts], axis=1)
        np.testing.assert_allclose(found[mask], full[mask], atol=1e-4, err_msg=kind)
        assert int(cache.filled) == 10, kind


def test_positions_count_real_tokens_of_a_document() -> None:
    segments = [[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 2, 3, 3, 3, 0, 0], [1, 1, 0, 1, 1, 0, 2, 2]]
    expected = [[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2, 0, 0], [0, 1, 0, 2, 3, 0, 0, 1]]
    real = np.array(segments) > 0
    found = np.asarray(jax.jit(positions_of)(np.array(segments)))
    np.testing.assert_array_equal(found[real], np.array(expected)[real])


def test_rotate_against_a_loop() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3], [0, 0, 5, 40]])
    expected = np.zeros_like(x)
    for b, h, t, i in np.ndindex(2, 3, 4, 3):
        angle = float(positions[b, t]) * 100.0 ** (-2 * i / 6)
        first, second = x[b, h, t, i], x[b, h, t, i + 3]
        expected[b, h, t, i] = first * cos(angle) - second * sin(angle)
        expected[b, h, t, i + 3] = second * cos(angle) + first * sin(angle)
    for below in (0, 41):  # computed, looked up
        turned = jax.jit(
            lambda x, at, below=below: rotate(x, *turns(at, frequencies(6, 100.0, RopeScaling()), below=below))
        )
        np.testing.assert_allclose(turned(x, positions), expected, atol=1e-5)
    # Half of the head: dimensions 2 and 3 of a head of 4 stay.
    half = np.asarray(
        jax.jit(lambda x, at: rotate(x, *turns(at, frequencies(2, 100.0, RopeScaling()), 2.0)))(x[..., :4], positions)
    )
    np.testing.assert_array_equal(half[..., 2:], x[..., 2:4])
    np.testing.assert_allclose(half[..., 0, 0, :2], 2 * x[..., 0, 0, :2], atol=1e-6)


def test_rope_scalings_by_hand() -> None:
    plain = frequencies(8, 10_000.0, RopeScaling())
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(frequencies(8, 10_000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6)
    # Turns in a context of 1000: 159, 15.9, 1.59, 0.159. Above 4 kept, below 1 divided, between by share.
    llama = frequencies(8, 10_000.0, RopeScaling("llama3", 8.0, original_context=1000))
    share = (1000 * 0.01 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(llama, [1.0, 0.1, 0.01 * (share + (1 - share) / 8), 0.001 / 8], rtol=1e-5)
    # The dimension of 32 turns is 8 log(1000 / 64π) / 2 log(10,000) = 0.70, that of 1 turn 2.20: a ramp from 0 to 3.
    yarn = RopeScaling("yarn", 4.0, original_context=1000)
    kept = 1 - np.arange(4) / 3
    np.testing.assert_allclose(frequencies(8, 10_000.0, yarn), plain * (kept + (1 - kept) / 4), rtol=1e-5)
    assert yarn.amplitude == pytest.approx(0.1 * np.log(4) + 1)


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_logits(model: Transformer, params: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
    """Of the sum of the sines of the logits, and these."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, tokens)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(loss, has_aux=True)(params)


def test_scanned_layers_compute_the_same() -> None:
    cases: list[tuple[str, Any]] = [("gpt2", "none"), ("gemma3", "full"), ("gemma3", "dots")]
    for name, remat in cases:
        plain, stacking = Transformer(KINDS[name]), dataclasses.replace(KINDS[name], scan_layers=True)
        scanned = Transformer(dataclasses.replace(stacking, remat=remat))
        fresh = drawn(Transformer(stacking), shaken=0.0)
        params = unstack_blocks(fresh, plain.config)
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(plain)), name
        stacked = jax.jit(stack_blocks, static_argnums=1)(params, plain.config)
        jax.tree.map(np.testing.assert_array_equal, stacked, fresh)
        tokens = np.random.default_rng(1).integers(0, 37, (2, 8), np.int32)
        gradient, whole = jax.tree.map(np.asarray, gradient_and_logits(plain, params, tokens))
        # A sum over 592 logits has gradients up to 118, and what is rounded there is handed on to the others: by a
        # quarter of a millionth of the largest on a CPU with AVX2, where 1e-5 is a tenth of one.
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
        found, _ = jax.tree.map(np.asarray, gradient_and_logits(scanned, stacked, tokens))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-7 * largest, err_msg=f"{name}, {remat}"),
            unstack_blocks(found, plain.config),
            gradient,
        )
        step = jax.jit(lambda *inputs, model=scanned: model.apply({"params": inputs[0]}, inputs[1], cache=inputs[2]))
        logits, cache = step(stacked, tokens[:, :4], empty_cache(scanned.config, 2, 8))
        rest, _ = step(stacked, tokens[:, 4:], cache)
        found = np.concatenate([np.asarray(logits), np.asarray(rest)], axis=1)
        np.testing.assert_allclose(found, whole, atol=1e-4, err_msg=f"{name}, {remat}")


def test_a_token_sees_its_window_and_no_further() -> None:
    model = Transformer(ModelConfig(**ONE, windows=(3,), kv_heads=1))
    params, tokens = drawn(model), np.random.default_rng(1).integers(0, 37, (1, 10))
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % 37
    moved = np.abs(logits_of(model, params, tokens) - logits_of(model, params, changed)).max(axis=-1)[0] > 1e-6
    np.testing.assert_array_equal(moved, [False] * 2 + [True] * 3 + [False] * 5)


def test_padded_vocabulary_rows_have_no_logit() -> None:
    for tied in (True, False):
        wide = Transformer(ModelConfig(**ONE, tied=tied, vocab_multiple=32))
        params, tokens = shapes_of(wide), jnp.zeros((1, 2), jnp.int32)
        assert params["embedding"].shape == (64, 16)
        assert jax.eval_shape(wide.apply, {"params": params}, tokens).shape == (1, 2, 37)


def test_bfloat16_computes_float32_logits_near_the_float32_ones() -> None:
    for kind in KINDS:
        model, params, tokens = example(kind)
        half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
        fine, coarse = logits_of(model, params, tokens), logits_of(half, params, tokens)
        assert coarse.dtype == np.float32, kind
        assert {x.dtype.name for x in jax.tree.leaves(shapes_of(half))} == {"float32"}, kind
        # 8 bits of mantissa, a handful of products: a few hundredths; equal would mean that nothing ran in bfloat16.
        assert 1e-4 < np.abs(coarse - fine).max() < 0.15 * np.abs(fine).max(), kind


def test_scalar_head_starts_small_on_the_given_backbone() -> None:
    config = ModelConfig(vocab_size=8, context=8, width=1023, layers=1, heads=1, head_width=2, ffn_width=2, tied=False)
    scalar, backbone = Transformer(config, scalar=True), drawn(Transformer(config))
    params = to_scalar_head(backbone, scalar, jax.random.key(1))
    head = np.asarray(params["score"]["kernel"]).ravel()
    # N(0, 1/1024) from 1023 draws: the deviation is known to 1/sqrt(2·1023) = 2.2%, the mean to 1/32 of it.
    assert abs(head.std() * 32 - 1) < 0.08 and abs(head.mean() * 32) < 4 / 32
    assert float(params["score"]["bias"][0]) == 0.0
    assert params["block_0"] is backbone["block_0"] and params["embedding"] is backbone["embedding"]
    assert "unembedding" not in params
    assert jax.eval_shape(scalar.apply, {"params": params}, jnp.zeros((1, 3), jnp.int32)).shape == (1, 3)


def test_embedding_scale_acts_on_the_way_in_only() -> None:
    plain, scaled = (Transformer(ModelConfig(**ONE, tied=False, embedding_scale=scale)) for scale in (1.0, 8.0))
    params, tokens = drawn(plain), np.arange(10)[None]
    eighth = params | {"embedding": params["embedding"] / 8}
    np.testing.assert_array_equal(logits_of(plain, params, tokens), logits_of(scaled, eighth, tokens))


def test_normed_queries_and_keys_have_no_length() -> None:
    for qk_norm in (True, False):
        model = Transformer(ModelConfig(**ONE, qk_norm=qk_norm, norm_epsilon=1e-12))
        params, tokens = drawn(model), np.arange(10)[None]
        attention = params["block_0"]["attention"]
        longer = {name: attention[name] | {"kernel": 4 * attention[name]["kernel"]} for name in ("query", "key")}
        changed = params | {"block_0": params["block_0"] | {"attention": attention | longer}}
        close = np.allclose(logits_of(model, params, tokens), logits_of(model, changed, tokens), atol=1e-5)
        assert close == qk_norm


def test_dropout_is_off_unless_asked_for() -> None:
    model = Transformer(ModelConfig(**ONE, dropout=0.5))
    params, tokens = drawn(model), np.arange(10)[None]
    plain = logits_of(model, params, tokens)
    np.testing.assert_array_equal(plain, logits_of(Transformer(ModelConfig(**ONE)), params, tokens))
    drop = jax.jit(lambda key: model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key}))
    assert np.abs(np.asarray(drop(jax.random.key(1))) - plain).max() > 0.01


def test_flops_by_hand() -> None:
    # Width 8: a layer multiplies by 8·8 + 2·8·4 + 8·8 + 3·8·16 = 576 weights, the head by 8·11 = 88; 2 FLOPs a weight.
    # Attention: query times key and weights times value, 2 FLOPs · 8 numbers each, over 10/2 keys on average: 160.
    config = ModelConfig(vocab_size=11, width=8, layers=3, heads=2, kv_heads=1, ffn_width=16)
    assert config.flops_per_token(10) == 2 * (3 * 576 + 88) + 3 * 160
    assert config.flops_per_token(10, language_head=False) == 2 * 3 * 576 + 3 * 160


def test_impossible_shapes_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": 0}, "layers.* 0"),
        ({"width": 10, "heads": 4}, "width 10 is not divisible by heads 4"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"head_width": 3}, "head width 3 with rotary_fraction 1.0"),
        ({"dropout": 1.0}, "dropout.* 1.0"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**change)


def test_what_does_not_fit_is_refused() -> None:
    model = Transformer(ModelConfig(**ONE))
    params = shapes_of(model)
    with pytest.raises(ValueError, match="sequence of 25 tokens is longer than the context 24"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 25), jnp.int32))
    cache, tokens = empty_cache(model.config, 1, 4), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids with a cache"):
        model.apply({"params": params}, tokens, segment_ids=tokens, cache=cache)


def test_the_last_block_gives_the_columns_asked_for() -> None:
    cases: list[dict[str, Any]] = [
        {"layers": 1},
        {"windows": (3, 0), "qk_norm": True},
        {"residual": "parallel_shared", "layers": 1},
        {"scan_layers": True},
        {"remat": "full", "positions": "learned", "norm": "layer", "activation": "gelu", "bias": True, "layers": 1},
    ]
    tokens = np.random.default_rng(1).integers(0, 11, (3, 9), np.int32)
    mask = np.arange(9) >= np.array([[0], [2], [4]])
    at = np.array([[1, 8], [3, 5], [4, 8]])
    for changes in cases:
        small = {"vocab_size": 11, "context": 16, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1}
        model = Transformer(ModelConfig(**(small | changes)))

        @jax.jit
        def hidden(params: dict, model: Transformer = model) -> tuple[jax.Array, ...]:
            run = functools.partial(model.apply, {"params": params}, tokens, mask, method="hidden")
            return run(), run(last=4), run(at_BQ=at)

        whole, last, chosen = map(np.asarray, hidden(drawn(model)))
        np.testing.assert_allclose(last, whole[:, -4:], atol=1e-6, err_msg=str(changes))
        wanted = np.take_along_axis(whole, at[:, :, None], 1)
        np.testing.assert_allclose(chosen, wanted, atol=1e-6, err_msg=str(changes))


def test_a_config_of_an_older_run_loads() -> None:
    config = KINDS["gemma3"]
    saved = to_plain(config)
    del saved["attention"]
    assert from_plain(ModelConfig, saved, where="config.json") == config
