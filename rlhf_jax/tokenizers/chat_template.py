"""Chat templates: rendering of messages in the format that a published model was trained on.

A template is a Jinja program from an external source, so it runs in a sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    import jinja2

Turns = Sequence[tuple[str, str]]  # (role, content) of each message

# Today's date for templates, whatever the day: the ids of a row must not change from one day to the next, nor between
# training and sampling. Llama 3.1's template falls back to the same date.
TODAY = datetime.datetime(2024, 7, 26)
_NO_MARKS = ("", "")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Errors that the code in a template may raise, in addition to jinja2's own.
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """Chat template of a model; equal if source and special tokens are equal."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Stores the template, which is compiled when it is first used.

        Args:
          source: the Jinja template.
          tokens: variables for the texts of special tokens, such as "eos_token".
        """
        self.source = source
        self.tokens = dict(tokens or {})

    @classmethod
    def named(cls, templates: Iterable[Mapping[str, str]], tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """Selects the template named "default" from several, [{"name": …, "template": …}, …]."""
        sources = {entry["name"]: entry["template"] for entry in templates}
        if "default" not in sources:
            raise UserError(f"chat_template: expected one named default, got templates named {', '.join(sources)}")
        return cls(sources["default"], tokens)

    @property
    def marks_answers(self) -> bool:
        """True if the template marks the targets itself, with {% generation %} blocks."""
        return _GENERATION.search(self.source) is not None

    def render(
        self, messages: Turns, *, add_generation_prompt: bool = False, generation_marks: tuple[str, str] = _NO_MARKS
    ) -> str:
        """Renders the messages as text.

        Args:
          add_generation_prompt: append the header of the assistant's answer.
          generation_marks: texts placed before and after each {% generation %} block.

        Raises:
          UserError: if the template rejects the messages (with its own message), or is not a valid template.
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
        """The first of the special tokens that end an answer; None if there is none, or if rendering fails."""
        try:
            prompt = self.render([("user", "a")], add_generation_prompt=True)
            whole = self.render([("user", "a"), ("assistant", "b")])
        except UserError:
            return None
        return SpecialTexts.of(tuple(special)).first_of_end(whole[len(prompt) :]) if whole.startswith(prompt) else None

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


class SpecialTexts:
    """Matcher for the texts of special tokens, including those that could form across the edges of a message."""

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
    def of(cls, texts: tuple[str, ...]) -> SpecialTexts:
        return cls(texts)

    def openings(self, text: str) -> set[int]:
        """Positions of characters to hide, so that the text names no token, alone or with its surroundings."""
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
        """Splits into (answer, special tokens at its end); white space after those is dropped."""
        match = self._end.fullmatch(text)
        return (match["text"], match["end"]) if match else (text, "")

    def first_of_end(self, text: str) -> str | None:
        match = self._one.match(self.split_end(text)[1])
        return match[0] if match else None


@functools.cache
def _environment() -> jinja2.Environment:
    """Sandboxed environment for templates, with the names that transformers provides."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError('chat templates need jinja2; install it with: pip install "rlhf_jax[hf]"') from None

    class Generation(jinja2.ext.Extension):
        """Tag {% generation %} … {% endgeneration %}, which renders its body between the two marks."""

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
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=TODAY.strftime)
    return environment


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
