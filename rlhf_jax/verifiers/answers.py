"""Answers checked against the right one: as text, as a number, as JSON of a schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation, Overflow
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import text_of

# 1,234.5, -3, .5, 2e3; not the digits of v2 or of 1.2.3.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w]|\.\d)")


def exact(completions: Sequence[Any], answer: Sequence[Any], *, after: str = "") -> list[float | None]:
    """1 where the completion is the right answer, without white space around it, else 0.

    Args:
      completions: answers.
      answer: column of the right answers, each a text, a number or a list of them; None for no verdict.
      after: mark that the answer stands behind, such as "####": the last in the completion, which must have one.
    """

    def verdict(completion: Any, right: Any) -> float | None:
        if right is None:
            return None
        said = final(completion, after)
        return float(said is not None and said.strip() in {str(one).strip() for one in listed(right)})

    return [verdict(*each) for each in zip(completions, answer, strict=True)]


def number(
    completions: Sequence[Any], answer: Sequence[Any], *, after: str = "", tolerance: float = 0.0
) -> list[float | None]:
    """1 where the last number in the completion is the right one, whatever the spelling (1,000 and 1e3), else 0.

    Args:
      completions: answers.
      answer: column of the right numbers, as numbers or as text; None for no verdict.
      after: mark that the number stands behind, as in `exact`.
      tolerance: largest difference that still counts as equal.

    Raises:
      UserError: for a right answer that has no number.
    """

    def verdict(completion: Any, right: Any) -> float | None:
        if right is None:
            return None
        wanted = [last_number(str(one)) for one in listed(right)]
        if None in wanted or not wanted:
            raise UserError(f"field 'answer': expected a number, got {right!r}; use verifiers:exact for text")
        said = last_number(final(completion, after) or "")
        return float(any(said is not None and one is not None and _near(said, one, tolerance) for one in wanted))

    return [verdict(*each) for each in zip(completions, answer, strict=True)]


def _near(said: Decimal, right: Decimal, tolerance: float) -> bool:
    try:
        return abs(said - right) <= Decimal(tolerance)
    except Overflow:  # a difference above 10^999999
        return said == right


def follows_schema(completions: Sequence[Any], schema: Sequence[Any]) -> list[float | None]:
    """1 where the completion is JSON that the row's schema allows, else 0; the package jsonschema checks it.

    Args:
      completions: answers; a block fenced as JSON is taken out of its fence.
      schema: column of JSON schemas, as objects or as JSON text; None for no verdict.

    Raises:
      UserError: for a schema that is none.
    """
    import jsonschema

    @functools.cache
    def validator(text: str) -> Any:
        try:
            content = json.loads(text)
            kind = jsonschema.validators.validator_for(content, default=jsonschema.Draft202012Validator)
            kind.check_schema(content)
        except (ValueError, jsonschema.SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"field 'schema': expected a JSON schema, got {text[:80]!r}: {reason}") from error
        return kind(content)

    def verdict(completion: Any, content: Any) -> float | None:
        if content is None:
            return None
        check = validator(content if isinstance(content, str) else json.dumps(content, sort_keys=True))
        try:
            return float(check.is_valid(json.loads(unfenced(text_of(completion), "json"))))
        except (ValueError, RecursionError, OverflowError):  # no JSON; too deep; 1e999 for a schema with multipleOf
            return 0.0

    return [verdict(*each) for each in zip(completions, schema, strict=True)]


def final(completion: Any, after: str) -> str | None:
    """Text of a completion behind the last `after`; None if it has none."""
    text = text_of(completion)
    if not after:
        return text
    _, mark, rest = text.rpartition(after)
    return rest if mark else None


def listed(value: Any) -> Sequence[Any]:
    """The right answers of a row that has one or a list of them."""
    return value if isinstance(value, list | tuple) else [value]


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None if there is none."""
    for match in reversed(list(_NUMBER.finditer(text))):
        try:
            return Decimal(match.group().replace(",", ""))
        except InvalidOperation:  # a sign or an exponent alone
            continue
    return None


def unfenced(text: str, language: str) -> str:
    """The content of the last fenced block of the language, or of none; the text itself if it has no such block."""
    blocks = re.findall(rf"```(?:{language})?[ \t]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text
