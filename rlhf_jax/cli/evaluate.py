"""Compare models: win rates, KL, perplexity, diversity, reward-model accuracy, as a table, a JSON file and a report.

rlhf-jax evaluate runs/sft runs/aligned --prompts prompts.jsonl --reward runs/judge --reference runs/sft

rlhf-jax evaluate runs/sft --prompts prompts.jsonl --reward runs/judge runs/gold --best-of 64 --out runs/best-of-64

rlhf-jax evaluate ours.jsonl theirs.jsonl --reward-function quality.py:score --out runs/files

rlhf-jax evaluate --reward runs/judge --comparisons comparisons.jsonl --out runs/judge-accuracy
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.config.evaluation import EvaluationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluationConfig):
    """Compare models on the same prompts."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL …]")]] = ()
    """Models to compare, the baseline first: run folders, published models (a Hugging Face folder, gguf:FILE,
    peft:FOLDER), or JSONL files of answers, with the fields prompt and answer."""


def run(config: Config) -> None:
    """Compares the models, prints the tables and writes the files."""
    from rlhf_jax.cli import evaluating

    evaluating.run(config)
