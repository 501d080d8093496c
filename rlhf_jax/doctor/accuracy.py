"""Checks of a reward model on comparisons: better than chance, than the longer answer, and than its prompt's form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import Comparison, Demonstration, Ledger, Ranking
from rlhf_jax.doctor.checks import Check, LeftOut, Measured
from rlhf_jax.doctor.patient import Patient
from rlhf_jax.evaluation.calibration import LEAST, USUAL
from rlhf_jax.evaluation.reward_accuracy import reward_accuracy
from rlhf_jax.evaluation.scorers import response_scores
from rlhf_jax.evaluation.warnings import reward_warnings

# Comparisons that are scored: an interval of ±0.06.
MOST = 256


@functools.lru_cache(maxsize=1)
def measured(patient: Patient) -> dict[str, Any] | None:
    """Figures of the reward model on evenly spaced comparisons; None without any."""
    records = patient.records.comparisons
    if not records:
        return None
    places = np.linspace(0, len(records) - 1, min(len(records), MOST)).round().astype(int)
    some: Sequence[Comparison | Ranking] = [records[place] for place in places]
    return reward_accuracy(patient.opened, some, Ledger())


def accuracy(patient: Patient) -> Measured:
    """Accuracy on held-out comparisons: those of the data, or as the run has recorded it."""
    found, summary = measured(patient), patient.summary
    if found is not None and not patient.records.trained:
        figures, prompts, where = found["accuracy"], found["prompts"], "measured on"
    elif summary.get("heldout_accuracy_interval"):
        low, high = summary["heldout_accuracy_interval"]
        figures = {"value": summary["heldout_accuracy"], "low": low, "high": high}
        prompts, where = summary["heldout_prompts"], "recorded on"
    else:
        raise LeftOut("nothing was held out; give comparisons that it was not trained on with --data")
    share, low, high = (figures[name] for name in ("value", "low", "high"))
    text = f"{share:.3f} (95% interval {low:.3f} to {high:.3f}), {where} {prompts:,} held-out prompts"
    steps = int(summary.get("steps", 1))
    if reasons := reward_warnings(share, (low, high), prompts, steps=steps):
        return Measured(False, text, reasons[0])
    return Measured(high >= LEAST, text)


def longer(patient: Patient) -> Measured:
    """Accuracy against that of "the longer answer is the better one", on the same comparisons."""
    found = measured(patient)
    if found is None:
        raise LeftOut("no comparisons that fit; give some with --data")
    share, rule, prompts = found["accuracy"]["value"], found["longer_wins"], found["prompts"]
    where = "comparisons that it was trained on" if patient.records.trained else "held-out comparisons"
    return Measured(share > rule, f"{share:.3f}, the longer answer {rule:.3f}, on {prompts:,} {where}")


def sees_prompt(patient: Patient) -> Measured:
    """Scores of answers under other prompts."""
    pairs = [one for one in patient.records.comparisons if not one.rests][:32]
    if len({one.prompt for one in pairs}) < 8:
        raise LeftOut("fewer than 8 prompts with answers of one message; give some with --data")
    best = [one.chosen if isinstance(one, Comparison) else one.responses[int(np.argmin(one.ranks))] for one in pairs]
    under = [
        _scores(
            patient, [Demonstration(one.prompt, text, "", one.turns) for one, text in zip(asked, best, strict=True)]
        )
        for asked in (pairs, [*pairs[1:], pairs[0]])
    ]
    moved, spread = float(np.nanmean(np.abs(under[0] - under[1]))), float(np.nanstd(under[0]))
    if np.isnan(moved):
        raise LeftOut("no answer fits the model's context")
    share = moved / spread if spread > 0 else 0.0
    return Measured(share > LEAST_MOVED, f"the score of an answer moves by {share:.2f} of their deviation")


def _scores(patient: Patient, records: Sequence[Demonstration]) -> np.ndarray:
    found = response_scores(patient.opened, patient.params, records, Ledger())
    return np.array([np.nan if score is None else score for score in found])


# Of the deviation of scores: a model that reads answers alone is at 0.
LEAST_MOVED = 0.02
ACCURACY = (
    Check(
        "reward-accuracy",
        "heldout_accuracy: pairs that the scores order as the labels do",
        f"interval above 0.5 and reaching {LEAST:g}; {USUAL[0]:g} to {USUAL[1]:g} is usual on people's comparisons, "
        "more on generated labels",
        "how-to “My reward model is stuck at 60%”: more comparisons, another --optimizer.learning-rate, start from the "
        "fine-tuned model",
        ("scalar",),
        accuracy,
    ),
    Check(
        "reward-length",
        "accuracy against that of the rule “the longer answer wins”",
        "above the rule's",
        "it may have learned length: balance the lengths in the comparisons, or add a term for length to the reward",
        ("scalar",),
        longer,
    ),
    Check(
        "reward-sees-prompt",
        "change of an answer's score under another prompt, in deviations of the scores",
        f"above {LEAST_MOVED:g}",
        "it judges form alone: add comparisons whose worse answer is a good one to another prompt",
        ("scalar",),
        sees_prompt,
    ),
)
