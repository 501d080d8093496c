"""Sampling: the distribution it draws from, what it says of each token, and when it stops."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.generate import Generation, draw, filter_logits, generate, stream
from rlhf_jax.model import Transformer, stack_blocks
from tests.random_params import initialized

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("each_key_once")]

DEEP = ModelConfig(vocab_size=7, context=16, width=16, layers=2, heads=2, kv_heads=1, ffn_width=16)
CONFIGS = {
    "plain": dataclasses.replace(DEEP, layers=1),
    "windows": dataclasses.replace(DEEP, windows=(3, 0)),
    "scan": dataclasses.replace(DEEP, scan_layers=True),
}
EOS, PAD = 5, 6
PROMPTS = np.array([[0, 0, 0, 1, 2], [0, 3, 4, 1, 2], [1, 2, 3, 4, 4], [2, 2, 2, 2, 2]] * 8, np.int32)
MASK = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]] * 8, bool)

# What rows draw with, so that one program has batches of all kinds. The nearer to 1 the number, the lower the id.
MIXED = 0.75 * np.random.default_rng(0).random((32, 11), np.float32)
DRAWS = {
    "mixed": MIXED,
    # Every other row draws from the upper end of the distribution: it does not stop, at 0 or 1.
    "late": np.where(np.arange(32)[:, None] % 2 == 0, MIXED / 8, MIXED),
    # All rows have drawn a 0, and stopped, when they have five tokens.
    "early": np.where(np.arange(11) >= np.arange(32)[:, None] % 5, np.float32(1 - 2**-24), MIXED),
}
SETTINGS: dict[str, Any] = {"max_new_tokens": 11, "stop_ids": (0, 1), "pad_id": PAD}
FILTERED: dict[str, Any] = {
    "max_new_tokens": 8, "stop_ids": (EOS, 0, 1), "pad_id": PAD, "temperature": 0.7, "top_k": 4, "top_p": 0.9
}  # fmt: skip
CALLS: list[tuple[int, int, int]] = []


class Counted(Transformer):
    """A transformer whose forward passes leave in CALLS, as they run, their rows, tokens and slots of the cache."""

    def hidden(self, tokens_BT: jax.Array, *inputs: Any, **named: Any) -> Any:
        call = (*tokens_BT.shape, named["cache"].places_BS.shape[1])
        jax.debug.callback(lambda: CALLS.append(call))
        return super().hidden(tokens_BT, *inputs, **named)


@functools.cache
def parameters(kind: str) -> dict[str, Any]:
    # Large weights: a flat distribution would hide errors.
    deep = jax.tree.map(lambda x: 2 * np.asarray(x), initialized(Transformer(DEEP), jax.random.key(0)))
    if kind == "plain":
        return {name: value for name, value in deep.items() if name != "block_1"}
    return jax.jit(lambda: stack_blocks(deep, DEEP))() if kind == "scan" else deep


def sample(
    kind: str, prompts: np.ndarray = PROMPTS, mask: np.ndarray = MASK, seed: int = 0, **settings: Any
) -> Generation:
    key = jax.random.key(seed)
    model, params = Counted(CONFIGS[kind]), parameters(kind)
    return jax.tree.map(np.asarray, generate(model, params, jnp.asarray(prompts), jnp.asarray(mask), key, **settings))


@functools.cache
def drawn(
    kind: str, draws: str = "mixed", *, repeated: bool = False, **changes: Any
) -> tuple[Generation, list[tuple[int, int, int]]]:
    """Responses drawn with those numbers, and the calls of the model, sorted.

    The prompts are the 32; with `samples`, as many as give 32 rows; or, repeated, 16 of them twice.
    """
    count = 16 if repeated else 32 // changes.get("samples", 1)
    prompts, mask = (np.repeat(x[:count], 1 + repeated, axis=0) for x in (PROMPTS, MASK))
    CALLS.clear()
    out = sample(kind, prompts, mask, uniform_BR=DRAWS[draws], **SETTINGS | changes)
    jax.effects_barrier()
    return out, sorted(CALLS)


def assert_same(found: Generation, wanted: Generation, **tolerance: Any) -> None:
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.mask, wanted.mask)
    np.testing.assert_allclose(found.logp, wanted.logp, **tolerance)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: dict, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens)


def logits_after(kind: str, out: Generation) -> np.ndarray:
    """Logits [B, R, V] that each token of the responses was drawn from, of rows without left padding or a cache."""
    lengths, columns = MASK.sum(axis=1)[:, None], np.arange(out.tokens.shape[1])
    tokens = np.zeros((32, 16), np.int32)
    for row, prompt, mask, response in zip(tokens, PROMPTS, MASK, out.tokens, strict=True):
        ids = [*prompt[mask], *response]
        row[: len(ids)] = ids
    logits = np.asarray(forward(Transformer(CONFIGS[kind]), parameters(kind), tokens))
    return logits[np.arange(32)[:, None], lengths + columns - 1]


def naive_logp(logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 7, top_p: float = 1.0) -> np.ndarray:
    """Log-probabilities [V] of what is left of a distribution."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-weights)[:top_k]
    running = np.cumsum(weights[order]) / weights[order].sum()
    order = order[: 1 + np.sum(running < top_p - 1e-12)]
    out = np.full(weights.shape, -np.inf)
    out[order] = np.log(weights[order] / weights[order].sum())
    return out


