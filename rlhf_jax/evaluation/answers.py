"""Answers to prompts: sampled from a model in batches, with what the model says of them, or read from a file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params, PromptBatch
from rlhf_jax.config import SamplingConfig
from rlhf_jax.data import Ledger, Prompt, PromptRows, bucket_length, prompt_ids, response_text
from rlhf_jax.data.batches import by_length, default_buckets
from rlhf_jax.data.forms import COMPLETIONS, dialogue_field, exchange_of
from rlhf_jax.data.jsonl import read_rows
from rlhf_jax.data.rows import Row, Useless
from rlhf_jax.errors import UserError
from rlhf_jax.generate import generate
from rlhf_jax.logprobs import response_losses
from rlhf_jax.model import Transformer
from rlhf_jax.packing import padded_episodes
from rlhf_jax.pretrained.source import Source

Key = tuple[str, tuple]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
      text: continues a prompt that is text; the assistant's content, without a leading space, for one of messages.
      ended: False if it was cut at the length limit, None if that is not known.
      tokens: number of tokens, the end included; None for an answer from a file.
      entropy: mean entropy of the model's distribution over its tokens, in nats per token.
      kl: log π − log π_ref of the answer, summed over its tokens, in nats.
    """

    text: str
    ended: bool | None = None
    tokens: int | None = None
    entropy: float | None = None
    kl: float | None = None


class Language(NamedTuple):
    """A language model with its parameters in memory."""

    source: Source
    network: Transformer
    params: Params

    @classmethod
    def of(cls, source: Source) -> Language:
        return cls(source, source.network(), source.params())


def key_of(prompt: Prompt) -> Key:
    """A prompt's content, by which files of answers are matched."""
    return prompt.prompt, prompt.turns


def room_of(source: Source, max_new_tokens: int) -> int:
    """Tokens that a prompt may have.

    Raises:
      UserError: if the model's context has no room for a prompt and an answer.
    """
    room = source.model.context - max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens: expected at most {source.model.context - 1}, to leave room for a prompt in the context "
            f"of {source.model.context} tokens of {source.where}, got {max_new_tokens}"
        )
    return room


def unfit(prompt: Prompt, source: Source, room: int) -> str:
    """Why a model cannot answer a prompt, "" if it can."""
    length = len(prompt_ids(prompt, source.tokenizer))
    if not length:
        return f"no tokens for {source.where}"
    return f"longer than {room} tokens, the context of {source.where} less max_new_tokens" if length > room else ""


