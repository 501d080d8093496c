"""All checks of a model, and what comes out as JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax.doctor.accuracy import ACCURACY
from rlhf_jax.doctor.answers import ANSWERS, shown_rows
from rlhf_jax.doctor.checks import Check, examine
from rlhf_jax.doctor.curves import CURVES
from rlhf_jax.doctor.network import NETWORK
from rlhf_jax.doctor.patient import Patient, open_patient
from rlhf_jax.doctor.policy import POLICY

CHECKS: tuple[Check, ...] = (*CURVES, *ANSWERS, *NETWORK, *POLICY, *ACCURACY)


def diagnose(run: str | os.PathLike[str], *, data: Sequence[str] = (), columns: Sequence[str] = ()) -> dict[str, Any]:
    """Check a run, or a published model, on its own data.

    Args:
      run: the folder of a run, finished or not, or a published model in the forms of `rlhf_jax.load`.
      data: files of rows in place of the run's own: text for a pretrain run, demonstrations for sft, comparisons for
        reward and preference, prompts for ppo.
      columns: fields of these files under other names, such as prompt=task.

    Returns:
      The diagnosis, as `rlhf-jax doctor` writes it: "run", "stage", "data", "healthy", "checks" (`Result` as JSON) and
      "rows", demonstrations with their targets between ⟦ and ⟧.

    Raises:
      UserError: as `open_patient`.
    """
    return diagnosis_of(open_patient(os.fspath(run), data=data, columns=columns))


def diagnosis_of(patient: Patient) -> dict[str, Any]:
    """The diagnosis of an opened model, as of `diagnose`."""
    # Accelerators multiply float32 in fewer bits by default, which is rounding and no mistake.
    with jax.default_matmul_precision("float32"):
        results = examine(patient, CHECKS)
    return {
        "run": patient.where,
        "stage": patient.stage,
        "data": patient.records.about,
        "healthy": all(result.status != "finding" for result in results),
        "checks": [dataclasses.asdict(result) for result in results],
        "rows": [line.plain for line in shown_rows(patient)],
    }
