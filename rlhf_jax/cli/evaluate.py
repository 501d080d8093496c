"""Compare models: win rates, KL, perplexity, diversity, reward-model accuracy, as a table, a JSON file and a report.

rlhf-jax evaluate runs/sft runs/aligned --prompts prompts.jsonl --reward runs/judge --reference runs/sft

rlhf-jax evaluate runs/sft --prompts prompts.jsonl --reward runs/judge runs/gold --best-of 64 --out runs/best-of-64

rlhf-jax evaluate ours.jsonl theirs.jsonl --reward-function quality.py:score --out runs/files

rlhf-jax evaluate runs/sft runs/aligned --prompts prompts.jsonl --people labels/blind --out runs/blind

rlhf-jax evaluate --reward runs/judge --comparisons comparisons.jsonl --out runs/judge-accuracy
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.config.evaluation import EvaluationConfig, is_file
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluationConfig):
    """Compare models on the same prompts."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL …]")]] = ()
    """Models to compare, the baseline first: run folders, published models (a Hugging Face folder, gguf:FILE,
    peft:FOLDER), or JSONL files of answers, with the fields prompt and answer."""
    people: str = ""
    """Labelling folder in which people compare the first answers of all models, blind. The page is served until Ctrl-C;
    then, and whenever the command is repeated, the win rates by their judgements are added to the report."""
    serve: bool = True
    """Serve the page of --people; --no-serve only makes the folder and adds up its judgements, for a page that
    `rlhf-jax label` serves to several people."""
    port: int = 8460
    """Port of the page; 0 picks a free one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "port", 0)
        if self.people and not (self.prompts or any(map(is_file, self.models))):
            raise UserError("people: expected prompts whose answers people compare, got none; use --prompts")
        if not self.people and not self.serve:
            raise UserError("serve: expected --people FOLDER with --no-serve, got no --people")


def run(config: Config) -> None:
    """Compares the models, prints the tables and writes the files."""
    from rlhf_jax.cli import evaluating

    evaluating.run(config)
