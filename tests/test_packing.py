"""Episodes in packed rows against the same episodes each in a row of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import PromptBatch
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.packing import find_places, over_rows, pack_episodes, unpack
from rlhf_jax.parallel.mesh import pmap_update
from rlhf_jax.stages import ppo
from rlhf_jax.stages.rollout import Frozen, Networks

CONFIG = ModelConfig(vocab_size=11, context=16, width=16, layers=1, heads=2, kv_heads=1)
NETWORKS = Networks(Transformer(CONFIG), Transformer(CONFIG, scalar=True))
EOS, PAD = 9, 10


def test_first_fit_decreasing_by_hand() -> None:
    # By length: 9 in row 0, 6 in row 1, 5 in row 2 (1 has room for 4), 4 in row 1, 3 in row 2, 1 in row 0.
    places = find_places(jnp.array([4, 9, 1, 5, 6, 3]), jnp.array([1, 2, 1, 2, 3, 1]), row_length=10, most_responses=4)
    assert places.row_B.tolist() == [1, 0, 0, 2, 1, 2]
    assert places.column_B.tolist() == [6, 0, 9, 0, 0, 5]
    assert places.response_B.tolist() == [3, 0, 2, 0, 0, 2]
    assert places.segment_B.tolist() == [4, 1, 6, 3, 2, 5]
    assert int(places.rows) == 3
    # The same with room for 3 response tokens a row: the 4 no longer fits row 1, nor the 3 row 2 behind it.
    places = find_places(jnp.array([4, 9, 1, 5, 6, 3]), jnp.array([1, 2, 1, 2, 3, 1]), row_length=10, most_responses=3)
    assert places.row_B.tolist() == [2, 0, 0, 2, 1, 3]
    assert int(places.rows) == 4


def test_rows_by_hand() -> None:
    tokens = jnp.array([[0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 0, 0], [0, 0, 9, 1, 0, 0]])
    mask = jnp.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]], bool)
    packed, places = pack_episodes(tokens, mask, mask[:, 3:], {"id": tokens[:, 3:] * 10})
    # Responses [3 4], [8], [1]: the first two episodes have 4 tokens, the third has room behind the first.
    assert packed.tokens_BT.tolist() == [[1, 2, 3, 4, 9, 1], [5, 6, 7, 8, 0, 0], [0] * 6]
    assert packed.segment_ids_BT.tolist() == [[1, 1, 1, 1, 3, 3], [2, 2, 2, 2, 0, 0], [0] * 6]
    assert packed.targets_BR.tolist() == [[3, 4, 1], [8, 0, 0], [0, 0, 0]]
    assert packed.at_BR.tolist() == [[1, 2, 4], [2, 0, 0], [0, 0, 0]]
    assert packed.response_mask_BR.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert packed.data["id"].tolist() == [[30, 40, 10], [80, 0, 0], [0, 0, 0]]
    assert int(places.rows) == 2
    back = unpack(packed.data["id"], places, mask[:, 3:])
    np.testing.assert_array_equal(back, np.where(mask[:, 3:], tokens[:, 3:] * 10, 0))


def test_a_loop_over_rows_computes_those_in_use() -> None:
    computed: list[int] = []

    def double(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: computed.append(len(x)))
        return 2 * x

    out = jax.jit(lambda x, rows: over_rows(double, x, rows, 2))(jnp.arange(1.0, 9.0), jnp.int32(5))
    jax.effects_barrier()
    assert out.tolist() == [2, 4, 6, 8, 10, 12, 0, 0]
    assert computed == [2, 2, 2]


def iteration(**episode: Any) -> tuple[Any, dict[str, float]]:
    """The state after one PPO iteration by two devices, and its metrics."""
    config = ppo.Config(
        batch=16,
        minibatches=2,
        epochs=1,
        clip=0.02,
        # ε large: where a gradient is 0 but for rounding, Adam would blow the rounding up.
        policy=OptimConfig(learning_rate=0.02, warmup_steps=0, epsilon=1e-3),
        critic=OptimConfig(learning_rate=0.002, warmup_steps=0, epsilon=1e-3),
        devices=2,
        pmap=True,
        episode=EpisodeConfig(response_length=7, **episode),
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, 9, (16, 6), np.int32)
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray(np.arange(6) >= random.integers(0, 6, (16, 1))))
    # Large weights, and a narrow clip: responses of all lengths, and ratios that are clipped.
    nets = [
        jax.tree.map(lambda x: 3 * x, init_params(network, jax.random.key(n)))
        for n, network in enumerate((NETWORKS.policy, NETWORKS.scorer, NETWORKS.policy, NETWORKS.scorer))
    ]
    frozen = Frozen(nets[2], nets[3], jnp.float32(0.5), jnp.float32(2.0))
    step = pmap_update(ppo.make_update(NETWORKS, config, eos_id=(EOS, 3), pad_id=PAD, axis_name="data"), 2)
    state, metrics = step(ppo.initial_state(config, *nets[:2]), ppo.Batch(prompts, None), frozen)
    return jax.tree.map(np.asarray, state.params), {name: float(x) for name, x in metrics.items()}


def test_an_iteration_is_the_same_packed_and_through_slots() -> None:
    plain, facts = iteration()
    packed, packed_facts = iteration(pack=2, slots=3)
    assert 2 < facts["response_tokens"] < 6 and 0 < facts["missing_end"] < 1 and facts["clipped"] > 0
    assert packed_facts == pytest.approx(facts, rel=1e-4, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), packed, plain)


def test_settings_that_do_not_fit_are_refused() -> None:
    episode = EpisodeConfig(pack=3)
    with pytest.raises(UserError, match=r"episode.pack: found 3, wanted a divisor of the 8 episodes of a minibatch"):
        ppo.Config(batch=16, minibatches=2, episode=episode)
    with pytest.raises(UserError, match=r"episode.slots: found 4 with 2 devices, wanted 0, one device or --pmap"):
        ppo.Config(batch=16, minibatches=2, devices=2, episode=EpisodeConfig(slots=4))
    with pytest.raises(UserError, match=r"microbatches: found 2 with episode.pack 4, wanted 1"):
        ppo.Config(batch=16, minibatches=2, microbatches=2, episode=dataclasses.replace(episode, pack=4))
    with pytest.raises(UserError, match=r"pack: found -1, wanted"):
        EpisodeConfig(pack=-1)
