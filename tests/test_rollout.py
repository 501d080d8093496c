"""An episode against a naive loop over its rows: no left padding, token by token, in plain arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import PromptBatch, Rollout
from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.model import Transformer
from rlhf_jax.stages.ppo import Frozen, Networks, make_rollout
from tests.random_params import initialized

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("each_key_once")]

EOS, PAD, R = 6, 5, 6

CONFIG = ModelConfig(vocab_size=7, context=16, width=16, layers=1, heads=2, tied=False)
NETWORKS = Networks(Transformer(CONFIG), Transformer(CONFIG, scalar=True))
PROMPTS = [[1, 2, 3, 4], [3], [2, 2], [4, 1, 0], [1, 1], [0, 3, 1], [2], [1, 4, 4]]
BETA, MEAN, SCALE = 0.3, 0.5, 2.0


@functools.cache
def parameters() -> dict[str, Any]:
    """Four different networks."""
    kinds = {
        "policy": NETWORKS.policy,
        "reference": NETWORKS.policy,
        "critic": NETWORKS.scorer,
        "reward": NETWORKS.scorer,
    }
    return {name: initialized(network, jax.random.key(n)) for n, (name, network) in enumerate(kinds.items())}


def rollout() -> tuple[Rollout, dict[str, Any]]:
    """Episodes of the prompts, and their metrics."""
    config = EpisodeConfig(
        response_length=R, temperature=0.7, missing_end="subtract", missing_end_score=-1.5, gamma=0.9
    )
    tokens = np.full((8, 4), PAD, np.int32)
    for row, ids in zip(tokens, PROMPTS, strict=True):
        row[4 - len(ids) :] = ids
    mask = np.arange(4)[None] >= 4 - np.array([len(ids) for ids in PROMPTS])[:, None]
    params = parameters()
    frozen = Frozen(params["reference"], params["reward"], jnp.float32(MEAN), jnp.float32(SCALE))
    program = jax.jit(make_rollout(NETWORKS, config, eos_id=EOS, pad_id=PAD))
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask))
    return jax.device_get(program(params, frozen, prompts, jax.random.key(9), jnp.float32(BETA)))


APPLY = {
    name: jax.jit(lambda params, ids, network=network: network.apply({"params": params}, ids))
    for name, network in NETWORKS._asdict().items()
}


def forward(name: str, params: dict[str, Any], ids: list[int]) -> np.ndarray:
    """What a network says of one row alone: logits [T, V] or scores [T]. What follows a token does not change them."""
    row = np.array([ids + [0] * (4 + R - len(ids))])
    apply = APPLY["policy" if name in ("policy", "reference") else "scorer"]
    return np.asarray(apply(params[name], row), np.float64)[0, : len(ids)]


def test_an_episode_is_what_a_naive_loop_makes_of_its_tokens() -> None:
    # Without an end 1.5 is subtracted; for the other ways to treat it see test_episodes.py.
    params = parameters()
    out, metrics = rollout()
    advantages, kls, ends = [], [], []
    for b, prompt in enumerate(PROMPTS):
        tail = np.asarray(out.tokens_BT)[b, 4:].tolist()
        response = tail[: tail.index(EOS) + 1] if EOS in tail else tail
        n, whole, ended = len(response), prompt + response, EOS in tail
        assert np.asarray(out.response_mask_BR)[b].tolist() == [t < n for t in range(R)]
        logp = {}
        for name in ("policy", "reference"):
            logits = forward(name, params, whole) / 0.7
            rows = [logits[len(prompt) + t - 1] for t in range(n)]
            logp[name] = [row[a] - np.log(np.exp(row).sum()) for row, a in zip(rows, response, strict=True)]
        value = [forward("critic", params, whole)[len(prompt) + t - 1] for t in range(n)]
        score = (forward("reward", params, whole)[-1] - MEAN) / SCALE
        if not ended:
            score -= 1.5
        reward = [-BETA * (logp["policy"][t] - logp["reference"][t]) + (score if t == n - 1 else 0) for t in range(n)]
        after, advantage = 0.0, [0.0] * n
        for t in reversed(range(n)):
            delta = reward[t] + 0.9 * (value[t + 1] if t + 1 < n else 0.0) - value[t]
            advantage[t] = after = delta + 0.9 * 0.95 * after
        for found, wanted in (
            (out.logp_BR, logp["policy"]), (out.ref_logp_BR, logp["reference"]), (out.value_BR, value),
            (out.target_BR, [a + v for a, v in zip(advantage, value, strict=True)]),
        ):  # fmt: skip
            np.testing.assert_allclose(np.asarray(found)[b, :n], wanted, atol=2e-5)
        np.testing.assert_allclose(float(out.score_B[b]), score, atol=2e-5)
        advantages.append(advantage)
        kls.append(sum(p - q for p, q in zip(logp["policy"], logp["reference"], strict=True)))
        ends.append(ended)
    assert 0 < sum(ends) < len(PROMPTS), "this key shows one kind of end only; take another"
    flat = np.concatenate(advantages)
    for b, advantage in enumerate(advantages):
        found = np.asarray(out.advantage_BR)[b]
        np.testing.assert_allclose(found[: len(advantage)], (np.array(advantage) - flat.mean()) / flat.std(), atol=1e-4)
        assert not found[len(advantage) :].any()
    np.testing.assert_allclose(float(metrics["kl"]), np.mean(kls), atol=2e-5)
    np.testing.assert_allclose(float(metrics["missing_end"]), 1 - np.mean(ends))
    np.testing.assert_allclose(float(metrics["sampler_logp_error"]), 0.0, atol=1e-5)