def sample_answers(
    language: Language,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    batch: int = 32,
    seed: int = 0,
    reference: Language | None = None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Sample answers to prompts in batches; yields (index of the prompt, its answers), prompts of similar length first.

    Random numbers belong to a prompt's place and an answer's number, so an answer depends on neither the other prompts
    nor the number of answers.

    Args:
      language: model to sample from.
      prompts: that fit its context.
      places: number of each prompt, from which its random numbers are drawn.
      samples: answers per prompt.
      max_new_tokens: maximum length of an answer, in tokens.
      temperature: of sampling, and of the entropy and KL.
      batch: rows at a time.
      seed: of sampling.
      reference: model with the same tokenizer for `Answer.kl`.
    """
    tokenizer = language.source.tokenizer
    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    buckets = default_buckets(room_of(language.source, max_new_tokens))
    together = math.ceil(samples / math.ceil(samples / batch))
    settings = SamplingConfig(
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=temperature,
        samples=together,
    )
    for part in by_length(list(map(len, rows)), max(1, batch // together)):
        width = bucket_length(max(len(rows[at]) for at in part), buckets)
        # The last group is padded with its own rows, so that one program serves all.
        repeated = part[np.arange(max(1, batch // together)) % len(part)]
        prompt_rows = PromptRows([rows[at] for at in repeated], width, tokenizer.pad_id)
        uniform_BSR = _uniform(seed, np.array([places[at] for at in repeated]), samples, max_new_tokens)
        found: list[list[Answer]] = [[] for _ in part]
        for first in range(0, samples, together):
            # The last of several rounds repeats some answers, which are left out again.
            numbers = np.minimum(np.arange(first, first + together), samples - 1)
            answers = _one_round(
                language,
                reference,
                prompt_rows,
                uniform_BSR[:, numbers].reshape(-1, max_new_tokens),
                settings,
                [bool(prompts[at].turns) for at in repeated],
            )
            for place, several in enumerate(found):
                several += answers[place * together : place * together + min(together, samples - first)]
        yield from zip(part.tolist(), found, strict=True)


def _one_round(
    language: Language,
    reference: Language | None,
    rows: PromptRows,
    uniform_BR: np.ndarray,
    settings: SamplingConfig,
    turns: Sequence[bool],
) -> list[Answer]:
    """The answers to the prompts of one batch, settings.samples to each; turns: True for prompts of messages."""
    tokenizer, batch = language.source.tokenizer, rows.batch(np.arange(len(rows)))
    prompts = (batch.tokens_BP, batch.mask_BP)
    # The key is not used: the numbers are given.
    key, uniform = jax.random.key(0), jnp.asarray(uniform_BR)
    out = generate(language.network, language.params, *prompts, key, settings, uniform_BR=uniform)
    ids_BR, mask_BR = np.asarray(out.tokens), np.asarray(out.mask)
    entropy_B, kl_B = _measured(language, reference, _beside(batch, ids_BR, mask_BR), mask_BR, settings.temperature)
    answers = []
    for row, (ids_R, mask_R) in enumerate(zip(ids_BR, mask_BR, strict=True)):
        ids, prompt = ids_R[mask_R].tolist(), row // settings.samples
        text = response_text(rows.rows[prompt], ids, tokenizer)
        # The answer to messages starts with a space in the Human / Assistant template, which is not its content.
        own_space = turns[prompt] and tokenizer.chat_template is None
        answers.append(
            Answer(
                text=text.removeprefix(" ") if own_space else text,
                ended=ids[-1] in tokenizer.stop_ids,
                tokens=len(ids),
                entropy=None if entropy_B is None else float(entropy_B[row]),
                kl=None if kl_B is None else float(kl_B[row]),
            )
        )
    return answers


@functools.partial(jax.jit, static_argnums=(2, 3))
def _numbers(key: Array, place_B: Array, samples: int, length: int) -> Array:
    def of_prompt(place: Array) -> Array:
        # A key for each answer, so that its numbers do not depend on how many there are.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, place), jnp.arange(samples))
        return jax.vmap(lambda one: jax.random.uniform(one, (length,), jnp.float32))(keys)

    return jax.vmap(of_prompt)(place_B)


def _uniform(seed: int, place_B: np.ndarray, samples: int, length: int) -> np.ndarray:
    """Uniform numbers to draw the tokens of each answer with, [B, samples, R]."""
    return np.asarray(_numbers(jax.random.key(seed), place_B.astype(np.int32), samples, length))


def _beside(prompts: PromptBatch, ids_BR: np.ndarray, mask_BR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of each answer after its prompt, [B n, T], for n answers to each prompt."""
    times = len(ids_BR) // len(prompts.tokens_BP)
    tokens_BP, mask_BP = (np.repeat(np.asarray(x), times, axis=0) for x in (prompts.tokens_BP, prompts.mask_BP))
    return np.concatenate([tokens_BP, ids_BR], axis=1), np.concatenate([mask_BP, mask_BR], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _logp_and_entropy(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, mask_BR: Array, *, temperature: float
) -> tuple[Array, Array]:
    """Log-probability of each response, summed, and mean entropy at its tokens, [B] each."""
    rows = padded_episodes(tokens_BT, mask_BT, mask_BR, None)
    loss_BR, entropy_BR = response_losses(model, params, rows, temperature=temperature)
    count_B = jnp.maximum(jnp.sum(mask_BR, axis=1), 1)
    logp_B = -jnp.sum(jnp.where(mask_BR, loss_BR, 0.0), axis=1)
    return logp_B, jnp.sum(jnp.where(mask_BR, entropy_BR, 0.0), axis=1) / count_B


def _measured(
    language: Language,
    reference: Language | None,
    whole: tuple[np.ndarray, np.ndarray],
    mask_BR: np.ndarray,
    temperature: float,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(entropy, KL to the reference) of each answer, [B] each; None for greedy answers, and without a reference."""
    if temperature == 0:
        return None, None
    logp_B, entropy_B = _logp_and_entropy(language.network, language.params, *whole, mask_BR, temperature=temperature)
    if reference is None:
        return np.asarray(entropy_B), None
    ref_logp_B, _ = _logp_and_entropy(reference.network, reference.params, *whole, mask_BR, temperature=temperature)
    return np.asarray(entropy_B), np.asarray(logp_B) - np.asarray(ref_logp_B)


def read_answers(path: str, ledger: Ledger) -> list[tuple[Prompt, Answer]]:
    """Read a JSONL file of answers: rows with a prompt, in any of the forms that prompts have, and its answer.

    The answer is under `answer`, `completion`, `response`, `output` or `solution`, or the last message of a dialogue.
    It may be empty. "ended": false says that it was cut. Several rows with one prompt are several answers to it.

    Args:
      path: JSONL file.
      ledger: gets the rows without a prompt; the others are for `matched` to decide.

    Raises:
      UserError: with file, line and field.
    """
    found = []
    empty = True
    for where, fields in read_rows(path):
        empty = False
        ledger.read(where)
        try:
            found.append(_answered(Row(where, fields)))
        except Useless as useless:
            ledger.drop(where, str(useless))
    if empty:
        raise UserError(f"{path}: expected one JSON object on each line, got a file without rows")
    return found


def matched(
    path: str, rows: Sequence[tuple[Prompt, Answer]], prompts: Sequence[Prompt], ledger: Ledger
) -> list[list[Answer]]:
    """The answers of a file to each of the prompts; the ledger gets the rows with other prompts.

    Raises:
      UserError: for a prompt without an answer, or with another number of answers than the first has.
    """
    answers: dict[Key, list[Answer]] = {key_of(prompt): [] for prompt in prompts}
    for prompt, answer in rows:
        if key_of(prompt) in answers:
            ledger.keep(prompt.where)
            answers[key_of(prompt)].append(answer)
        else:
            ledger.drop(prompt.where, "an answer to none of the prompts that are compared")
    missing = [prompt.where for prompt in prompts if not answers[key_of(prompt)]]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: expected an answer to each of the {len(prompts)} prompts, got none to {missing[0]}{others}; add "
            "them, or use --prompts with those that all files answer"
        )
    counts = {prompt.where: len(answers[key_of(prompt)]) for prompt in prompts}
    (first, count), *_ = counts.items()
    for where, other in counts.items():
        if other != count:
            raise UserError(f"{path}: expected {count} answers to each prompt, as to {first}, got {other} to {where}")
    return [answers[key_of(prompt)] for prompt in prompts]


def _answered(row: Row) -> tuple[Prompt, Answer]:
    """The prompt and the answer of a row."""
    row.refuse_unread()
    names = row.among(COMPLETIONS)
    if len(names) > 1:
        raise row.wrong(names[1], f"{names[0]!r} as well", "one field with the answer; remove or rename one")
    name = names[0] if names else dialogue_field(row)
    if name is None:
        raise row.missing("'answer'", f"; it is read from one of {', '.join(COMPLETIONS)}, or from messages")
    found = exchange_of(row, [(name, row.value(name))])
    if found.rests:
        got = "messages of " + ", ".join(message.role for message in found.rests[0])
        raise row.wrong(name, got, "one message of the assistant")
    if not found.prompt.strip():
        raise Useless("empty prompt")
    (text,) = found.texts
    others = {field: value for field, value in row.fields.items() if field not in ("prompt", name)}
    ended = row.ended("ended") if "ended" in row else None
    return Prompt(found.prompt, row.where, found.turns, others), Answer(
        text.removeprefix(" ") if found.turns else text, ended
    )
