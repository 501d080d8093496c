"""Completions and dialogues on the console: what `rlhf-jax generate` does."""

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
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.lifecycle import say

# Responses sampled side by side; of more prompts, so many are read ahead and those of like length go together.
ROWS, AHEAD = 32, 256

if TYPE_CHECKING:
    from rlhf_jax.cli.generate import Config


class Speaker:
    """A run's model and how to sample from it."""

    def __init__(self, config: Config) -> None:
        source = open_source(config.run, stages=("pretrain", "sft", "ppo"))
        self.config = config
        self.tokenizer = source.tokenizer
        self.model = source.network()
        self.context = self.model.config.context
        self.room = self.context - config.max_new_tokens
        if self.room < 1:
            raise UserError(
                f"max_new_tokens: found {config.max_new_tokens}, which leaves no room for a prompt in the model's "
                f"context of {self.context} tokens; use --max-new-tokens {max(self.context // 2, 1)}"
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
        """Raises UserError if a prompt is nothing, or leaves no room for the response."""
        if not ids:
            raise UserError(
                f"{where}: found an empty prompt, wanted text: nothing stands before a text of this model's"
            )
        if len(ids) > self.room:
            raise UserError(
                f"{where}: found {len(ids)} tokens, wanted {self.room} or less: the context of {self.context} less "
                f"max_new_tokens {self.config.max_new_tokens}"
            )

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The text of one response to each prompt."""
        numbers = []
        for _ in range(0, len(prompts), ROWS):
            self.key, key = jax.random.split(self.key)
            numbers.append(np.asarray(uniform_numbers(key, ROWS, self.config.max_new_tokens)))
        # A prompt is answered by the numbers of its place, whatever else is sampled beside it.
        uniform_NR = np.concatenate(numbers)
        texts = [""] * len(prompts)
        for part in by_length(list(map(len, prompts)), ROWS):
            for place, text in zip(part, self.side_by_side([prompts[place] for place in part], uniform_NR[part])):
                texts[place] = text
        return texts

    def side_by_side(self, prompts: Sequence[Sequence[int]], uniform_BR: np.ndarray) -> list[str]:
        """Responses of one batch, each drawn with its row of numbers."""
        # Few shapes, each compiled once: widths are buckets, and so are numbers of rows.
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
        # Decoded alone, a response would lose a space before it, as SentencePiece takes one from the front of a text.
        wholes = [decode([*ids, *row[mask].tolist()]) for ids, (row, mask) in zip(prompts, kept)]
        return [whole[len(decode(ids)) :] for ids, whole in zip(prompts, wholes)]

    def spoken(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of a response to one prompt, in the pieces in which it is sampled."""
        width = bucket_length(len(ids), default_buckets(self.room))
        batch = PromptRows([list(ids)], width, self.tokenizer.pad_id).batch(np.arange(1))
        self.key, key = jax.random.split(self.key)
        decode = self.tokenizer.decode
        columns = stream(self.model, self.params, batch.tokens_BP, batch.mask_BP, key, self.sampling)
        before, said, text = [*ids], len(decode(ids)), ""
        for token_B, _ in columns:
            before.append(int(token_B[0]))
            text = decode(before)
            # A character of several tokens is none until its last one is there.
            if not text.endswith("\ufffd"):
                yield text[said:]
                said = max(said, len(text))
        yield text[said:]


def run(config: Config) -> None:
    """Prints completions of the prompts, or holds a dialogue."""
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
    """Prints each prompt with its completions. prompts: (where it came from, text)."""
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
    """Answers line by line; what no longer fits the context is forgotten, the oldest exchange first."""
    said: list[Message] = []
    for where, text in lines("you> "):
        if text.strip() == "/quit":
            break
        if not text.strip():
            continue
        said.append(Message("user", checked(text, where)))
        while len(said) > 2 and len(chat_ids(said, speaker.tokenizer)) > speaker.room:
            del said[:2]
            say("(the oldest message and its answer no longer fit the context and are forgotten)")
        ids = chat_ids(said, speaker.tokenizer)
        speaker.refuse(ids, where)
        if speaker.tokenizer.chat_template is None:
            # A model that never saw the end of a turn goes on with the other side's.
            answer = speaker.answers([ids])[0].split(HEADERS["user"])[0].strip()
            print(answer, flush=True)
        else:
            answer, spoken = "", ""
            for piece in speaker.spoken(ids):
                spoken += piece
                print(spoken.strip()[len(answer) :], end="", flush=True)
                answer = spoken.strip()
            print(flush=True)
        said.append(Message("assistant", answer))


def lines(invitation: str) -> Iterator[tuple[str, str]]:
    """(where, text) of each line of standard input. invitation: shown to a person at a terminal."""
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
            raise UserError(f"standard input:{number}: byte {error.start + 1}: {error.reason}, wanted UTF-8") from None
        if text := text.rstrip("\r\n"):
            yield f"standard input:{number}", text


def checked(text: str, where: str) -> str:
    """The text, unless its bytes were not UTF-8: Python hides those in characters of no meaning."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1}: found bytes that are not UTF-8") from None
    return text
