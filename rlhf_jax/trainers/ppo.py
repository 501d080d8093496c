"""Stage 3.2, PPO: files of prompts in, a run folder out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, PromptBatch, TrainState
from rlhf_jax.config import LoraConfig, to_plain
from rlhf_jax.data import (
    Ledger,
    Prompt,
    PromptRows,
    RaggedRows,
    Text,
    batch_at,
    encode_prompts,
    encode_text,
    have_messages,
    pack_text,
    read_records,
    response_text,
)
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.samples import sample_responses
from rlhf_jax.generate import Generation
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.optim import first_key
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.host_step import HostStep
from rlhf_jax.parallel.mesh import make_mesh, place
from rlhf_jax.pretrained.source import Source, Start, open_for, same_tokenizer, start_from
from rlhf_jax.rewards import (
    RewardFunction,
    RewardFunctions,
    Terms,
    fingerprint,
    load_function,
    make_terms,
    spec_of,
)
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
    say_data,
    say_epochs,
    train,
)
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.ppo import (
    STAGE,
    Batch,
    Config,
    Frozen,
    Networks,
    ScoredResponses,
    initial_state,
    make_sampling,
    make_update,
    rescaled,
)
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers.inputs import EXAMPLES, wants_embedded

POLICIES = ("sft", "pretrain", "ppo")
# Responses on which mean and scale of the scores are measured: the scale to 4%.
REFERENCE_RESPONSES = 256


def run(
    config: Config,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
    prompts: Sequence[Prompt] | None = None,
    texts: Sequence[Text] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
) -> Finished:
    """Optimize the model of config.init against a reward model, reward functions or both.

    Resumes from the latest checkpoint of the same run.

    A reward function is f(prompts, completions, **columns) -> one number for each completion, as in TRL. A prompt that
    is text has its completion as text, without special tokens; a prompt given as messages is a list of {"role": …,
    "content": …}, and its completion a list with the assistant's message. columns are the other fields of the prompts'
    rows. None in place of a number says that the function does not apply. The reward is the weighted sum of the
    reward model's normalized score and the functions' values; each is written as the metric "reward/NAME".

    Args:
      config: settings of the stage.
      reward_funcs: reward functions, after those that config.reward_function names.
      prompts: records in place of the files (or the embedded corpus) that the config names.
      texts: records of the pretraining mix, likewise.
      evaluate: maps a state to metrics, which are written as "eval/…".

    Raises:
      UserError: for settings or files that do not fit.
    """
    config, functions, terms = _reward(config, reward_funcs)
    if not config.init:
        raise UserError("init: expected a fine-tuned model, got nothing; use --init FOLDER")
    source = open_for(config, config.init, stages=POLICIES)
    reward_model = _reward_model(config, source)
    tokenizer = source.tokenizer
    scorer_model = source.model if reward_model is None else reward_model.model
    networks = Networks(source.network(), Transformer(scorer_model, scalar=True))
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
    ledger, text_ledger = Ledger(), Ledger()
    if prompts is None:
        embedded = wants_embedded("data", config.data, "prompts")
        prompts = (
            load_corpus().prompts if embedded else read_records(config.data, "prompts", ledger, columns=config.columns)
        )
    mixing = config.pretraining_batch > 0
    if texts is None and mixing:
        paths = config.pretraining_data
        embedded = wants_embedded("pretraining_data", paths, "text for the pretraining mix")
        texts = load_corpus().texts if embedded else read_records(paths, "text", text_ledger)
    if mixing:
        refuse_empty(texts or (), "texts of the pretraining mix", text_ledger, field="pretraining_data")
    inputs = {
        "init": source.fingerprint,
        "prompts": fingerprint_of(prompts),
        "texts": fingerprint_of(texts or () if mixing else ()),
    }
    if reward_model is not None:
        inputs["reward"] = reward_model.fingerprint
    if functions:
        inputs["reward_functions"] = fingerprint(functions)
        # As text: the columns of a prompt are not part of its content elsewhere.
        inputs["columns"] = fingerprint_of([Text(str(sorted(prompt.columns.items()))) for prompt in prompts])
    rows = encode_prompts(prompts, tokenizer, max_tokens=config.prompt_length, ledger=ledger)
    refuse_empty(rows, "prompts", ledger)
    rewards = None if terms is None else rewards_of(functions, terms, rows, config.reward_timeout)
    policy, scorer = starts(config, source, reward_model)
    reference = policy.params
    if config.reference:
        other = open_reference(config, source)
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
    for warning in () if reward_model is None else reward_model.warnings:
        say(f"warning: {config.reward}: {warning}")
    if functions and config.episode.missing_end == "replace":
        say(
            f"a response without an end-of-text token gets {config.episode.missing_end_score:g} in place of its "
            "reward; --episode.missing-end subtract lowers its reward instead, keep leaves it"
        )
    text_rows = None
    if mixing and texts is not None:
        text_rows = pack_text(
            encode_text(texts, tokenizer, ledger=text_ledger),
            length=config.pretraining_row_length + 1,
            start_ids=tokenizer.start_ids,
            eos_id=tokenizer.eos_id,
        )

    say_data(ledger, pretraining_data=text_ledger)
    say_epochs(rows, batch=config.batch, steps=config.steps, what="prompts")
    if text_rows is not None:
        say_epochs(text_rows, batch=config.pretraining_batch, steps=config.steps, what="rows of the pretraining mix")

    def batch(step: int, **share: Any) -> Batch:
        text = None
        if text_rows is not None:
            text = batch_at(text_rows, batch_size=config.pretraining_batch, seed=config.seed, step=step, **share)
        prompts, row_B = batch_at(_NumberedRows(rows), batch_size=config.batch, seed=config.seed, step=step, **share)
        return Batch(prompts, text, row_B if functions else None)

    mean, scale = 0.0, 1.0
    if reward_model is not None:
        mean, scale = normalization(
            folder,
            reward_model,
            lambda: first_scores(config, networks, policy, scorer, rows, tokenizer),
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
    forward = networks.policy.config.flops_per_token(length, language_head=False)
    state = train(
        folder,
        config,
        lambda: initial_state(config, policy.params, rescaled(scorer.params, mean, scale)),
        lambda axis: make_update(networks, config, **ids, axis_name=axis, terms=terms),
        batch,
        frozen=(frozen,),
        host_step=None
        if rewards is None
        else host_step(
            lambda axis: make_sampling(networks, config, **ids, axis_name=axis),
            rewards,
            rows,
            tokenizer,
            config.episode.response_length,
        ),
        evaluate=evaluate,
        # Sampling, one forward pass of each network for scoring, and forward and backward passes of policy and critic
        # in each epoch.
        flops_per_token=forward * (4 + (reward_model is not None) + 2 * config.lora.passes * config.epochs),
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
    }
    finished = complete(folder, summary, ledger, pretraining_data=text_ledger)
    return dataclasses.replace(finished, examples=list(rows.sources)[:EXAMPLES])


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


def open_reference(config: Config, source: Source) -> Source:
    """Open a reference model other than the initial policy.

    Raises:
      UserError: if its tokenizer or architecture is another one.
    """
    reference = open_for(config, config.reference, stages=POLICIES)
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


def _reward(
    config: Config, reward_funcs: RewardFunction | Sequence[RewardFunction]
) -> tuple[Config, list[RewardFunction], Terms | None]:
    """The config with the names of all functions, the functions, and the terms of the reward if there are functions."""
    given = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    for number, function in enumerate(given):
        if not callable(function):
            raise UserError(
                f"reward_funcs[{number}]: expected a function, got {function!r}; a reward model is the setting reward"
            )
    functions = [*map(load_function, config.reward_function), *given]
    if not functions:
        if config.reward_weights:
            raise UserError("reward_weights: expected none without a reward function, got some; use --reward-function")
        return config, [], None
    names = (*config.reward_function, *map(spec_of, given))
    terms = make_terms(functions, config.reward_weights, model=bool(config.reward))
    # Written out, for the run's config.json.
    return dataclasses.replace(config, reward_function=names, reward_weights=terms.weights), functions, terms


def _reward_model(config: Config, source: Source) -> Source | None:
    """The reward model, or None if reward functions alone make the reward."""
    if not config.reward:
        if not config.reward_function:
            raise UserError(
                "reward: expected a reward model or a reward function, got nothing; use --reward FOLDER or "
                "--reward-function FILE.py:NAME"
            )
        return None
    reward_model = open_for(config, config.reward, stages=("reward",))
    same_tokenizer(source, reward_model)
    if reward_model.score_scale is not None:
        refuse_scale(reward_model, reward_model.score_scale)
    return reward_model


def rewards_of(functions: Sequence[RewardFunction], terms: Terms, rows: PromptRows, timeout: float) -> RewardFunctions:
    """The functions on the prompts that were kept."""
    records: Sequence[Prompt] = rows.sources
    return RewardFunctions(
        functions,
        terms.names[-len(functions) :],
        prompts=[
            [message._asdict() for message in record.turns] if record.turns else record.prompt for record in records
        ],
        columns=[record.columns for record in records],
        places=[record.where for record in records],
        required=len(terms.names) == len(functions),
        timeout=timeout,
    )


@dataclasses.dataclass(frozen=True)
class _NumberedRows:
    """Rows of prompts with the number of each in the data."""

    rows: PromptRows

    def __len__(self) -> int:
        return len(self.rows)

    def row_length(self, indices: np.ndarray) -> int:
        return self.rows.row_length(indices)

    def batch(self, indices: np.ndarray, among: np.ndarray | None = None) -> tuple[PromptBatch, Any]:
        return self.rows.batch(indices, among), indices.astype(np.int32)


def host_step(
    make: Callable[[str | None], Callable[..., Generation]],
    rewards: RewardFunctions,
    rows: PromptRows,
    tokenizer: TextTokenizer,
    response_length: int,
) -> HostStep:
    """Between sampling and the update: responses to text, text to values.

    Args:
      make: axis name -> the sampling of an iteration.
      rewards: the reward functions.
      rows: the prompts.
      tokenizer: decodes.
      response_length: R.
    """

    def text(row: int, ids: list[int]) -> str:
        decoded = response_text(rows.rows[row], ids, tokenizer)
        # The answer to messages starts with a space in the Human / Assistant template, which is not its content.
        own_space = rows.sources[row].turns and tokenizer.chat_template is None
        return decoded.removeprefix(" ") if own_space else decoded

    def scored(batch: Batch, sampled: Any, value_BN: Any) -> Batch:
        return dataclasses.replace(batch, row_B=None, scored=ScoredResponses(sampled, value_BN))

    def fill(batch: Batch, sampled: Generation) -> Batch:
        numbers = np.asarray(batch.row_B).tolist()
        responses = zip(np.asarray(sampled.tokens), np.asarray(sampled.mask), strict=True)
        texts = [text(row, ids[mask].tolist()) for row, (ids, mask) in zip(numbers, responses, strict=True)]
        return scored(batch, sampled, rewards(numbers, texts))

    def outline(batch: Batch) -> Batch:
        shape = (len(np.asarray(batch.row_B)), response_length)
        sampled: list[Any] = [np.zeros(shape, kind) for kind in (np.int32, np.bool_, np.float32)]
        return scored(batch, Generation(*sampled), np.zeros((shape[0], len(rewards.functions)), np.float32))

    return HostStep(make, fill, outline)
