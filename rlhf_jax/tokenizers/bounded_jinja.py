"""Jinja with limits on time, memory and nesting, since a chat template is a program from an external source.

Jinja's sandbox keeps a template from the system, but not from loops without end or texts without measure. Here every
loop, call and operation is counted, and one that would make a huge value is refused before it is computed. Nothing is
folded at compile time, where no limit would hold.
"""

from __future__ import annotations

import functools
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jinja2
import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from rlhf_jax.errors import UserError

# Seconds of processor time and characters (or items) of one rendering; templates of published models need some 1e-4 s
# and a few times the length of the dialogue.
SECONDS, CHARACTERS = 10.0, 64 * 2**20
# Largest number that a template may hand to a function, and bits of an integer.
NUMBER, BITS = 100_000, 10_000
# Characters of a template.
LONGEST = 2**20
_LONG = re.compile(r"\d{5,}")
_EVERY = 64
Made = TypeVar("Made")


class Exceeded(UserError):
    """A template that needs too much time, memory or nesting."""


class _Budget:
    """What the rendering that is going on may still use; those of several threads share it."""

    __slots__ = ("end", "left", "steps")

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, characters: int) -> None:
        """Starts a rendering of messages with so many characters."""
        self.steps = 0
        self.left = CHARACTERS + 200 * characters
        self.end = time.process_time() + SECONDS

    def step(self) -> None:
        """Counts an operation."""
        self.steps += 1
        if self.steps % _EVERY == 0:
            self.look()

    def look(self) -> None:
        """Looks at the clock."""
        if time.process_time() > self.end:
            raise Exceeded(f"takes more than {SECONDS:g} s")

    def take(self, size: int) -> None:
        """Counts a value of so many characters or items, before or after it is made."""
        self.left -= size
        if self.left < 0:
            raise Exceeded(f"makes more than {CHARACTERS:,} characters")
        if size > 1e5:
            self.look()


budget = _Budget()


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _made(value: Any) -> Any:
    budget.take(_size(value))
    return value


def _check(name: str, values: Iterable[Any]) -> None:
    """Refuses numbers that a function would fill or repeat with."""
    for value in values:
        if isinstance(value, int | float) and abs(value) > NUMBER:
            raise Exceeded(f"calls {name} with {value:.6g}, more than {NUMBER:,}")


def _check_format(text: str) -> None:
    if _LONG.search(text) or "*" in text:
        raise Exceeded(f"formats with a width of its own or of more than 4 digits: {text[:40]!r}")


def _replaced(text: str, old: Any, new: Any) -> None:
    budget.take(len(text) + text.count(str(old)) * len(str(new)))


def _times(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            budget.take(len(value) * max(count, 0))


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 with limits."""
    # jinja2 marks the filters that get the context or the environment first.
    passed = int(hasattr(function, "jinja_pass_arg"))
    special = ("format", "indent", "join")

    @functools.wraps(function)
    def bounded(*arguments: Any, **options: Any) -> Any:
        budget.step()
        if len(arguments) == passed + 1 and not options and name not in special:
            return _made(function(*arguments))
        value, *rest = arguments[passed:] or (None,)
        _check(name, (*rest, *options.values()))
        if name == "replace" and len(rest) >= 2:
            _replaced(str(value), *rest[:2])
        if name == "format":
            _check_format(str(value))
        if name == "indent":
            width = (rest or [options.get("width", 4)])[0]
            budget.take(str(value).count("\n") * (width if isinstance(width, int) else _size(width)))
        if name == "join":
            value = list(_counted(value))
            budget.take(len(value) * _size((rest or [options.get("d", "")])[0]))
            arguments = (*arguments[:passed], value, *rest)
        if name == "tojson" and any(isinstance(each, int) and each > 100 for each in (*rest, *options.values())):
            raise Exceeded("indents by more than 100 characters")
        return _made(function(*arguments, **options))

    return bounded


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


class _Generator(jinja2.compiler.CodeGenerator):
    """Counts the parts of a text that is put together with ~."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of jinja2 with limits; use `budget.begin` before each rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)
        self.globals.pop("lipsum", None)
        self.filters["_counted"] = _counted

    def bound_filters(self) -> None:
        """Puts limits on the filters that are there."""
        self.filters = {name: _filter(name, function) for name, function in self.filters.items()}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the parts of an output."""
        found = []
        for part in parts:
            budget.left -= len(part)
            if budget.left < 0:
                budget.take(0)
            found.append(part)
        return "".join(found)

    @staticmethod
    def joined(parts: Sequence[Any]) -> str:
        """Joins the operands of ~."""
        text = "".join(map(str, parts))
        budget.take(len(text))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            made = left + right
            budget.take(len(made) if made.__class__ is str else _size(made))
            return made
        budget.step()
        if operator == "*":
            _times(left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        if operator == "**" and isinstance(right, int | float) and abs(right) * _bits(left) > BITS:
            raise Exceeded(f"raises a number to the power of {right:.6g}")
        if operator == "*" and _bits(left) + _bits(right) > BITS:
            raise Exceeded("multiplies numbers of thousands of digits")
        return _made(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **options: Any) -> Any:
        budget.step()
        _check(str(__obj.__name__) if hasattr(__obj, "__name__") else "it", (*arguments, *options.values()))
        if isinstance(__obj, types.BuiltinMethodType):
            text, name = __obj.__self__, __obj.__name__
            if name == "replace" and len(arguments) >= 2:
                _replaced(str(text), *arguments[:2])
            if name == "join" and arguments:
                arguments = (list(_counted(arguments[0])), *arguments[1:])
                budget.take(len(arguments[0]) * _size(text))
            if name == "strftime":
                _check_format(str(arguments))
        return _made(super().call(__context, __obj, *arguments, **options))

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(value, types.BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            _check_format(str(value.__self__).replace("*", ""))
        return super().wrap_str_format(value)

    def _generate(self, source: jinja2.nodes.Template, *arguments: Any, **options: Any) -> str:
        for loop in source.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return super()._generate(source, *arguments, **options)


def read(reader: Callable[[str], Made], source: str) -> Made:
    """Parses or compiles a template.

    Raises:
      Exceeded: for one that is nested too deeply or too long.
    """
    if len(source) > LONGEST:
        raise Exceeded(f"is longer than {LONGEST:,} characters")
    budget.begin(0)
    try:
        return reader(source)
    except (RecursionError, MemoryError, SyntaxError):
        raise Exceeded("is nested too deeply") from None
