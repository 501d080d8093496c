"""Chat templates: messages as the text that a published model was trained on, as token ids, and as targets.

A template is a Jinja program that came with a model: it runs in a sandbox. Special tokens are those that the template
itself writes. The text of one in a message stays text: its first character is replaced, before the template runs, by a
stand-in that occurs nowhere, and put back once the rendering has been cut at its special tokens.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import TextTokenizer

if TYPE_CHECKING:
    import jinja2

Turns = Sequence[tuple[str, str]]  # (role, content) of each message
Section = tuple[str, bool]  # text, and whether it is a target

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that no text is meant to hold
_NO_MARKS = ("", "")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What a template's own lines may raise, beside jinja2's errors.
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A model's template of messages; two are equal if they render alike."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Args:
        source: the Jinja template.
        tokens: variables that it may use for the texts of special tokens, such as "eos_token".
        """
        self.source = source
        self.tokens = dict(tokens or {})

    @classmethod
    def named(cls, templates: Iterable[Mapping[str, str]], tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """Of several, [{"name": …, "template": …}, …], the one called "default"."""
        sources = {entry["name"]: entry["template"] for entry in templates}
        if "default" not in sources:
            raise UserError(f"chat_template: found templates named {', '.join(sources)}, wanted one named default")
        return cls(sources["default"], tokens)

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself what of an answer is a target, in {% generation %} blocks."""
        return _GENERATION.search(self.source) is not None

    def render(
        self, messages: Turns, *, add_generation_prompt: bool = False, generation_marks: tuple[str, str] = _NO_MARKS
    ) -> str:
        """The messages as text.

        Args:
          add_generation_prompt: go on to the place where the assistant answers.
          generation_marks: what is put before and after each {% generation %} block.
        Raises: UserError with the template's own words if it refuses the messages, or is no template.
        """
        template = self._compiled
        import jinja2

        try:
            return template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=generation_marks,
                **self.tokens,
            )
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise UserError(f"chat template: {_one_line(error)}") from None

    def turn_end(self, special: Collection[str]) -> str | None:
        """The first of the special tokens that end an answer; None if none does, or the template refuses to say."""
        try:
            prompt = self.render([("user", "a")], add_generation_prompt=True)
            whole = self.render([("user", "a"), ("assistant", "b")])
        except UserError:
            return None
        return _Tokens.of(tuple(special)).first_of_end(whole[len(prompt) :]) if whole.startswith(prompt) else None

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = _environment()
        import jinja2

        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template: line {error.lineno}: {_one_line(error)}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and (self.source, self.tokens) == (other.source, other.tokens)

    def __hash__(self) -> int:
        return hash(self.source)


def chat_ids(messages: Turns, tokenizer: TextTokenizer) -> list[int]:
    """The prompt: messages up to the place where the assistant answers."""
    talk = _Talk(messages, tokenizer)
    return talk.ids([talk.render(len(messages), prompt=True)])[0]


def chat_response_ids(messages: Turns, response: str, tokenizer: TextTokenizer, *, ended: bool = True) -> list[int]:
    """What the assistant answers to `chat_ids(messages)`, and the end of its turn if it `ended`.

    Raises: UserError if the template renders an answer otherwise than after its own prompt.
    """
    talk = _Talk([*messages, ("assistant", response)], tokenizer)
    answer = talk.answer(len(messages))
    if answer is None:
        raise UserError(_NOT_AFTER_PROMPT)
    return talk.ids([answer.prompt, answer.text + (answer.end if ended else "")])[1]


def chat_row(messages: Turns, tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a whole dialogue: the assistant's answers and the ends of its turns are targets.

    The template's {% generation %} blocks say what they are. Without any, an answer is what follows the prompt of the
    turns before it, up to the special token that ends the turn. A template may render an answer otherwise once others
    follow (Qwen3 drops its thoughts); what the model is never asked to write after that prompt is no target.

    Raises: UserError if no answer is left.
    """
    talk = _Talk(messages, tokenizer)
    sections = talk.marked_sections() if talk.template.marks_answers else talk.answered_sections()
    if not any(target for _, target in sections):
        raise UserError(_NOT_AFTER_PROMPT)
    ids: list[int] = []
    mask: list[bool] = []
    for (_, target), part in zip(sections, talk.ids([text for text, _ in sections])):
        ids += part
        mask += [target] * len(part)
    return ids, mask


_NOT_AFTER_PROMPT = (
    "chat template: found no answer of the assistant's that is rendered as it would follow the generation prompt; "
    "wanted messages with one (a template that opens with <think> wants it in the answer)"
)


class _Answer(NamedTuple):
    """One of the assistant's turns. prompt: all before it. end: the special tokens that end it, "" if none do."""

    prompt: str
    text: str
    end: str


class _Talk:
    """Messages and a tokenizer; renderings hold stand-ins until `ids` puts back what they stand for."""

    def __init__(self, messages: Turns, tokenizer: TextTokenizer):
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer.name}: found no chat template, wanted one to render messages with")
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template
        self.tokens = _Tokens.of(tuple(tokenizer.special_tokens))
        contents = [content for _, content in messages]
        taken = set(self.template.source).union(*contents, *tokenizer.special_tokens)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        self._marks = (next(free), next(free))
        places = [self.tokens.openings(content) for content in contents]
        hidden = sorted({content[at] for content, found in zip(contents, places) for at in found})
        self._stand_ins = dict(zip(hidden, free))
        self.messages = [
            (
                role,
                "".join(self._stand_ins[c] if at in found else c for at, c in enumerate(content)) if found else content,
            )
            for (role, content), found in zip(messages, places)
        ]

    def render(self, count: int, *, prompt: bool = False) -> str:
        """The first `count` messages; with `prompt`, up to the assistant's answer to them."""
        return self.template.render(self.messages[:count], add_generation_prompt=prompt)

    def ids(self, sections: Sequence[str]) -> list[list[int]]:
        back = {ord(stand_in): character for character, stand_in in self._stand_ins.items()}
        return self.tokenizer.encode_sections(sections, back)

    def answer(self, at: int) -> _Answer | None:
        """The turn of message `at`, the assistant's, when it was the last; None if it does not follow the prompt."""
        prompt, whole = self.render(at, prompt=True), self.render(at + 1)
        if not whole.startswith(prompt):
            return None
        return _Answer(prompt, *self.tokens.split_end(whole[len(prompt) :]))

    def answered_sections(self) -> list[Section]:
        """Sections of the whole rendering, with targets where an answer stands as it follows its prompt."""
        whole = self.render(len(self.messages))
        sections, done = [], 0
        for at, (role, _) in enumerate(self.messages):
            answer = self.answer(at) if role == "assistant" else None
            if answer is None or len(answer.prompt) < done or not whole.startswith("".join(answer)):
                continue
            sections += [(whole[done : len(answer.prompt)], False), (answer.text + answer.end, True)]
            done = len("".join(answer))
        return [*sections, (whole[done:], False)]

    def marked_sections(self) -> list[Section]:
        """Sections of the whole rendering, with targets in its {% generation %} blocks."""
        whole = self.template.render(self.messages, generation_marks=self._marks)
        parts = re.split("[" + "".join(self._marks) + "]", whole)
        return [(part, at % 2 == 1) for at, part in enumerate(parts)]


