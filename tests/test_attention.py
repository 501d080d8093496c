"""Attention's kernels against its plain form, and that against a loop; which of them a program is given."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.layers import attention
from rlhf_jax.layers.attention import attend, choose, cudnn, plain, splash
from rlhf_jax.model import Transformer, init_params, stack_blocks
from rlhf_jax.parallel.mesh import make_mesh

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


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("queries", [T, 70])
def test_splash_is_the_plain_form(kind: str, softcap: float, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 128)  # two blocks a row
    segments_BS, settings = segments(kind), {"scale": 0.3, "softcap": softcap}
    given, asked = arrays(queries)

    def by_plain(query: Any, key: Any, value: Any) -> jax.Array:
        return real(plain(query, key, value, jnp.asarray(allowed(segments_BS, queries)), **settings), segments_BS)

    def by_splash(query: Any, key: Any, value: Any) -> jax.Array:
        out = splash(query, key, value, jnp.asarray(segments_BS), interpret=True, **settings)
        return real(out, segments_BS)

    (wanted, pull_plain), (found, pull) = jax.vjp(jax.jit(by_plain), *given), jax.vjp(jax.jit(by_splash), *given)
    np.testing.assert_allclose(wanted, naive(*given, allowed(segments_BS, queries), 0.3, softcap), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(("query", "key", "value"), pull(asked), pull_plain(asked), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)


def test_splash_on_a_mesh_is_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 128)
    given, asked = arrays()
    ids = jnp.asarray(segments("packed"))
    run = functools.partial(splash, segments_BS=ids, scale=0.3, interpret=True)
    wanted, pull_alone = jax.vjp(run, *given)
    # Rows over two devices, key heads over two.
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        found, pull = jax.vjp(jax.jit(run), *given)
        gradients = pull(asked)
    assert len(found.sharding.device_set) == 4
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, pull_alone(asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("odd", [0, 1])
def test_what_cudnn_is_asked_for_is_the_plain_form(odd: int) -> None:
    (query, key, value), asked = arrays()
    given = (query[:, :, odd:], key[:, :, odd:], value[:, :, odd:])
    asked = asked[:, :, odd:]
    ids = segments("padded")[:, odd:]
    mask = jnp.asarray(allowed(segments("padded"))[:, odd:, odd:])
    wanted, pull_plain = jax.vjp(lambda q, k, v: real(plain(q, k, v, mask, scale=0.3), ids), *given)
    found, pull = jax.vjp(lambda q, k, v: real(cudnn(q, k, v, mask, scale=0.3, implementation="xla"), ids), *given)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(pull(asked), pull_plain(asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


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


def losses(config: ModelConfig, params: Any, **rows: Any) -> tuple[Any, Any]:
    """(hidden states of real tokens, gradients) of a model on rows that are packed or padded."""
    tokens = np.random.default_rng(3).integers(0, 31, (B, T), np.int32)
    ids = jnp.asarray(segments("packed"))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = Transformer(config).apply({"params": params}, tokens, segment_ids=ids, method="hidden", **rows)
        mask = ids[:, -hidden.shape[1] :, None] > 0
        hidden = hidden * mask
        return jnp.sum(jnp.sin(hidden)) / jnp.sum(mask), hidden

    with jax.set_mesh(make_mesh()):
        gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    return hidden, gradient


@pytest.mark.parametrize(
    ("change", "last"),
    [({"windows": (0, 300)}, 140), ({"remat": "full"}, 0), ({"scan_layers": True, "remat": "dots"}, 140)],
    ids=["last", "remat", "scanned"],
)
def test_a_model_with_the_kernel_is_the_model(
    change: dict[str, Any], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, **change)
    params = init_params(Transformer(SMALL), jax.random.key(0))
    params = stack_blocks(params, config) if config.scan_layers else params
    wanted = losses(config, params, last=last)
    calls = []

    def counted(*args: Any, **settings: Any) -> jax.Array:
        calls.append(args[0].shape[2])
        return splash(*args, **settings, interpret=True)

    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", counted)
    monkeypatch.setattr(attention, "BLOCK", 128)
    found = losses(config, params, last=last)
    assert set(calls) == ({T} if config.scan_layers or not last else {T, last})
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_narrow_window_or_a_cache_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, windows=(0, 50))
    params = init_params(Transformer(SMALL), jax.random.key(0))
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", lambda *args, **settings: pytest.fail("the kernel was asked"))
    losses(config, params)
    with pytest.raises(pytest.fail.Exception):
        losses(SMALL, params)


def test_attend_without_segments_is_plain() -> None:
    given, _ = arrays()
    mask = jnp.asarray(allowed(segments("packed")))
    found = attend(*given, mask, None, scale=0.3, kind="splash")
    np.testing.assert_array_equal(found, plain(*given, mask, scale=0.3))
