"""Results of a run: headline, key figures, diagram of the recipe, win rates and sampled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.evaluation.report.charts import interval_chart
from rlhf_jax.evaluation.report.html import (
    Cell,
    Figures,
    answer,
    details,
    duration,
    number,
    percent,
    section,
    side_by_side,
    table,
    text,
)

LEAST_DISTINCT = 0.8  # of SFT's share of distinct answers
SHOWN, MOST = 10, 100  # samples shown unfolded, and in total


def distinct_of_sft(figures: Figures) -> float | None:
    """Ratio of PPO's share of distinct answers to SFT's."""
    given = figures.number("ppo.distinct_share_of_sft")
    ppo, sft = figures.number("ppo.distinct_share"), figures.number("sft.distinct_share")
    return given if given is not None or ppo is None or not sft else ppo / sft


def headline(figures: Figures) -> str:
    """The outcome in one sentence."""
    rate, interval = figures.number("ppo.win_rate_vs_sft"), figures.interval("ppo.win_rate_vs_sft_interval")
    distinct = distinct_of_sft(figures)
    if rate is None:
        return "Results of the RLHF recipe"
    low, high = interval or (rate, rate)
    if low > 0.5:
        words = f"After RLHF, answers beat those of SFT on {rate:.0%} of test prompts"
    elif high < 0.5:
        words = f"RLHF made answers worse: they beat those of SFT on only {rate:.0%} of test prompts"
    else:
        words = f"RLHF changed little: its answers beat those of SFT on {rate:.0%} of test prompts, no clear win"
    return words + (", but it repeats itself" if distinct is not None and distinct < LEAST_DISTINCT else "")


def lead(figures: Figures) -> str:
    """Introduction under the headline."""
    words = [
        "A language model was pretrained on plain text and fine-tuned on demonstrations (SFT), a reward model was "
        "trained on rankings, and PPO optimised the policy against that reward model."
    ]
    kl = figures.shown("ppo.kl_nats")
    if kl is not None:
        words.append(f"The policy ended {kl} nats per response from SFT.")
    words.append("Answers are compared by a rule-based gold score that PPO never sees; ties count half.")
    return " ".join(words)


def cards(figures: Figures) -> str:
    """Cards of the key figures, without those that the summary lacks."""

    def within(key: str) -> str:
        pair = figures.interval(key)
        return f"95% interval {percent(pair[0])} to {percent(pair[1])}" if pair else ""

    def against(words: str, key: str, form: str) -> str:
        shown = figures.shown(key, form)
        return f"{words} {shown}" if shown else ""

    distinct = distinct_of_sft(figures)
    wanted = (
        ("PPO wins over SFT", "ppo.win_rate_vs_sft", "%", within("ppo.win_rate_vs_sft_interval")),
        ("SFT wins over pretrained", "sft.win_rate_vs_pretrained", "%", within("sft.win_rate_vs_pretrained_interval")),
        ("Reward model’s accuracy", "reward.heldout_accuracy", "%", "of test pairs"),
        ("KL from SFT", "ppo.kl_nats", "{:.2f}", "nats per response"),
        ("Distinct answers, PPO", "ppo.distinct_share", "%",
         f"{percent(distinct)} of SFT’s share" if distinct is not None else ""),
        ("PPO’s answers about the function", "ppo.topic_share", "%", against("SFT’s", "sft.topic_share", "%")),
        ("Gold score of PPO’s answers", "ppo.gold_mean", "{:.2f}", against("of 7; SFT’s", "sft.gold_mean", "{:.2f}")),
        ("SFT’s nats per response token", "sft.heldout_response_nll", "{:.2f}",
         against("on test demonstrations; the pretrained model’s", "pretrain.heldout_response_nll", "{:.2f}")),
        ("Bits per byte of test text", "pretrain.heldout_bits_per_byte", "{:.2f}",
         against("token bigrams need", "pretrain.bigram_bits_per_byte", "{:.2f}")),
    )  # fmt: skip
    out = [
        f"<div><dt>{title}</dt><dd>{shown}<small>{note}</small></dd></div>"
        for title, key, form, note in wanted
        if (shown := figures.shown(key, form)) is not None
    ]
    return f'<dl class="cards">{"".join(out)}</dl>' if out else ""


def recipe(figures: Figures, ledgers: Mapping[str, Mapping[str, Any]]) -> str:
    """Diagram of the four stages: data, model and a key figure of each."""

    def data(stage: str, name: str, unit: str) -> str:
        ledger = ledgers.get(stage) or {}
        count = number(ledger.get("tokens" if unit == "tokens" else "accepted"))
        return f"{name}<small>{count:,.0f} {unit}</small>" if count else name

    steps = (
        ("pretrain", data("pretrain", "Text", "tokens"), "Language model", "predicts the next token",
         figures.shown("pretrain.heldout_bits_per_byte"), "bits per byte of test text"),
        ("sft", data("sft", "Demonstrations", "rows"), "SFT model", "learns to answer",
         figures.shown("sft.heldout_response_nll"), "nats per response token, test"),
        ("reward", data("reward", "Rankings", "rows"), "Reward model", "starts from SFT, learns preferences",
         figures.shown("reward.heldout_accuracy", "%"), "of test pairs right"),
        ("ppo", data("ppo", "Prompts", "rows"), "PPO policy", "starts from SFT, maximises reward with a KL penalty",
         figures.shown("ppo.win_rate_vs_sft", "%"), "wins over SFT"),
    )  # fmt: skip
    items = "".join(
        f'<li class="c-{stage}"><div class="data">{source}</div>'
        f'<div class="model"><b>{name}</b><span>{what}</span></div>'
        + (f'<p class="figure"><b>{figure}</b> {unit}</p>' if figure is not None else "")
        + "</li>"
        for stage, source, name, what, figure, unit in steps
    )
    return section("recipe", "The recipe", f'<ol class="recipe">{items}</ol>')


def gains(figures: Figures) -> str:
    """Section of win rates with their intervals, and a table of metrics by model."""
    prompts = figures.number("ppo.heldout_prompts")
    many = f"{prompts:,.0f} " if prompts else ""
    pairs = (
        ("SFT against pretrained", "sft", "sft.win_rate_vs_pretrained"),
        ("PPO against SFT", "ppo", "ppo.win_rate_vs_sft"),
    )
    rows = [
        (name, colour, rate, figures.interval(key + "_interval"))
        for name, colour, key in pairs
        if (rate := figures.number(key)) is not None
    ]
    measures = (
        ("Gold score, mean", "gold_mean", "{:.2f}"),
        ("One finished sentence", "finished_share", "%"),
        ("All words are words", "known_share", "%"),
        ("About the function", "topic_share", "%"),
        ("Sensible: all three of them", "sensible_share", "%"),
        ("Sensible, and no word twice", "sensible_fluent_share", "%"),
        ("Three to eight words", "concise_share", "%"),
        ("Distinct answers", "distinct_share", "%"),
        ("Nats per response token", "heldout_response_nll", "{:.2f}"),
    )
    models = {"pretrain": "Pretrained", "sft": "SFT", "ppo": "PPO"}
    if figures.number("docstrings.gold_mean") is not None:
        models["docstrings"] = "Documentation"
    lines = [
        (title, *(figures.shown(f"{model}.{key}", form) or "–" for model in models))
        for title, key, form in measures
        if any(figures.number(f"{model}.{key}") is not None for model in models)
    ]
    compared = table("On test prompts", ("", *models.values()), lines)
    return section(
        "gains",
        "Win rates and metrics by stage",
        f'<div class="two">{interval_chart(rows)}{compared}</div>' if rows or lines else "",
        lead=f"Share of {many}test prompts where the later model’s answer has the higher gold score, ties half; "
        "bars are 95% intervals.",
    )


def answers(samples: Sequence[Mapping[str, Any]]) -> str:
    """Section of the three models' answers to the same prompts, with gold scores; the best of a row is marked."""
    documented_first = sorted(samples, key=lambda sample: not sample.get("docstring"))
    rows = [_answer(sample) for sample in documented_first[:MOST]]
    rest = len(rows) - SHOWN
    warmth = samples[0].get("temperature") if samples else None
    sampled = f" Sampled at temperature {warmth}; every figure above is at 1." if warmth else ""
    return section(
        "answers",
        "Sampled answers",
        _answers(rows[:SHOWN]),
        details(f"{rest} more of {len(samples):,} prompts", _answers(rows[SHOWN:])),
        lead="Test prompts, on which nothing was trained or chosen: a function’s name and arguments, in words. The "
        f"last column is its real documentation; prompts that have one come first. The number is the gold score, ★ the "
        f"highest of its row.{sampled}",
    )


