"""A check and its result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from rlhf_jax.doctor.patient import LeftOut, Patient
from rlhf_jax.errors import UserError

__all__ = ["Check", "LeftOut", "Measured", "Result", "examine"]

LANGUAGE_STAGES = ("pretrain", "sft", "ppo", "preference")
STAGES = (*LANGUAGE_STAGES, "reward")


class Measured(NamedTuple):
    """What a check found.

    Attributes:
      healthy: True if it is in the healthy range.
      found: the figures, in words.
      remedy: what to try, in place of the check's own; "" for that.
    """

    healthy: bool
    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that may be wrong.

    Attributes:
      name: its name, with hyphens.
      metric: what is measured.
      healthy: the healthy range.
      remedy: what to try if it is not healthy.
      of: kinds of patients that it is made for, as in `Patient.kinds`.
      measure: makes it; raises LeftOut, with the reason, where it cannot be made.
    """

    name: str
    metric: str
    healthy: str
    remedy: str
    of: Sequence[str]
    measure: Callable[[Patient], Measured]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a check.

    Attributes:
      check: name of the check.
      status: "healthy", "finding", or "left out" for a check that could not be made.
      metric: what was measured.
      healthy: the healthy range.
      found: the figures; of a check that was left out, the reason.
      remedy: what to try; "" unless there is a finding.
      seconds: time that it took.
    """

    check: str
    status: Literal["healthy", "finding", "left out"]
    metric: str
    healthy: str
    found: str
    remedy: str
    seconds: float


def examine(patient: Patient, checks: Iterable[Check]) -> list[Result]:
    """Make those of the checks that are made for the patient, in their order."""
    return [_result(patient, check) for check in checks if patient.kinds & set(check.of)]


def _result(patient: Patient, check: Check) -> Result:
    start = time.perf_counter()
    status: Literal["healthy", "finding", "left out"]
    try:
        measured = check.measure(patient)
        status, found = ("healthy" if measured.healthy else "finding"), measured.found
        remedy = "" if measured.healthy else measured.remedy or check.remedy
    except (LeftOut, UserError) as reason:
        status, found, remedy = "left out", str(reason), ""
    seconds = time.perf_counter() - start
    return Result(check.name, status, check.metric, check.healthy, found, remedy, round(seconds, 3))
