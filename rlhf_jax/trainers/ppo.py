"""Stage 3.2, PPO: files of prompts in, a run folder out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.config import LoraConfig, to_plain
from rlhf_jax.data import (
    Ledger,
    Prompt,
    RaggedRows,
    Text,
    batch_at,
    encode_prompts,
    encode_text,
    pack_text,
    read_records,
)
from rlhf_jax.data.batches import PromptRows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.samples import sample_responses
from rlhf_jax.lora import attach
from rlhf_jax.optim import first_key
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import make_mesh, place
from rlhf_jax.pretrained.source import Source, Start, open_source, same_tokenizer, start_from
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import (
    Finished,
    complete,
    create_run,
    fingerprint_of,
    refuse_empty,
    release,
    say,
    train,
)
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.ppo import STAGE, Batch, Config, Frozen, Networks, initial_state, make_update, rescaled
from rlhf_jax.tokenizers.protocol import TextTokenizer

POLICIES = ("sft", "pretrain", "ppo")
# Responses on which mean and scale of the scores are measured: the scale to 4%.
REFERENCE_RESPONSES = 256


def run(
    config: Config,
    *,
    prompts: Sequence[Prompt] | None = None,
    texts: Sequence[Text] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
) -> Finished:
    """Optimize the model of config.init against the reward model of config.reward.

    Resumes from the latest checkpoint of the same run.

    Args:
      config: settings of the stage.
      prompts: records in place of the files (or the embedded corpus) that the config names.
      texts: records of the pretraining mix, likewise.
      evaluate: maps a state to metrics, which are written as "eval/…".

    Raises:
      UserError: for settings or files that do not fit.
    """
    for field, expected in (("init", "a fine-tuned model"), ("reward", "a reward model")):
        if not dataclasses.asdict(config)[field]:
            raise UserError(f"{field}: expected {expected}, got nothing; use --{field} FOLDER")
    source = open_source(config.init, stages=POLICIES)
    reward_model = open_source(config.reward, stages=("reward",))
    same_tokenizer(source, reward_model)
    if reward_model.score_scale is not None:
        refuse_scale(reward_model, reward_model.score_scale)
    tokenizer = source.tokenizer
    networks = Networks(source.network(), reward_model.network())
    length = config.prompt_length + config.episode.response_length
    for network in networks:
        if length > network.config.context:
            raise UserError(
                f"prompt_length {config.prompt_length} + response_length {config.episode.response_length} exceeds the "
                f"context of {network.config.context} tokens; use --prompt-length "
                f"{max(network.config.context - config.episode.response_length, 1)} or less"
            )
    if config.pretraining_batch and config.pretraining_row_length > networks.policy.config.context:
        raise UserError(
            f"pretraining_row_length: expected at most the context of {networks.policy.config.context} tokens, got "
            f"{config.pretraining_row_length}"
        )
    ledger = Ledger()
    if prompts is None:
        prompts = read_records(config.data, "prompts", ledger) if config.data else load_corpus().prompts
    mixing = config.pretraining_batch > 0
    if texts is None and mixing:
        paths = config.pretraining_data
        texts = read_records(paths, "text", Ledger()) if paths else load_corpus().texts
    inputs = {
        "init": source.fingerprint,
        "reward": reward_model.fingerprint,
        "prompts": fingerprint_of(prompts),
        "texts": fingerprint_of(texts or () if mixing else ()),
    }
    rows = encode_prompts(prompts, tokenizer, max_tokens=config.prompt_length, ledger=ledger)
    refuse_empty(rows, "prompts", ledger)
    policy, scorer = starts(config, source, reward_model)
    reference = policy.params
    if config.reference:
        other = open_reference(config.reference, source)
        inputs["reference"] = other.fingerprint
        reference = reference_params(other, policy, config.lora)
    folder = create_run(
        config,
        stage=STAGE,
        model=networks.policy.config,
        tokenizer=tokenizer,
        inputs=inputs,
        origin=source.origin,
        base=policy.record,
    )
    if folder.finished:
        return Finished(folder, folder.summary)
    say(ledger.summary())
    text_rows = None
    if mixing and texts is not None:
        text_rows = pack_text(
            encode_text(texts, tokenizer, ledger=Ledger()),
            length=config.pretraining_row_length + 1,
            start_ids=tokenizer.start_ids,
            eos_id=tokenizer.eos_id,
        )

    def batch(step: int, **share: Any) -> Batch:
        text = None
        if text_rows is not None:
            text = batch_at(text_rows, batch_size=config.pretraining_batch, seed=config.seed, step=step, **share)
        return Batch(batch_at(rows, batch_size=config.batch, seed=config.seed, step=step, **share), text)

    mean, scale = normalization(
        folder,
        reward_model,
        lambda: first_scores(config, networks, policy, scorer, rows, tokenizer),
    )
    frozen = Frozen(
        reference=reference,
        reward=scorer.params,
        score_mean=jnp.asarray(mean, jnp.float32),
        score_scale=jnp.asarray(scale, jnp.float32),
        backbone=policy.base,
        scorer_backbone=None if scorer.base is policy.base else scorer.base,
    )
    forward = networks.policy.config.flops_per_token(length, language_head=False)
    state = train(
        folder,
        config,
        lambda: initial_state(config, policy.params, rescaled(scorer.params, mean, scale)),
        lambda axis: make_update(networks, config, eos_id=tokenizer.stop_ids, pad_id=tokenizer.pad_id, axis_name=axis),
        batch,
        frozen=(frozen,),
        evaluate=evaluate,
        # Sampling, four forward passes for scoring, and forward and backward passes of policy and critic in each epoch.
        flops_per_token=forward * (5 + 2 * config.lora.passes * config.epochs),
        show=("score", "kl", "response_tokens", "missing_end"),
    )
    release(folder, state.extras["ema"] if config.ema_decay else state.params["policy"], config.steps)
    metrics = read_rows(folder.metrics)
    summary = {
        "first_ratio_error": metrics[0]["first_ratio_error"],
        "first_kl": metrics[0]["kl"],
        "first_score": metrics[0]["score"],
        "last_score": metrics[-1]["score"],
        "last_kl": metrics[-1]["kl"],
        "kl_coef": float(state.extras["kl_coef"]),
        "score_mean": mean,
        "score_scale": scale,
    }
    return complete(folder, summary, ledger)


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
    facts: dict[str, Any] | None = processes.from_first(lambda: read_json(path) if path.exists() else None)
    if facts is None:
        if reward_model.score_mean is not None and reward_model.score_scale is not None:
            mean, scale, responses = reward_model.score_mean, reward_model.score_scale, None
        else:
            scores = measure().astype(np.float64)
            mean, scale, responses = float(scores.mean()), float(scores.std()), len(scores)
            refuse_scale(reward_model, scale)
            say(f"scores of {responses} responses of the starting policy: mean {mean:.4g}, scale {scale:.4g}")
        found = facts = {"score_mean": mean, "score_scale": scale, "measured_on_responses": responses}
        processes.by_first(lambda: write_json(path, found))
    return facts["score_mean"], facts["score_scale"]


def refuse_scale(reward_model: Source, scale: float) -> None:
    """Raises UserError if scores do not differ or are not finite."""
    if not (scale > 0 and math.isfinite(scale)):
        raise UserError(
            f"{reward_model.where}: score_scale: expected more than 0, as scores must differ, got {scale}; train it on "
            "more data"
        )


def open_reference(spec: str, source: Source) -> Source:
    """Open a reference model other than the initial policy.

    Raises:
      UserError: if its tokenizer or architecture is another one.
    """
    reference = open_source(spec, stages=POLICIES)
    same_tokenizer(source, reference)
    ours, own = (to_plain(dataclasses.replace(each.model, dropout=0.0)) for each in (source, reference))
    for field, expected in ours.items():
        if own[field] != expected:
            raise UserError(
                f"{reference.where}: {field}: expected {expected} as in the initial policy {source.where}, got "
                f"{own[field]}; the reference must have the policy's architecture"
            )
    return reference


def reference_params(reference: Source, policy: Start, lora: LoraConfig) -> Params:
    """Parameters of a reference model for `Frozen`: an adapter to the policy's backbone, or all parameters."""
    shared = policy.record is not None and policy.record["fingerprint"] == reference.base_fingerprint
    return reference.own() if shared and reference.lora == lora else reference.params()


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


def starts(config: Config, source: Source, reward_model: Source) -> tuple[Start, Start]:
    """Initial parameters of policy and reward model, sharing one backbone if both were adapters to the same one."""
    policy = start_from(source, config.lora, lambda: first_key(config.seed, 0))
    own = reward_model.lora == config.lora and reward_model.base is not None
    if own and policy.record is not None and policy.record["fingerprint"] == reward_model.base_fingerprint:
        return policy, Start(reward_model.own(), policy.base, policy.record)
    return policy, start_from(reward_model, config.lora, lambda: first_key(config.seed, 1))
