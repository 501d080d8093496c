"""Sampled answers as training data, for `rlhf-jax sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data import Ledger, Prompt, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import Answer, Language, room_of, sample_answers, unfit
from rlhf_jax.evaluation.chosen import chosen_rows
from rlhf_jax.evaluation.scorers import Scorer, function_scorer, model_scorer
from rlhf_jax.files import write_file
from rlhf_jax.pretrained.source import LANGUAGE, longest_answer, open_source, with_prefix
from rlhf_jax.reward_functions.loading import load_function
from rlhf_jax.runs.lifecycle import say

if TYPE_CHECKING:
    from rlhf_jax.cli.sample import Config


def run(config: Config) -> None:
    """Samples, scores, chooses and writes; what is left out is said with the reason."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out: expected a file that does not exist yet, got {out}; give another --out")
    ledger, unscored = Ledger(), Ledger()
    source = open_source(with_prefix(config.run), stages=LANGUAGE)
    # Before minutes of sampling: a scorer that cannot be opened, and prompts that cannot be answered.
    scorer = scorer_of(config, unscored)
    longest = longest_answer([source], config.max_new_tokens)
    room = room_of(source, longest)
    prompts: list[Prompt] = []
    for prompt in read_records(list(config.prompts), "prompts", ledger):
        if reason := unfit(prompt, source, room):
            ledger.drop(prompt.where, reason)
        else:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts: expected a prompt that {source.where} can answer, got none; {ledger.summary()}")
    say(f"{source.where}: {config.samples} answers to each of {len(prompts):,} prompts")
    answers: list[list[Answer]] = [[] for _ in prompts]
    for at, several in sample_answers(
        Language.of(source),
        prompts,
        range(len(prompts)),
        samples=config.samples,
        max_new_tokens=longest,
        temperature=config.temperature,
        batch=config.batch,
        seed=config.seed,
    ):
        answers[at] = several
    scores_PK = None if scorer is None else scorer(prompts, answers)
    rows = list(chosen_rows(prompts, answers, scores_PK, config.keep, ledger, at_least=config.at_least))
    say(ledger.summary())
    for reason, count in unscored.reasons().get("dropped", {}).items():
        say(f"{count:,} answers have no score: {reason}")
    if scores_PK is not None and np.isfinite(scores_PK).any():
        best = np.nanmax(np.where(np.isnan(scores_PK), -np.inf, scores_PK), axis=1).mean()
        say(f"score: mean {np.nanmean(scores_PK):.4g}, of the best of {config.samples} {best:.4g}")
    if not rows:
        raise UserError(f"{source.where}: expected an answer to keep, got none; see the reasons above")
    write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows):,} rows")


def scorer_of(config: Config, unscored: Ledger) -> Scorer | None:
    """What scores the answers, None if all are kept."""
    if config.reward:
        return model_scorer(open_source(with_prefix(config.reward), stages=("reward",)), unscored, batch=config.batch)
    if config.reward_function:
        function = load_function(config.reward_function)
        return function_scorer(function, config.reward_function, timeout=config.reward_timeout)
    return None
