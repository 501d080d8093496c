"""Tables printed at the end of the recipe: responses of each stage side by side, and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text

SHOWN_PROMPTS = 8


def print_summary(console: rich.console.Console, folder: Path, summary: dict[str, Any]) -> None:
    """Prints responses side by side, then the figures."""
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))[:SHOWN_PROMPTS]
    table = rich.table.Table(
        title=f"the same test prompts, answered after each stage (temperature {samples[0]['temperature']})",
        show_lines=True,
    )
    for title in ("prompt", "pretrained", "SFT", "PPO"):
        table.add_column(title, ratio=2, overflow="fold")
    for sample in samples:
        answers = [f"{sample[name][:160]}\n[{sample['gold'][name]:g} of 7]" for name in ("pretrain", "sft", "ppo")]
        table.add_row(*(rich.text.Text(cell) for cell in (sample["prompt"].strip(), *answers)))
    console.print(table)
    console.print(figures_table(summary, "results on test prompts and text, which no setting was chosen on"))


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
    interval = s.get("ppo.win_rate_vs_sft_interval")
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    rows = [
        ("bits per byte of test text", f"{s['pretrain.heldout_bits_per_byte']:.3f}",
         f"the bigram model's {s['pretrain.bigram_bits_per_byte']:.3f}"),
        ("SFT: nats per response token", f"{s['sft.heldout_response_nll']:.3f}",
         f"the pretrained model's {s['pretrain.heldout_response_nll']:.3f}"),
        ("SFT against pretrained, win rate", f"{s['sft.win_rate_vs_pretrained']:.3f}", ""),
        ("reward model: accuracy on gold order", f"{s['reward.heldout_accuracy']:.3f}", ""),
        ("PPO against SFT, win rate", f"{s['ppo.win_rate_vs_sft']:.3f}{spread}", ""),
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
    figures = rich.table.Table(title=title)
    for title in ("figure", "measured", "compare"):
        figures.add_column(title)
    for row in rows:
        figures.add_row(*(rich.text.Text(cell) for cell in row))
    return figures