def test_logp_is_that_of_the_full_forward() -> None:
    # As the settings of `generate` stand, and with the filters, which leave out a good part of the distribution.
    filters = {name: FILTERED[name] for name in ("temperature", "top_k", "top_p")}
    for kind, out, settings in (("plain", drawn("plain")[0], {}), ("windows", sample("windows", **FILTERED), filters)):
        logp: Any = np.apply_along_axis(functools.partial(naive_logp, **settings), -1, logits_after(kind, out))
        expected = np.take_along_axis(logp, out.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(out.logp[out.mask], expected[out.mask], atol=1e-4, err_msg=kind)
        assert np.all(out.logp[~out.mask] == 0.0), kind
        assert len(set(out.mask.sum(axis=1).tolist())) > 3, kind
        assert np.isfinite(logp).all() == (not settings), kind


def test_a_row_stops_at_its_end_and_is_padded_behind() -> None:
    out, free = drawn("plain")[0], drawn("plain", stop_ids=())[0]
    # Each row is what it would be in a batch where no row stops, up to its end: keys do not depend on the others.
    assert free.mask.all()
    ends = np.isin(free.tokens, SETTINGS["stop_ids"])
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, 11)
    np.testing.assert_array_equal(out.mask, np.arange(11) < lengths[:, None])
    np.testing.assert_array_equal(out.tokens[out.mask], free.tokens[out.mask])
    assert np.all(out.tokens[~out.mask] == PAD)
    # Rows of all kinds: short, long, without an end, and with each of the two.
    assert len(set(lengths.tolist())) > 3
    last = out.tokens[np.arange(32), lengths - 1]
    assert {0, 1} < set(last.tolist())


def test_the_loop_ends_with_the_last_row() -> None:
    # One forward pass for the prompt, one for each further column.
    for draws, longest in (("early", 5), ("late", 11)):
        out, calls = drawn("plain", draws)
        assert out.mask.sum(axis=1).max() == longest, draws
        assert calls == [(32, 1, 16)] * (longest - 1) + [(32, 5, 16)], draws


def test_a_stream_is_the_same_column_by_column() -> None:
    whole = sample("windows", **FILTERED)
    prompts = (jnp.asarray(PROMPTS), jnp.asarray(MASK))
    model, params = Transformer(CONFIGS["windows"]), parameters("windows")
    columns = list(stream(model, params, *prompts, jax.random.key(0), segments=3, **FILTERED))
    assert 4 < len(columns) == whole.mask.sum(axis=1).max()  # all three segments, of 2, 4 and 8 tokens
    tokens, mask = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    np.testing.assert_array_equal(mask, whole.mask[:, : len(columns)])
    np.testing.assert_array_equal(tokens, whole.tokens[:, : len(columns)])


