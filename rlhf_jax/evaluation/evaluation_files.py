"""Files of an evaluation: evaluation.json, answers.jsonl, report.html and ledger.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.config.evaluation import EvaluationConfig
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.frontier import plain
from rlhf_jax.evaluation.report.evaluation import write_evaluation_report
from rlhf_jax.files import write_file
from rlhf_jax.runs.atomic_files import read_json, write_json

FILE, ANSWERS, REPORT, LEDGER = "evaluation.json", "answers.jsonl", "report.html", "ledger.json"
OTHERS = ("config.json", "summary.json", "metrics.jsonl", "run.lock")  # of a run or a recipe
SHOWN = 12  # prompts in the report
MAY_CHANGE = ("out", "batch", "reward_timeout")


def refuse_other(folder: Path) -> None:
    """Checks that nothing would be overwritten.

    Raises:
      UserError: if the folder is a file, or has an evaluation or a run.
    """
    if (folder / FILE).exists():
        raise UserError(f"out: expected a folder without an evaluation, got {folder / FILE}; give another --out")
    if own := [name for name in OTHERS if (folder / name).exists()]:
        raise UserError(f"out: expected a folder of its own, got one with {own[0]}, a run's; give another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: expected a folder, got the file {folder}; give another --out")


def write_answered(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write answers.jsonl."""
    write_file(folder / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_evaluation(config: EvaluationConfig) -> dict[str, Any]:
    """The content of the evaluation.json that an evaluation with these settings has written.

    Raises:
      UserError: if it had other settings.
    """
    path = config.folder / FILE
    content: dict[str, Any] = read_json(path)
    for name, value in plain(dataclasses.asdict(config)).items():
        if name not in MAY_CHANGE and content["settings"].get(name) != value:
            raise UserError(
                f"{name}: expected {content['settings'].get(name)!r}, as in {path}, got {value!r}; repeat its command, "
                "or give another --out"
            )
    return content


def read_answered(folder: Path) -> list[dict[str, Any]]:
    """The rows of answers.jsonl."""
    return [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n") if line]


def write_evaluation(folder: Path, content: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Write report.html and evaluation.json.

    Args:
      folder: of the evaluation.
      content: of evaluation.json.
      samples: rows of answers.jsonl, of which the first are shown.
    """
    write_evaluation_report(folder / REPORT, content, samples[:SHOWN])
    write_json(folder / FILE, content)  # last: a folder with it is complete
