"""Token ids and loss masks of messages, rendered with the chat template of a published model.

Only what the template itself writes becomes a special token. The text of a special token inside a message stays text:
its first character is replaced, before the template runs, by a stand-in character that occurs nowhere else, and
restored once the rendering has been split at its special tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.dialogues import TOOL, Message
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.chat_template import TOOLS, SpecialTexts
from rlhf_jax.tokenizers.protocol import TextTokenizer

Turns = Sequence[Message | tuple[str, str]]
Section = tuple[str, bool]  # text, and True if it is a target
Turn = dict[str, Any]  # a message as a chat template gets it

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that ordinary text does not contain


def chat_ids(messages: Turns, tokenizer: TextTokenizer) -> list[int]:
    """Ids of the prompt: the messages and the header of the assistant's turn."""
    talk = _Talk(messages, tokenizer)
    return talk.ids([talk.render(len(messages), prompt=True)])[0]


def dialogue_ids(messages: Turns, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a full dialogue.

    Raises:
      UserError: if the template removes a part of an answer.
    """
    talk = _Talk(messages, tokenizer)
    talk.refuse_cuts(range(len(messages)))
    return talk.ids([talk.render(len(messages))])[0]


def chat_response_ids(messages: Turns, response: str, tokenizer: TextTokenizer, *, ended: bool = True) -> list[int]:
    """Ids of the assistant's response to `chat_ids(messages)`, with the end of its turn if it `ended`.

    Raises:
      UserError: if the template does not render the response directly after its generation prompt, or removes a part.
    """
    talk = _Talk([*messages, ("assistant", response)], tokenizer)
    answer = talk.answer(len(messages))
    talk.refuse_cut(len(messages))
    if answer is None:
        raise UserError(talk.not_after_prompt(len(messages)))
    return talk.ids([answer.prompt, answer.text + (answer.end if ended else "")])[1]


def chat_rest_ids(messages: Turns, rest: Turns, tokenizer: TextTokenizer, *, ended: bool = True) -> list[int]:
    """Ids of the rest of a dialogue, which follows `chat_ids(messages)`, with the end of its last turn if it `ended`.

    Raises:
      UserError: if the template does not render the rest directly after its generation prompt, or removes a part of it.
    """
    talk = _Talk([*messages, *rest], tokenizer)
    talk.refuse_cuts(range(len(messages), len(messages) + len(rest)))
    prompt, whole = talk.render(len(messages), prompt=True), talk.render(len(messages) + len(rest))
    if not whole.startswith(prompt):
        raise UserError(_NOT_AFTER_PROMPT)
    text, end = talk.tokens.split_end(whole[len(prompt) :])
    return talk.ids([prompt, text + (end if ended else "")])[1]


def chat_observation_ids(messages: Turns, observation: Message, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a message that follows the assistant's answer: from the end of its turn to the header of its next answer.

    They do not depend on the answer, whose own ids stay as they were sampled: a mark that no text contains stands for
    it, and what the template writes after that is taken, without the token that ends the turn.

    Raises:
      UserError: if the template refuses the message or does not render it.
    """
    taken = "".join(content for _, content in [*messages, observation])
    mark = next(chr(code) for code in reversed(_PRIVATE_USE) if chr(code) not in taken)
    talk = _Talk([*messages, ("assistant", mark), observation], tokenizer)
    before, found, after = talk.render(len(messages) + 2, prompt=True).rpartition(mark)
    if not found:
        raise UserError("chat template: expected one that renders the answers before the last message, got none of it")
    end = talk.tokens.split_start(after)
    if tokenizer.special_tokens.get(end.strip()) not in tokenizer.stop_ids:
        end = ""
    return talk.ids([before + mark + end, after[len(end) :]])[1]


def chat_row(
    messages: Turns, tokenizer: TextTokenizer, *, unlearned: Collection[int] = ()
) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a full dialogue: the assistant's answers and the ends of its turns are targets.

    The template's {% generation %} blocks define the answers. Without any, an answer is the text after the generation
    prompt of the turns before it, up to the special token that ends the turn. A template may render an earlier answer
    differently (Qwen3 drops its thoughts); text that the model never has to generate after that prompt is no target.

    Args:
      unlearned: places of assistant turns that are no targets.

    Raises:
      UserError: if no answer is left, or if the template removes a part of the last one or of a target.
    """
    talk = _Talk(messages, tokenizer)
    last = max((at for at, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is not None:
        talk.refuse_cut(last)
    marked = talk.template.marks_answers
    sections = talk.marked_sections(unlearned) if marked else talk.answered_sections(unlearned)
    if not any(target for _, target in sections):
        raise UserError(_NOT_AFTER_PROMPT if last is None else talk.not_after_prompt(last))
    ids: list[int] = []
    mask: list[bool] = []
    for (_, target), part in zip(sections, talk.ids([text for text, _ in sections])):
        ids += part
        mask += [target] * len(part)
    return ids, mask


_NOT_AFTER_PROMPT = (
    "chat template: expected messages with an assistant answer that is rendered as it follows the generation prompt, "
    "got none (a template that opens with <think> needs it in the answer; or use --chat-template FILE)"
)


def _shared(first: str, second: str) -> int:
    """Number of characters with which both texts start."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:60]!r} … ({len(text)} characters)"


class _Answer(NamedTuple):
    """An assistant turn. prompt: everything before it. end: the special tokens that end it, "" if there are none."""

    prompt: str
    text: str
    end: str


class _Talk:
    """Messages with a tokenizer; renderings contain stand-in characters until `ids` restores the originals."""

    def __init__(self, messages: Turns, tokenizer: TextTokenizer):
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer.name}: expected a chat template to render messages with, got none")
        turns = [_turn(message) for message in messages]
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template
        if turns and turns[0]["role"] == TOOLS:
            self.template = self.template.for_tools
        self.tokens = SpecialTexts.of(tuple(tokenizer.special_tokens))
        # Within calls and lists of tools, whose texts a template may compare, only whole special tokens are hidden.
        texts = {(turn["content"], True) for turn in turns if isinstance(turn["content"], str)}
        texts |= {(text, False) for turn in turns for value in _further(turn).values() for text in _texts(value)}
        taken = set(self.template.source).union(*(text for text, _ in texts), *tokenizer.special_tokens)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        self._marks = (next(free), next(free))
        self._rendered: dict[tuple[int, bool], str] = {}
        places = {(text, edges): self.tokens.openings(text, edges=edges) for text, edges in texts}
        hidden = sorted({text[at] for (text, _), found in places.items() for at in found})
        self._stand_ins = dict(zip(hidden, free))

        def hide(text: str, *, edges: bool = False) -> str:
            found = places[text, edges]
            return "".join(self._stand_ins[c] if at in found else c for at, c in enumerate(text)) if found else text

        self.messages = []
        for turn in turns:
            changed = {key: _mapped(value, hide) for key, value in _further(turn).items()}
            if isinstance(turn["content"], str):
                changed["content"] = hide(turn["content"], edges=True)
            self.messages.append({"role": turn["role"], **changed})
        self._refuse_unrendered()

    def render(self, count: int, *, prompt: bool = False) -> str:
        """Renders the first `count` messages; with `prompt`, followed by the header of the assistant's answer."""
        if (count, prompt) not in self._rendered:
            text = self.template.render(self.messages[:count], add_generation_prompt=prompt)
            self._rendered[count, prompt] = text
        return self._rendered[count, prompt]

    def ids(self, sections: Sequence[str]) -> list[list[int]]:
        back = {ord(stand_in): character for character, stand_in in self._stand_ins.items()}
        return self.tokenizer.encode_sections(sections, back)

    def answer(self, at: int) -> _Answer | None:
        """The assistant turn `at`, rendered as the last message; None if it does not follow the generation prompt."""
        prompt, whole = self.render(at, prompt=True), self.render(at + 1)
        if not whole.startswith(prompt):
            return None
        return _Answer(prompt, *self.tokens.split_end(whole[len(prompt) :]))

    def _refuse_unrendered(self) -> None:
        """Checks that the template renders tools, each call with its arguments, and the results of calls.

        Raises:
          UserError: for the first of them whose rendering is the same without it.
        """
        for at, turn in enumerate(self.messages):
            parts = list(_without(turn))
            shown = self.messages if turn["role"] == TOOLS else self.messages[: at + 1]
            whole = self._render_or_none(shown) if parts else None
            for name, others in parts:
                if whole is not None and whole == self._render_or_none([*shown[:at], *others, *shown[at + 1 :]]):
                    raise UserError(
                        f"field {name!r}: expected a chat template that renders it, got one that gives the same text "
                        f"without (message {at + 1}, {turn['role']}); use --chat-template FILE, or leave the row out"
                    )
            if turn["content"] is None:
                none, empty = (self._render_or_none([*self.messages[:at], turn | {"content": c}]) for c in (None, ""))
                if empty is not None and (none or "").count("None") > empty.count("None"):
                    raise UserError(
                        "field 'content': expected a chat template that leaves a null content out, got one that writes "
                        'None; use --chat-template FILE, or "" in its place'
                    )

    def _render_or_none(self, messages: Sequence[Turn]) -> str | None:
        """The rendering, None if the template refuses the messages."""
        try:
            return self.template.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant")
        except UserError:
            return None

    def refuse_cuts(self, places: Iterable[int]) -> None:
        """Checks the assistant turns among these places as `refuse_cut` does."""
        for at in places:
            if self.messages[at]["role"] == "assistant":
                self.refuse_cut(at)

    def refuse_cut(self, at: int) -> None:
        """Checks that the template renders the whole of the assistant turn `at` while it is the last message.

        White space does not count, since many templates strip it or put it around thoughts.

        Raises:
          UserError: with the text that the template removes, such as the thoughts of a model that reasons.
        """
        whole = self.render(at + 1)
        content = self.messages[at]["content"] or ""
        said = "".join(content.split())
        if said in "".join(whole.split()):
            return
        prompt = self.render(at, prompt=True)
        shown = "".join(whole[_shared(prompt, whole) :].split())
        kept = next((size for size in range(len(said) - 1, 0, -1) if said[-size:] in shown), 0)
        removed = content
        for character in reversed(said[len(said) - kept :]):
            removed = removed[: removed.rindex(character)]
        back = {ord(stand_in): character for character, stand_in in self._stand_ins.items()}
        raise UserError(
            f"chat template: expected one that renders the whole answer, got one that removes or changes "
            f"{_short(removed.strip().translate(back))}; use --chat-template FILE with a template that keeps it, or "
            "leave it out of the data"
        )

    def not_after_prompt(self, at: int) -> str:
        """The error for an answer that does not follow its generation prompt, with what the prompt adds."""
        prompt, whole = self.render(at, prompt=True), self.render(at + 1)
        added = prompt[_shared(prompt, whole) :]
        if not added:
            return _NOT_AFTER_PROMPT
        return f"{_NOT_AFTER_PROMPT}; the prompt ends with {_short(added)}, which the rendering of the answer lacks"

    def answered_sections(self, unlearned: Collection[int]) -> list[Section]:
        """Sections of the full rendering; answers rendered as they follow their generation prompt are targets."""
        whole = self.render(len(self.messages))
        sections, done = [], 0
        for at, message in enumerate(self.messages):
            answer = self.answer(at) if message["role"] == "assistant" and at not in unlearned else None
            if answer is None or len(answer.prompt) < done or not whole.startswith("".join(answer)):
                continue
            # What a template removes only once others follow makes the answer no target, above.
            self.refuse_cut(at)
            sections += [(whole[done : len(answer.prompt)], False), (answer.text + answer.end, True)]
            done = len("".join(answer))
        return [*sections, (whole[done:], False)]

    def marked_sections(self, unlearned: Collection[int]) -> list[Section]:
        """Sections of the full rendering; its {% generation %} blocks are targets."""
        whole = self.template.render(self.messages, generation_marks=self._marks)
        parts = re.split("[" + "".join(self._marks) + "]", whole)
        answers = [at for at, message in enumerate(self.messages) if message["role"] == "assistant"]
        if unlearned and len(parts) // 2 != len(answers):
            raise UserError(
                f"chat template: expected one {{% generation %}} block for each of the {len(answers)} assistant turns, "
                f"of which some are not to be learned, got {len(parts) // 2}"
            )
        if len(parts) // 2 == len(answers):
            self.refuse_cuts(at for at in answers if at not in unlearned)
        skipped = {2 * block + 1 for block, at in enumerate(answers) if at in unlearned}
        return [(part, at % 2 == 1 and at not in skipped) for at, part in enumerate(parts)]


