"""Evaluation of the recipe, all on the test part of the corpus, which nothing before this reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.arrays import Params
from rlhf_jax.data import Ledger, PromptRows, encode_demonstrations
from rlhf_jax.demo.python_docs import Corpus
from rlhf_jax.evaluation.bigram import bigram_nats
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.evaluation.samples import distinct_share, sequence_kl, win_rate
from rlhf_jax.files import write_file
from rlhf_jax.model import Transformer
from rlhf_jax.parallel import processes
from rlhf_jax.recipe.labels import Judge, Sampler, gold_rankings, prompt_rows
from rlhf_jax.recipe.sizes import Size
from rlhf_jax.runs.lifecycle import Finished, model_of, released_params
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers import pretrain
from rlhf_jax.trainers.reward import accuracy

# Sampling temperature of the responses shown in the table and the report.
SHOWN_TEMPERATURE = 0.7
# Responses per test prompt for the win rates, to reduce the variance from sampling.
ANSWERS = 4


def measure(
    runs: Mapping[str, Finished], corpus: Corpus, sampler: Sampler, judge: Judge, *, size: Size, seed: int, folder: Path
) -> dict[str, Any]:
    """Measures the runs, and writes responses side by side to samples.json.

    Args:
      runs: pretrain, sft, reward and ppo.
      corpus: its test part is measured on; its training texts fit the bigram model.

    Returns:
      The figures by their dotted names.
    """
    tokenizer, test = judge.tokenizer, corpus.test
    prompts = prompt_rows(test.prompts, tokenizer, size.prompt_tokens)
    params = {name: released_params(runs[name].run) for name in ("pretrain", "sft", "ppo")}
    summaries = {name: run.summary for name, run in runs.items()}
    answers = {name: sampler(params[name], prompts, seed + 4, ANSWERS) for name in params}
    gold = {name: judge.scores(list(prompts.sources), answers[name]) for name in params}
    distinct = {name: distinct_share([tokenizer.decode(row[0]).strip() for row in answers[name]]) for name in params}
    against_sft, sft_interval = win_rate(gold["ppo"], gold["sft"])
    against_pretrained, pretrained_interval = win_rate(gold["sft"], gold["pretrain"])
    kl = sequence_kl(
        sampler.model,
        params["ppo"],
        params["sft"],
        prompts,
        [row[0] for row in answers["ppo"]],
        max_new_tokens=sampler.response_tokens,
    )
    # Responses to read are sampled at a lower temperature. All figures but *_shown are at 1, as in PPO training.
    shown = {name: sampler(params[name], prompts, seed + 5, temperature=SHOWN_TEMPERATURE) for name in params}
    if processes.is_first():
        samples = _side_by_side(shown, prompts, corpus, judge)
        write_file(folder / "samples.json", json.dumps(samples, indent=1) + "\n")
    shares: dict[str, float] = {}
    for name in params:
        for suffix, sampled in (("", answers[name]), ("_shown", shown[name])):
            of_one = judge.shares(list(prompts.sources), sampled)
            shares |= {f"{name}.{key}{suffix}": value for key, value in of_one.items()}
    shares |= _docstring_figures(prompts, corpus, judge)
    return (
        shares
        | language_figures(sampler.model, params, corpus, tokenizer, size)
        | reward_figures(runs, sampler, judge, params["sft"], prompts, size, seed)
        | {
            # Of the development part, beside the curve of SFT's loss on it.
            "pretrain.development_response_nll": summaries["sft"]["heldout_response_nll_before"],
            "sft.win_rate_vs_pretrained": against_pretrained,
            "sft.win_rate_vs_pretrained_interval": pretrained_interval,
            "sft.distinct_share": distinct["sft"],
            "sft.gold_mean": float(gold["sft"].mean()),
            "pretrain.gold_mean": float(gold["pretrain"].mean()),
            "pretrain.distinct_share": distinct["pretrain"],
            "ppo.win_rate_vs_sft": against_sft,
            "ppo.win_rate_vs_sft_interval": sft_interval,
            "ppo.heldout_prompts": len(prompts),
            "ppo.kl_nats": float(kl.mean()),
            "ppo.distinct_share": distinct["ppo"],
            "ppo.distinct_share_of_sft": distinct["ppo"] / max(distinct["sft"], 1e-9),
            "ppo.gold_mean": float(gold["ppo"].mean()),
            "ppo.first_ratio_error": summaries["ppo"]["first_ratio_error"],
            "ppo.first_kl": summaries["ppo"]["first_kl"],
        }
    )


def _side_by_side(
    shown: Mapping[str, list[list[list[int]]]], prompts: PromptRows, corpus: Corpus, judge: Judge
) -> list[dict[str, Any]]:
    """The first response of each model to each prompt, beside the docstring that people wrote."""
    gold = {name: judge.scores(list(prompts.sources), shown[name])[:, 0] for name in shown}
    return [
        {
            "prompt": prompt.prompt,
            **{name: judge.tokenizer.decode(shown[name][i][0]).strip() for name in shown},
            "docstring": corpus.test.sentences.get(prompt.prompt),
            "gold": {name: round(float(gold[name][i]), 3) for name in shown},
            "temperature": SHOWN_TEMPERATURE,
        }
        for i, prompt in enumerate(prompts.sources)
    ]


def _docstring_figures(prompts: PromptRows, corpus: Corpus, judge: Judge) -> dict[str, float]:
    """Figures of docstrings that people wrote for the same functions: an upper bound to expect of a model."""
    tokenizer, sentences = judge.tokenizer, corpus.test.sentences
    documented = [p for p in prompts.sources if p.prompt in sentences]
    if not documented:
        return {}
    written = [[[*tokenizer.encode(sentences[p.prompt]), tokenizer.eos_id]] for p in documented]
    figures = {f"docstrings.{key}": value for key, value in judge.shares(documented, written).items()}
    figures["docstrings.gold_mean"] = float(judge.scores(documented, written).mean())
    # False positive rate of the topic rule: docstrings of other functions that pass.
    half = len(written) // 2
    others = judge.shares(documented, written[half:] + written[:half])
    return figures | {"docstrings.topic_share_of_others": others["topic_share"]}


def language_figures(
    model: Transformer, params: Mapping[str, Params], corpus: Corpus, tokenizer: TextTokenizer, size: Size
) -> dict[str, float]:
    """Bits per byte of the test texts, beside a bigram model's, and nats per response token of test demonstrations."""
    training, rows = (
        pretrain.pack(texts, tokenizer, size.row_length, Ledger()) for texts in (corpus.texts, corpus.test.texts)
    )
    bits = math.log(2) * sum(len(text.text.encode()) for text in corpus.test.texts)
    loss, targets = mean_loss(model, params["pretrain"], rows)
    limit = min(size.prompt_tokens + size.response_tokens, size.row_length)
    written = encode_demonstrations(corpus.test.demonstrations, tokenizer, max_tokens=limit, ledger=Ledger())
    return {
        "pretrain.heldout_bits_per_byte": loss * targets / bits,
        "pretrain.bigram_bits_per_byte": bigram_nats(training, rows, tokenizer.vocab_size) / bits,
        "pretrain.heldout_response_nll": mean_loss(model, params["pretrain"], written)[0],
        "sft.heldout_response_nll": mean_loss(model, params["sft"], written)[0],
    }


def reward_figures(
    runs: Mapping[str, Finished],
    sampler: Sampler,
    judge: Judge,
    sft_params: Params,
    prompts: PromptRows,
    size: Size,
    seed: int,
) -> dict[str, float]:
    """Accuracy of the reward model on the gold order of the SFT model's responses to the test prompts."""
    judged = runs["reward"].run
    right, pairs = accuracy(
        Transformer(model_of(judged), scalar=True),
        released_params(judged),
        gold_rankings(sampler, judge, sft_params, prompts, seed),
        size.reward_batch,
        pack=1,
    )
    return {"reward.heldout_accuracy": right, "reward.heldout_pairs": pairs}


def nested(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values with dotted keys, as one dict per stage."""
    stages: dict[str, dict[str, Any]] = {}
    for key, value in summary.items():
        stage, dot, name = key.partition(".")
        if dot:
            stages.setdefault(stage, {})[name] = value
    return stages
