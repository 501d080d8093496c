"""Evaluation: held-out losses, comparison of models, statistics, the HTML reports.

`evaluate(models, prompts, …)` compares models; it is imported on first access, as the model code takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.evaluation.compare_models import evaluate as evaluate


def __getattr__(name: str) -> Any:
    if name != "evaluate":
        raise AttributeError(f"module 'rlhf_jax.evaluation' has no attribute {name!r}")
    return importlib.import_module("rlhf_jax.evaluation.compare_models").evaluate