def _turn(message: Message | tuple[str, str]) -> Turn:
    turn = message.as_row() if isinstance(message, Message) else {"role": message[0], "content": message[1]}
    return turn | {"content": json.loads(turn["content"])} if turn["role"] == TOOLS else turn


def _further(turn: Turn) -> dict[str, Any]:
    """What a turn has beside its role and a content that is text."""
    return {
        key: value for key, value in turn.items() if key != "role" and not (key == "content" and isinstance(value, str))
    }


def _texts(value: Any) -> Iterator[str]:
    """The texts within lists and objects, and the keys of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value:
            yield from _texts(part)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with each text within it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return value


def _without(turn: Turn) -> Iterator[tuple[str, list[Turn]]]:
    """(key, the turn without it) for each part of a turn that a template may leave out."""
    if turn["role"] == TOOLS:
        for at in range(len(turn["content"])):
            rest = turn["content"][:at] + turn["content"][at + 1 :]
            yield TOOLS, [turn | {"content": rest}] if rest else []
    elif turn["role"] == TOOL and turn["content"]:
        yield "content", [turn | {"content": ""}]
    calls = turn.get("tool_calls", [])
    for at, call in enumerate(calls):
        rest = calls[:at] + calls[at + 1 :]
        said = turn | {"tool_calls": rest} if rest else {"role": turn["role"], "content": turn["content"] or ""}
        yield "tool_calls", [said]
        function = call.get("function", call)
        if function["arguments"]:
            emptied = function | {"arguments": {}}
            emptied = call | {"function": emptied} if "function" in call else emptied
            yield "arguments", [turn | {"tool_calls": [*calls[:at], emptied, *calls[at + 1 :]]}]
