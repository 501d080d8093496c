"""Training curves of the four stages, from each run's metrics.jsonl."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.evaluation.report.charts import Line, Points, line_chart
from rlhf_jax.evaluation.report.html import Figures, details, number, section

Rows = Sequence[Mapping[str, Any]]

# Diagnostics of PPO: name in metrics.jsonl, title, unit of the axis.
HEALTH = (
    ("entropy", "Entropy", "nats per token"),
    ("response_tokens", "Length of a response", "tokens"),
    ("missing_end", "Responses without an end", "share"),
    ("kl_coef", "KL coefficient β", "score units per nat"),
    ("policy_loss", "Policy loss", ""),
    ("value_loss", "Value loss", ""),
    ("clipped", "Clipped ratios", "share of tokens"),
    ("ppo_over_pretraining", "PPO gradient over pretraining gradient", "norms"),
    ("eval/score_gap", "Score over gold on held-out prompts", "gap"),
)


def points(rows: Rows, name: str) -> Points:
    """(step, value) of every row with a finite value of this name."""
    pairs = [(float(row["step"]), number(row[name])) for row in rows if name in row]
    return [(step, value) for step, value in pairs if value is not None]


def curves(figures: Figures, metrics: Mapping[str, Rows]) -> str:
    """Section of curves; `metrics` has the rows of each stage, possibly none."""
    pretrain, sft, reward = metrics["pretrain"], metrics["sft"], metrics["reward"]
    bits = points(pretrain, "eval/bits_per_byte")
    small = [
        line_chart(
            [
                Line("training", "pretrain", points(pretrain, "loss")),
                Line("held out", "ink", points(pretrain, "eval/loss"), dots=True),
            ],
            title="1 · Pretraining loss",
            y="nats per token",
        ),
        line_chart(
            [
                Line("training", "sft", points(sft, "loss")),
                Line("held out", "ink", points(sft, "eval/loss"), dots=True),
            ],
            title="2 · Fine-tuning loss",
            y="nats per response token",
            references=_levels(figures, ("before SFT, held out", "pretrain.development_response_nll")),
        ),
        line_chart(
            [
                Line("training", "reward", points(reward, "accuracy")),
                Line("held out", "ink", points(reward, "eval/accuracy"), dots=True),
            ],
            title="3 · Reward model accuracy",
            y="share of pairs",
            references=[("chance", 0.5), *_levels(figures, ("two labellers agree", "reward.labeller_agreement"))],
        ),
    ]
    if len(bits) > 1:
        fourth = line_chart(
            [Line("held out", "pretrain", bits, dots=True)],
            title="1 · Held-out text",
            y="bits per byte",
            references=_levels(figures, ("token bigrams", "pretrain.bigram_bits_per_byte")),
        )
        small.insert(1, fourth)
    else:
        # A single evaluation is not a curve, and its value is already on the page.
        fourth = line_chart(
            [Line("training", "reward", points(reward, "loss"))],
            title="3 · Reward model loss",
            y="nats per pair",
            references=[("chance", math.log(2))],
        )
        small.insert(2, fourth)
    return section(
        "curves",
        "Training curves",
        f'<div class="two">{"".join(small)}</div>',
        ppo(metrics["ppo"]),
        lead="Thin lines are the logged values, thick lines their running mean, dots evaluations on held-out data, "
        "on which settings may be chosen; the figures of this page are measured on other data. PPO’s score and KL of "
        "an iteration are those of the policy before its update.",
    )


def ppo(rows: Rows) -> str:
    """Reward, gold score and KL in panels of their own from iteration 0, and PPO's diagnostics.

    A rollout is sampled from the policy of the iterations before it: its score and its KL are drawn there.
    """
    panels = [
        ([Line("score", "reward", before(rows, "score"))], "Score", "before the KL penalty"),
        ([Line("gold score", "ppo", points(rows, "eval/gold"), dots=True)], "Gold score, held out", "score"),
        ([Line("KL to the reference", "muted", before(rows, "kl"))], "KL to the reference", "nats per response"),
    ]
    terms = dict.fromkeys(name for row in rows for name in row if name.startswith("reward/"))
    if len(terms) > 1:
        drawn = zip(terms, itertools.cycle(("reward", "sft", "ppo", "muted", "pretrain")))
        lines = [Line(term.removeprefix("reward/"), colour, before(rows, term)) for term, colour in drawn]
        panels.insert(1, (lines, "Terms of the reward", "before weights"))
    main = "".join(
        line_chart(lines, title=title, x="iteration", y=unit, width=360, height=260, legend=len(lines) > 1)
        for lines, title, unit in panels
    )
    small = ""
    for name, title, unit in HEALTH:
        line = Line(title, "ppo", points(rows, name))
        small += line_chart([line], title=title, x="iteration", y=unit, width=320, height=190, legend=False)
    folded = details("More of PPO’s curves", f'<div class="three">{small}</div>' if small else "")
    return (f'<div class="three">{main}</div>' if main else "") + folded


def before(rows: Rows, name: str) -> Points:
    """(iterations done before a rollout, value) of a metric of rollouts."""
    return [(step - 1, value) for step, value in points(rows, name)]


def _levels(figures: Figures, *keys: tuple[str, str]) -> list[tuple[str, float]]:
    levels = [(name, figures.number(key)) for name, key in keys]
    return [(name, level) for name, level in levels if level is not None]
