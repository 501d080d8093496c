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

SMALL: dict[str, Any] = {"vocab_size": 37, "context": 24, "width": 16, "layers": 2, "heads": 4}
KINDS = {
    "gpt2": ModelConfig.gpt2(**SMALL),
    "llama": ModelConfig(**SMALL, kv_heads=2, tied=False),
    "tied": ModelConfig(**SMALL, kv_heads=1, head_width=6),
    "qwen3": ModelConfig(**SMALL, kv_heads=2, head_width=6, qk_norm=True, embedding_scale=4.0),
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
        **SMALL, norm="layer", activation="gelu_exact", bias=True, rotary_fraction=0.5, residual="parallel", tied=False
    ),
    "stablelm": ModelConfig(**SMALL, norm="layer", qkv_bias=True, rotary_fraction=0.5, residual="parallel_shared"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple:
    """(model, parameters of size that shows, rows of tokens) of each kind."""
    model = Transformer(KINDS[request.param])
    random = np.random.default_rng(1)
    # Fresh biases are 0 and scales 1: shaken, so that each of them counts.
    params = jax.tree.map(
        lambda x: x + random.normal(scale=0.1, size=x.shape).astype(np.float32),
        init_params(model, jax.random.key(1)),
    )
    return model, params, random.integers(0, model.config.vocab_size, (3, 10), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: dict, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, segment_ids=segments)


def logits_of(model: Transformer, params: dict, tokens: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """Logits of tokens [B, 10], all of one segment if none are given."""
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    return np.asarray(forward(model, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)))


def shapes_of(model: Transformer) -> dict:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def test_parameters_by_hand() -> None:
    # GPT-2, width 8, 2 layers, feed-forward 32: a block is 4 (8·8 + 8) of attention, 8·32 + 32 + 32·8 + 8 of
    # feed-forward, 2·16 of norms: 288 + 552 + 32 = 872. Tokens 11·8, positions 6·8, last norm 16.
    gpt2 = ModelConfig.gpt2(vocab_size=11, context=6, width=8, layers=2, heads=2)
    assert count_parameters(shapes_of(Transformer(gpt2))) == 2 * 872 + 88 + 48 + 16
    # GPT-2 itself, 124M.
    true = ModelConfig.gpt2(vocab_size=50257, context=1024, width=768, layers=12, heads=12)
    assert count_parameters(shapes_of(Transformer(true))) == 124_439_808
    # Llama, 4 heads over 1 key head, hidden 8/3·8 = 21.3 -> 32, untied, vocabulary 11 -> 12 rows: a block is
    # 8·8 + 2·8·2 + 8·8 of attention, 3·8·32 of feed-forward, 2·8 of norms: 160 + 768 + 16 = 944.
    llama = ModelConfig(vocab_size=11, context=6, width=8, layers=2, heads=4, kv_heads=1, tied=False, vocab_multiple=4)
    assert count_parameters(shapes_of(Transformer(llama))) == 2 * 944 + 2 * 12 * 8 + 8


def test_left_padding_changes_no_logit(kind: tuple) -> None:
    model, params, tokens = kind
    alone = logits_of(model, params, tokens)
    mask = np.arange(10) >= np.array([[3], [5], [0]])
    for garbage in (0, 36):
        padded = np.full_like(tokens, garbage)
        for row, pads in enumerate((3, 5, 0)):
            padded[row, pads:] = tokens[row, : 10 - pads]
        logits = logits_of(model, params, padded, mask)
        for row, pads in enumerate((3, 5, 0)):
            np.testing.assert_allclose(logits[row, pads:], alone[row, : 10 - pads], atol=2e-5)


def test_a_later_token_changes_no_earlier_logit(kind: tuple) -> None:
    model, params, tokens = kind
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    before, after = logits_of(model, params, tokens), logits_of(model, params, changed)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.all(np.abs(after[:, 6:] - before[:, 6:]).max(axis=-1) > 1e-3)


def test_packed_documents_do_not_see_each_other(kind: tuple) -> None:
    model, params, tokens = kind
    segments = np.array([[1] * 4 + [2] * 3 + [3] * 2 + [0], [1] * 2 + [2] * 8, [1] + [2] * 4 + [3] * 5])
    packed = logits_of(model, params, tokens, segments)
    for row, first, last in ((0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 2, 10), (2, 5, 10)):
        # Alone at the start of a row; what follows it there cannot reach back.
        alone = logits_of(model, params, np.roll(tokens, -first, axis=1))
        np.testing.assert_allclose(packed[row, first:last], alone[row, : last - first], atol=2e-5)


def test_cached_decoding_equals_the_full_forward(kind: tuple) -> None:
    model, params, tokens = kind
    mask = np.arange(10) >= np.array([[2], [1], [0]])
    mask[2, 5] = False  # a prompt padded on its right
    full = logits_of(model, params, tokens, mask)
    step = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs[:2], cache=inputs[2]))
    cache, parts, start = empty_cache(model.config, 3, 14), [], 0
    for size in (4, 4, 1, 1):  # prefill, more at once, token by token
        at = slice(start, start + size)
        logits, cache = step(jnp.asarray(tokens[:, at]), jnp.asarray(mask[:, at]), cache)
        parts.append(logits)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[mask], full[mask], atol=1e-4)
    assert int(cache.filled) == 10


