"""Attention's kernels against its plain form, and that against a loop; which of them a program is given."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.layers import attention
from rlhf_jax.layers.attention import attend, choose, cudnn, plain, splash
from rlhf_jax.model import Transformer, empty_cache, init_params, unstack_blocks
from rlhf_jax.parallel.mesh import make_mesh
from tests.random_params import initialized

pytestmark = pytest.mark.speed

B, H, G, T, D = 2, 4, 2, 200, 16


def arrays(queries: int = T) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(queries, keys, values) and what is asked of the result's gradient."""
    random = np.random.default_rng(0)
    shapes = [(B, H, queries, D), (B, G, T, D), (B, G, T, D), (B, H, queries, D)]
    query, key, value, asked = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    return (query, key, value), asked


def segments(kind: str) -> np.ndarray:
    """Rows of T tokens: padded unevenly on both sides, or packed with segments of uneven lengths and padding behind."""
    found = np.zeros((B, T), np.int32)
    if kind == "padded":
        found[0, 37:], found[1, 3:190] = 1, 1
    else:
        found[0, :61], found[0, 61:130], found[0, 130:137], found[1, :128], found[1, 128:] = 1, 2, 3, 1, 2
    return found


def allowed(segments_BS: np.ndarray, queries: int = T) -> np.ndarray:
    """[B, Q, S]: of its own segment, real, and not behind the token."""
    same = (segments_BS[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)
    return (same & np.tril(np.ones((T, T), bool)))[:, T - queries :]


def naive(query: Any, key: Any, value: Any, allowed_BQS: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """In float64, one query after the other; 0 where it sees nothing."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, h, q in np.ndindex(*query.shape[:3]):
        group, seen = h // (H // G), allowed_BQS[b, q]
        if seen.any():
            scores = key[b, group, seen] @ query[b, h, q] * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[b, h, q] = weights @ value[b, group, seen] / weights.sum()
    return out


def real(x: jax.Array, segments_BS: np.ndarray) -> jax.Array:
    """[B, H, Q, d] with zeros for padding, whose attention is left open."""
    return x * jnp.asarray(segments_BS[:, -x.shape[2] :, None] > 0, x.dtype)[:, None]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Two blocks a row of T."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", 128)
        yield


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    """Compiled: (result, gradients of query, key and value) from these, what is asked of the gradient, and the rest."""

    def run(given: tuple[jax.Array, ...], asked: jax.Array, *rest: Any) -> Any:
        found, pull = jax.vjp(lambda *given: attend(*given, *rest), *given)
        return found, pull(asked)

    return jax.jit(run)


@functools.cache
def kernel_and_plain(softcap: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Splash attention from segments and the plain form from a mask as well, zeros for padding, with gradients."""
    settings = {"scale": 0.3, "softcap": softcap}
    return (
        with_gradients(lambda q, k, v, ids: real(splash(q, k, v, ids, interpret=True, **settings), ids)),
        with_gradients(lambda q, k, v, ids, mask: real(plain(q, k, v, mask, **settings), ids)),
    )


def test_splash_is_the_plain_form() -> None:
    # Fewer queries without a softcap are in `test_a_model_with_the_kernel_is_the_model`.
    for (queries, softcap), kind in itertools.product(((T, 0.0), (T, 2.0), (70, 2.0)), ("padded", "packed")):
        row = f"{queries} queries, softcap {softcap}, {kind}"
        ids, mask = segments(kind), allowed(segments(kind), queries)
        given, asked = arrays(queries)
        by_splash, by_plain = kernel_and_plain(softcap)
        found, gradients = by_splash(given, asked, ids)
        wanted, wanted_gradients = by_plain(given, asked, ids, mask)
        by_loop = naive(*given, mask, 0.3, softcap)
        np.testing.assert_allclose(wanted, by_loop, rtol=1e-5, atol=1e-5, err_msg=row)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=row)
        for name, one, other in zip(("query", "key", "value"), gradients, wanted_gradients, strict=True):
            assert np.abs(np.asarray(other)).max() > 0.1, (row, name)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=f"{row}: {name}")


def test_splash_on_a_mesh_is_splash() -> None:
    given, asked = arrays()
    run, _ = kernel_and_plain(0.0)
    wanted, wanted_gradients = run(given, asked, segments("packed"))
    # Rows over two devices, key heads over two.
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        found, gradients = run(given, asked, segments("packed"))
    assert len(found.sharding.device_set) == 4
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_what_cudnn_is_asked_for_is_the_plain_form() -> None:
    _, by_plain = kernel_and_plain(0.0)
    by_cudnn = with_gradients(
        lambda q, k, v, ids, mask: real(cudnn(q, k, v, mask, scale=0.3, implementation="xla"), ids)
    )
    given, asked = (jax.tree.map(np.asarray, x) for x in arrays())
    mask = allowed(segments("padded"))
    for odd in (0, 1):
        rest = (asked[:, :, odd:], segments("padded")[:, odd:], mask[:, odd:, odd:])
        cut = tuple(x[:, :, odd:] for x in given)
        found, gradients = by_cudnn(cut, *rest)
        wanted, wanted_gradients = by_plain(cut, *rest)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"from {odd}")
        for one, other in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=f"from {odd}")


