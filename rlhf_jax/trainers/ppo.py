"""Stage 3.2, PPO: files of prompts in, a run folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf_jax.arrays import TrainState
from rlhf_jax.data import Ledger, Prompt, PromptRows, Text, batch_at, encode_prompts, have_messages, read_records
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.environments.calling import Environment
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.warnings import end_warnings
from rlhf_jax.generate import Generation
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.host_step import HostStep
from rlhf_jax.pretrained.source import Source, open_for
from rlhf_jax.reward_functions.loading import RewardFunction, fingerprint
from rlhf_jax.rewards import Terms
from rlhf_jax.runs.folder import RunFolder
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
from rlhf_jax.trainers.pretrain import pack


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
    models = _open_models(config)
    source, networks, tokenizer = models.source, models.networks, models.source.tokenizer
    data = _read(config, tokenizer, prompts, texts)
    inputs = _inputs(config, models, data, functions)
    between = None
    if terms is not None:
        ahead = (lambda step: batch(step) if step < config.steps else None) if config.rollout_lag else None
        between = _between(config, networks, functions, terms, data.rows, tokenizer, ahead)
    policy, scorer = starts(config, source, models.reward)
    other = models.reference
    reference = policy.params if other is None else reference_params(other, policy, config.lora)
    folder = open_folder(config, STAGE, networks.policy.config, source, policy, inputs)
    if folder.finished:
        return Finished(folder, folder.summary)

    _say_rewards(config, models.reward, by_function=bool(functions))
    batch: Callable[..., Batch] = _batches(config, tokenizer, data, numbered=bool(functions))
    mean, scale = 0.0, 1.0
    if models.reward is not None:
        mean, scale = normalization(
            folder, models.reward, lambda: first_scores(config, networks, policy, scorer, data.rows, tokenizer)
        )
    frozen = Frozen(
        reference=reference,
        reward=None if models.reward is None else scorer.params,
        score_mean=jnp.asarray(mean, jnp.float32),
        score_scale=jnp.asarray(scale, jnp.float32),
        backbone=policy.base,
        scorer_backbone=None if scorer.base is policy.base else scorer.base,
    )

    def start() -> TrainState:
        critic = rescaled(scorer.params, mean, scale) if config.value_network else None
        state = initial_state(config, policy.params, critic, policy.base)
        return with_room_ahead(state, config) if config.rollout_lag else state

    ids: dict[str, Any] = {"eos_id": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    terms_shown = (f"reward/{name}" for name in (terms.names if terms else ()))
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
        flops_per_token=_flops_per_token(config, networks, scored=models.reward is not None),
        show=("score", *terms_shown, "kl", "response_tokens", "missing_end"),
    )
    release(folder, state.extras["ema"] if config.ema_decay else state.params["policy"], config.steps)
    summary = {
        "dialogues": source.dialogues or have_messages(data.rows.sources),
        **_first_and_last(folder),
        "kl_coef": float(state.extras["kl_coef"]),
        "score_mean": mean,
        "score_scale": scale,
        **({"warnings": warnings} if warnings else {}),
    }
    return complete(folder, summary, data.rows.sources[:EXAMPLES], data.ledger, pretraining_data=data.text_ledger)


class _Models(NamedTuple):
    """Sources of the initial policy, of the reward model and of another reference, if there are, and architectures."""

    source: Source
    reward: Source | None
    reference: Source | None
    networks: Networks


def _open_models(config: Config) -> _Models:
    if not config.init:
        raise UserError("init: expected a fine-tuned model, got nothing; use --init FOLDER")
    source = open_for(config, config.init, stages=POLICIES)
    reward_model = open_reward_model(config, source)
    other = open_reference(config, source) if config.reference else None
    teacher = None if other is None or difference(source, other) is None else other.network()
    scorer = Transformer((reward_model or source).model, scalar=True)
    networks = Networks(source.network(), scorer, teacher)
    _check_lengths(config, networks)
    return _Models(source, reward_model, other, networks)


class _Data(NamedTuple):
    """Prompts, as read and as encoded, and texts of the pretraining mix, with the ledger of each."""

    prompts: Sequence[Prompt]
    rows: PromptRows
    ledger: Ledger
    texts: Sequence[Text]
    text_ledger: Ledger


def _read(
    config: Config, tokenizer: TextTokenizer, prompts: Sequence[Prompt] | None, texts: Sequence[Text] | None
) -> _Data:
    """The records given, or those of the files or the embedded corpus that the config names."""
    ledger, text_ledger = Ledger(), Ledger()
    if prompts is None:
        embedded = wants_embedded("data", config.data, "prompts")
        prompts = (
            load_corpus().prompts if embedded else read_records(config.data, "prompts", ledger, columns=config.columns)
        )
    if not config.pretraining_batch:
        texts = ()
    elif texts is None:
        embedded = wants_embedded("pretraining_data", config.pretraining_data, "text for the pretraining mix")
        texts = load_corpus().texts if embedded else read_records(config.pretraining_data, "text", text_ledger)
    if config.pretraining_batch:
        refuse_empty(texts, "texts of the pretraining mix", text_ledger, field="pretraining_data")
    rows = encode_prompts(prompts, tokenizer, max_tokens=config.prompt_length, ledger=ledger)
    refuse_empty(rows, "prompts", ledger)
    return _Data(prompts, rows, ledger, texts, text_ledger)


def _inputs(config: Config, models: _Models, data: _Data, functions: Sequence[Any]) -> dict[str, str]:
    """Fingerprints of all that a resumed run must find unchanged."""
    inputs = {
        "init": models.source.fingerprint,
        "prompts": fingerprint_of(data.prompts),
        "texts": fingerprint_of(data.texts),
    }
    if models.reward is not None:
        inputs["reward"] = models.reward.fingerprint
    if functions:
        inputs["environment" if config.environment else "reward_functions"] = fingerprint(functions)
        # As text: the columns of a prompt are not part of its content elsewhere.
        inputs["columns"] = fingerprint_of([Text(str(sorted(prompt.columns.items()))) for prompt in data.prompts])
    if models.reference is not None:
        inputs["reference"] = models.reference.fingerprint
    return inputs


def _say_rewards(config: Config, reward_model: Source | None, *, by_function: bool) -> None:
    """Print the warnings of the reward model, and what an episode without an end gets, where that may surprise."""
    episode = config.episode
    if reward_model is not None:
        ends = end_warnings(reward_model.without_end, episode.missing_end, episode.missing_end_score)
        for warning in (*reward_model.warnings, *ends):
            say(f"warning: {config.reward}: {warning}")
    if (by_function or reward_model is None) and episode.missing_end == "replace":
        what = "a response without an end-of-text token"
        if config.environment:
            what = f"an episode that the environment has not ended in {config.max_turns} turns, or that is cut,"
        say(
            f"{what} gets {episode.missing_end_score:g} in place of its reward; --episode.missing-end subtract "
            "lowers its reward instead, keep leaves it"
        )


def _batches(config: Config, tokenizer: TextTokenizer, data: _Data, *, numbered: bool) -> Callable[..., Batch]:
    """Lay out the data, print how much there is and how often a run visits it, and return step -> batch."""
    text_rows = None
    if config.pretraining_batch:
        text_rows = pack(data.texts, tokenizer, config.pretraining_row_length, data.text_ledger)
    say_data(data.ledger, pretraining_data=data.text_ledger)
    prompts_at_once = config.batch // config.samples_per_prompt
    say_epochs(data.rows, batch=prompts_at_once, steps=config.steps, what="prompts")
    if text_rows is not None:
        say_epochs(text_rows, batch=config.pretraining_batch, steps=config.steps, what="rows of the pretraining mix")

    def batch(step: int, **share: Any) -> Batch:
        order: dict[str, Any] = {"seed": config.seed, "step": step, **share}
        text = None if text_rows is None else batch_at(text_rows, batch_size=config.pretraining_batch, **order)
        prompts, row_B = batch_at(NumberedRows(data.rows), batch_size=prompts_at_once, **order)
        return Batch(prompts, text, row_B if numbered else None)

    return batch


def _first_and_last(folder: RunFolder) -> dict[str, Any]:
    """Figures of the first and the last iteration, None for a run without any."""
    metrics = [row for row in read_rows(folder.metrics) if row["step"] > 0] or [{}]
    first, last = metrics[0], metrics[-1]
    summary = {
        "first_ratio_error": first.get("first_ratio_error"),
        "first_kl": first.get("kl"),
        "first_score": first.get("score"),
        "last_score": last.get("score"),
        "last_kl": last.get("kl"),
    }
    return summary


def _flops_per_token(config: Config, networks: Networks, *, scored: bool) -> float:
    """Work of an iteration per token of its episodes.

    It is sampling, one forward pass of each network for scoring, and forward and backward passes of policy and critic,
    if there is one, in each epoch.
    """
    length = config.prompt_length + config.episode.response_length
    forward, of_reference = (
        network.config.flops_per_token(length, language_head=False)
        for network in (networks.policy, networks.teacher or networks.policy)
    )
    passes = (1 + config.value_network) * config.lora.passes * config.epochs
    return forward * (2 + config.value_network + scored) + of_reference + forward * passes


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
