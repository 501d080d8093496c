"""Columns of the metrics of a run."""

from __future__ import annotations

import math
import statistics

from rlhf_jax.doctor.patient import FEWEST, LeftOut, Patient


def column(patient: Patient, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, without rows that do not have it, nulls among them, and the row of step 0."""
    rows = [(row["step"], row[name]) for row in patient.metrics if row["step"] > 0 and row.get(name) is not None]
    return [(step, float(value)) for step, value in rows if math.isfinite(value)]


def quarters(patient: Patient, name: str, fewest: int = FEWEST) -> tuple[float, float]:
    """Mean of a metric over the first and over the last quarter of the rows.

    Raises:
      LeftOut: if there are too few rows.
    """
    values = [value for _, value in column(patient, name)]
    if len(values) < fewest:
        raise LeftOut(f"{len(values)} rows with {name} in metrics.jsonl, at least {fewest} are needed")
    size = max(len(values) // 4, 1)
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])