class _Tokens:
    """The texts of special tokens, and where they stand or may come to stand."""

    def __init__(self, texts: Collection[str]):
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        one = "|".join(map(re.escape, longest_first)) if longest_first else "(?!)"
        self._one = re.compile(one)
        self._opening = re.compile(f"(?={one})")
        self._end = re.compile(rf"(?P<text>.*?)(?P<end>(?:{one})(?:\s*(?:{one}))*)\s*\Z", re.DOTALL)
        self._heads = {text[:size] for text in longest_first for size in range(1, len(text))}
        self._tails = {text[-size:] for text in longest_first for size in range(1, len(text))}
        self._texts = "\0".join(longest_first)
        self._longest = len(longest_first[0]) if longest_first else 0

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, texts: tuple[str, ...]) -> _Tokens:
        return cls(texts)

    def openings(self, text: str) -> set[int]:
        """Places of a text whose characters must be hidden, or it, or it and what stands beside it, name a token."""
        places = {match.start() for match in self._opening.finditer(text)}
        for size in range(1, min(self._longest, len(text) + 1)):
            if text[-size:] in self._heads:
                places.add(len(text) - size)
            if text[:size] in self._tails:
                places.add(size - 1)
        # A template may even write both ends of a token around a message.
        if 0 < len(text) < self._longest and text in self._texts:
            places.add(0)
        return places

    def split_end(self, text: str) -> tuple[str, str]:
        """(what was said, the special tokens at the end); white space that a template puts after them is left out."""
        match = self._end.fullmatch(text)
        return (match["text"], match["end"]) if match else (text, "")

    def first_of_end(self, text: str) -> str | None:
        match = self._one.match(self.split_end(text)[1])
        return match[0] if match else None


@functools.cache
def _environment() -> jinja2.Environment:
    """Where templates run, with the names that transformers gives them."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError('chat templates need jinja2; install it with: pip install "rlhf_jax[hf]"') from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %} renders its body between the two marks."""

        tags = {"generation"}  # noqa: RUF012, jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("marked", [jinja2.nodes.Name("generation_marks", "load")])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def marked(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
            return marks[0] + caller() + marks[1]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes what is special in HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # One moment for the whole run: a row must not change at midnight.
    now = datetime.datetime.now()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now.strftime)
    return environment


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
