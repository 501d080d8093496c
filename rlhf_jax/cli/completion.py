"""Completions and dialogues on the console, for `rlhf-jax generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_jax.config import SamplingConfig
from rlhf_jax.data import chat_ids
from rlhf_jax.data.dialogues import HEADERS, Message
from rlhf_jax.errors import UserError
from rlhf_jax.inference import Sampler
from rlhf_jax.pretrained.source import LANGUAGE, on_base, open_source, with_template
from rlhf_jax.runs.lifecycle import say

# Rows that are read at once, to batch rows of similar length.
AHEAD = 256

if TYPE_CHECKING:
    from rlhf_jax.cli.generate import Config


class Speaker(Sampler):
    """A run's model with its sampling settings."""

    def __init__(self, config: Config) -> None:
        source = open_source(on_base(config.run, config.base), stages=LANGUAGE)
        source = with_template(source, config.chat_template)
        sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            stop_ids=source.tokenizer.stop_ids,
            pad_id=source.tokenizer.pad_id,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            segments=config.segments,
            cache_dtype=config.cache_dtype,
        )
        super().__init__(source, sampling, config.seed)
        self.config = config


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
