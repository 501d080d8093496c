"""The models that PPO starts from: policy, reference, reward model and value network, and the scale of the scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params
from rlhf_jax.config import LoraConfig, ModelConfig, PreferenceConfig, to_plain
from rlhf_jax.data import PromptRows, RaggedRows
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.samples import sample_responses
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.optim import first_key
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import make_mesh, place
from rlhf_jax.pretrained.source import Source, Start, open_for, same_tokenizer, start_from
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import say
from rlhf_jax.runs.sealed import check_file, seal_run, sealed_files
from rlhf_jax.stages.ppo import Config, Networks
from rlhf_jax.tokenizers.protocol import TextTokenizer

POLICIES = ("sft", "pretrain", "ppo", "preference")
# Responses on which mean and scale of the scores are measured: the scale to 4%.
REFERENCE_RESPONSES = 256
# float32 tells scores apart in this range; those of reward models are within 0.01 to 100.
SMALLEST_SCALE, LARGEST_SCORE = 1e-5, 1e6


def open_reward_model(config: Config, source: Source) -> Source | None:
    """The reward model, or None if reward functions, an environment or the KL penalty alone make the reward."""
    if not config.reward:
        # The penalty alone moves the policy to another reference: distillation.
        if not config.reward_function and not config.environment and not config.reference:
            raise UserError(
                "reward: expected a reward model or a reward function, got nothing; use --reward FOLDER or "
                "--reward-function FILE.py:NAME"
            )
        return None
    reward_model = open_for(config, config.reward, stages=("reward",))
    same_tokenizer(source, reward_model)
    if reward_model.score_scale is not None:
        refuse_scale(reward_model, reward_model.score_scale, reward_model.score_mean or 0.0)
    return reward_model


def starts(config: Config, source: Source, reward_model: Source | None) -> tuple[Start, Start]:
    """Initial parameters of policy and reward model, sharing one backbone if both were adapters to the same one.

    Without a reward model the second is the value network: the policy with a scalar head of zeros, so that V is 0.
    """

    policy = start_from(source, config.lora, lambda: first_key(config.seed, 0))
    if reward_model is None:
        scorer = Transformer(source.model, scalar=True)
        shapes = jax.eval_shape(lambda: init_params(scorer, jax.random.key(0)))
        head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["score"])
        kept = policy.params if policy.base is not None else {k: v for k, v in policy.params.items() if k in shapes}
        return policy, dataclasses.replace(policy, params={**kept, "score": head})
    own = reward_model.lora == config.lora and reward_model.base is not None
    if own and policy.record is not None and policy.record["fingerprint"] == reward_model.base_fingerprint:
        return policy, Start(reward_model.own(), policy.base, policy.record)
    return policy, start_from(reward_model, config.lora, lambda: first_key(config.seed, 1))


def open_reference(config: Config | PreferenceConfig, source: Source) -> Source:
    """Open a reference model other than the initial policy.

    Raises:
      UserError: if its tokenizer is another one.
    """
    reference = open_for(config, config.reference, stages=POLICIES)
    same_tokenizer(source, reference)
    return reference


def difference(source: Source, other: Source) -> tuple[str, Any, Any] | None:
    """A setting in which two models compute differently: (name, that of the first, that of the other), or None."""
    ours, own = (_architecture(each.model) for each in (source, other))
    return next(((name, value, own[name]) for name, value in ours.items() if own[name] != value), None)


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """The settings that decide what a network computes, with defaults written out, as published models have them."""
    written = dataclasses.replace(
        model,
        kv_heads=model.key_heads,
        head_width=model.head_size,
        ffn_width=model.hidden_width,
        windows=tuple(map(model.window, range(model.layers))),
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
        ffn_bias=model.bias if model.ffn_bias is None else model.ffn_bias,
        query_scale=model.head_size**-0.5 if model.query_scale is None else model.query_scale,
        embedding_rows=model.vocab_rows,
    )
    how = ("dropout", "dtype", "remat", "attention", "head_chunk", "vocab_multiple")
    return {name: value for name, value in to_plain(written).items() if name not in how}


def reference_params(reference: Source, policy: Start, lora: LoraConfig) -> Params:
    """Parameters of a reference model for `Frozen`: an adapter to the policy's backbone, or all parameters."""
    shared = policy.record is not None and policy.record["fingerprint"] == reference.base_fingerprint
    return reference.own() if shared and reference.lora == lora else reference.params()


