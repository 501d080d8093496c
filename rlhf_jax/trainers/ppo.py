"""Stage 3.2, PPO: files of prompts in, a run folder out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from rlhf_jax.arrays import TrainState
from rlhf_jax.data import (
    Ledger,
    Prompt,
    PromptRows,
    Text,
    batch_at,
    encode_prompts,
    encode_text,
    have_messages,
    pack_text,
    read_records,
)
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.environments.calling import Environment
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.warnings import end_warnings
from rlhf_jax.generate import Generation
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.host_step import HostStep
from rlhf_jax.pretrained.source import open_for
from rlhf_jax.reward_functions.loading import RewardFunction, fingerprint
from rlhf_jax.rewards import Terms
from rlhf_jax.runs.lifecycle import (
    Finished,
    complete,
    exclusive,
    fingerprint_of,
    refuse_empty,
    release,
    say,
    say_data,
    say_epochs,
)
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.ppo import (
    STAGE,
    Batch,
    Config,
    Frozen,
    Networks,
    initial_state,
    make_sampling,
    make_update,
    rescaled,
)
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers.alarms import train
from rlhf_jax.trainers.inputs import EXAMPLES, wants_embedded
from rlhf_jax.trainers.one_network import open_folder
from rlhf_jax.trainers.ppo_environment import environment_step, with_environment
from rlhf_jax.trainers.ppo_rewards import (
    NumberedRows,
    host_step,
    refuse_lag,
    reward_functions,
    rewards_of,
    with_room_ahead,
)
from rlhf_jax.trainers.ppo_start import (
    POLICIES,
    difference,
    first_scores,
    normalization,
    open_reference,
    open_reward_model,
    reference_params,
    starts,
)


@exclusive
def run(
    config: Config,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
    environment: Environment | None = None,
    prompts: Sequence[Prompt] | None = None,
    texts: Sequence[Text] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
) -> Finished:
    """Optimize the model of config.init against a reward model, reward functions or both, or in an environment.

    Resumes from the latest checkpoint of the same run.

    A reward function is f(prompts, completions, **columns) -> one number for each completion, as in TRL. A prompt that
    is text has its completion as text, without special tokens; a prompt given as messages is a list of {"role": …,
    "content": …}, and its completion a list with the assistant's message. columns are the other fields of the prompts'
    rows. None in place of a number says that the function does not apply. The reward is the weighted sum of the
    reward model's normalized score and the functions' values; each is written as the metric "reward/NAME".

    An environment is f(state, text) -> (state, observation, reward, done), called on each turn of the policy until it
    is done, or config.max_turns; see `rlhf_jax.environments`. A reward model scores the end of the episode.

    Args:
      config: settings of the stage.
      reward_funcs: reward functions, after those that config.reward_function names.
      environment: environment, in place of one that config.environment names.
      prompts: records in place of the files (or the embedded corpus) that the config names.
      texts: records of the pretraining mix, likewise.
      evaluate: maps a state to metrics, which are written as "eval/…"; with config.eval_every, the initial state too.

    Raises:
      UserError: for settings or files that do not fit; at an alarm, with the last good policy released.
    """
    config, functions, terms = with_environment(config, environment, reward_funcs)
    if not functions:
        config, functions, terms = reward_functions(config, reward_funcs)
    if config.rollout_lag:
        refuse_lag(config, functions)
    if not config.init:
        raise UserError("init: expected a fine-tuned model, got nothing; use --init FOLDER")
    source = open_for(config, config.init, stages=POLICIES)
    reward_model = open_reward_model(config, source)
    tokenizer = source.tokenizer
    scorer_model = source.model if reward_model is None else reward_model.model
    other = open_reference(config, source) if config.reference else None
    teacher = None if other is None or difference(source, other) is None else other.network()
    networks = Networks(source.network(), Transformer(scorer_model, scalar=True), teacher)
    length = config.prompt_length + config.episode.response_length
    _check_lengths(config, networks)
    ledger, text_ledger = Ledger(), Ledger()
    if prompts is None:
        prompts = _prompts(config, ledger)
    texts = _texts(config, texts, text_ledger) if config.pretraining_batch else ()
    inputs = {"init": source.fingerprint, "prompts": fingerprint_of(prompts), "texts": fingerprint_of(texts)}
    if reward_model is not None:
        inputs["reward"] = reward_model.fingerprint
    if functions:
        inputs["environment" if config.environment else "reward_functions"] = fingerprint(functions)
        # As text: the columns of a prompt are not part of its content elsewhere.
        inputs["columns"] = fingerprint_of([Text(str(sorted(prompt.columns.items()))) for prompt in prompts])
    rows = encode_prompts(prompts, tokenizer, max_tokens=config.prompt_length, ledger=ledger)
    refuse_empty(rows, "prompts", ledger)
    between = None
    if terms is not None:
        ahead = (lambda step: batch(step) if step < config.steps else None) if config.rollout_lag else None
        between = _between(config, networks, functions, terms, rows, tokenizer, ahead)
    policy, scorer = starts(config, source, reward_model)
    reference = policy.params
    if other is not None:
        inputs["reference"] = other.fingerprint
        reference = reference_params(other, policy, config.lora)
    folder = open_folder(config, STAGE, networks.policy.config, source, policy, inputs)
    if folder.finished:
        return Finished(folder, folder.summary)
    if reward_model is not None:
        episode = config.episode
        ends = end_warnings(reward_model.without_end, episode.missing_end, episode.missing_end_score)
        for warning in (*reward_model.warnings, *ends):
            say(f"warning: {config.reward}: {warning}")
    if (functions or reward_model is None) and config.episode.missing_end == "replace":
        what = "a response without an end-of-text token"
        if config.environment:
            what = f"an episode that the environment has not ended in {config.max_turns} turns, or that is cut,"
        say(
            f"{what} gets {config.episode.missing_end_score:g} in place of its reward; --episode.missing-end subtract "
            "lowers its reward instead, keep leaves it"
        )
    text_rows = None
    if config.pretraining_batch:
        text_rows = pack_text(
            encode_text(texts, tokenizer, ledger=text_ledger),
            length=config.pretraining_row_length + 1,
            start_ids=tokenizer.start_ids,
            eos_id=tokenizer.eos_id,
        )

    say_data(ledger, pretraining_data=text_ledger)
    prompts_at_once = config.batch // config.samples_per_prompt
    say_epochs(rows, batch=prompts_at_once, steps=config.steps, what="prompts")
    if text_rows is not None:
        say_epochs(text_rows, batch=config.pretraining_batch, steps=config.steps, what="rows of the pretraining mix")

    def batch(step: int, **share: Any) -> Batch:
        text = None
        if text_rows is not None:
            text = batch_at(text_rows, batch_size=config.pretraining_batch, seed=config.seed, step=step, **share)
        prompts, row_B = batch_at(NumberedRows(rows), batch_size=prompts_at_once, seed=config.seed, step=step, **share)
        return Batch(prompts, text, row_B if functions else None)

    def start() -> TrainState:
        critic = rescaled(scorer.params, mean, scale) if config.value_network else None
        state = initial_state(config, policy.params, critic, policy.base)
        return with_room_ahead(state, config) if config.rollout_lag else state

    mean, scale = 0.0, 1.0
    if reward_model is not None:
        mean, scale = normalization(
            folder, reward_model, lambda: first_scores(config, networks, policy, scorer, rows, tokenizer)
        )
    frozen = Frozen(
        reference=reference,
        reward=None if reward_model is None else scorer.params,
        score_mean=jnp.asarray(mean, jnp.float32),
        score_scale=jnp.asarray(scale, jnp.float32),
        backbone=policy.base,
        scorer_backbone=None if scorer.base is policy.base else scorer.base,
    )
    ids: dict[str, Any] = {"eos_id": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    forward, of_reference = (
        network.config.flops_per_token(length, language_head=False)
        for network in (networks.policy, teacher or networks.policy)
    )
    state, warnings = train(
        folder,
        config,
        start,
        lambda axis: make_update(networks, config, **ids, axis_name=axis, terms=terms),
        batch,
        frozen=(frozen,),
        host_step=between,
        evaluate=evaluate,
        evaluate_first=True,
        # Sampling, one forward pass of each network for scoring, and forward and backward passes of policy and critic,
        # if there is one, in each epoch.
        flops_per_token=forward * (2 + config.value_network + (reward_model is not None))
        + of_reference
        + forward * (1 + config.value_network) * config.lora.passes * config.epochs,
        show=(
            "score",
            *(f"reward/{name}" for name in (terms.names if terms else ())),
            "kl",
            "response_tokens",
            "missing_end",
        ),
    )
    release(folder, state.extras["ema"] if config.ema_decay else state.params["policy"], config.steps)
    metrics = [row for row in read_rows(folder.metrics) if row["step"] > 0] or [{}]
    summary = {
        "dialogues": source.dialogues or have_messages(rows.sources),
        "first_ratio_error": metrics[0].get("first_ratio_error"),
        "first_kl": metrics[0].get("kl"),
        "first_score": metrics[0].get("score"),
        "last_score": metrics[-1].get("score"),
        "last_kl": metrics[-1].get("kl"),
        "kl_coef": float(state.extras["kl_coef"]),
        "score_mean": mean,
        "score_scale": scale,
        **({"warnings": warnings} if warnings else {}),
    }
    finished = complete(folder, summary, ledger, pretraining_data=text_ledger)
    return dataclasses.replace(finished, examples=list(rows.sources)[:EXAMPLES])


def _between(
    config: Config,
    networks: Networks,
    functions: Sequence[Any],
    terms: Terms,
    rows: PromptRows,
    tokenizer: TextTokenizer,
    ahead: Callable[[int], Batch | None] | None,
) -> HostStep:
    """Work of the host between sampling and the update: reward functions, or an environment."""
    ids: dict[str, Any] = {"eos_id": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}

    def make(axis: str | None) -> Callable[..., Generation]:
        return make_sampling(networks, config, **ids, axis_name=axis)

    if config.environment:
        return environment_step(make, functions[0], config, terms, rows, tokenizer)
    rewards = rewards_of(functions, terms, rows, config.reward_timeout)
    return host_step(make, rewards, rows, tokenizer, config.episode.response_length, config.samples_per_prompt, ahead)


def _check_lengths(config: Config, networks: Networks) -> None:
    """Raises UserError if prompt and response, or a row of the pretraining mix, are longer than a model's context."""
    for network in filter(None, networks):
        context, response = network.config.context, config.episode.response_length
        if config.prompt_length + response > context:
            # The shorter of the two is left as it is.
            shorter = f"--prompt-length {context - response}"
            if context - response < min(config.prompt_length, context // 2):
                shorter = f"--episode.response-length {max(context - config.prompt_length, 1)}"
            raise UserError(
                f"prompt_length {config.prompt_length} + response_length {response} exceeds the context of {context} "
                f"tokens; use {shorter} or less"
            )
    if config.pretraining_batch and config.pretraining_row_length > networks.policy.config.context:
        raise UserError(
            f"pretraining_row_length: expected at most the context of {networks.policy.config.context} tokens, got "
            f"{config.pretraining_row_length}"
        )


def _prompts(config: Config, ledger: Ledger) -> Sequence[Prompt]:
    if wants_embedded("data", config.data, "prompts"):
        return load_corpus().prompts
    return read_records(config.data, "prompts", ledger, columns=config.columns)


def _texts(config: Config, texts: Sequence[Text] | None, ledger: Ledger) -> Sequence[Text]:
    """Texts of the pretraining mix: those given, or those of the files that the config names."""
    if texts is None:
        embedded = wants_embedded("pretraining_data", config.pretraining_data, "text for the pretraining mix")
        texts = load_corpus().texts if embedded else read_records(config.pretraining_data, "text", ledger)
    refuse_empty(texts, "texts of the pretraining mix", ledger, field="pretraining_data")
    return texts
