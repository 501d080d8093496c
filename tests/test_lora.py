"""Adapters: nothing at first, the merged network's logits later, gradients for them alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import LoraConfig, ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.lora import attach, init_adapter, merge
from rlhf_jax.model import Transformer, to_scalar_head
from tests.random_params import random_params

pytestmark = pytest.mark.core

SMALL: dict[str, Any] = {"vocab_size": 19, "context": 12, "width": 8, "layers": 1, "heads": 2}
TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
LORA = LoraConfig(rank=3, alpha=6.0)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: dict) -> jax.Array:
    return model.apply({"params": params}, TOKENS)


def shaken(tree: dict, seed: int = 0) -> dict:
    """Every leaf random: B too, which starts at 0."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * random.normal(size=x.shape)).astype(x.dtype), tree)


@functools.cache
def fresh(config: LoraConfig, model: Transformer) -> tuple[dict, dict]:
    """(parameters, a fresh adapter to them), on the host."""
    base = random_params(model)
    return base, jax.tree.map(np.asarray, jax.jit(init_adapter, static_argnums=1)(base, config, jax.random.key(1)))


def test_attached_is_nothing_at_first_and_then_what_is_merged() -> None:
    for model in (Transformer(ModelConfig(**SMALL)), Transformer(ModelConfig.gpt2(**SMALL))):
        base, adapter = fresh(LORA, model)
        plain = forward(model, base)
        np.testing.assert_array_equal(forward(model, attach(base, adapter, LORA.scale)), plain)
        trained = shaken(adapter)
        attached = forward(model, attach(base, trained, LORA.scale))
        assert np.abs(attached - plain).max() > 0.1, model
        merged = jax.jit(merge, static_argnums=2)(base, trained, LORA.scale)
        assert str(jax.tree.structure(merged)) == str(jax.tree.structure(base))
        np.testing.assert_allclose(forward(model, merged), attached, atol=1e-4, err_msg=str(model))


def test_the_product_by_hand() -> None:
    base = {"block_0": {"attention": {"query": {"kernel": jnp.eye(2)}}}}
    module = {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, 5.0]])}
    adapter = {"block_0": {"attention": {"query": module}}}
    merged = merge(base, adapter, 0.5)["block_0"]["attention"]["query"]
    np.testing.assert_allclose(merged["kernel"], [[2.5, 2.5], [3.0, 6.0]])
    assert LoraConfig(rank=4, alpha=2.0).scale == 0.5


def test_only_the_named_kernels_and_only_the_adapter_get_a_gradient() -> None:
    model = Transformer(ModelConfig(**SMALL | {"layers": 2}))
    config = LoraConfig(rank=2, targets=("query", "down"))
    base, adapter = fresh(config, model)
    adapter = shaken(adapter)
    assert sorted(adapter) == ["block_0", "block_1"]
    assert sorted(adapter["block_0"]["attention"]) == ["query"]
    assert sorted(adapter["block_0"]["ffn"]) == ["down"]
    count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert count == 2 * (2 * (8 + 8) + 2 * (32 + 8))  # layers x rank x (in + out) of query and down

    def loss(adapter: dict) -> jax.Array:
        return jnp.sum(model.apply({"params": attach(base, adapter, config.scale)}, TOKENS) ** 2)

    gradient = jax.jit(jax.grad(loss))(adapter)
    assert str(jax.tree.structure(gradient)) == str(jax.tree.structure(adapter))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_score_head_stands_beside_the_adapter() -> None:
    model = Transformer(ModelConfig(**SMALL), scalar=True)
    base, adapter = fresh(LORA, Transformer(ModelConfig(**SMALL)))
    whole = jax.jit(to_scalar_head, static_argnums=1)(base, model, jax.random.key(2))
    adapter = adapter | {"score": whole["score"]}
    expected = forward(model, whole)
    np.testing.assert_array_equal(forward(model, attach(base, adapter, LORA.scale)), expected)
    # A whole network in place of an adapter is itself, whatever it is laid over.
    np.testing.assert_array_equal(forward(model, attach(base, whole, LORA.scale)), expected)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"targets: expected one or more of .*, got \['querry'\]"):
        LoraConfig(rank=2, targets=("querry",))
    gpt2 = random_params(Transformer(ModelConfig.gpt2(**SMALL)))
    with pytest.raises(UserError, match="the model has none of gate"):
        init_adapter(gpt2, LoraConfig(rank=2, targets=("gate",)), jax.random.key(0))
