"""Tools that a row offers and the calls in its messages, as chat templates take them.

A template gets the arguments of a call as an object. OpenAI's format has them as JSON text, which templates would quote
once more, so the text is parsed, as transformers' documentation of chat templates asks for. Within objects a null
counts as absent, as in a row: tables give every tool the keys of all others. JSON text has no such keys, so its nulls
stay.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.jsonl import describe, parse_value

CALL_KEYS, RESULT_KEYS = ("tool_calls",), ("tool_call_id", "name")


class Malformed(Exception):
    """A part of a field that is not as expected; `place` continues the name of the field."""

    def __init__(self, place: str, got: str, expected: str):
        super().__init__(expected)
        self.place, self.got, self.expected = place, got, expected


def tools_of(value: object) -> str:
    """JSON of the list of tools in a field, which may itself hold JSON.

    Raises:
      Malformed: for anything but a list of functions with a name.
    """
    tools = _parsed("", value, "a list of tools, or one as JSON") if isinstance(value, str) else _without_nulls(value)
    if not isinstance(tools, list):
        raise Malformed("", describe(tools), "a list of tools")
    for number, tool in enumerate(tools):
        _named(f"[{number}]", tool, 'a function with a name, {"type": "function", "function": {"name": …}}')
    return further(tools)


def calls_of(value: object) -> list[dict[str, Any]]:
    """The calls of a message with their arguments as objects.

    Raises:
      Malformed: for anything but a list of calls of functions, each with its arguments.
    """
    calls = _parsed("", value, "a list of calls") if isinstance(value, str) else _without_nulls(value)
    if not isinstance(calls, list):
        raise Malformed("", describe(calls), "a list of calls")
    return [_call(f"[{number}]", call) for number, call in enumerate(calls)]


def further(value: object) -> str:
    """Keys of a message, or tools, as the JSON text that messages keep."""
    return json.dumps(value, ensure_ascii=False)


def _call(place: str, call: Any) -> dict[str, Any]:
    function = _named(place, call, 'a call of a function, {"function": {"name": …, "arguments": …}}')
    inner = f"{place}.function" if "function" in call else place
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(f"{inner}.arguments", arguments, "an object, or one as JSON")
    if not isinstance(arguments, dict):
        raise Malformed(f"{inner}.arguments", describe(arguments), "an object, or one as JSON")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _named(place: str, value: Any, expected: str) -> dict[str, Any]:
    """The function in a tool or a call, which may be the object itself."""
    function = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(value, dict) and value.get("type", "function") != "function" and "function" in value:
        raise Malformed(f"{place}.type", describe(value["type"]), "'function', the only kind of tool")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Malformed(place, describe(value), expected)
    return function


def _parsed(place: str, text: str, expected: str) -> Any:
    try:
        return parse_value(text)
    except ValueError:
        raise Malformed(place, describe(text), expected) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
