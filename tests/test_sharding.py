"""What lies where on a mesh: the table, the states it lays out, what the compiled step moves, going on elsewhere."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.arrays import TokenBatch, TrainState
from rlhf_jax.config import LoraConfig, ModelConfig, OptimConfig, RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.lora import init_adapter
from rlhf_jax.model import Transformer
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.parallel.mesh import jit_update, make_mesh, outline, place, shard_rows, shardings
from rlhf_jax.parallel.sharding import parameter_axes, spec
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.stages import pretrain
from tests.random_params import initialized

pytestmark = pytest.mark.speed

CONFIG = ModelConfig(vocab_size=64, context=16, width=16, layers=3, heads=4, ffn_width=32, tied=False)
OPTIMIZER = make_optimizer(OptimConfig(learning_rate=0.01, warmup_steps=0, epsilon=1e-3), 8)


def new(config: ModelConfig) -> TrainState:
    params = initialized(Transformer(config), jax.random.key(0))
    return new_state(params, OPTIMIZER.init(params), 0)


def batch(seed: int = 0) -> TokenBatch:
    tokens = np.random.default_rng(seed).integers(0, 64, (16, 16), np.int32)
    return TokenBatch(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool))


def test_the_table_by_hand() -> None:
    assert parameter_axes("params.block_0.attention.query.kernel", 2) == ("width", "heads")
    assert parameter_axes("opt_state.1.mu.blocks.ffn.down.kernel", 3) == ("none", "hidden", "width")
    assert parameter_axes("params.unembedding", 2) == ("width", "vocabulary")
    assert parameter_axes("params.block_0.ffn_norm.scale", 1) == ("none",)
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    assert spec(("width", "heads"), (16, 6), sizes) == PartitionSpec(("fsdp",), ("tensor",))
    assert spec(("width", "heads"), (6, 16), sizes) == PartitionSpec(None, ("tensor",))
    assert spec(("batch", "none"), (8, 3), sizes) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("width",), (16,), {"data": 8, "fsdp": 1, "tensor": 1}) == PartitionSpec(None)


def test_every_matrix_its_moments_and_its_adapter_are_cut() -> None:
    mesh = make_mesh(fsdp=4, tensor=2)
    for scan in (False, True):
        config = dataclasses.replace(CONFIG, scan_layers=scan, layers=2 if scan else 1)
        state = jax.eval_shape(functools.partial(new, config))
        adapter = jax.eval_shape(
            lambda params: init_adapter(params, LoraConfig(rank=2), jax.random.key(1)), state.params
        )
        trees = (state.params, state.opt_state, adapter)
        for tree in place(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trees), mesh):
            assert tree
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                if name.endswith(("kernel", "embedding")):
                    assert leaf.addressable_shards[0].data.size == leaf.size // 8, name
                elif name.endswith(("lora_a", "lora_b")):
                    assert leaf.addressable_shards[0].data.size in (leaf.size // 4, leaf.size // 2), name


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """(operation, shapes of its results) of every collective in an HLO text."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\(", line
        )
        if match:
            shapes = [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", match[1])]
            found.append((match[2], shapes))
    return found


def test_the_step_gathers_a_layer_at_a_time_and_never_the_logits() -> None:
    config = dataclasses.replace(CONFIG, layers=2)
    meshes: list[dict[str, int]] = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
    for axes in meshes:
        mesh = make_mesh(**axes)
        state = outline(functools.partial(new, config), mesh)
        step = jax.jit(
            pretrain.make_update(Transformer(config), OPTIMIZER), out_shardings=(shardings(state, mesh), None)
        )
        with jax.set_mesh(mesh):
            text = step.lower(state, shard_rows(batch(), mesh)).compile().as_text()
        gathered = [shapes for name, shapes in collectives(str(text)) if name == "all-gather"]
        assert gathered, axes
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        for shapes in gathered:
            assert sum(int(np.prod(shape)) for shape in shapes) < parameters / 4, (axes, shapes)
            # 15 positions of a row predict; with the vocabulary beside them it would be logits.
            assert not any(15 in shape and 64 in shape for shape in shapes), (axes, shapes)


def test_a_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, layers=1)
    update = pretrain.make_update(Transformer(config), OPTIMIZER)
    shapes, random = jax.eval_shape(functools.partial(new, config)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(scale=0.25, size=leaf.shape).astype(np.float32), shapes.params)
    moments = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.opt_state)

    def fresh_state() -> TrainState:
        return new_state(params, moments, 0)

    def train(state: TrainState, mesh: Any, seeds: range) -> TrainState:
        step, state = jit_update(update, mesh), place(state, mesh)
        for seed in seeds:
            state, _ = step(state, batch(seed))
        return state

    alone = train(fresh_state(), make_mesh(1), range(4))
    half = train(fresh_state(), make_mesh(fsdp=8), range(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, half, {})
    mesh = make_mesh(2, 2, 2)
    resumed = train(checkpoints.restore(place(fresh_state(), mesh)), mesh, range(2, 4))
    kernel = resumed.params["block_0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone.params, resumed.params)
    assert int(resumed.step) == 4


def test_a_mesh_is_read_and_checked() -> None:
    def config(**settings: Any) -> RunConfig:
        return RunConfig(**({"batch": 16, "steps": 1} | settings))

    assert config(mesh="data=2, fsdp=4").mesh_shape == {"data": 2, "fsdp": 4, "tensor": 1}
    assert config(devices=4).mesh_shape == {"data": 4, "fsdp": 1, "tensor": 1}
    for mesh in ("fsdp", "fsdp=0", "depth=2", "fsdp=2,fsdp=4"):
        with pytest.raises(UserError, match=f"mesh: expected .*, got '{mesh}'"):
            config(mesh=mesh).mesh_shape  # noqa: B018
    with pytest.raises(UserError, match="batch 16 is not divisible by devices 6"):
        config(mesh="data=3,fsdp=2,tensor=2")
    with pytest.raises(UserError, match="pmap: expected a mesh with the axis data only, got"):
        config(mesh="fsdp=2", pmap=True)
    with pytest.raises(UserError, match=r"devices: expected 1 with mesh .*, got 2"):
        config(mesh="fsdp=2", devices=2)
