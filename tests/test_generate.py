"""Sampling: the distribution it draws from, what it says of each token, and when it stops."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.generate import draw, filter_logits, generate, stream
from rlhf_jax.model import Transformer, init_params, stack_blocks

pytestmark = pytest.mark.usefixtures("each_key_once")

MODEL = Transformer(ModelConfig(vocab_size=7, context=16, width=16, layers=2, heads=2, kv_heads=1, ffn_width=16))
EOS, PAD = 5, 6
PROMPTS = np.array([[0, 0, 0, 1, 2], [0, 3, 4, 1, 2], [1, 2, 3, 4, 4], [2, 2, 2, 2, 2]] * 8, np.int32)
MASK = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]] * 8, bool)


@pytest.fixture(scope="module")
def params() -> dict:
    # Large weights: a flat distribution would hide errors.
    return jax.tree.map(lambda x: 2 * x, init_params(MODEL, jax.random.key(0)))


def sample(params: dict, seed: int = 0, *, model=MODEL, prompts=PROMPTS, mask=MASK, **changes) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (EOS,), "pad_id": PAD} | changes
    out = generate(model, params, jnp.asarray(prompts), jnp.asarray(mask), jax.random.key(seed), **settings)
    return jax.tree.map(np.asarray, out)


@jax.jit
def following(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Full-forward logits [B, R, V] of what follows the prompt."""
    return MODEL.apply({"params": params}, tokens, mask)[:, PROMPTS.shape[1] - 1 : -1]


def logits_after(params: dict, out: Any) -> np.ndarray:
    rows = (np.concatenate(pair, axis=1) for pair in ((PROMPTS, out.tokens), (MASK, out.mask)))
    return np.asarray(following(params, *map(jnp.asarray, rows)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logp_is_that_of_the_full_forward(params: dict, temperature: float) -> None:
    out = sample(params, temperature=temperature)
    logp = np.asarray(jax.nn.log_softmax(logits_after(params, out) / temperature))
    expected = np.take_along_axis(logp, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logp[out.mask], expected[out.mask], atol=1e-4)
    assert np.all(out.logp[~out.mask] == 0.0)


def test_a_row_stops_at_its_end_and_is_padded_behind(params: dict) -> None:
    out = sample(params)
    ends = out.tokens == EOS
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, 8)
    assert len(set(lengths.tolist())) > 3  # rows of all kinds, also without an end
    np.testing.assert_array_equal(out.mask, np.arange(8) < lengths[:, None])
    assert np.all(out.tokens[~out.mask] == PAD)
    # Each row is what it would be in a batch where no row stops, up to its end: keys do not depend on the others.
    free = sample(params, stop_ids=())
    assert free.mask.all()
    np.testing.assert_array_equal(out.tokens[out.mask], free.tokens[out.mask])


def test_any_of_the_stop_ids_ends_a_row(params: dict) -> None:
    out = sample(params, stop_ids=(EOS, 2))
    free = sample(params, stop_ids=())
    ends = np.isin(free.tokens, (EOS, 2))
    assert (free.tokens[np.arange(32), ends.argmax(axis=1)][ends.any(axis=1)] == 2).any()
    np.testing.assert_array_equal(out.mask, np.cumsum(ends, axis=1) - ends == 0)


def test_the_loop_ends_with_the_last_row(params: dict) -> None:
    # Forward passes, counted as they run: one for the prompt, one for each further column.
    seen: list[int] = []

    class Counted(Transformer):
        def head(self, hidden_BTD: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: seen.append(1))
            return super().head(hidden_BTD)

    out = sample(params, model=Counted(MODEL.config), max_new_tokens=11, stop_ids=(EOS, 0, 1, 2))
    longest = int(out.mask.sum(axis=1).max())
    jax.effects_barrier()
    assert 1 < longest < 11
    assert len(seen) == longest


def test_a_stream_is_the_same_column_by_column(params: dict) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (EOS, 0, 1), "pad_id": PAD, "temperature": 0.7}
    whole = sample(params, **settings)
    prompts = (jnp.asarray(PROMPTS), jnp.asarray(MASK))
    columns = list(stream(MODEL, params, *prompts, jax.random.key(0), **settings))
    assert len(columns) == whole.mask.sum(axis=1).max()
    tokens, mask = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    np.testing.assert_array_equal(mask, whole.mask[:, : len(columns)])
    np.testing.assert_array_equal(tokens, whole.tokens[:, : len(columns)])
    grown = list(stream(MODEL, params, *prompts, jax.random.key(0), segments=3, **settings))
    jax.tree.map(np.testing.assert_array_equal, grown, columns)


