"""Completions and dialogues on the console, for `rlhf-jax generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.data import Ledger, chat_ids, read_records
from rlhf_jax.data.dialogues import HEADERS, TOOL, Message
from rlhf_jax.errors import UserError
from rlhf_jax.inference import Sampler
from rlhf_jax.pretrained.source import LANGUAGE, on_base, open_source, with_template
from rlhf_jax.runs.lifecycle import say
from rlhf_jax.tokenizers.chat_template import TOOLS

# Rows that are read at once, to batch rows of similar length.
AHEAD = 256

if TYPE_CHECKING:
    from rlhf_jax.cli.generate import Config


class Speaker(Sampler):
    """A run's model with its sampling settings."""

    def __init__(self, config: Config) -> None:
        source = open_source(on_base(config.run, config.base), stages=LANGUAGE)
        source = with_template(source, config.chat_template)
        super().__init__(
            source,
            config.seed,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            segments=config.segments,
            cache_dtype=config.cache_dtype,
        )
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
    if speaker.config.start:
        messages += started(speaker.config.start)
        answer(speaker, messages, speaker.config.start)
    for where, text in lines("you> "):
        if text.strip() == "/quit":
            break
        if not text.strip():
            continue
        if text.startswith("/tool "):
            messages.append(Message(TOOL, checked(text.removeprefix("/tool "), where)))
        else:
            messages.append(Message("user", checked(text, where)))
        answer(speaker, messages, where)


def started(path: str) -> tuple[Message, ...]:
    """The dialogue that a chat starts from.

    Raises:
      UserError: for a file of no row or several, and for a prompt that is text.
    """
    prompts = read_records(Path(path), "prompts", Ledger())
    if len(prompts) != 1:
        raise UserError(f"{path}: expected one row, the start of the chat, got {len(prompts)}")
    if not prompts[0].turns:
        raise UserError(
            f"{prompts[0].where}: field 'prompt': expected messages, got text, which a response continues; use "
            "--prompt for text"
        )
    return prompts[0].turns


def answer(speaker: Speaker, messages: list[Message], where: str) -> None:
    """Prints the model's answer to the messages, and adds it to them."""
    told = sum(message.role in (TOOLS, "system") for message in messages[:2])
    while len(chat_ids(messages, speaker.tokenizer)) > speaker.room:
        # Up to the next question: an answer or a call has no meaning without what it answers.
        later = [place for place, message in enumerate(messages) if message.role == "user" and place > told]
        if not later:
            break
        del messages[told : later[0]]
        say("(dropped the oldest message and its answer: the dialogue no longer fits the context)")
    ids = chat_ids(messages, speaker.tokenizer)
    speaker.refuse(ids, where)
    if speaker.tokenizer.chat_template is None:
        # A model that was not trained to end its turn continues with the user's.
        said = speaker.answers([ids])[0].split(HEADERS["user"])[0].strip()
        print(said, flush=True)
    else:
        said, spoken = "", ""
        for piece in speaker.spoken(ids):
            spoken += piece
            print(spoken.strip()[len(said) :], end="", flush=True)
            said = spoken.strip()
        print(flush=True)
    messages.append(Message("assistant", said))


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