def test_positions_count_real_tokens_of_a_document() -> None:
    segments = [[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 2, 3, 3, 3, 0, 0], [1, 1, 0, 1, 1, 0, 2, 2]]
    expected = [[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2, 0, 0], [0, 1, 0, 2, 3, 0, 0, 1]]
    real = np.array(segments) > 0
    np.testing.assert_array_equal(np.asarray(positions_of(jnp.asarray(segments)))[real], np.array(expected)[real])


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
        turn = turns(jnp.asarray(positions), frequencies(6, 100.0, RopeScaling()), below=below)
        np.testing.assert_allclose(rotate(jnp.asarray(x), *turn), expected, atol=1e-5)
    # Half of the head: dimensions 2 and 3 of a head of 4 stay.
    turn = turns(jnp.asarray(positions), frequencies(2, 100.0, RopeScaling()), 2.0)
    half = rotate(jnp.asarray(x[..., :4]), *turn)
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


@pytest.mark.parametrize(("name", "remat"), [("gpt2", "none"), ("gemma3", "full"), ("gemma3", "dots")])
def test_scanned_layers_compute_the_same(name: str, remat: Any) -> None:
    plain = Transformer(KINDS[name])
    scanned = Transformer(dataclasses.replace(KINDS[name], scan_layers=True, remat=remat))
    params = init_params(plain, jax.random.key(0))
    stacked = stack_blocks(params, plain.config)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(scanned))
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked, plain.config), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 37)
    gradient, whole = gradient_and_logits(plain, params, tokens)
    # A sum over 592 logits has gradients up to 107, and what is rounded there is handed on to the others: by a quarter
    # of a millionth of the largest on a CPU with AVX2, where 1e-5 is a tenth of one.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-7 * largest),
        unstack_blocks(gradient_and_logits(scanned, stacked, tokens)[0], plain.config),
        gradient,
    )
    step = jax.jit(lambda tokens, cache: scanned.apply({"params": stacked}, tokens, cache=cache))
    logits, cache = step(tokens[:, :4], empty_cache(scanned.config, 2, 8))
    rest, _ = step(tokens[:, 4:], cache)
    np.testing.assert_allclose(np.concatenate([logits, rest], axis=1), whole, atol=1e-4)


def test_a_token_sees_its_window_and_no_further() -> None:
    model = Transformer(ModelConfig(**(SMALL | {"layers": 1}), windows=(3,), kv_heads=1))
    params = init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 37)
    changed = tokens.at[0, 2].add(1)
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    moved = np.abs(np.asarray(apply(tokens) - apply(changed))).max(axis=-1)[0] > 1e-6
    np.testing.assert_array_equal(moved, [False, False, True, True, True, False, False, False])


def test_padded_vocabulary_rows_have_no_logit() -> None:
    for tied in (True, False):
        wide = Transformer(ModelConfig(**(SMALL | {"vocab_size": 37}), tied=tied, vocab_multiple=32))
        params, tokens = shapes_of(wide), jnp.zeros((1, 2), jnp.int32)
        assert params["embedding"].shape == (64, 16)
        assert jax.eval_shape(wide.apply, {"params": params}, tokens).shape == (1, 2, 37)


def test_bfloat16_computes_float32_logits_near_the_float32_ones(kind: tuple) -> None:
    model, params, tokens = kind
    half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
    fine, coarse = logits_of(model, params, tokens), logits_of(half, params, tokens)
    assert coarse.dtype == np.float32
    assert {x.dtype.name for x in jax.tree.leaves(shapes_of(half))} == {"float32"}
    # 8 bits of mantissa, a handful of products: a few hundredths; equal would mean that nothing ran in bfloat16.
    assert 1e-4 < np.abs(coarse - fine).max() < 0.15 * np.abs(fine).max()


def test_scalar_head_starts_small_on_the_given_backbone() -> None:
    config = ModelConfig(vocab_size=8, context=8, width=1023, layers=1, heads=1, head_width=2, ffn_width=2, tied=False)
    scalar, backbone = Transformer(config, scalar=True), init_params(Transformer(config), jax.random.key(0))
    params = to_scalar_head(backbone, scalar, jax.random.key(1))
    head = np.asarray(params["score"]["kernel"]).ravel()
    # N(0, 1/1024) from 1023 draws: the deviation is known to 1/sqrt(2·1023) = 2.2%, the mean to 1/32 of it.
    assert abs(head.std() * 32 - 1) < 0.08 and abs(head.mean() * 32) < 4 / 32
    assert float(params["score"]["bias"][0]) == 0.0
    assert params["block_0"] is backbone["block_0"] and params["embedding"] is backbone["embedding"]
    assert "unembedding" not in params
    assert jax.eval_shape(scalar.apply, {"params": params}, jnp.zeros((1, 3), jnp.int32)).shape == (1, 3)


