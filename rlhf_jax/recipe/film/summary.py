"""Figures of the film task: summary.json, and the table on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.table

from rlhf_jax.recipe.film.measure import JUDGE, REWARD
from rlhf_jax.recipe.tables import compared, with_interval

SHOWN = 12  # prompts in the report; half of them on the console


def summary_of(content: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures by dotted names.

    Args:
      content: of evaluation.json.
      stages: summaries of sft, reward and ppo.
    """
    models = {model["name"]: model for model in content["models"]}
    (best,) = (name for name, model in models.items() if model["best_of"])
    found: dict[str, Any] = {"ppo.heldout_prompts": content["prompts"]}
    for name, model in models.items():
        key = "best_of_n" if name == best else name
        found |= {
            f"{key}.distinct_share": model["distinct_share"],
            f"{key}.untouched_perplexity": model["untouched_perplexity"],
            f"{key}.response_tokens": model["tokens"]["value"],
            f"{key}.missing_end": model["missing_end"],
            f"{key}.reward_score": _value(model["scores"][REWARD]),
            f"{key}.judge_score": _value(model["scores"][JUDGE]),
        }
    for scorer, word in ((JUDGE, "win_rate"), (REWARD, "reward_win_rate")):
        for rate in content["win_rates"]:
            if rate["scorer"] == scorer and rate["second"] == "sft":
                key = f"{'best_of_n' if rate['first'] == best else 'ppo'}.{word}_vs_sft"
                found |= {key: rate["rate"]["value"], f"{key}_interval": [rate["rate"]["low"], rate["rate"]["high"]]}
    found |= {
        "ppo.kl_nats": models["ppo"]["kl"]["value"],
        "ppo.distinct_share_of_sft": models["ppo"]["distinct_share"] / max(models["sft"]["distinct_share"], 1e-9),
        "ppo.perplexity_of_sft": models["ppo"]["untouched_perplexity"] / models["sft"]["untouched_perplexity"],
        "ppo.first_ratio_error": stages["ppo"]["first_ratio_error"],
        "best_of_n.kl_nats": models[best]["kl_to_own_model"],
        "sft.heldout_response_nll": stages["sft"]["heldout_response_nll"],
    }
    for one in content["reward_models"]:
        found |= {
            "reward.heldout_accuracy": one["accuracy"]["value"],
            "reward.heldout_accuracy_interval": [one["accuracy"]["low"], one["accuracy"]["high"]],
            "reward.heldout_pairs": one["pairs"],
        }
    names = ("reward.words_accuracy", "judge.heldout_accuracy", "reward.human_accuracy")
    return found | {name: value for name, (_, value, _) in zip(names, content["bands"])}


def _value(estimate: Mapping[str, Any] | None) -> float | None:
    return None if estimate is None else estimate["value"]


def figures_table(s: Mapping[str, Any], title: str) -> rich.table.Table:
    """Table of the figures of a summary, each with what it compares with."""
    human = f", one other person {s['reward.human_accuracy']:.3f}" if "reward.human_accuracy" in s else ""
    rows = [
        ("reward model: held-out comparisons by people", with_interval(s, "reward.heldout_accuracy"),
         f"words alone {s['reward.words_accuracy']:.3f}{human}"),
        ("the judge on the same", f"{s['judge.heldout_accuracy']:.3f}", ""),
        ("PPO against SFT, the judge", with_interval(s, "ppo.win_rate_vs_sft"), "0.5 is no difference"),
        ("best-of-n against SFT, the judge", with_interval(s, "best_of_n.win_rate_vs_sft"), ""),
        ("PPO against SFT, the reward model", with_interval(s, "ppo.reward_win_rate_vs_sft"), ""),
        ("KL to SFT, nats per response", f"{s['ppo.kl_nats']:.2f}", f"best-of-n {s['best_of_n.kl_nats']:.2f}"),
        ("distinct answers, PPO and SFT", f"{s['ppo.distinct_share']:.3f} and {s['sft.distinct_share']:.3f}", ""),
        ("perplexity under the untouched model", f"{s['ppo.untouched_perplexity']:.1f}",
         f"SFT {s['sft.untouched_perplexity']:.1f}, best-of-n {s['best_of_n.untouched_perplexity']:.1f}"),
        ("tokens of an answer, PPO and SFT", f"{s['ppo.response_tokens']:.1f} and {s['sft.response_tokens']:.1f}", ""),
        ("minutes", f"{s['wall_seconds'] / 60:.1f}", ""),
    ]  # fmt: skip
    return compared(title, rows)