@pytest.mark.parametrize(
    ("changes", "segments"), [({}, 2), ({"windows": (3, 0)}, 3), ({"scan_layers": True}, 2)], ids=str
)
def test_a_cache_that_grows_changes_nothing(
    params: dict, changes: dict, segments: int, request: pytest.FixtureRequest
) -> None:
    model = Transformer(dataclasses.replace(MODEL.config, **changes))
    if model.config.scan_layers:
        request.getfixturevalue("optimised")  # as quickly compiled, one log-probability of 256 is off by 3e-5
        params = stack_blocks(params, model.config)
    for settings in ({"stop_ids": (EOS, 0)}, {"max_new_tokens": 11, "stop_ids": ()}):
        plain = sample(params, model=model, **settings)
        grown = sample(params, model=model, segments=segments, **settings)
        np.testing.assert_array_equal(grown.tokens, plain.tokens)
        np.testing.assert_array_equal(grown.mask, plain.mask)
        np.testing.assert_allclose(grown.logp, plain.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stop_ids", "longest"), [((), 11), ((EOS, 0, 1, 2), 5)])
def test_a_token_is_computed_with_the_slots_of_its_segment(params: dict, stop_ids: tuple, longest: int) -> None:
    seen: list[int] = []

    class Counted(Transformer):
        def hidden(self, *inputs: Any, **named: Any) -> Any:
            slots = named["cache"].places_BS.shape[1]
            jax.debug.callback(lambda: seen.append(slots))
            return super().hidden(*inputs, **named)

    out = sample(params, model=Counted(MODEL.config), max_new_tokens=11, stop_ids=stop_ids, segments=3)
    jax.effects_barrier()
    assert out.mask.sum(axis=1).max() == longest
    # Behind 5 slots of the prompt room for 3 tokens, 6 and 11. The first token comes with the prompt, each other as the
    # one before it is written.
    assert sorted(seen) == ([8] * 4 + [11] * 3 + [16] * 4)[:longest]


@pytest.mark.parametrize(("changes", "slots"), [({}, 1), ({"windows": (3, 0)}, 8), ({"scan_layers": True}, 5)])
def test_through_slots_each_row_is_what_it_is_with_all_others(params: dict, changes: dict, slots: int) -> None:
    # 32 prompts through a few slots: prompts take the places of rows that ended, the ring of keys is written round and
    # round (5 prompts and 4 x 8 tokens a slot), and at the end the live rows move together.
    model = Transformer(dataclasses.replace(MODEL.config, **changes))
    if model.config.scan_layers:
        params = stack_blocks(params, model.config)
    together, apart = sample(params, model=model), sample(params, model=model, slots=slots)
    assert together.mask.any(axis=1).all() and 1 < together.mask.sum(axis=1).mean() < 8
    np.testing.assert_array_equal(apart.tokens, together.tokens)
    np.testing.assert_array_equal(apart.mask, together.mask)
    np.testing.assert_allclose(apart.logp, together.logp, atol=1e-4)


def test_slots_compute_few_columns(params: dict) -> None:
    computed: list[int] = []

    class Counted(Transformer):
        def head(self, hidden_BTD: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: computed.append(len(hidden_BTD)))
            return super().head(hidden_BTD)

    out = sample(params, model=Counted(MODEL.config), stop_ids=(EOS, 0, 1), slots=8)
    jax.effects_barrier()
    tokens = int(out.mask.sum())
    assert tokens < 0.5 * out.mask.sum(axis=1).max() * len(out.mask)
    assert tokens <= sum(computed) < 1.4 * tokens


@pytest.mark.parametrize(
    ("changes", "options", "read"),
    [
        ({}, {"segments": 2, "cache_dtype": "int8"}, 16),
        ({"scan_layers": True}, {"slots": 8}, 16),
        ({}, {"slots": 24}, 18),  # 12 prompts, and the last 4 in parts of 3
    ],
)
def test_samples_of_a_prompt_are_what_they_are_of_the_prompt_repeated(
    params: dict, changes: dict, options: dict, read: int
) -> None:
    model = Transformer(dataclasses.replace(MODEL.config, **changes))
    if model.config.scan_layers:
        params = stack_blocks(params, model.config)
    prompts, mask = PROMPTS[:16], MASK[:16]
    computed: list[int] = []

    class Counted(Transformer):
        def hidden(self, tokens_BT: jax.Array, *inputs: Any, **named: Any) -> Any:
            if tokens_BT.shape[1] == prompts.shape[1]:
                jax.debug.callback(lambda: computed.append(len(tokens_BT)))
            return super().hidden(tokens_BT, *inputs, **named)

    repeated = sample(
        params, model=model, prompts=np.repeat(prompts, 2, axis=0), mask=np.repeat(mask, 2, axis=0), **options
    )
    out = sample(params, model=Counted(model.config), prompts=prompts, mask=mask, samples=2, **options)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.tokens, repeated.tokens)
    np.testing.assert_array_equal(out.mask, repeated.mask)
    np.testing.assert_allclose(out.logp, repeated.logp, atol=1e-4)
    assert sum(computed) == read