def test_embedding_scale_acts_on_the_way_in_only() -> None:
    plain, scaled = (Transformer(ModelConfig(**SMALL, tied=False, embedding_scale=scale)) for scale in (1.0, 8.0))
    params, tokens = init_params(plain, jax.random.key(0)), np.arange(10)[None]
    eighth = params | {"embedding": params["embedding"] / 8}
    np.testing.assert_array_equal(logits_of(plain, params, tokens), logits_of(scaled, eighth, tokens))


@pytest.mark.parametrize(("qk_norm", "same"), [(True, True), (False, False)])
def test_normed_queries_and_keys_have_no_length(qk_norm: bool, same: bool) -> None:
    model = Transformer(ModelConfig(**SMALL, qk_norm=qk_norm, norm_epsilon=1e-12))
    params, tokens = init_params(model, jax.random.key(0)), np.arange(10)[None]
    attention = params["block_0"]["attention"]
    longer = {name: attention[name] | {"kernel": 4 * attention[name]["kernel"]} for name in ("query", "key")}
    changed = params | {"block_0": params["block_0"] | {"attention": attention | longer}}
    close = np.allclose(logits_of(model, params, tokens), logits_of(model, changed, tokens), atol=1e-5)
    assert close == same


def test_dropout_is_off_unless_asked_for() -> None:
    model = Transformer(ModelConfig(**SMALL, dropout=0.5))
    params, tokens = init_params(model, jax.random.key(0)), np.arange(10)[None]
    plain = logits_of(model, params, tokens)
    np.testing.assert_array_equal(plain, logits_of(Transformer(ModelConfig(**SMALL)), params, tokens))
    drop = jax.jit(lambda key: model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key}))
    assert np.abs(np.asarray(drop(jax.random.key(1))) - plain).max() > 0.01


def test_flops_by_hand() -> None:
    # Width 8: a layer multiplies by 8·8 + 2·8·4 + 8·8 + 3·8·16 = 576 weights, the head by 8·11 = 88; 2 FLOPs a weight.
    # Attention: query times key and weights times value, 2 FLOPs · 8 numbers each, over 10/2 keys on average: 160.
    config = ModelConfig(vocab_size=11, width=8, layers=3, heads=2, kv_heads=1, ffn_width=16)
    assert config.flops_per_token(10) == 2 * (3 * 576 + 88) + 3 * 160
    assert config.flops_per_token(10, language_head=False) == 2 * 3 * 576 + 3 * 160


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers.* 0"),
        ({"width": 10, "heads": 4}, "width 10 is not divisible by heads 4"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"head_width": 3}, "head width 3 with rotary_fraction 1.0"),
        ({"dropout": 1.0}, "dropout.* 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_what_does_not_fit_is_refused() -> None:
    model = Transformer(ModelConfig(**SMALL))
    params = shapes_of(model)
    with pytest.raises(ValueError, match="sequence of 25 tokens is longer than the context 24"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 25), jnp.int32))
    cache, tokens = empty_cache(model.config, 1, 4), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids with a cache"):
        model.apply({"params": params}, tokens, segment_ids=tokens, cache=cache)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"windows": (3, 0), "qk_norm": True},
        {"residual": "parallel_shared"},
        {"scan_layers": True},
        {"remat": "full", "positions": "learned", "norm": "layer", "activation": "gelu", "bias": True},
    ],
    ids=str,
)
def test_the_last_block_gives_the_columns_asked_for(changes: dict) -> None:
    model = Transformer(ModelConfig(vocab_size=11, context=16, width=16, layers=2, heads=2, kv_heads=1, **changes))
    params = init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 11)
    mask = jnp.asarray(np.arange(9) >= np.array([[0], [2], [4]]))
    at = jnp.array([[1, 8], [3, 5], [4, 8]])
    hidden = functools.partial(model.apply, {"params": params}, tokens, mask, method="hidden")
    whole = hidden()
    np.testing.assert_allclose(hidden(last=4), whole[:, -4:], atol=1e-6)
    np.testing.assert_allclose(
        hidden(at_BQ=at), np.take_along_axis(np.asarray(whole), np.asarray(at)[:, :, None], 1), atol=1e-6
    )


def test_a_config_of_an_older_run_loads() -> None:
    config = KINDS["gemma3"]
    saved = to_plain(config)
    del saved["attention"]
    assert from_plain(ModelConfig, saved, where="config.json") == config
