"""Completions and dialogues on the console, for `rlhf-jax generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import SamplingConfig
from rlhf_jax.data import chat_ids
from rlhf_jax.data.batches import PromptRows, bucket_length, by_length, default_buckets
from rlhf_jax.data.dialogues import HEADERS, Message
from rlhf_jax.errors import UserError
from rlhf_jax.generate import generate, stream, uniform_numbers
from rlhf_jax.pretrained.source import on_base, open_source, with_template
from rlhf_jax.runs.lifecycle import say

# ROWS responses are sampled per batch. AHEAD rows are read at once, to batch rows of similar length.
ROWS, AHEAD = 32, 256

if TYPE_CHECKING:
    from rlhf_jax.cli.generate import Config


class Speaker:
    """A run's model with its sampling settings."""

    def __init__(self, config: Config) -> None:
        source = open_source(on_base(config.run, config.base), stages=("pretrain", "sft", "ppo"))
        source = with_template(source, config.chat_template)
        self.config = config
        self.tokenizer = source.tokenizer
        self.model = source.network()
        self.context = self.model.config.context
        self.room = self.context - config.max_new_tokens
        if self.room < 1:
            raise UserError(
                f"max_new_tokens: expected at most {self.context - 1}, to leave room for a prompt in the model's "
                f"context of {self.context} tokens, got {config.max_new_tokens}; use --max-new-tokens "
                f"{max(self.context // 2, 1)}"
            )
        self.params = source.params()
        self.key = jax.random.key(config.seed)
        self.sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            pad_id=self.tokenizer.pad_id,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            segments=config.segments,
            cache_dtype=config.cache_dtype,
        )

    def refuse(self, ids: Sequence[int], where: str) -> None:
        """Checks the length of a prompt.

        Raises:
          UserError: if the prompt is empty, or leaves no room for the response.
        """
        if not ids:
            raise UserError(
                f"{where}: expected text, got an empty prompt, and this model's tokenizer adds no start token"
            )
        if len(ids) > self.room:
            raise UserError(
                f"{where}: expected at most {self.room} tokens, the context of {self.context} minus max_new_tokens "
                f"{self.config.max_new_tokens}, got {len(ids)}"
            )

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Text of one response to each prompt."""
        numbers = []
        for _ in range(0, len(prompts), ROWS):
            self.key, key = jax.random.split(self.key)
            numbers.append(np.asarray(uniform_numbers(key, ROWS, self.config.max_new_tokens)))
        # Each prompt has its own row of random numbers, so its response does not depend on the others in its batch.
        uniform_NR = np.concatenate(numbers)
        texts = [""] * len(prompts)
        for part in by_length(list(map(len, prompts)), ROWS):
            for place, text in zip(part, self.side_by_side([prompts[place] for place in part], uniform_NR[part])):
                texts[place] = text
        return texts

    def side_by_side(self, prompts: Sequence[Sequence[int]], uniform_BR: np.ndarray) -> list[str]:
        """Responses of one batch, each sampled with its own row of uniform numbers."""
        # Widths and row counts are bucketed, so that few shapes are compiled.
        width = bucket_length(max(map(len, prompts)), default_buckets(self.room))
        rows = np.arange(1 << (len(prompts) - 1).bit_length()) % len(prompts)
        batch = PromptRows(list(prompts), width, self.tokenizer.pad_id).batch(rows)
        out = generate(
            self.model,
            self.params,
            batch.tokens_BP,
            batch.mask_BP,
            self.key,
            self.sampling,
            uniform_BR=jnp.asarray(uniform_BR[rows]),
        )
        decode = self.tokenizer.decode
        tokens_BR, mask_BR = np.asarray(out.tokens), np.asarray(out.mask)
        kept = zip(tokens_BR[: len(prompts)], mask_BR[: len(prompts)])
        # Decoded alone, a response would lose its leading space: SentencePiece strips one at the start of a text.
        wholes = [decode([*ids, *row[mask].tolist()]) for ids, (row, mask) in zip(prompts, kept)]
        return [whole[len(decode(ids)) :] for ids, whole in zip(prompts, wholes)]

    def spoken(self, ids: Sequence[int]) -> Iterator[str]:
        """Text of the response to one prompt, streamed as it is sampled."""
        width = bucket_length(len(ids), default_buckets(self.room))
        batch = PromptRows([list(ids)], width, self.tokenizer.pad_id).batch(np.arange(1))
        self.key, key = jax.random.split(self.key)
        decode = self.tokenizer.decode
        columns = stream(self.model, self.params, batch.tokens_BP, batch.mask_BP, key, self.sampling)
        before, printed, text = [*ids], len(decode(ids)), ""
        for token_B, _ in columns:
            before.append(int(token_B[0]))
            text = decode(before)
            # A character made of several tokens decodes only once its last token is there.
            if not text.endswith("\ufffd"):
                yield text[printed:]
                printed = max(printed, len(text))
        yield text[printed:]


def run(config: Config) -> None:
    """Prints completions of the prompts, or starts a chat."""
    speaker = Speaker(config)
    if config.chat:
        chat(speaker)
    elif config.prompt:
        places = [(f"--prompt {number}", text) for number, text in enumerate(config.prompt, start=1)]
        complete(speaker, places)
    elif sys.stdin.isatty():
        for place in lines("prompt> "):
            complete(speaker, [place])
    else:
        complete(speaker, list(lines("")))


def complete(speaker: Speaker, prompts: Sequence[tuple[str, str]]) -> None:
    """Prints each prompt with its completions.

    Args:
      prompts: (source, text) pairs; the source names the prompt in errors.
    """
    rows = []
    for where, text in prompts:
        ids = [*speaker.tokenizer.start_ids, *speaker.tokenizer.encode(checked(text, where))]
        speaker.refuse(ids, where)
        rows += [(text, ids)] * speaker.config.samples
    if len(rows) == 1:
        print(rows[0][0], end="", flush=True)
        for piece in speaker.spoken(rows[0][1]):
            print(piece, end="", flush=True)
        print(flush=True)
        return
    for start in range(0, len(rows), AHEAD):
        part = rows[start : start + AHEAD]
        for number, ((text, _), answer) in enumerate(zip(part, speaker.answers([ids for _, ids in part]))):
            if start + number:
                print()
            print(text + answer, flush=True)


def chat(speaker: Speaker) -> None:
    """Chats line by line; the oldest exchanges are dropped once the dialogue no longer fits the context."""
    messages: list[Message] = []
    for where, text in lines("you> "):
        if text.strip() == "/quit":
            break
        if not text.strip():
            continue
        messages.append(Message("user", checked(text, where)))
        while len(messages) > 2 and len(chat_ids(messages, speaker.tokenizer)) > speaker.room:
            del messages[:2]
            say("(dropped the oldest message and its answer: the dialogue no longer fits the context)")
        ids = chat_ids(messages, speaker.tokenizer)
        speaker.refuse(ids, where)
        if speaker.tokenizer.chat_template is None:
            # A model that was not trained to end its turn continues with the user's.
            answer = speaker.answers([ids])[0].split(HEADERS["user"])[0].strip()
            print(answer, flush=True)
        else:
            answer, spoken = "", ""
            for piece in speaker.spoken(ids):
                spoken += piece
                print(spoken.strip()[len(answer) :], end="", flush=True)
                answer = spoken.strip()
            print(flush=True)
        messages.append(Message("assistant", answer))


def lines(invitation: str) -> Iterator[tuple[str, str]]:
    """Yields (source, text) for each line of standard input.

    Args:
      invitation: the prompt shown if standard input is a terminal.
    """
    if sys.stdin.isatty():
        number = 0
        while True:
            number += 1
            try:
                yield f"line {number}", input(invitation)
            except EOFError:
                print()
                return
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input:{number}: byte {error.start + 1}: {error.reason}, expected UTF-8"
            ) from None
        if text := text.rstrip("\r\n"):
            yield f"standard input:{number}", text


def checked(text: str, where: str) -> str:
    """Returns the text.

    Raises:
      UserError: if its bytes were not UTF-8, which Python decodes to lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1}: expected UTF-8, got other bytes") from None
    return text
