"""Stage 3.2, PPO: files of prompts in, a run folder out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, TrainState
from rlhf_jax.data import (
    Ledger,
    Prompt,
    Text,
    batch_at,
    encode_prompts,
    encode_text,
    have_messages,
    pack_text,
    read_records,
)
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.source import Source, Start, open_for, same_tokenizer, start_from
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
    source = open_for(config, config.init, stages=("sft", "pretrain"))
    reward_model = open_for(config, config.reward, stages=("reward",))
    same_tokenizer(source, reward_model)
    if not reward_model.score_scale > 0:
        raise UserError(
            f"{reward_model.where}: score_scale: expected more than 0, as scores must differ, got "
            f"{reward_model.score_scale}; train it on more data"
        )
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

    frozen = Frozen(
        reference=policy.params,
        reward=scorer.params,
        score_mean=jnp.asarray(reward_model.score_mean, jnp.float32),
        score_scale=jnp.asarray(reward_model.score_scale, jnp.float32),
        backbone=policy.base,
        scorer_backbone=None if scorer.base is policy.base else scorer.base,
    )
    forward = networks.policy.config.flops_per_token(length, language_head=False)
    state = train(
        folder,
        config,
        lambda: initial_state(
            config, policy.params, rescaled(scorer.params, reward_model.score_mean, reward_model.score_scale)
        ),
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
        "dialogues": source.dialogues or have_messages(rows.sources),
        "first_ratio_error": metrics[0]["first_ratio_error"],
        "first_kl": metrics[0]["kl"],
        "first_score": metrics[0]["score"],
        "last_score": metrics[-1]["score"],
        "last_kl": metrics[-1]["kl"],
        "kl_coef": float(state.extras["kl_coef"]),
    }
    return complete(folder, summary, ledger)


def starts(config: Config, source: Source, reward_model: Source) -> tuple[Start, Start]:
    """Initial parameters of policy and reward model, sharing one backbone if both were adapters to the same one."""

    def keys() -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))

    policy = start_from(source, config.lora, lambda: keys()[0])
    own = reward_model.lora == config.lora and reward_model.base is not None
    if own and policy.record is not None and policy.record["fingerprint"] == reward_model.base_fingerprint:
        return policy, Start(reward_model.own(), policy.base, policy.record)
    return policy, start_from(reward_model, config.lora, lambda: keys()[1])
