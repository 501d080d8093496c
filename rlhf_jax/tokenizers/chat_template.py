"""Chat templates: rendering of messages in the format that a published model was trained on.

A template is a Jinja program from an external source, so it runs in a sandbox, and with limits (bounded_jinja.py).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_jax.errors import UserError, install_command

if TYPE_CHECKING:
    import jinja2

Made = TypeVar("Made")
# Of each message (role, content), or all of its keys. A first message of the role "tools" has the list of tools.
Turns = Sequence[tuple[str, str] | Mapping[str, Any]]

# Today's date for templates, whatever the day: the ids of a row must not change from one day to the next, nor between
# training and sampling. Llama 3.1's template falls back to the same date.
TODAY = datetime.datetime(2024, 7, 26)
_NO_MARKS = ("", "")
TOOLS = "tools"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Errors that the code in a template may raise, in addition to jinja2's own.
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """Chat template of a model; equal if source and special tokens are equal."""

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, *, where: str = "", of_tools: str | None = None
    ):
        """Stores the template, which is compiled when it is first used.

        Args:
          source: the Jinja template.
          tokens: variables for the texts of special tokens, such as "eos_token".
          where: file and field of the template, for errors in its syntax.
          of_tools: the Jinja template for dialogues with tools, if there is another.
        """
        self.source, self._of_tools, self._where = source, of_tools, where
        self._label = f"{where}: chat template" if where else "chat template"
        self.tokens = dict(tokens or {})

    @classmethod
    def named(
        cls, templates: Iterable[Mapping[str, str]], tokens: Mapping[str, str] | None = None, *, where: str = ""
    ) -> ChatTemplate:
        """Selects from several, [{"name": …, "template": …}, …], the one named "default", and "tool_use" for tools."""
        sources = {entry["name"]: entry["template"] for entry in templates}
        if "default" not in sources:
            named = ", ".join(sources) or "nothing"
            raise UserError(f"{where or 'chat_template'}: expected one named default, got templates named {named}")
        return cls(sources["default"], tokens, where=where, of_tools=sources.get("tool_use"))

    @functools.cached_property
    def for_tools(self) -> ChatTemplate:
        """The template for dialogues with tools."""
        return self if self._of_tools is None else ChatTemplate(self._of_tools, self.tokens, where=self._where)

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

        from rlhf_jax.tokenizers.bounded_jinja import Exceeded, budget

        rows = [row if isinstance(row, Mapping) else {"role": row[0], "content": row[1]} for row in messages]
        tools = rows.pop(0)["content"] if rows and rows[0]["role"] == TOOLS else None
        budget.begin(len(str(rows)) + len(str(tools)))
        try:
            return template.render(
                messages=rows,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=generation_marks,
                **self.tokens,
            )
        except (Exceeded, MemoryError) as error:
            raise UserError(f"{self._label}: {_one_line(error) or 'needs too much memory'}") from None
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise UserError(f"chat template: {_one_line(error)}") from None

    def check(self) -> None:
        """Compiles the template.

        Raises:
          UserError: if it is not a valid template.
        """
        _ = self._compiled

    @functools.cached_property
    def syntax(self) -> list[Any]:
        """The program of the template, equal for templates that differ in comments, quotes or line breaks in tags.

        {% generation %} blocks are left out, since they mark targets and render nothing.
        """
        try:
            return _statements(self._parsed.body)
        except RecursionError:
            raise UserError(f"{self._label}: is nested too deeply") from None

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Names of the special tokens that the template uses."""
        import jinja2.meta

        return frozenset(name for name in jinja2.meta.find_undeclared_variables(self._parsed) if name in self.tokens)

    def turn_end(self, special: Collection[str]) -> str | None:
        """The first of the special tokens that end an answer; None if there is none, or if rendering fails."""
        try:
            prompt = self.render([("user", "a")], add_generation_prompt=True)
            whole = self.render([("user", "a"), ("assistant", "b")])
        except UserError:
            return None
        return SpecialTexts.of(tuple(special)).first_of_end(whole[len(prompt) :]) if whole.startswith(prompt) else None

    @property
    def _parsed(self) -> jinja2.nodes.Template:
        return self._read(_environment().parse)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return self._read(_environment().from_string)

    def _read(self, reader: Callable[[str], Made]) -> Made:
        import jinja2

        from rlhf_jax.tokenizers.bounded_jinja import Exceeded, read

        try:
            return read(reader, self.source)
        except Exceeded as error:
            raise UserError(f"{self._label}: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self._label}: line {error.lineno}: {_one_line(error)}") from None

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

    def openings(self, text: str, *, edges: bool = True) -> set[int]:
        """Positions of characters to hide, so that the text names no token, alone or with its surroundings.

        Args:
          edges: False for text that stands between quotes, such as a name that a template may also compare.
        """
        places = {match.start() for match in self._opening.finditer(text)}
        if not edges:
            return places
        for size in range(1, min(self._longest, len(text) + 1)):
            if text[-size:] in self._heads:
                places.add(len(text) - size)
            if text[:size] in self._tails:
                places.add(size - 1)
        # A template may even write both ends of a token around a message.
        if 0 < len(text) < self._longest and text in self._texts:
            places.add(0)
        return places

    def first_within(self, text: str) -> str | None:
        """The first special token that a text names."""
        match = self._one.search(text)
        return match[0] if match else None

    def split_end(self, text: str) -> tuple[str, str]:
        """Splits into (answer, special tokens at its end); white space after those is dropped."""
        match = self._end.fullmatch(text)
        return (match["text"], match["end"]) if match else (text, "")

    def split_start(self, text: str) -> str:
        """The special token that a text starts with, and white space before it; "" if there is none."""
        match = self._one.match(text, len(text) - len(text.lstrip()))
        return text[: match.end()] if match else ""

    def first_of_end(self, text: str) -> str | None:
        match = self._one.match(self.split_end(text)[1])
        return match[0] if match else None