def test_a_cache_that_grows_changes_nothing_and_a_token_is_computed_with_the_slots_of_its_segment() -> None:
    # Behind 5 slots of the prompt room for 6 tokens and 11, or for 3, 6 and 11. The first token comes with the prompt,
    # each other as the one before it is written.
    slots = {2: [11] * 7 + [16] * 4, 3: [8] * 4 + [11] * 3 + [16] * 4}
    for kind, segments in (("plain", 2), ("windows", 3), ("scan", 2)):
        for draws, longest in (("early", 5), ("late", 11)):
            grown, calls = drawn(kind, draws, segments=segments)
            assert grown.mask.sum(axis=1).max() == longest, (kind, draws)
            assert sorted(call[-1] for call in calls) == slots[segments][:longest], (kind, draws)
            assert_same(grown, drawn(kind, draws)[0], rtol=1e-5, atol=1e-5)


def test_through_slots_each_row_is_what_it_is_with_all_others() -> None:
    # 32 prompts through a few slots: prompts take the places of rows that ended, the ring of keys is written round and
    # round (5 prompts and 4 x 11 tokens a slot), and at the end the live rows move together.
    for kind, slots in (("plain", 1), ("windows", 8), ("scan", 5)):
        for draws in ("mixed", "late"):
            assert_same(drawn(kind, draws, slots=slots)[0], drawn(kind, draws)[0], atol=1e-4)


def test_slots_compute_few_columns() -> None:
    out, calls = drawn("windows", slots=8)
    tokens = int(out.mask.sum())
    assert tokens < 0.5 * out.mask.sum(axis=1).max() * len(out.mask)
    assert tokens <= sum(rows for rows, _, _ in calls) < 1.4 * tokens


def test_samples_of_a_prompt_are_what_they_are_of_the_prompt_repeated() -> None:
    rounded = {"segments": 2, "cache_dtype": "int8"}
    rows: tuple[tuple[str, dict, dict, int], ...] = (
        ("plain", rounded, rounded, 16),
        ("scan", {"slots": 8}, {}, 16),
        ("plain", {"slots": 24}, {}, 18),  # 12 prompts, and the last 4 in parts of 3
    )
    for kind, options, others, read in rows:
        out, calls = drawn(kind, samples=2, **options)
        assert_same(out, drawn(kind, repeated=True, **others)[0], atol=1e-4)
        assert sum(count for count, tokens, _ in calls if tokens == 5) == read, (kind, options)


def test_greedy_takes_the_most_likely() -> None:
    settings: dict[str, Any] = SETTINGS | {"temperature": 0.0}
    out = sample("plain", **settings)
    np.testing.assert_array_equal(out.tokens[out.mask], logits_after("plain", out).argmax(axis=-1)[out.mask])
    np.testing.assert_array_equal(out.tokens, sample("plain", seed=1, **settings).tokens)


def test_what_stands_in_left_padding_changes_no_answer() -> None:
    # Nor does how much of it there is: `logits_after` has none.
    other = sample("plain", np.where(MASK, PROMPTS, 3), uniform_BR=MIXED, **SETTINGS)
    assert_same(other, drawn("plain")[0], atol=1e-4)


def test_draws_follow_the_distribution() -> None:
    probability = np.array([0.4, 0.0, 0.3, 0.15, 0.0, 0.1, 0.045, 0.005, 0.0])
    # The last rows have distributions of their own, one id each: rows are drawn one by one.
    shares = np.concatenate([np.broadcast_to(probability, (1_000_000, 9)), np.eye(9)]).astype(np.float32)
    uniform = np.append(
        jax.random.uniform(jax.random.key(3), (1_000_000,)), np.linspace(0.0, 1.0, 9, endpoint=False, dtype=np.float32)
    )
    with np.errstate(divide="ignore"):
        draws = np.asarray(jax.jit(draw)(np.log(shares), uniform))
    np.testing.assert_array_equal(draws[-9:], np.arange(9))
    counts = np.bincount(draws[:-9], minlength=9)
    assert counts.sum() == 1_000_000 and np.all(counts[probability == 0] == 0)
    expected = 1_000_000 * probability[probability > 0]
    # Chi-square with 5 degrees of freedom: above 20.5 once in 1,000 seeds.
    assert np.sum((counts[probability > 0] - expected) ** 2 / expected) < 20.5


