"""What stands where the recipe would have people: responses sampled from its models, judged and ranked."""

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
from rlhf_jax.model import Transformer
from rlhf_jax.parallel import processes
from rlhf_jax.tokenizers.protocol import TextTokenizer

RESPONSES = 4  # that a labeller ranks, K
# Responses in a batch where there are so many: one that has ended gives its place to the next, a quarter less time on a
# CPU. Of the default's 32,000 and 4,388, one in 33 and one in 360 are sampled in vain to fill the last batch.
MANY = 2200


class Judge:
    """The simulated labeller: gold scores of sampled token ids."""

    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.usage = Usage.of((text.text for text in corpus.texts), corpus.descriptions)

    def scores(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> np.ndarray:
        """Gold scores [prompts, K]; a response without an end never finished, whatever it looks like."""
        return self._each(gold_score, prompts, responses)

    def shares(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> dict[str, float]:
        """Shares of the responses that have each virtue; that are sensible; and that are so and say no word twice.

        Sensible are finished sentences of words that are words, about what was asked, as far as a rule can tell.
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
        """Whether a response has its end-of-text token."""
        return bool(ids) and ids[-1] == self.tokenizer.eos_id


class Sampler:
    """Responses of a run's model, by the pure distribution; at temperature 1 unless said."""

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
    """The prompts that fit in `width` tokens, in the order of a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(prompts))
    return encode_prompts([prompts[i] for i in order], tokenizer, max_tokens=width, ledger=Ledger())


def some(prompts: PromptRows, count: int) -> PromptRows:
    """The first `count` prompts, and where there are fewer, again from the first."""
    places = [i % len(prompts) for i in range(count)]
    return PromptRows(
        [prompts.rows[i] for i in places], prompts.width, prompts.pad_id, [prompts.sources[i] for i in places]
    )


def label(
    sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, *, rankings: int, seed: int, folder: Path
) -> tuple[RankingRows, float]:
    """(rankings of sampled responses by a noisy labeller, how often two of them agree on a pair).

    The labeller's rankings also stand in rankings.jsonl, as a person's would; training reads the sampled ids.

    Args:
      rankings: how many; where prompts are fewer, they are asked again and the new responses ranked.
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
        json.dumps({"prompt": p.prompt, "responses": [judge.tokenizer.decode(ids) for ids in row], "ranks": r.tolist()})
        for p, row, r in zip(chosen.sources, responses, ranks, strict=True)
    ]
    if processes.is_first():
        (folder / "rankings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ranked(sampler, judge, chosen, responses, ranks), float(same[differ].mean())


def ranked(
    sampler: Sampler, judge: Judge, prompts: PromptRows, responses: list[list[list[int]]], ranks: np.ndarray
) -> RankingRows:
    """Rows of ranked responses, in batches of one length, or with the prompt shared of one of two: each is compiled."""
    rows = [
        (ranking_rows(ids, row), row_ranks.tolist())
        for ids, row, row_ranks in zip(prompts.rows, responses, ranks, strict=True)
    ]
    limit = prompts.width + sampler.response_tokens
    longest = prompts.width + RESPONSES * sampler.response_tokens
    return RankingRows(rows, limit, judge.tokenizer.pad_id, (limit, longest * 5 // 6, longest))


def gold_rankings(sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, seed: int) -> RankingRows:
    """Held-out rankings by the noise-free gold score; equal scores are ties."""
    responses = sampler(params, prompts, seed + 2, RESPONSES)
    gold = judge.scores(list(prompts.sources), responses)
    ranks = 1 + (gold[:, None, :] > gold[:, :, None]).sum(axis=2)
    return ranked(sampler, judge, prompts, responses, ranks)
