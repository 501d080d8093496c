"""Diagnosis of a run, or of a published model, on its own data: what `rlhf-jax doctor` checks."""

from rlhf_jax.doctor.checks import Check, LeftOut, Result, examine
from rlhf_jax.doctor.diagnosis import CHECKS, diagnose
from rlhf_jax.doctor.patient import Patient, open_patient

__all__ = ["CHECKS", "Check", "LeftOut", "Patient", "Result", "diagnose", "examine", "open_patient"]
