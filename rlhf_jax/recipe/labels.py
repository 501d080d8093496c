"""Simulated human labels of the recipe: responses sampled from its models, scored and ranked by a gold labeller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import Ledger, Prompt, PromptRows, RankingRows, encode_prompts, ranking_rows
from rlhf_jax.demo.gold_score import Virtues, gold_score, noise_for_agreement, rank, virtues_of
from rlhf_jax.demo.python_docs import Corpus
from rlhf_jax.demo.relevance import Usage
from rlhf_jax.evaluation.samples import sample_responses
from rlhf_jax.files import write_file
from rlhf_jax.model import Transformer
from rlhf_jax.parallel import processes
from rlhf_jax.tokenizers.protocol import TextTokenizer

RESPONSES = 4  # K, responses to a prompt that a labeller ranks
# Batch size of continuous batching, used from this number of responses on: a finished response frees its slot for the
# next, which takes a quarter less time on a CPU. Of the default's 32,000 and 4,388 responses, the padding of the last
# batch wastes one in 33 and one in 360.
MANY = 2200


class Judge:
    """Gold scorer of the simulated labeller, for sampled token ids."""

    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.usage = Usage.of((text.text for text in corpus.texts), corpus.descriptions)

    def scores(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> np.ndarray:
        """Gold scores [prompts, K]; a response without EOS counts as unfinished, whatever its text."""
        return self._each(gold_score, prompts, responses)

    def shares(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> dict[str, float]:
        """Shares of responses that meet each criterion, that are sensible, and that are sensible and fluent.

        A sensible response is a finished sentence of known words about the function, as far as a rule can tell.
        """
        has_NKV = self._each(virtues_of, prompts, responses)
        has = {name: has_NKV[..., i] for i, name in enumerate(Virtues._fields)}
        has["sensible"] = has["finished"] & has["topic"] & has["known"]
        has["sensible_fluent"] = has["sensible"] & has["fluent"]
        return {f"{name}_share": float(each.mean()) for name, each in has.items()}

    def _each(self, what: Callable[..., Any], prompts: list[Prompt], responses: list[list[list[int]]]) -> np.ndarray:
        return np.array(
            [
                [what(p.prompt, self.tokenizer.decode(ids), self.usage, ended=self.ended(ids)) for ids in row]
                for p, row in zip(prompts, responses, strict=True)
            ]
        )

    def ended(self, ids: list[int]) -> bool:
        """True if a response has its EOS token."""
        return bool(ids) and ids[-1] == self.tokenizer.eos_id


class Sampler:
    """Sampler of responses from a model, without top-k or top-p; at temperature 1 by default."""

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, response_tokens: int) -> None:
        self.model, self.response_tokens = model, response_tokens
        self.options: dict[str, Any] = {
            "max_new_tokens": response_tokens,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }

    def __call__(
        self, params: Any, prompts: PromptRows, seed: int, samples: int = 1, temperature: float = 1.0
    ) -> list[list[list[int]]]:
        key = jax.random.key(seed)
        many = len(prompts) * samples >= MANY
        return sample_responses(
            self.model,
            params,
            prompts,
            key,
            samples=samples,
            temperature=temperature,
            batch_size=MANY if many else 256,
            slots=256 if many else 0,
            **self.options,
        )


def prompt_rows(prompts: list[Prompt], tokenizer: TextTokenizer, width: int) -> PromptRows:
    """Encodes the prompts that fit in `width` tokens, in a fixed shuffled order."""
    order = np.random.default_rng(0).permutation(len(prompts))
    return encode_prompts([prompts[i] for i in order], tokenizer, max_tokens=width, ledger=Ledger())


def some(prompts: PromptRows, count: int) -> PromptRows:
    """The first `count` prompts, starting over if there are fewer."""
    places = [i % len(prompts) for i in range(count)]
    return PromptRows(
        [prompts.rows[i] for i in places], prompts.width, prompts.pad_id, [prompts.sources[i] for i in places]
    )


def label(
    sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, *, rankings: int, seed: int, folder: Path
) -> tuple[RankingRows, float]:
    """Samples responses and ranks them with a noisy labeller.

    The rankings are also written to rankings.jsonl, in the format for human rankings; training reads the sampled ids.

    Args:
      rankings: number of rankings; with fewer prompts, prompts are sampled again and the new responses ranked.

    Returns:
      (rankings, share of pairs with different gold scores on which two such labellers agree).
    """
    chosen = some(prompts, rankings)
    responses = sampler(params, chosen, seed + 1, RESPONSES)
    gold = judge.scores(list(chosen.sources), responses)
    noise = noise_for_agreement(gold)
    random = np.random.default_rng([seed, 1])
    ranks, second = rank(gold, noise, random), rank(gold, noise, random)
    first, other = np.triu_indices(RESPONSES, 1)
    differ = gold[:, first] != gold[:, other]
    same = (ranks[:, first] < ranks[:, other]) == (second[:, first] < second[:, other])
    lines = [
        json.dumps(
            {
                "prompt": p.prompt,
                "responses": [judge.tokenizer.decode(ids) for ids in row],
                "ranks": r.tolist(),
                "ended": [judge.ended(ids) for ids in row],
            }
        )
        for p, row, r in zip(chosen.sources, responses, ranks, strict=True)
    ]
    if processes.is_first():
        write_file(folder / "rankings.jsonl", "\n".join(lines) + "\n")
    return ranked(sampler, judge, chosen, responses, ranks), float(same[differ].mean())


def ranked(
    sampler: Sampler, judge: Judge, prompts: PromptRows, responses: list[list[list[int]]], ranks: np.ndarray
) -> RankingRows:
    """Rows of ranked responses. Few buckets, as each is compiled: one for separate rows, two for shared prompts."""
    rows = [
        (ranking_rows(ids, row), row_ranks.tolist())
        for ids, row, row_ranks in zip(prompts.rows, responses, ranks, strict=True)
    ]
    limit = prompts.width + sampler.response_tokens
    longest = prompts.width + RESPONSES * sampler.response_tokens
    return RankingRows(rows, limit, judge.tokenizer.pad_id, (limit, longest * 5 // 6, longest))


def gold_rankings(sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, seed: int) -> RankingRows:
    """Samples responses to held-out prompts and ranks them by the noise-free gold score; equal scores are ties."""
    responses = sampler(params, prompts, seed + 2, RESPONSES)
    gold = judge.scores(list(prompts.sources), responses)
    ranks = 1 + (gold[:, None, :] > gold[:, :, None]).sum(axis=2)
    return ranked(sampler, judge, prompts, responses, ranks)