WHOLE: dict[str, Any] = {
    "queries": 256,
    "head": 64,
    "dtype": "bfloat16",
    "softcap": 0.0,
    "by_segments": True,
    "cached": False,
}


def test_on_a_cpu_it_is_plain() -> None:
    assert choose("auto", **WHOLE) == "plain"


def test_on_a_tpu_whole_rows_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert choose("auto", **WHOLE) == choose("auto", **WHOLE | {"softcap": 5.0, "dtype": "float32"}) == "splash"
        assert choose("plain", **WHOLE) == "plain"
        changes: list[dict[str, Any]] = [{"queries": 64}, {"by_segments": False}, {"cached": True}]
        for change in changes:
            assert choose("auto", **WHOLE | change) == "plain"


def test_the_kernel_is_only_for_programs_whose_parts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    # Eight devices and nothing that says which of them holds what, as where a sharded state is evaluated.
    assert choose("auto", **WHOLE) == "plain"
    seen: list[str] = []

    def each(x: jax.Array) -> jax.Array:
        seen.append(choose("auto", **WHOLE))
        return x

    jax.pmap(each)(jnp.ones(8))
    assert set(seen) == {"splash"}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose("auto", **WHOLE) == "splash"


def test_on_a_gpu_it_is_cudnn_where_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "_ampere", lambda: True)
    assert choose("auto", **WHOLE) == choose("auto", **WHOLE | {"by_segments": False, "head": 128}) == "cudnn"
    changes: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"head": 68},
        {"head": 136},
        {"softcap": 5.0},
        {"cached": True},
        {"queries": 64},
    ]
    for change in changes:
        assert choose("auto", **WHOLE | change) == "plain"
    monkeypatch.setattr(attention, "_ampere", lambda: False)
    assert choose("auto", **WHOLE) == "plain"


SMALL = ModelConfig(vocab_size=31, context=256, width=32, layers=2, heads=4, kv_heads=2, tied=False)
TOKENS = np.random.default_rng(3).integers(0, 31, (B, T), np.int32)


def gradient_and_hidden(config: ModelConfig, last: int = 0) -> Callable[[Any], Any]:
    """From parameters, gradients and the hidden states of real tokens, of a model on packed rows."""
    ids = segments("packed")

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = Transformer(config).apply({"params": params}, TOKENS, segment_ids=ids, method="hidden", last=last)
        mask = ids[:, -hidden.shape[1] :, None] > 0
        hidden = hidden * mask
        return jnp.sum(jnp.sin(hidden)) / jnp.sum(mask), hidden

    return jax.grad(loss, has_aux=True)


def test_a_model_with_the_kernel_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = dataclasses.replace(SMALL, scan_layers=True)
    stacked = jax.tree.map(np.asarray, initialized(Transformer(scanned), jax.random.key(0)))
    asked: list[int] = []

    def counted(*args: Any, **settings: Any) -> jax.Array:
        asked.append(args[0].shape[2])
        return splash(*args, **settings, interpret=True)

    monkeypatch.setattr(attention, "splash", counted)
    cases: list[tuple[dict[str, Any], int, int]] = [
        # The last block, which is asked for 140 columns, is the only one; a window that holds the row is none.
        ({"layers": 1, "windows": (300,), "remat": "full"}, 140, 140),
        # Scanned layers are alike, the last one too.
        ({"scan_layers": True, "remat": "dots"}, 140, T),
    ]
    for change, last, queries in cases:
        config = dataclasses.replace(SMALL, **change)
        given = stacked if config.scan_layers else unstack_blocks(stacked, SMALL)
        found = {}
        for platform in ("cpu", "tpu"):
            monkeypatch.setattr(attention, "platform", lambda platform=platform: platform)
            with jax.set_mesh(make_mesh()):
                found[platform] = jax.tree.leaves(jax.jit(gradient_and_hidden(config, last))(given))
            assert set(asked) == (set() if platform == "cpu" else {queries}), (change, platform)
        for one, other in zip(found["tpu"], found["cpu"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=str(change))
        asked.clear()


def test_a_narrow_window_or_a_cache_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    params = jax.eval_shape(init_params, Transformer(SMALL), jax.random.key(0))
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", lambda *args, **settings: pytest.fail("the kernel was asked"))
    with jax.set_mesh(make_mesh()):
        jax.eval_shape(gradient_and_hidden(dataclasses.replace(SMALL, windows=(0, 50))), params)
        cache = jax.eval_shape(lambda: empty_cache(SMALL, B, T))
        jax.eval_shape(
            lambda params, cache: Transformer(SMALL).apply({"params": params}, TOKENS, cache=cache), params, cache
        )
        with pytest.raises(pytest.fail.Exception):
            jax.eval_shape(gradient_and_hidden(SMALL), params)


def test_attend_without_segments_is_plain() -> None:
    given, _ = arrays()
    mask = allowed(segments("packed"))
    found = jax.jit(lambda q, k, v: attend(q, k, v, mask, None, scale=0.3, kind="splash"))(*given)
    np.testing.assert_array_equal(found, jax.jit(lambda q, k, v: plain(q, k, v, mask, scale=0.3))(*given))


def test_blocks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 512)
    lengths = (1, 128, 129, 256, 257, 512, 513, 5000)
    assert [attention.block_of(length) for length in lengths] == [128, 128, 256, 256, 512, 512, 512, 512]
