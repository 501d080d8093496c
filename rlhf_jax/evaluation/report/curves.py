"""Training curves of the four stages, from each run's metrics.jsonl."""

from __future__ import annotations

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
                Line("held out, from scratch", "muted", points(metrics["reward_scratch"], "eval/accuracy"), dots=True),
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
        "on which settings may be chosen; the figures of this page are measured on other data.",
    )


def ppo(rows: Rows) -> str:
    """Reward-model score, gold score and KL in one chart, and PPO's diagnostics."""
    lines = [
        Line("reward model’s score", "reward", points(rows, "score")),
        Line("gold score, held out", "ppo", points(rows, "eval/gold"), dots=True),
        Line("KL to SFT, right axis", "muted", points(rows, "kl"), axis="right", dashed=True),
    ]
    title = "4 · PPO: score, gold and distance from SFT"
    main = ""
    # One drawing is not readable at both widths; the style sheet shows the one that fits.
    for css, width, height in (("wide", 980, 360), ("narrow", 420, 320)):
        drawn = line_chart(
            lines, title=title, x="iteration", y="score", right="nats per response", width=width, height=height
        )
        main += f'<div class="{css}">{drawn}</div>' if drawn else ""
    small = ""
    for name, title, unit in HEALTH:
        line = Line(title, "ppo", points(rows, name))
        small += line_chart([line], title=title, x="iteration", y=unit, width=320, height=190, legend=False)
    return main + details("More of PPO’s curves", f'<div class="three">{small}</div>' if small else "")


def _levels(figures: Figures, *keys: tuple[str, str]) -> list[tuple[str, float]]:
    levels = [(name, figures.number(key)) for name, key in keys]
    return [(name, level) for name, level in levels if level is not None]
