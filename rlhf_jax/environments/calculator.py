"""A calculator that the policy calls by text, and the verdict on its final answer."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.verifiers import number

# The text between the tag and the end of the turn.
_CALL = re.compile(r"<calc>([^<>=]*)=?\s*(?:</calc>)?\s*\Z")
# No other letters: Python's parser warns of "3is".
_EXPRESSION = re.compile(r"[0-9eE.+*/() -]{1,100}")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(
    state: Mapping[str, Any], text: str, *, role: str = "", cost: float = 0.0
) -> tuple[Mapping[str, Any], Any, float, bool]:
    """An environment: a turn that ends with a call, <calc>37*48=, gets its result; any other turn is the final answer.

    The reward of the final answer is 1 if its last number is the row's `answer`, else 0.

    Args:
      state: the prompt's row.
      text: what the policy said.
      role: role of the result in a dialogue, "user" or "tool"; by default it is text.
      cost: subtracted from the reward for each call.

    Raises:
      UserError: for a row without an answer.
    """
    call = _CALL.search(text)
    if call is not None:
        result = compute(call[1])
        return state, {"role": role, "content": result} if role else result, -cost, False
    (verdict,) = number([text], [state.get("answer")])
    if verdict is None:
        raise UserError("field 'answer': expected the right number in the row, got none")
    return state, None, verdict, True


def compute(expression: str) -> str:
    """The value of a short expression with + - * / and brackets, exact or to 10 digits; "error" for anything else."""
    if _EXPRESSION.fullmatch(expression) is None:
        return "error"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        # Too large for a float, or, as a whole number, for Python's limit of 4,300 digits.
        return str(value) if value.denominator == 1 else f"{float(value):.10g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError
