"""The report of a whole recipe: one HTML file that needs nothing else, no script and no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.evaluation.report import record, results
from rlhf_jax.evaluation.report.curves import curves
from rlhf_jax.evaluation.report.html import STAGES, Figures
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.metrics import read_rows


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from what the recipe left in the folder; what is missing there is left out.

    Args:
      folder: holds summary.json, samples.json, and a run folder for each stage: pretrain, sft, reward, reward_scratch
        and ppo, each with config.json, metrics.jsonl and ledger.json.
    Returns: the file's path.
    Raises: UserError for a file that is no JSON, naming it.
    """
    figures = Figures(_object(folder / "summary.json"))
    metrics = {stage: read_rows(folder / stage / "metrics.jsonl") for stage in STAGES}
    ledgers = {stage: found for stage in STAGES if (found := _object(folder / stage / "ledger.json"))}
    configs = {stage: found for stage in STAGES if (found := _object(folder / stage / "config.json"))}
    samples = _read(folder / "samples.json")
    samples = [sample for sample in samples if isinstance(sample, Mapping)] if isinstance(samples, list) else []
    body = (
        f'<header><p class="eyebrow">{results.eyebrow(folder.resolve().name, figures)}</p>'
        f"<h1>{results.headline(figures)}</h1><p>{results.lead(figures)}</p></header>"
        f"{results.cards(figures)}{results.recipe(figures, ledgers)}{results.gains(figures)}{results.answers(samples)}"
        f"{curves(figures, metrics)}{results.bars(figures)}{record.ledgers(ledgers)}{record.time(figures, metrics)}"
        f"{record.settings(configs)}"
        "<footer>Written by rlhf_jax from summary.json, samples.json and the folders of the stages.</footer>"
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    # The policy makes sure of what the page promises: a browser loads nothing for it and runs nothing in it.
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{results.headline(figures)}</title><style>\n{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _object(path: Path) -> Mapping[str, Any]:
    value = _read(path)
    return value if isinstance(value, dict) else {}