def test_greedy_takes_the_most_likely(params: dict) -> None:
    out = sample(params, temperature=0.0)
    np.testing.assert_array_equal(out.tokens[out.mask], logits_after(params, out).argmax(axis=-1)[out.mask])
    np.testing.assert_array_equal(out.tokens, sample(params, 1, temperature=0.0).tokens)


def test_left_padding_changes_no_answer(params: dict) -> None:
    wider = np.concatenate([np.full((32, 3), 4, np.int32), np.where(MASK, PROMPTS, 3)], axis=1)
    mask = np.concatenate([np.zeros((32, 3), bool), MASK], axis=1)
    plain, padded = sample(params), sample(params, prompts=wider, mask=mask)
    np.testing.assert_array_equal(padded.tokens, plain.tokens)
    np.testing.assert_allclose(padded.logp, plain.logp, atol=1e-4)


def test_draws_follow_the_distribution() -> None:
    probability = np.array([0.4, 0.0, 0.3, 0.15, 0.0, 0.1, 0.045, 0.005, 0.0])
    logp = jnp.log(jnp.asarray(probability, jnp.float32))
    draws = np.asarray(
        draw(jnp.broadcast_to(logp, (1_000_000, 9)), jax.random.uniform(jax.random.key(3), (1_000_000,)))
    )
    counts = np.bincount(draws, minlength=9)
    assert counts.sum() == 1_000_000 and np.all(counts[probability == 0] == 0)
    expected = 1_000_000 * probability[probability > 0]
    # Chi-square with 5 degrees of freedom: above 20.5 once in 1,000 seeds.
    assert np.sum((counts[probability > 0] - expected) ** 2 / expected) < 20.5
    # Rows are drawn one by one, each from its own distribution.
    own = np.asarray(draw(jnp.where(jnp.eye(9, dtype=bool), 0.0, -jnp.inf), jnp.linspace(0.0, 1.0, 9, endpoint=False)))
    np.testing.assert_array_equal(own, np.arange(9))


def test_draws_invert_the_distribution_function() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=1000).astype(np.float32) * 3
    uniform = random.random(5000).astype(np.float32)
    draws = np.asarray(draw(jnp.broadcast_to(jax.nn.log_softmax(logits), (5000, 1000)), jnp.asarray(uniform)))
    probability = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
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
    # Two of four; ids that tie with the second stay.
    np.testing.assert_allclose(kept(top_k=2), [[0, 4 / 7, 0, 3 / 7], [0.25 / 0.9, 0.25 / 0.9, 0.4 / 0.9, 0]], rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=9), np.exp(logits), rtol=1e-6)
    # 0.4 + 0.3 reaches 0.65 and 0.4 + 0.25 + 0.25 does; 0.4 alone reaches 0.39; one id always stays.
    np.testing.assert_allclose(kept(top_p=0.65)[0], [0, 4 / 7, 0, 3 / 7], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.66)[1], [0.25 / 0.9, 0.25 / 0.9, 0.4 / 0.9, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.39), [[0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-6)
    # First the temperature, then the filters: 0.16/0.3 alone is past a half.
    np.testing.assert_allclose(kept(temperature=0.5, top_p=0.5)[0], [0, 1, 0, 0], atol=1e-6)


def test_filters_reach_the_sampler(params: dict) -> None:
    np.testing.assert_array_equal(sample(params, top_k=1).tokens, sample(params, temperature=0.0).tokens)
    out = sample(params, top_k=2)
    second = np.sort(logits_after(params, out), axis=-1)[..., -2]
    chosen = np.take_along_axis(logits_after(params, out), out.tokens[..., None], axis=-1)[..., 0]
    assert np.all(chosen[out.mask] >= second[out.mask] - 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 12}, r"prompt of 5 \+ 12 new tokens exceeds the context 16"),
        ({"temperature": -1.0}, "temperature -1.0: wanted 0 or more"),
        ({"top_p": 0.0}, "top_p 0.0: wanted above 0, at most 1"),
        ({"top_k": -1}, "top_k -1: wanted 0 or more"),
        ({"segments": 0}, "segments 0: wanted 1 or more"),
        ({"segments": 2, "slots": 4}, "segments 2 with slots 4: wanted one of them"),
        ({"samples": 0}, "samples 0 with slots 0: wanted 1 or more"),
        ({"samples": 2, "slots": 4}, "samples 2 with slots 4: wanted 1 or more, slots a multiple of 4 times it"),
    ],
)
def test_what_cannot_be_sampled_is_refused(params: dict, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(params, **change)