def test_draws_invert_the_distribution_function() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=1000).astype(np.float32) * 3
    uniform = random.random(5000).astype(np.float32)
    probability = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    draws = np.asarray(jax.jit(draw)(np.tile(np.log(probability).astype(np.float32), (5000, 1)), uniform))
    running, target = np.cumsum(probability), 1.0 - uniform.astype(np.float64)
    # The id whose step of the distribution function holds the number, but for what float32 rounds.
    assert np.all(target <= running[draws] + 1e-6) and np.all(target > running[draws] - probability[draws] - 1e-6)


def test_an_impossible_id_is_never_drawn() -> None:
    # Among 20,000 ids the running sum of float32 goes up and down by its last bit where the probability is 0.
    random = np.random.default_rng(0)
    logits = np.where(np.arange(20_000) % 7 == 3, random.normal(size=(8, 20_000)), -1e30).astype(np.float32)
    logp = jax.nn.log_softmax(jnp.asarray(logits))
    uniform = jax.random.uniform(jax.random.key(0), (2_000, 8))
    draws = np.asarray(jax.jit(jax.vmap(draw, (None, 0)))(logp, uniform))
    assert np.all(draws % 7 == 3)


def test_filters_by_hand() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.4, 0.1]]))

    def kept(**changes) -> np.ndarray:
        settings: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes
        return np.exp(np.asarray(filter_logits(logits, **settings)))

    np.testing.assert_allclose(kept(), np.exp(logits), rtol=1e-6)
    # p² over the sum of squares, 0.3 and 0.295.
    np.testing.assert_allclose(kept(temperature=0.5)[0], np.array([0.01, 0.16, 0.04, 0.09]) / 0.3, rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=1)[0], [0, 1, 0, 0], atol=1e-6)
    # Two of four; ids that tie with the second stay.
    np.testing.assert_allclose(kept(top_k=2), [[0, 4 / 7, 0, 3 / 7], [0.25 / 0.9, 0.25 / 0.9, 0.4 / 0.9, 0]], rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=9), np.exp(logits), rtol=1e-6)
    # 0.4 + 0.3 reaches 0.65 and 0.4 + 0.25 + 0.25 does; 0.4 alone reaches 0.39; one id always stays.
    np.testing.assert_allclose(kept(top_p=0.65)[0], [0, 4 / 7, 0, 3 / 7], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.66)[1], [0.25 / 0.9, 0.25 / 0.9, 0.4 / 0.9, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.39), [[0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-6)
    # First the temperature, then the filters: 0.16/0.3 alone is past a half.
    np.testing.assert_allclose(kept(temperature=0.5, top_p=0.5)[0], [0, 1, 0, 0], atol=1e-6)


def test_what_cannot_be_sampled_is_refused() -> None:
    rows: tuple[tuple[dict, str], ...] = (
        ({"max_new_tokens": 12}, r"prompt of 5 \+ 12 new tokens exceeds the context 16"),
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"top_p": 0.0}, "top_p: expected above 0, at most 1, got 0.0"),
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"segments": 0}, "segments: expected 1 or more, got 0"),
        ({"segments": 2, "slots": 4}, "segments: expected 1 with slots 4, got 2; use one of the two"),
        ({"samples": 0}, "samples: expected 1 or more, .*, got samples 0 with slots 0"),
        (
            {"samples": 2, "slots": 4},
            "samples: expected 1 or more, and slots a multiple of 4 .*, got samples 2 with slots 4",
        ),
    )
    for change, message in rows:
        with pytest.raises(ValueError, match=message):
            sample("plain", **SETTINGS | change)
