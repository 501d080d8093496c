"""Tables printed at the end of the recipe: responses of each stage side by side, and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text

SHOWN_PROMPTS = 8


def print_summary(console: rich.console.Console, folder: Path, summary: dict[str, Any]) -> None:
    """Prints responses side by side, then the figures."""
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))[:SHOWN_PROMPTS]
    rows = [
        (
            sample["prompt"].strip(),
            *(f"{sample[name][:160]}\n[{sample['gold'][name]:g} of 7]" for name in ("pretrain", "sft", "ppo")),
        )
        for sample in samples
    ]
    title = f"the same test prompts, answered after each stage (temperature {samples[0]['temperature']})"
    console.print(answers_table(title, ("pretrained", "SFT", "PPO"), rows))
    console.print(figures_table(summary, "results on test prompts and text, which no setting was chosen on"))


def answers_table(title: str, models: Sequence[str], rows: Iterable[Sequence[str]]) -> rich.table.Table:
    """Table of answers side by side: the prompt, and the answer of each model."""
    table = rich.table.Table(title=title, show_lines=True)
    for head in ("prompt", *models):
        table.add_column(head, ratio=2, overflow="fold")
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    return table


def compared(title: str, rows: Iterable[tuple[str, str, str]]) -> rich.table.Table:
    """Table of figures, each with what it compares with."""
    table = rich.table.Table(title=title)
    for head in ("figure", "measured", "compare"):
        table.add_column(head)
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    return table


def with_interval(s: Mapping[str, Any], key: str) -> str:
    """A rate of a summary, with its interval if it has one, as text."""
    interval = s.get(f"{key}_interval")
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{s[key]:.3f}{spread}" if key in s else "–"


def stages(s: dict[str, Any], share: str) -> str:
    """A share of the responses after pretraining, SFT and PPO, as text."""
    return " to ".join(f"{s[f'{stage}.{share}']:.2f}" for stage in ("pretrain", "sft", "ppo"))


def docstrings(s: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Table row of the true docstrings by the same rules; no row if the summary does not have them."""
    if "docstrings.sensible_share" not in s:
        return []
    shares = (s[f"docstrings.{name}_share"] for name in ("topic", "sensible", "sensible_fluent"))
    others = f"of other functions: about it {s['docstrings.topic_share_of_others']:.2f}"
    return [("docstrings themselves, the same three", ", ".join(f"{share:.2f}" for share in shares), others)]


def figures_table(s: dict[str, Any], title: str) -> rich.table.Table:
    """Table of the figures of a summary, each with what it compares with."""
    rows = [
        ("bits per byte of test text", f"{s['pretrain.heldout_bits_per_byte']:.3f}",
         f"the bigram model's {s['pretrain.bigram_bits_per_byte']:.3f}"),
        ("SFT: nats per response token", f"{s['sft.heldout_response_nll']:.3f}",
         f"the pretrained model's {s['pretrain.heldout_response_nll']:.3f}"),
        ("SFT against pretrained, win rate", f"{s['sft.win_rate_vs_pretrained']:.3f}", ""),
        ("reward model: accuracy on gold order", f"{s['reward.heldout_accuracy']:.3f}", ""),
        ("PPO against SFT, win rate", with_interval(s, "ppo.win_rate_vs_sft"), ""),
        ("gold score, SFT to PPO", f"{s['sft.gold_mean']:.2f} to {s['ppo.gold_mean']:.2f}", ""),
        ("about the function, SFT to PPO", f"{s['sft.topic_share']:.2f} to {s['ppo.topic_share']:.2f}",
         f"at temperature 0.7: {s['sft.topic_share_shown']:.2f} to {s['ppo.topic_share_shown']:.2f}"),
        ("sensible: that, finished, all words", stages(s, "sensible_share"),
         f"at temperature 0.7: {stages(s, 'sensible_share_shown')}"),
        ("and no word twice", stages(s, "sensible_fluent_share"),
         f"at temperature 0.7: {stages(s, 'sensible_fluent_share_shown')}"),
        *docstrings(s),
        ("KL to SFT, nats per response", f"{s['ppo.kl_nats']:.2f}", ""),
        ("distinct answers, PPO and SFT", f"{s['ppo.distinct_share']:.3f} and {s['sft.distinct_share']:.3f}",
         ""),
        ("|ratio - 1| and KL before the first update", f"{s['ppo.first_ratio_error']:.1e} and {s['ppo.first_kl']:.1e}",
         "0 but for rounding"),
        ("minutes", f"{s['wall_seconds'] / 60:.1f}", ""),
    ]  # fmt: skip
    return compared(title, rows)
