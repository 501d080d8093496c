"""Warnings at the end of a stage: a reward model that may be no better than chance, a model that over-fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Held-out loss above its lowest by less than this fraction is no over-fitting yet.
MARGIN = 0.01
# Share of what training gained on held-out rows that may be lost again. Ouyang et al. 2022 trained on past the lowest
# loss, as answers get better still; the default recipe loses 0.22.
LOST_AGAIN = 0.5
# Share of answers that are cut off, above which most of them get the same penalty and there is little to prefer.
ANSWERS_CUT = 0.5


def reward_warnings(
    accuracy: float | None, interval: tuple[float, float] | None, prompts: int, *, steps: int
) -> list[str]:
    """Reasons not to trust a reward model, at most one sentence; [] if there is none.

    Args:
      accuracy: held-out accuracy over pairs, None if nothing was held out.
      interval: its 95% interval.
      prompts: held-out prompts with an ordered pair.
      steps: updates done.
    """
    reasons = []
    if accuracy is None or interval is None:
        reasons.append("nothing was held out, so its accuracy is unknown")
    elif interval[0] <= 0.5:
        worse = "is worse than chance" if interval[1] < 0.5 else "may be chance"
        reasons.append(
            f"its held-out accuracy {accuracy:.2f} {worse} (95% interval {interval[0]:.2f} to {interval[1]:.2f}, "
            f"{prompts:,} prompts)"
        )
    if steps == 0:
        reasons.append("it was not trained")
    if not reasons:
        return []
    return [
        f"do not trust this reward model: {', and '.join(reasons)}; use more comparisons, a larger --heldout-fraction "
        "or more --epochs before PPO"
    ]


def end_warnings(without_end: float | None, missing_end: str, missing_end_score: float) -> list[str]:
    """The sentence that says that a reward model pays for responses that do not end; [] if it does not.

    Args:
      without_end: mean change of a score without the end token, in standard deviations; None if it is not known.
      missing_end: what PPO does with such a score: "replace", "subtract" or "keep".
      missing_end_score: what it takes instead of it or adds to it.
    """
    taken = abs(missing_end_score) if missing_end == "subtract" else 0.0
    if without_end is None or missing_end == "replace" or without_end <= taken:
        return []
    return [
        f"it scores a response {without_end:.2g} standard deviations higher without its end token, of which "
        f"--episode.missing-end {missing_end} takes off {taken:g}: not to end pays; use --episode.missing-end replace"
    ]


def sft_warnings(rows: Sequence[Mapping[str, Any]], before: float | None, *, release: str) -> list[str]:
    """The sentence that says that a fine-tuned model over-fits; [] if it does not or nothing was held out.

    Args:
      rows: metrics of the run in the order of steps; those of an evaluation have "eval/loss".
      before: held-out loss of the initial model.
      release: "best" or "last", the evaluation whose model later stages take.
    """
    curve = [row for row in rows if row.get("eval/loss") is not None and row.get("loss") is not None]
    if not curve or before is None:
        return []
    # The newest among equals, as among checkpoints.
    best, last = min(curve, key=lambda row: (row["eval/loss"], -row["step"])), curve[-1]
    if before < best["eval/loss"] * (1 - MARGIN):
        return [
            f"held-out loss {best['eval/loss']:.3f} at best, {before:.3f} before training: training made it worse; use "
            "a lower --optimizer.learning-rate"
        ]
    if last["eval/loss"] <= best["eval/loss"] * (1 + MARGIN):
        return []
    fell = last["loss"] < best["loss"]
    # Who asked for the last model knows that the loss on held-out rows is not all.
    advice = (
        "; use a lower --optimizer.learning-rate" if not fell else "; use fewer --epochs" if release == "best" else ""
    )
    return [
        f"held-out loss rose from {best['eval/loss']:.3f} after step {best['step']:,}, its best, to "
        f"{last['eval/loss']:.3f} after step {last['step']:,}, while the training loss "
        + (f"fell from {best['loss']:.3f} to {last['loss']:.3f}: it over-fits" if fell else "did not fall: it diverges")
        + f"; later stages take the model of step {(best if release == 'best' else last)['step']:,}{advice}"
    ]


def lost_again(rows: Sequence[Mapping[str, Any]], before: float | None) -> tuple[float, float, float] | None:
    """(lowest held-out loss, the last one, share of what training gained that was lost since); None for too few.

    The share is infinite if nothing was gained.

    Args:
      rows: as for `sft_warnings`.
      before: held-out loss of the initial model; None for that of the first evaluation.
    """
    curve = [row["eval/loss"] for row in rows if row.get("eval/loss") is not None]
    start = curve[0] if before is None and curve else before
    if start is None or len(curve) + (before is not None) < 2:
        return None
    best, last = min(curve), curve[-1]
    if last <= best * (1 + MARGIN) and best <= start * (1 + MARGIN):
        return best, last, 0.0
    return best, last, (last - best) / (start - best) if start > best else math.inf
