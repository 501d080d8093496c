"""The form in which a trial says what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

Command = Callable[[Sequence[str]], NoReturn]
"""`rlhf_jax.cli.app.main`: runs a command of the command line and exits."""


@dataclasses.dataclass
class Outcome:
    """Result of a trial.

    Attributes:
      counts: what was tried and found.
      wrong: each case in which the guarantee does not hold, in words.
    """

    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> bool:
        """Notes a case in which the guarantee does not hold; returns whether it does."""
        if not holds:
            self.wrong.append(otherwise)
        return holds

    def at_least(self, expected: Mapping[str, float]) -> None:
        """Notes each count that is smaller than it should be: a trial that hits nothing proves nothing."""
        for name, number in expected.items():
            found = self.counts.get(name, 0)
            self.expect(found >= number, f"{name}: expected at least {number:g}, got {found}")