def _answers(rows: Sequence[Sequence[Cell]]) -> str:
    head = ("Prompt", "Pretrained", "SFT", "PPO", "Documentation")
    return side_by_side("Answers side by side", head, rows)


def _answer(sample: Mapping[str, Any]) -> list[Cell]:
    gold = sample.get("gold")
    scores = {name: number(gold.get(name)) for name in ("pretrain", "sft", "ppo")} if isinstance(gold, Mapping) else {}
    known = [score for score in scores.values() if score is not None]
    prompt = text(sample.get("prompt", "")).strip().replace("-&gt;", '<span class="whole">-&gt;</span>')
    cells: list[Cell] = [f"<code>{prompt}</code>"]
    for name in ("pretrain", "sft", "ppo"):
        score = scores.get(name)
        best = score is not None and len(known) > 1 and score == max(known) > min(known)
        cells.append((answer(sample.get(name, ""), score, name="gold score", best=best), f"c-{name}"))
    documented = sample.get("docstring")
    cells.append((text(documented or "–"), "doc" if documented else "doc none"))
    return cells


def eyebrow(name: str, figures: Figures) -> str:
    """The run's name, seed and time in one line."""
    seed, seconds = figures.number("seed"), figures.number("wall_seconds")
    parts = [f"run {text(name)}"] if name else []
    parts += [f"seed {seed:.0f}"] if seed is not None else []
    parts += [duration(seconds)] if seconds is not None else []
    return " · ".join(parts)
