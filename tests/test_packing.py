"""Episodes in packed rows against the same episodes each in a row of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import PromptBatch, TokenBatch, TrainState
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.packing import find_places, over_rows, pack_episodes, unpack
from rlhf_jax.parallel.mesh import pmap_update
from rlhf_jax.stages import ppo
from rlhf_jax.stages.ppo import Frozen, Networks
from tests.random_params import random_params

pytestmark = pytest.mark.speed

CONFIG = ModelConfig(vocab_size=11, context=16, width=16, layers=1, heads=2, kv_heads=1)
NETWORKS = Networks(Transformer(CONFIG), Transformer(CONFIG, scalar=True))
EOS, PAD = 9, 10


def test_first_fit_decreasing_by_hand() -> None:
    placed = jax.jit(find_places, static_argnames=("row_length", "most_responses"))
    episodes = (np.array([4, 9, 1, 5, 6, 3], np.int32), np.array([1, 2, 1, 2, 3, 1], np.int32))
    # By length: 9 in row 0, 6 in row 1, 5 in row 2 (1 has room for 4), 4 in row 1, 3 in row 2, 1 in row 0.
    places = placed(*episodes, row_length=10, most_responses=4)
    assert places.row_B.tolist() == [1, 0, 0, 2, 1, 2]
    assert places.column_B.tolist() == [6, 0, 9, 0, 0, 5]
    assert places.response_B.tolist() == [3, 0, 2, 0, 0, 2]
    assert places.segment_B.tolist() == [4, 1, 6, 3, 2, 5]
    assert int(places.rows) == 3
    # The same with room for 3 response tokens a row: the 4 no longer fits row 1, nor the 3 row 2 behind it.
    places = placed(*episodes, row_length=10, most_responses=3)
    assert places.row_B.tolist() == [2, 0, 0, 2, 1, 3]
    assert int(places.rows) == 4


def test_rows_by_hand() -> None:
    tokens = np.array([[0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 0, 0], [0, 0, 9, 1, 0, 0]], np.int32)
    mask = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]], bool)
    packed, places = jax.jit(pack_episodes)(tokens, mask, mask[:, 3:], {"id": tokens[:, 3:] * 10})
    # Responses [3 4], [8], [1]: the first two episodes have 4 tokens, the third has room behind the first.
    assert packed.tokens_BT.tolist() == [[1, 2, 3, 4, 9, 1], [5, 6, 7, 8, 0, 0], [0] * 6]
    assert packed.segment_ids_BT.tolist() == [[1, 1, 1, 1, 3, 3], [2, 2, 2, 2, 0, 0], [0] * 6]
    assert packed.targets_BR.tolist() == [[3, 4, 1], [8, 0, 0], [0, 0, 0]]
    assert packed.at_BR.tolist() == [[1, 2, 4], [2, 0, 0], [0, 0, 0]]
    assert packed.response_mask_BR.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert packed.data["id"].tolist() == [[30, 40, 10], [80, 0, 0], [0, 0, 0]]
    assert int(places.rows) == 2
    back = jax.jit(unpack)(packed.data["id"], places, mask[:, 3:])
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


class Iteration:
    """One PPO iteration by two devices with a share of pretraining text; `config.episode` as told."""

    random = np.random.default_rng(0)
    tokens = random.integers(0, 9, (16, 6)).astype(np.int32)
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray(np.arange(6) >= random.integers(0, 6, (16, 1))))
    text = TokenBatch(
        jnp.asarray((np.arange(28, dtype=np.int32) % 11).reshape(4, 7)),
        jnp.ones((4, 7), jnp.int32),
        jnp.ones((4, 7), bool),
    )
    # Large weights, and a narrow clip: responses of all lengths, and ratios that are clipped.
    nets = tuple(
        random_params(network, n, 3.0)
        for n, network in enumerate((NETWORKS.policy, NETWORKS.scorer, NETWORKS.policy, NETWORKS.scorer))
    )

    def __init__(self, **episode: Any) -> None:
        self.config = ppo.Config(
            batch=16,
            minibatches=2,
            epochs=1,
            clip=0.02,
            pretraining_coef=1.0,
            pretraining_batch=4,
            kl_target=0.01,
            kl_horizon=100.0,
            ema_decay=0.9,
            # ε large: where a gradient is 0 but for rounding, Adam would blow the rounding up.
            policy=OptimConfig(learning_rate=0.02, warmup_steps=0, epsilon=1e-3),
            critic=OptimConfig(learning_rate=0.002, warmup_steps=0, epsilon=1e-3),
            devices=2,
            pmap=True,
            episode=EpisodeConfig(response_length=7, **episode),
        )
        update = ppo.make_update(NETWORKS, self.config, eos_id=(EOS, 3), pad_id=PAD, axis_name="data")
        self.step = pmap_update(update, 2)

    def start(self) -> TrainState:
        return ppo.initial_state(self.config, *jax.tree.map(jnp.asarray, self.nets[:2]))

    def __call__(
        self, start: TrainState, reference: Any = nets[2], reward: Any = nets[3]
    ) -> tuple[TrainState, dict[str, float]]:
        """(the state after it, its metrics)"""
        frozen = Frozen(reference, reward, jnp.float32(0.5), jnp.float32(2.0))
        state, metrics = self.step(start, ppo.Batch(self.prompts, self.text), frozen)
        return state, {name: float(x) for name, x in metrics.items()}


@pytest.fixture(scope="module")
def plain() -> tuple[Iteration, TrainState, TrainState, dict[str, float]]:
    """An iteration with a row to each episode, the states before and after it, and its metrics."""
    iteration = Iteration()
    start = iteration.start()
    return iteration, start, *iteration(start)


def test_an_iteration_is_the_same_packed_and_through_slots(plain: tuple) -> None:
    _, start, state, facts = plain
    packed, packed_facts = Iteration(pack=2, slots=3)(start)
    assert 2 < facts["response_tokens"] < 6 and 0 < facts["missing_end"] < 1 and facts["clipped"] > 0
    assert packed_facts == pytest.approx(facts, rel=1e-4, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), packed.params, state.params)


def test_an_iteration_by_pmap(plain: tuple) -> None:
    iteration, start, state, facts = plain
    assert facts["first_ratio_error"] <= 1e-5 and facts["kl"] > 1e-3
    # A policy that is the reference itself.
    assert abs(iteration(start, iteration.nets[0])[1]["kl"]) <= 1e-5
    tokens = facts["response_tokens"] * 16 + np.sum(iteration.prompts.mask_BP)
    assert facts["tokens"] == pytest.approx(float(tokens), rel=1e-5)  # those of both devices
    assert int(state.step) == 1
    # 16 episodes of a horizon of 100, KL far above its target: by 0.2 of that share. The average moves by a tenth.
    assert float(state.extras["kl_coef"]) == pytest.approx(iteration.config.kl_coef * (1 + 0.2 * 16 / 100))
    average = jax.tree.map(lambda a, b: 0.9 * np.asarray(a) + 0.1 * np.asarray(b), start.params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.extras["ema"], average["policy"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_score_that_is_not_finite_in_some_episodes_stops_both_devices(plain: tuple) -> None:
    iteration, start, _, _ = plain
    reward = dict(iteration.nets[3])
    reward["embedding"] = np.array(reward["embedding"])
    reward["embedding"][9] = np.nan
    state, facts = iteration(start, reward=reward)
    # Three of the sixteen episodes have this token; most minibatches of a device have none of them.
    assert facts["nonfinite"] == 3 / 16 and (facts["policy_skipped"], facts["critic_skipped"]) == (1, 1)
    for name in ("params", "opt_state", "extras"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(start, name))


def test_settings_that_do_not_fit_are_refused() -> None:
    episode = EpisodeConfig(pack=3)
    with pytest.raises(UserError, match=r"episode.pack: expected a divisor of the 8 episodes of a minibatch .*, got 3"):
        ppo.Config(batch=16, minibatches=2, episode=episode)
    with pytest.raises(UserError, match=r"episode.slots: expected 0, one device or --pmap .*, got 4 with 2 devices"):
        ppo.Config(batch=16, minibatches=2, devices=2, episode=EpisodeConfig(slots=4))
    with pytest.raises(UserError, match=r"microbatches: expected 1 with episode.pack 4, got 2"):
        ppo.Config(batch=16, minibatches=2, microbatches=2, episode=dataclasses.replace(episode, pack=4))
    with pytest.raises(UserError, match=r"pack: expected .*, got -1"):
        EpisodeConfig(pack=-1)