def normalization(run: RunFolder, reward_model: Source, measure: Callable[[], np.ndarray]) -> tuple[float, float]:
    """Mean and scale that scores are normalized by: those recorded with the reward model, else measured.

    They are kept in scores.json in the run's folder, so that a resumed run has the same unit of β.

    Args:
      run: the run's folder.
      reward_model: the reward model.
      measure: scores of the starting policy's responses.

    Raises:
      UserError: if the scores do not differ or are not finite.
    """
    path = run.path / "scores.json"

    def kept() -> dict[str, Any] | None:
        check_file(run.path, path.name, sealed_files(run.path))
        return dict(read_json(path)) if path.exists() else None

    def keep(found: dict[str, Any]) -> None:
        write_json(path, found)
        seal_run(run.path, [path.name])

    facts: dict[str, Any] | None = processes.from_first(kept)
    if facts is None:
        if reward_model.score_mean is not None and reward_model.score_scale is not None:
            mean, scale, responses = reward_model.score_mean, reward_model.score_scale, None
        else:
            # Minutes for a published model on a CPU.
            say(
                f"{reward_model.where} has no mean and scale of its scores: {REFERENCE_RESPONSES} responses or more "
                "of the starting policy are sampled to measure them"
            )
            scores = measure().astype(np.float64)
            mean, scale, responses = float(scores.mean()), float(scores.std()), len(scores)
            refuse_scale(reward_model, scale, mean)
            say(f"scores of {responses} responses of the starting policy: mean {mean:.4g}, scale {scale:.4g}")
        found = facts = {"score_mean": mean, "score_scale": scale, "measured_on_responses": responses}
        processes.by_first(lambda: keep(found))
    return facts["score_mean"], facts["score_scale"]


def refuse_scale(reward_model: Source, scale: float, mean: float = 0.0) -> None:
    """Raises UserError if scores do not differ, are not finite, or are of a size that no scores have."""
    if not (scale > 0 and math.isfinite(scale)):
        raise UserError(
            f"{reward_model.where}: score_scale: expected more than 0, as scores must differ, got {scale}; train it on "
            "more data"
        )
    for name, value, sound in (
        ("score_scale", scale, SMALLEST_SCALE <= scale <= LARGEST_SCORE),
        ("score_mean", mean, abs(mean) <= LARGEST_SCORE),
    ):
        if not sound:
            raise UserError(
                f"{reward_model.where}: {name}: expected a deviation of {SMALLEST_SCALE:g} to {LARGEST_SCORE:g} and a "
                f"mean of at most {LARGEST_SCORE:g}, got {value:g}; the summary is damaged, or the model is: train it "
                "again"
            )


def first_scores(
    config: Config, networks: Networks, policy: Start, scorer: Start, prompts: PromptRows, tokenizer: TextTokenizer
) -> np.ndarray:
    """Raw scores of REFERENCE_RESPONSES or a few more samples of the starting policy, to evenly spaced prompts."""
    mesh, rows = make_mesh(**config.mesh_shape), config.batch // config.row_devices
    some = np.linspace(0, len(prompts) - 1, min(len(prompts), REFERENCE_RESPONSES)).round().astype(int)
    prompts = dataclasses.replace(prompts, rows=[prompts.rows[i] for i in some], sources=())
    language, reward = (place(attach(start.base, start.params, config.lora.scale), mesh) for start in (policy, scorer))
    responses = sample_responses(
        networks.policy,
        language,
        prompts,
        first_key(config.seed, 2),
        samples=math.ceil(REFERENCE_RESPONSES / len(prompts)),
        batch_size=rows,
        max_new_tokens=config.episode.response_length,
        eos_id=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=config.episode.temperature,
    )
    whole = [[*prompt, *ids] for prompt, many in zip(prompts.rows, responses, strict=True) for ids in many]
    limit = config.prompt_length + config.episode.response_length
    ragged = RaggedRows([(ids, [False] * len(ids)) for ids in whole], limit, tokenizer.pad_id, buckets=(limit,))
    return row_scores(networks.scorer, reward, ragged, batch_size=rows)