@functools.cache
def _environment() -> jinja2.Environment:
    """Sandboxed environment for templates, with the names that transformers provides."""
    try:
        import jinja2.ext

        from rlhf_jax.tokenizers.bounded_jinja import BoundedEnvironment
    except ImportError:
        raise UserError(f"chat templates need jinja2; run: {install_command('hf')}") from None

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

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.bound_filters()
    environment.globals.update(raise_exception=refuse, strftime_now=TODAY.strftime)
    return environment


def _statements(nodes: Iterable[jinja2.nodes.Node]) -> list[Any]:
    """Nested lists and tuples for statements; neighbouring texts are joined, {% generation %} gives its body."""
    import jinja2.nodes

    found: list[Any] = []
    for node in nodes:
        if isinstance(node, jinja2.nodes.CallBlock) and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute):
            parts = _statements(node.body)
        elif isinstance(node, jinja2.nodes.Output):
            parts = [n.data if isinstance(n, jinja2.nodes.TemplateData) else _plain(n) for n in node.nodes]
        else:
            parts = [_plain(node)]
        for part in parts:
            if isinstance(part, str) and found and isinstance(found[-1], str):
                found[-1] += part
            elif part != "":
                found.append(part)
    return found


def _plain(value: Any) -> Any:
    """A node as a tuple; message.role is written as message["role"] is."""
    import jinja2.nodes

    if isinstance(value, jinja2.nodes.Getattr) and not hasattr(dict, value.attr):
        value = jinja2.nodes.Getitem(value.node, jinja2.nodes.Const(value.attr), value.ctx)
    if isinstance(value, jinja2.nodes.Node):
        return (type(value).__name__, *((name, _plain(field)) for name, field in value.iter_fields()))
    if isinstance(value, list) and value and all(isinstance(item, jinja2.nodes.Stmt) for item in value):
        return _statements(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
