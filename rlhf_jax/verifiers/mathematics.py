"""Mathematical expressions compared by the package math-verify, in a process of its own."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.rewards import text_of
from rlhf_jax.verifiers.answers import listed

# The package limits the time of parsing and comparing by signals, which only a main thread gets, and rewards are called
# in another. What simplifies for ever, or takes all memory, ends this process alone.
_CHILD = """
import json, resource, sys
from math_verify import parse, verify
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
print("ready", flush=True)
for line in sys.stdin:
    said, right = json.loads(line)
    answer = parse(said)
    # A right answer is often LaTeX without the signs that say so.
    print(int(any(verify(parse(form % one), answer) for one in right for form in ("%s", "$%s$"))), flush=True)
"""


def equal_expression(completions: Sequence[Any], answer: Sequence[Any], *, seconds: float = 10.0) -> list[float | None]:
    """1 where the last expression in the completion equals the right answer, such as 1/2, 0.5 and \\frac12, else 0.

    Args:
      completions: answers; LaTeX is found in \\boxed{…}, $…$ and the like.
      answer: column of the right answers, each a text or a list of texts; None for no verdict.
      seconds: limit of one comparison, after which it counts as unequal.

    Raises:
      UserError: if math-verify is not installed.
    """
    found: list[float | None] = []
    child = _Child()
    try:
        for completion, right in zip(completions, answer, strict=True):
            if right is None:
                found.append(None)
                continue
            verdict = child.ask([text_of(completion), [str(one) for one in listed(right)]], seconds)
            if verdict is None:
                child.close()
                child = _Child()
            found.append(float(verdict == "1"))
    finally:
        child.close()
    return found


class _Child:
    """A process that compares expressions."""

    def __init__(self) -> None:
        pipe: Any = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if self._next(60.0) != "ready":
            self.process.kill()
            error = self.process.stderr.read() if self.process.stderr else ""
            self.close()
            if "No module named 'math_verify'" in error:
                raise UserError(f"equal_expression: requires the package math-verify; run: {install_command('verify')}")
            reason = (error.strip().splitlines() or ["no answer in a minute"])[-1]
            raise UserError(f"equal_expression: math-verify did not start: {reason}")

    def ask(self, question: Any, seconds: float) -> str | None:
        """The answer, None if there is none in time."""
        stdin = self.process.stdin
        if stdin is None or self.process.poll() is not None:
            return None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        return self._next(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self) -> None:
        for line in _lines(self.process):
            self.lines.put(line)
        self.lines.put(None)

    def _next(self, seconds: float) -> str | None:
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    for line in process.stdout or ():
        yield line.strip()
