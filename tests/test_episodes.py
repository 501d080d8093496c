"""PPO's rollout and iteration: where the score is read, what it becomes, and what one iteration changes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import PromptBatch, Rollout, TokenBatch
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import last_token_scores, response_losses
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.parallel.mesh import copied, jit_update, make_mesh, place
from rlhf_jax.rewards import Terms
from rlhf_jax.stages import ppo
from rlhf_jax.stages.ppo import Frozen, Networks, attach_frozen, make_rollout, sample, score
from tests.cases import case
from tests.random_params import random_params

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("each_key_once")]

CONFIG = ModelConfig(vocab_size=11, context=12, width=12, layers=1, heads=2, ffn_width=16)
NETWORKS = Networks(Transformer(CONFIG), Transformer(CONFIG, scalar=True))
TEACHER = Transformer(dataclasses.replace(CONFIG, width=20, layers=2))
EOS, PAD, ROWS, LENGTH = 8, 10, 16, 6
PROMPTS = PromptBatch(
    jnp.asarray(np.random.default_rng(0).integers(0, 8, (ROWS, 5), np.int32)),
    jnp.asarray(np.arange(5) >= (np.arange(ROWS) % 5)[:, None]),
)
SETTINGS = ppo.Config(
    batch=ROWS,
    minibatches=2,
    epochs=3,
    microbatches=2,
    kl_coef=0.5,
    kl_target=0.01,
    kl_horizon=100.0,
    ema_decay=0.9,
    pretraining_coef=2.0,
    pretraining_batch=8,
    policy=OptimConfig(learning_rate=0.02, warmup_steps=0),
    critic=OptimConfig(learning_rate=0.02, warmup_steps=0),
    episode=EpisodeConfig(response_length=LENGTH, missing_end_score=-1.5),
)
TEXT = TokenBatch(jnp.arange(56).reshape(8, 7) % 11, jnp.ones((8, 7), jnp.int32), jnp.ones((8, 7), bool))
BATCH = ppo.Batch(PROMPTS, TEXT)
# Of a reward function, which does not apply to the third row.
FOUND = np.where(np.arange(LENGTH) % 2 == 0, 4.0, 1 / 3)[None]
VALUES = np.where(np.arange(ROWS) == 2, np.nan, np.arange(ROWS))[:, None].astype(np.float32)


@pytest.fixture(scope="module")
def networks_params() -> tuple[dict, Frozen]:
    """(policy and critic, frozen reference and reward model); the policy is the reference, scaled up."""
    language, reward, critic = (
        random_params(NETWORKS.policy, 7, 2.0),
        random_params(NETWORKS.scorer, 1),
        random_params(NETWORKS.scorer, 2),
    )
    frozen = Frozen(language, reward, jnp.float32(0.25), jnp.float32(0.5))
    return {"policy": language, "critic": critic}, frozen


def taught_params() -> Any:
    return jax.tree.map(jnp.asarray, random_params(TEACHER, 4))


@functools.cache
def collector() -> Any:
    """One program: an episode for each prompt, scored with each way to treat a missing end, and in four parts."""
    config = EpisodeConfig(response_length=LENGTH, missing_end="keep", missing_end_score=-1.5)

    def run(params: dict, frozen: Frozen, key: jax.Array, kl_coef: jax.Array) -> Any:
        ids: dict[str, Any] = {"eos_id": EOS, "pad_id": PAD}
        sampled = sample(NETWORKS.policy, params["policy"], PROMPTS, key, config, **ids)

        def scored(
            missing_end: Any,
            parts: int = 1,
            frozen: Frozen = frozen,
            sampled: Any = sampled,
            networks: Networks = NETWORKS,
            **terms: Any,
        ) -> Any:
            settings = dataclasses.replace(config, missing_end=missing_end)
            rest: dict[str, Any] = {"eos_id": EOS, "parts": parts, **terms}
            return score(networks, params, frozen, PROMPTS, sampled, kl_coef, settings, **rest)

        # The teacher has all of its parameters, also where the others are adapters.
        backbones = dataclasses.replace(frozen, reference=taught_params(), backbone=params["policy"])
        judge: Any = frozen.reward
        empty = dataclasses.replace(backbones, reward={"score": judge["score"]}, scorer_backbone=judge)
        taught = attach_frozen(empty, 1.0, teacher=True)
        ways: tuple[Any, ...] = ("keep", "replace", "subtract")
        with_model: dict[str, Any] = {"terms": Terms(("model", "f"), (2.0, 3.0)), "value_BN": VALUES}
        alone: dict[str, Any] = {"terms": Terms(("f",), (3.0,)), "value_BN": VALUES}
        return {way: scored(way) for way in ways} | {
            "in parts": scored("keep", 4),
            "composed": scored("subtract", **with_model),
            # In even slots the sampler's policy found the token 4 times as likely, in odd ones a third as likely.
            "of another policy": scored(
                "keep", sampled=sampled._replace(logp=sampled.logp + jnp.log(jnp.asarray(FOUND))), importance_max=2.0
            ),
            "taught": scored("keep", frozen=taught, networks=NETWORKS._replace(teacher=TEACHER)),
            "function": scored("replace", frozen=dataclasses.replace(frozen, reward=None), **alone),
        }

    return jax.jit(run)


def rolled(networks_params: tuple, way: str = "keep") -> tuple:
    """(rollout, metrics)"""
    return all_rolled(networks_params)[way]


def all_rolled(networks_params: tuple) -> dict[str, tuple]:
    return jax.tree.map(np.asarray, collector()(*networks_params, jax.random.key(5), jnp.float32(0.5)))


def test_the_score_is_read_at_the_last_real_token() -> None:
    # A network by hand: nothing is mixed between tokens, token i is the i-th unit vector, which RMSNorm makes √12
    # long, and the head gives i/√12 for it. So the score of a row is the id of the token that it is read at.
    shapes = jax.eval_shape(lambda: init_params(NETWORKS.scorer, jax.random.key(0)))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params["embedding"] = np.eye(11, 12, dtype=np.float32)
    params["final_norm"]["scale"] = np.ones(12, np.float32)
    params["score"]["kernel"] = np.arange(12, dtype=np.float32)[:, None] / np.float32(np.sqrt(12))
    tokens = np.array(
        [[9, 1, 2, 3, 4, 5], [9, 9, 2, 7, 10, 10], [9, 9, 9, 8, 10, 10], [6, 10, 10, 10, 10, 10], [1] * 6], np.int32
    )
    mask = np.array([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6], bool)
    read = jax.jit(lambda params, tokens: last_token_scores(NETWORKS.scorer, params, tokens, jnp.asarray(mask)))
    np.testing.assert_allclose(read(params, tokens), [5, 7, 8, 6, 0], rtol=1e-4)
    np.testing.assert_allclose(read(params, np.where(mask, tokens, 3)), [5, 7, 8, 6, 0], rtol=1e-4)


def test_a_score_is_that_of_prompt_and_response_alone(networks_params: tuple) -> None:
    rollout, _ = rolled(networks_params)
    _, frozen = networks_params
    rows = (3, 6)  # left-padded by 3 and by 1
    lengths = [int(rollout.mask_BT[row].sum()) for row in rows]
    # What stands behind a token changes nothing for it: one program for both lengths.
    alone = np.full((2, rollout.tokens_BT.shape[1]), PAD, np.int32)
    for i, row in enumerate(rows):
        alone[i, : lengths[i]] = rollout.tokens_BT[row][rollout.mask_BT[row]]
    raw = np.asarray(jax.jit(NETWORKS.scorer.apply)({"params": frozen.reward}, alone))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(rollout.score_B[row], (raw[i, lengths[i] - 1] - 0.25) / 0.5, atol=1e-4)


def test_a_missing_end_is_penalised_as_named(networks_params: tuple) -> None:
    kept, metrics = rolled(networks_params)
    ended = np.any((kept.tokens_BT[:, 5:] == EOS) & kept.response_mask_BR, axis=1)
    assert 2 < ended.sum() < ROWS - 2 and metrics["missing_end"] == pytest.approx(1 - ended.mean())
    replaced, _ = rolled(networks_params, "replace")
    np.testing.assert_allclose(replaced.score_B, np.where(ended, kept.score_B, -1.5), atol=1e-6)
    subtracted, _ = rolled(networks_params, "subtract")
    np.testing.assert_allclose(subtracted.score_B, kept.score_B - 1.5 * ~ended, atol=1e-6)
    # In the unit of normalized scores, whatever a published reward model's own are: -1.5 is no gift beside -20.
    params, frozen = networks_params
    raw = kept.score_B * 0.5 + 0.25
    for factor, shift in ((3.0, -20.0), (100.0, 1000.0), (0.01, 0.5)):
        head = {name: factor * leaf for name, leaf in frozen.reward["score"].items()}
        reward = frozen.reward | {"score": head | {"bias": head["bias"] + shift}}
        own = factor * raw + shift
        published = dataclasses.replace(
            frozen, reward=reward, score_mean=jnp.float32(own.mean()), score_scale=jnp.float32(own.std())
        )
        wanted = (own - own.mean()) / own.std()
        for way, without_end in (("keep", wanted), ("replace", -1.5), ("subtract", wanted - 1.5)):
            with case((factor, shift, way)):
                found, _ = rolled((params, published), way)
                np.testing.assert_allclose(found.score_B, np.where(ended, wanted, without_end), atol=2e-3)


def test_a_composed_score_is_that_of_its_row(networks_params: tuple) -> None:
    (kept, _), (composed, metrics) = (rolled(networks_params, way) for way in ("keep", "composed"))
    ended = (kept.tokens_BT[:, 5:] == EOS).any(axis=1) & kept.response_mask_BR.any(axis=1)
    added = np.where(np.isnan(VALUES[:, 0]), 0.0, 3 * VALUES[:, 0])
    assert 0 < ended.sum() < ROWS
    np.testing.assert_allclose(composed.score_B, 2 * kept.score_B + added - np.where(ended, 0, 1.5), rtol=1e-5)
    assert metrics["reward/model"] == pytest.approx(kept.score_B.mean(), rel=1e-5)
    assert metrics["reward/f"] == pytest.approx(np.nanmean(VALUES))
    function, metrics = rolled(networks_params, "function")
    np.testing.assert_allclose(function.score_B, np.where(ended, added, -1.5), rtol=1e-6)
    assert "reward/model" not in metrics


def test_a_rollout_of_the_reference_itself(networks_params: tuple) -> None:
    rollout, metrics = rolled(networks_params)
    mask = rollout.response_mask_BR
    np.testing.assert_allclose(rollout.logp_BR, rollout.ref_logp_BR, atol=1e-5)
    assert abs(metrics["kl"]) <= 1e-5 and metrics["sampler_logp_error"] <= 1e-5
    assert metrics["reward"] == pytest.approx(rollout.score_B.mean(), abs=1e-5)
    assert metrics["response_tokens"] == pytest.approx(mask.sum() / ROWS)
    assert np.all(rollout.tokens_BT[:, 5:][~mask] == PAD)
    np.testing.assert_array_equal(rollout.mask_BT, np.concatenate([np.asarray(PROMPTS.mask_BP), mask], axis=1))


def test_a_rounded_cache_moves_the_sampler_and_not_the_rollout(networks_params: tuple) -> None:
    config = EpisodeConfig(response_length=LENGTH, missing_end="keep", cache_dtype="int8", segments=2)

    @jax.jit
    def both(params: dict, frozen: Frozen, key: jax.Array) -> Any:
        beta = jnp.float32(0.5)
        rollout, metrics = make_rollout(NETWORKS, config, eos_id=EOS, pad_id=PAD)(params, frozen, PROMPTS, key, beta)
        rows, _ = ppo.episode_rows(rollout, packed=False)
        return rollout, metrics, response_losses(NETWORKS.policy, params["policy"], rows, temperature=1.0)[0]

    rollout, metrics, loss_BR = jax.tree.map(np.asarray, both(*networks_params, jax.random.key(5)))
    # The sampler is off by what its metric says; what it sampled is scored by the policy itself, as the reference is.
    assert 1e-4 < metrics["sampler_logp_error"] < 0.05
    np.testing.assert_allclose(rollout.logp_BR, rollout.ref_logp_BR, atol=1e-5)
    mask = rollout.response_mask_BR
    np.testing.assert_allclose(rollout.logp_BR[mask], -loss_BR[mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="segments: expected 1 with slots 4, got 2; use one of the two"):
        EpisodeConfig(segments=2, slots=4)


def test_the_advantage_is_whitened_and_the_target_is_not(networks_params: tuple) -> None:
    rollout, _ = rolled(networks_params)
    mask = rollout.response_mask_BR
    kept = rollout.advantage_BR[mask]
    assert abs(kept.mean()) < 1e-5 and kept.var() == pytest.approx(1, abs=1e-4)
    assert np.all(rollout.advantage_BR[~mask] == 0)
    # Without a KL the only reward is the score at the end, where A = score - value: the target is it.
    last = mask.sum(axis=1) - 1
    np.testing.assert_allclose(rollout.target_BR[np.arange(ROWS), last], rollout.score_B, atol=1e-4)
    raw = (rollout.target_BR - rollout.value_BR)[mask]
    np.testing.assert_allclose(kept, (raw - raw.mean()) / raw.std(), atol=1e-4)


def test_responses_of_another_policy_have_weights(networks_params: tuple) -> None:
    found = all_rolled(networks_params)
    (here, _), (other, metrics) = found["keep"], found["of another policy"]
    weights = np.broadcast_to(np.minimum(1 / FOUND, 2.0), here.advantage_BR.shape)
    np.testing.assert_allclose(other.advantage_BR, weights * here.advantage_BR, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(other.target_BR, here.target_BR)
    assert metrics["importance_weight"] == pytest.approx(weights[here.response_mask_BR].mean(), rel=1e-4)
    assert metrics["kl"] == found["keep"][1]["kl"]


def test_a_teacher_of_another_architecture_is_the_reference(networks_params: tuple) -> None:
    found = all_rolled(networks_params)
    (rollout, metrics), (keep, _) = found["taught"], found["keep"]
    rows, _ = ppo.episode_rows(rollout, packed=False)
    loss_BR, _ = jax.jit(lambda rows: response_losses(TEACHER, taught_params(), rows, temperature=1.0))(rows)
    mask = rollout.response_mask_BR
    np.testing.assert_allclose(rollout.ref_logp_BR[mask], -np.asarray(loss_BR)[mask], rtol=1e-5, atol=1e-5)
    kl = (rollout.logp_BR - rollout.ref_logp_BR)[mask].sum() / ROWS
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.1
    for field in ("logp_BR", "value_BR", "score_B"):
        np.testing.assert_allclose(vars(rollout)[field], vars(keep)[field], rtol=1e-5, atol=1e-5)


def test_a_policy_that_moved_pays_for_it(networks_params: tuple) -> None:
    params, frozen = networks_params
    moved = params | {"policy": jax.tree.map(lambda x: 1.3 * x, params["policy"])}
    rollout, metrics = rolled((moved, frozen))
    kl = (rollout.logp_BR - rollout.ref_logp_BR)[rollout.response_mask_BR].sum() / ROWS
    assert kl > 0.05 and metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["reward"] == pytest.approx(rollout.score_B.mean() - 0.5 * kl, abs=1e-4)


def test_episodes_scored_in_parts_are_the_same(networks_params: tuple) -> None:
    found = all_rolled(networks_params)
    whole, parts = found["keep"][0], found["in parts"][0]
    np.testing.assert_array_equal(whole.tokens_BT, parts.tokens_BT)
    values = np.unique(np.round(whole.value_BR[:, 0], 4))
    assert len(values) > ROWS // 2  # rows differ, so that order is seen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def test_estimators_compare_the_responses_to_a_prompt(networks_params: tuple) -> None:
    params, frozen = networks_params
    moved = {"policy": jax.tree.map(lambda x: 1.3 * x, params["policy"])}  # no value network
    prompts = jax.tree.map(lambda x: x[:4], PROMPTS)
    config = EpisodeConfig(response_length=LENGTH, missing_end="keep")
    names = ("rloo", "grpo", "dr_grpo", "reinforce_pp", "remax")

    @jax.jit
    def run(params: dict, frozen: Frozen, key: jax.Array) -> Any:
        sampled = sample(
            *(NETWORKS.policy, params["policy"], prompts, key, config),
            **{"eos_id": EOS, "pad_id": PAD, "samples": 4, "greedy_first": True},
        )
        arguments = (NETWORKS, params, frozen, prompts, sampled, jnp.float32(0.5), config)
        # A term of weight 0, whose value is the number of its row.
        settings = {"terms": Terms(("model", "row"), (1.0, 0.0)), "value_BN": jnp.arange(1.0 * ROWS)[:, None]}
        every = {name: score(*arguments, eos_id=EOS, estimator=name, samples=4, **settings) for name in names}
        tokens_BT, mask_BT = every["rloo"][0].tokens_BT, every["rloo"][0].mask_BT
        return every, NETWORKS.policy.apply({"params": params["policy"]}, tokens_BT, mask_BT)

    every, logits = jax.tree.map(np.asarray, run(moved, frozen, jax.random.key(5)))
    rollout = every["rloo"][0]
    mask, first = rollout.response_mask_BR, np.arange(ROWS) % 4 == 0
    np.testing.assert_array_equal(rollout.tokens_BT[:, :5], np.repeat(np.asarray(prompts.tokens_BP), 4, axis=0))
    greedy = logits[:, 4:-1].argmax(axis=2) == rollout.tokens_BT[:, 5:]
    assert greedy[first][mask[first]].all() and not greedy[~first][mask[~first]].all()
    assert len({tuple(row) for row in rollout.tokens_BT[~first]}) > 8  # the others differ
    token = np.where(mask, -0.5 * (rollout.logp_BR - rollout.ref_logp_BR), 0)
    token[np.arange(ROWS), mask.sum(axis=1) - 1] += rollout.score_B
    groups = token.sum(axis=1).reshape(4, 4)
    mean = groups.mean(axis=1, keepdims=True)
    to_go = token[:, ::-1].cumsum(axis=1)[:, ::-1]
    flat = to_go[mask]
    expected = {
        "rloo": (groups - mean) * 4 / 3,
        "grpo": (groups - mean) / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4),
        "dr_grpo": groups - mean,
        "remax": groups - groups[:, :1],
    }
    for name, (found, metrics) in every.items():
        learned = mask & ~first[:, None] if name == "remax" else mask
        np.testing.assert_array_equal(found.response_mask_BR, learned)
        assert "value" not in metrics and metrics["nonfinite"] == 0
        counted = ~first if name == "remax" else np.ones(ROWS, bool)
        assert metrics["score"] == pytest.approx(rollout.score_B[counted].mean(), rel=1e-5)
        assert metrics["reward/model"] == pytest.approx(metrics["score"], rel=1e-5)
        assert metrics["reward/row"] == pytest.approx(np.arange(ROWS)[counted].mean())
        # One response to each prompt, which is not the greedy one of remax.
        one = slice(int(name == "remax"), None, 4)
        texts = [tuple(row) for row in np.where(mask, rollout.tokens_BT[:, 5:], -1)[one].tolist()]
        assert metrics["same_answer"] == max(map(texts.count, texts)) / 4, name
        if name == "reinforce_pp":
            wanted = (to_go - flat.mean()) / flat.std()
        else:
            wanted = np.repeat(expected[name].reshape(-1, 1), LENGTH, axis=1)
        np.testing.assert_allclose(found.advantage_BR[learned], wanted[learned], atol=2e-4, err_msg=name)


def test_policy_losses_and_their_reductions(networks_params: tuple) -> None:
    draws = np.random.default_rng(0)
    lengths = draws.integers(0, LENGTH + 1, ROWS)
    mask = np.arange(LENGTH) < lengths[:, None]
    off, advantage, ref = draws.normal(0, 0.4, (3, ROWS, LENGTH)).astype(np.float32)
    tokens = draws.integers(0, 8, (ROWS, 5 + LENGTH), np.int32)
    policy = {"policy": networks_params[0]["policy"]}
    settings: dict[str, dict[str, Any]] = {
        "token": {},
        "sequence": {"reduction": "sequence"},
        "constant": {"reduction": "constant"},
        "gspo": {"policy_loss": "gspo"},
        "cispo": {"policy_loss": "cispo", "clip_high": 0.3},
        "higher": {"clip_high": 0.3, "dual_clip": 1.5},
        "kl": {"kl_in": "loss", "reduction": "sequence"},
    }
    given: dict[str, Any] = {"batch": ROWS, "estimator": "reinforce_pp"}

    @jax.jit
    def run(policy: dict) -> Any:
        full_mask = jnp.concatenate([PROMPTS.mask_BP, jnp.asarray(mask)], axis=1)
        zeros = jnp.zeros(mask.shape)
        blank = Rollout(tokens, full_mask, mask, zeros, zeros, zeros, advantage, zeros, jnp.zeros(ROWS))
        loss_BR, _ = response_losses(
            NETWORKS.policy, policy["policy"], ppo.episode_rows(blank, packed=False)[0], temperature=1.0
        )
        logp_BR = jax.lax.stop_gradient(-loss_BR)
        part = dataclasses.replace(blank, logp_BR=logp_BR - off, ref_logp_BR=logp_BR - ref)
        found = {}
        for name, each in settings.items():
            for packed in (False, True) if name in ("sequence", "kl") else (False,):
                config = ppo.Config(**(given | each))
                rows, _ = ppo.episode_rows(
                    part, packed=packed, reduction=config.policy_reduction, with_reference=config.kl_in == "loss"
                )
                count, responses = int(mask.sum()), int((lengths > 0).sum())
                found[name, packed] = ppo.objective(
                    NETWORKS, policy, rows, jnp.asarray(count), config, responses=jnp.asarray(responses), kl_coef=0.3
                )
        return logp_BR, found

    logp, found = jax.tree.map(np.asarray, run(policy))
    ratio = np.exp(off)
    sequence = np.exp(np.sum(off * mask, axis=1, keepdims=True) / np.maximum(lengths, 1)[:, None]) * np.ones_like(off)

    def clipped(ratio: np.ndarray, high: float = 0.2) -> np.ndarray:
        return np.maximum(-ratio * advantage, -np.clip(ratio, 0.8, 1 + high) * advantage)

    higher = clipped(ratio, 0.3)
    weight = mask / np.maximum(lengths, 1)[:, None] / (lengths > 0).sum()
    expected = {
        "token": (clipped(ratio) * mask).sum() / mask.sum(),
        "sequence": (clipped(ratio) * weight).sum(),
        "constant": (clipped(ratio) * mask).sum() / (lengths > 0).sum() / LENGTH,
        "gspo": (clipped(sequence) * weight).sum(),
        "cispo": (-np.minimum(ratio, 1.3) * advantage * np.where(mask, logp, 0) * mask).sum() / mask.sum(),
        "higher": (np.where(advantage < 0, np.minimum(higher, -1.5 * advantage), higher) * mask).sum() / mask.sum(),
        "kl": ((clipped(ratio) + 0.3 * (np.exp(-ref) - 1 + ref)) * weight).sum(),
    }
    for (name, packed), (loss, metrics) in found.items():
        with case((name, packed)):
            assert loss == pytest.approx(expected[name], abs=2e-6)
            assert set(metrics) == {"policy_loss", "clipped", "ratio_error"}
    high = found["higher", False][1]["clipped"]
    assert high == pytest.approx((((ratio > 1.3) | (ratio < 0.8)) & mask).sum() / mask.sum(), abs=1e-6)


@functools.cache
def compiled_update() -> Any:
    return jit_update(ppo.make_update(NETWORKS, SETTINGS, eos_id=EOS, pad_id=PAD), make_mesh(1))


def kept(state: Any) -> dict:
    return {name: jax.tree.map(np.array, getattr(state, name)) for name in ("step", "params", "opt_state", "extras")}


@pytest.fixture(scope="module")
def iterations(networks_params: tuple) -> list:
    """[(state before, state after, metrics)] of two iterations, and of the first once more."""
    params, frozen = networks_params
    mesh, step = make_mesh(1), compiled_update()
    fresh = place(ppo.initial_state(SETTINGS, *jax.tree.map(jnp.asarray, (params["policy"], params["critic"]))), mesh)

    def start() -> Any:
        return copied(fresh, mesh)

    history, state = [], start()
    for again in (False, False, True):
        state = start() if again else state
        before = kept(state)
        state, metrics = step(state, BATCH, frozen)
        history.append((before, kept(state), {name: float(value) for name, value in metrics.items()}))
    return history


def test_before_the_first_update_nothing_has_moved(iterations: list) -> None:
    _, _, metrics = iterations[0]
    assert metrics["first_ratio_error"] <= 1e-5 and abs(metrics["kl"]) <= 1e-5
    _, _, later = iterations[1]
    assert later["first_ratio_error"] <= 1e-5 and later["kl"] > 1e-3
    assert metrics["ratio_error"] > 1e-3  # the mean over epochs, in which it moves


def test_an_iteration_takes_epochs_times_minibatches_steps(iterations: list) -> None:
    for number, (_, after, _) in enumerate(iterations[:2], 1):
        assert int(after["step"]) == number
        for name in ("policy", "critic"):
            adam = next(part for part in after["opt_state"][name] if hasattr(part, "mu"))
            assert int(adam.count) == number * SETTINGS.epochs * SETTINGS.minibatches


def test_the_coefficient_adapts(iterations: list) -> None:
    # 16 episodes of a horizon of 100. First KL 0 of 0.01: as far below as counts, -0.2. Then far above: 0.2.
    assert iterations[0][2]["kl_coef"] == 0.5
    first, second = (float(after["extras"]["kl_coef"]) for _, after, _ in iterations[:2])
    assert first == pytest.approx(0.5 * (1 - 0.2 * 0.16), rel=1e-6)
    assert iterations[1][2]["kl"] > 0.012 and second == pytest.approx(first * (1 + 0.2 * 0.16), rel=1e-6)


def test_the_moving_average_follows_the_policy(iterations: list) -> None:
    for before, after, _ in iterations[:2]:
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before["extras"]["ema"], after["params"]["policy"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after["extras"]["ema"], expected)
        moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["params"], after["params"])
        assert min(jax.tree.leaves(moves)) > 1e-4


def test_an_iteration_with_a_number_that_is_not_finite_changes_nothing(
    iterations: list, networks_params: tuple
) -> None:
    # Parameters, Adam, β and moving average. A row of NaN in an embedding reaches the episodes with its token.
    params, frozen = networks_params
    before = iterations[0][1]

    def damaged(network: dict, value: float) -> dict:
        embedding = np.array(network["embedding"])
        embedding[EOS] = value
        return network | {"embedding": embedding}

    def run(frozen: Frozen, batch: ppo.Batch = BATCH, **networks: dict) -> tuple[dict, dict, dict]:
        start = ppo.initial_state(SETTINGS, *jax.tree.map(jnp.asarray, (params["policy"], params["critic"])))
        start = dataclasses.replace(start, **jax.tree.map(jnp.asarray, before))
        start = copied(place(dataclasses.replace(start, params=start.params | networks), make_mesh(1)), make_mesh(1))
        was = kept(start)
        after, metrics = compiled_update()(start, batch, frozen)
        return was, kept(after), {name: float(value) for name, value in metrics.items()}

    critic = damaged(before["params"]["critic"], np.nan)
    cases: tuple[tuple[str, Frozen, dict], ...] = (
        ("score", dataclasses.replace(frozen, reward=damaged(frozen.reward, np.nan)), {}),
        ("score", dataclasses.replace(frozen, score_scale=jnp.float32(0.0)), {}),
        ("score", dataclasses.replace(frozen, reward=damaged(frozen.reward, np.inf)), {}),
        ("score", dataclasses.replace(frozen, score_mean=jnp.float32(-np.inf)), {}),
        ("kl", dataclasses.replace(frozen, reference=damaged(frozen.reference, np.nan)), {}),
        ("kl", dataclasses.replace(frozen, reference=damaged(frozen.reference, np.inf)), {}),
        ("value", frozen, {"critic": jax.tree.map(jnp.asarray, critic)}),
    )
    for name, nets, networks in cases:
        with case(name):
            was, after, metrics = run(nets, **networks)
            assert not np.isfinite(metrics[name]) and metrics["nonfinite"] > 0
            assert (metrics["policy_skipped"], metrics["critic_skipped"]) == (1, 1)
            assert int(after.pop("step")) == int(was.pop("step")) + 1
            jax.tree.map(np.testing.assert_array_equal, after, was)
    # A loss of the mix that is NaN, with a gradient that need not be: the other minibatch of each epoch makes its step.
    tokens = np.array(TEXT.tokens_BT)
    tokens[0, -1] = 99
    was, after, metrics = run(frozen, ppo.Batch(PROMPTS, dataclasses.replace(TEXT, tokens_BT=jnp.asarray(tokens))))
    assert (metrics["policy_skipped"], metrics["critic_skipped"], metrics["nonfinite"]) == (0.5, 0.5, 0)
    assert np.isnan(metrics["pretraining_loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    adam = next(part for part in after["opt_state"]["policy"] if hasattr(part, "mu"))
    assert int(adam.count) == (1 + 0.5) * SETTINGS.epochs * SETTINGS.minibatches
    assert after["extras"]["kl_coef"] != was["extras"]["kl_coef"]


def test_the_frozen_networks_stay(iterations: list, networks_params: tuple) -> None:
    before, frozen = iterations[0][0], networks_params[1]
    jax.tree.map(np.testing.assert_array_equal, frozen.reference, before["params"]["policy"])
    jax.tree.map(np.testing.assert_array_equal, frozen.reward, random_params(NETWORKS.scorer, 1))


def test_the_mix_is_reported_beside_ppo(iterations: list) -> None:
    for _, _, metrics in iterations:
        assert metrics["ppo_norm"] > 0 and metrics["pretraining_norm"] > 0
        assert metrics["ppo_over_pretraining"] == pytest.approx(
            metrics["ppo_norm"] / metrics["pretraining_norm"], rel=1e-5
        )
        assert 0.5 < metrics["pretraining_loss"] < 20


def test_the_same_state_gives_the_same_bits(iterations: list) -> None:
    jax.tree.map(np.testing.assert_array_equal, iterations[0][1], iterations[2][1])
    assert iterations[0][2] == iterations[2][2]
    assert iterations[0][2]["score"] != iterations[1][2]["score"]  # another step samples with another key
