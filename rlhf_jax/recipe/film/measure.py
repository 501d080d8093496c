"""Comparison of SFT, PPO and best-of-n on held-out prompts, by the reward model and by the judge kept apart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import EpisodeConfig
from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Ledger,
    Prompt,
    PromptRows,
    Ranking,
    encode_demonstrations,
    encode_prompts,
    read_records,
    response_text,
)
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import Answer, Language
from rlhf_jax.evaluation.arms import Arm, best_arm, figures, scored_prompts, win_rates
from rlhf_jax.evaluation.frontier import best_of_curve, fitted, plain
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.evaluation.reward_accuracy import reward_accuracy
from rlhf_jax.evaluation.samples import distinct_share, sample_responses, sequence_kl
from rlhf_jax.evaluation.scorers import model_scorer
from rlhf_jax.files import write_file
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_source
from rlhf_jax.recipe.film.judge import WordJudge, accuracy, fit_judge
from rlhf_jax.recipe.film.parts import Rows
from rlhf_jax.recipe.film.settings import MeasureConfig
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.tokenizers.protocol import TextTokenizer

REWARD, JUDGE = "reward model", "judge"


class Measurement:
    """Held-out prompts, and how answers to them are sampled and scored.

    Args:
      config: how many, and of what size the batches are.
      prompts: held-out prompts; the first that fit are used.
      tokenizer: of all models.
      prompt_length: most tokens of a prompt.
      episode: length of answers, and the score of one that does not end, as in PPO.
      openings: True if prompt and answer together are the text that is judged.
      seed: of sampling.
    """

    def __init__(
        self,
        config: MeasureConfig,
        prompts: Sequence[Prompt],
        tokenizer: TextTokenizer,
        *,
        prompt_length: int,
        episode: EpisodeConfig,
        openings: bool,
        seed: int,
    ) -> None:
        self.config, self.tokenizer, self.openings, self.seed = config, tokenizer, openings, seed
        self.ledger = Ledger()
        self.episode, self.response_length = episode, episode.response_length
        rows = encode_prompts(prompts, tokenizer, max_tokens=prompt_length, ledger=self.ledger)
        if not len(rows):
            raise UserError(f"data: expected held-out prompts of at most {prompt_length} tokens, got none")
        count = min(config.prompts, len(rows))
        self.prompts: list[Prompt] = list(rows.sources[:count])
        self.rows = PromptRows(rows.rows[:count], rows.width, rows.pad_id, self.prompts)

    def sampled(self, language: Language, samples: int = 1, seed: int = 0) -> list[list[list[int]]]:
        """Token ids of `samples` answers to each prompt."""
        batch = self.config.batch
        # A slot is free again as soon as its answer ends, where the answers fill the slots more than once.
        many = len(self.rows) * samples > 4 * batch and batch % (4 * samples) == 0
        return sample_responses(
            language.network,
            language.params,
            self.rows,
            jax.random.key(self.seed + seed),
            samples=samples,
            batch_size=16 * batch if many else batch,
            slots=batch if many else 0,
            max_new_tokens=self.response_length,
            eos_id=self.tokenizer.stop_ids,
            pad_id=self.tokenizer.pad_id,
        )

    def answers(self, sampled: Sequence[Sequence[Sequence[int]]], kl: np.ndarray | None = None) -> list[list[Answer]]:
        """Sampled token ids as answers; kl: of the first answer to each prompt."""
        found = []
        for place, (prompt, ids, several) in enumerate(zip(self.prompts, self.rows.rows, sampled, strict=True)):
            own_space = bool(prompt.turns) and self.tokenizer.chat_template is None
            texts = [response_text(ids, one, self.tokenizer) for one in several]
            found.append(
                [
                    Answer(
                        text.removeprefix(" ") if own_space else text,
                        bool(one) and one[-1] in self.tokenizer.stop_ids,
                        len(one),
                        kl=None if kl is None else float(kl[place]),
                    )
                    for text, one in zip(texts, several, strict=True)
                ]
            )
        return found

    def kl(self, policy: Language, reference: Language, sampled: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """k1 estimate of the KL of each prompt's first answer, in nats, [P]."""
        return sequence_kl(
            policy.network,
            policy.params,
            reference.params,
            self.rows,
            [several[0] for several in sampled],
            max_new_tokens=self.response_length,
            batch_size=self.config.batch,
        )

    def rewarded(self, scores_PK: np.ndarray, answers: Sequence[Sequence[Answer]]) -> np.ndarray:
        """A reward model's scores as PPO takes them: of an answer that does not end, what its settings say, [P, K]."""
        cut_PK = np.array([[answer.ended is False for answer in several] for several in answers])
        if self.episode.missing_end == "replace":
            return np.where(cut_PK, self.episode.missing_end_score, scores_PK)
        return scores_PK + self.episode.missing_end_score * (cut_PK & (self.episode.missing_end == "subtract"))

    def judged(self, judge: WordJudge, answers: Sequence[Sequence[Answer]]) -> np.ndarray:
        """The judge's scores, [P, K]."""
        texts = [
            judged_text(prompt, answer.text, self.openings)
            for prompt, several in zip(self.prompts, answers, strict=True)
            for answer in several
        ]
        return judge.scores(texts).reshape(len(self.prompts), -1)

    def perplexity(self, model: Language, arm: Arm) -> float:
        """Perplexity per token of an arm's answers, given their prompts and without their ends, under another model."""
        records = [
            Demonstration(prompt.prompt, f" {one.text}" if prompt.turns else one.text, turns=prompt.turns, ended=False)
            for prompt, several in zip(self.prompts, arm.answers, strict=True)
            for one in several
            if one.text
        ]
        limit = self.rows.width + 2 * self.response_length
        rows = encode_demonstrations(records, self.tokenizer, max_tokens=limit, ledger=Ledger())
        return math.exp(mean_loss(model.network, model.params, rows, batch_size=self.config.batch)[0])


def judged_text(prompt: Prompt, answer: str, openings: bool) -> str:
    """The text that the judge reads: the sentence where the prompt is its opening, else the answer."""
    return prompt.prompt + answer if openings else answer


def measure(
    measurement: Measurement,
    judge: WordJudge,
    *,
    runs: Mapping[str, Path],
    init: Source,
    heldout: Path,
    rankings: Rows,
    human: float | None,
    folder: Path,
) -> dict[str, Any]:
    """Compare the models; writes samples.jsonl and returns the content of evaluation.json.

    Args:
      measurement: held-out prompts.
      judge: the judge.
      runs: folders of the runs sft, reward and ppo.
      init: the untouched model.
      heldout: file of held-out comparisons.
      rankings: what the reward model was trained on, for the baseline of words.
      human: share of held-out comparisons on which another person agrees, if known.
      folder: of samples.jsonl.
    """
    source = open_source(str(runs["reward"]), stages=("reward",))
    compared, pool = sampled_arms(measurement, judge, source, runs)
    write_samples(folder / "samples.jsonl", measurement.prompts, compared)
    masks = scored_prompts(compared)
    untouched = Language.of(init)
    models = [
        figures(arm, masks, seed=measurement.seed)
        | {
            "distinct_share": distinct_share([several[0].text for several in arm.answers]),
            "untouched_perplexity": measurement.perplexity(untouched, arm),
        }
        for arm in compared
    ]
    del untouched
    pairs = read_records([str(heldout)], "rankings", Ledger())
    checked = reward_accuracy(source, pairs, measurement.ledger, batch=measurement.config.batch)
    curve = best_of_curve(pool, REWARD, seed=measurement.seed)
    dropped = measurement.ledger.reasons().get("dropped", {})
    content: dict[str, Any] = plain(
        {
            "prompts": len(measurement.prompts),
            "scorers": [REWARD, JUDGE],
            "reference": str(runs["sft"]),
            "models": models,
            "win_rates": win_rates(compared, masks, seed=measurement.seed),
            "best_of_n": [curve] if curve else [],
            "policies": training_curve(runs["ppo"], seed=measurement.seed),
            "reward_models": [checked] if checked else [],
            "bands": bands(pairs, judge, rankings, human),
            "notes": [f"{count:,} rows are left out: {reason}" for reason, count in dropped.items()],
        }
    )
    return content


def sampled_arms(
    measurement: Measurement, judge: WordJudge, reward: Source, runs: Mapping[str, Path]
) -> tuple[list[Arm], Arm]:
    """(the arms sft, best-of-n and ppo with an answer to each prompt, SFT's further answers), scored."""
    count = measurement.config.best_of
    sft = Language.of(open_source(str(runs["sft"]), stages=LANGUAGE))
    own, pool = measurement.sampled(sft, seed=4), measurement.sampled(sft, count, seed=5)
    ppo = Language.of(open_source(str(runs["ppo"]), stages=LANGUAGE))
    optimised = measurement.sampled(ppo, seed=6)
    kl = measurement.kl(ppo, sft, optimised)
    del sft, ppo
    scorer = model_scorer(reward, measurement.ledger, batch=measurement.config.batch)

    def arm(name: str, sampled: Sequence[Sequence[Sequence[int]]], kl: np.ndarray | None = None) -> Arm:
        answers = measurement.answers(sampled, kl)
        rewards = measurement.rewarded(scorer(measurement.prompts, answers), answers)
        scores = {REWARD: rewards, JUDGE: measurement.judged(judge, answers)}
        return Arm(name, str(runs[name]), "model", answers, scores)

    further = arm("sft", pool)
    best = dataclasses.replace(best_arm(further, REWARD), name=f"best_of_{count}")
    return [arm("sft", own), best, arm("ppo", optimised, kl)], further


def bands(
    pairs: Sequence[Comparison | Ranking], judge: WordJudge, rankings: Rows, human: float | None
) -> list[tuple[str, float, str]]:
    """Accuracies on the same comparisons to compare the reward model's with: (what, accuracy, source)."""
    words = fit_judge(rankings)
    here = "these comparisons"
    found = [
        ("words alone (TF-IDF, Bradley-Terry), the same training data", pair_accuracy(words, pairs), here),
        ("the judge", pair_accuracy(judge, pairs), here),
    ]
    if human is not None:
        found.append(("one other person", human, here))
    return found


def pair_accuracy(judge: WordJudge, records: Sequence[Comparison | Ranking]) -> float:
    """Accuracy of a judge of words on comparisons and on every pair of rankings."""
    better: list[str] = []
    worse: list[str] = []
    for record in records:
        texts = (record.chosen, record.rejected) if isinstance(record, Comparison) else record.responses
        ranks = (1, 2) if isinstance(record, Comparison) else record.ranks
        for one, rank in zip(texts, ranks, strict=True):
            lower = [text for text, other in zip(texts, ranks, strict=True) if rank < other]
            better += [one] * len(lower)
            worse += lower
    return accuracy(judge.scores(better), judge.scores(worse))


def training_curve(run: Path, *, seed: int) -> dict[str, Any] | None:
    """The judge's mean scores of PPO's policies during training against their KL to SFT; None for fewer than two."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if f"eval/{JUDGE}" in row]
    rows = [row for row in rows if row["step"] == 0 or "kl" in row]
    if len(rows) < 3 or rows[0]["step"] != 0:
        return None
    kl = [0.0, *(max(float(row["kl"]), 0.0) for row in rows[1:])]
    scores = {JUDGE: [float(row[f"eval/{JUDGE}"]) for row in rows]}
    fits = {
        name: fitted("rl", np.sqrt(kl), np.array([values]) - values[0], seed=seed) for name, values in scores.items()
    }
    return {
        "start": "sft",
        "models": [f"step {row['step']}" for row in rows],
        "kl": kl,
        "scores": scores,
        "fits": fits,
    }


def write_samples(path: Path, prompts: Sequence[Prompt], arms: Sequence[Arm]) -> None:
    """Write the first answer of each arm to each prompt as rows {"prompt", "model", "text"}, for any judge.

    text is the whole text: where the prompt is the opening of a sentence, the sentence can be judged as it stands.
    """
    rows = [
        {**(prompt_row(prompt.turns) if prompt.turns else {"prompt": prompt.prompt}), "model": arm.name}
        | {"text": several[0].text if prompt.turns else prompt.prompt + several[0].text}
        for arm in arms
        for prompt, several in zip(prompts, arm.answers, strict=True)
    ]
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def shown_rows(content: dict[str, Any], prompts: Sequence[Prompt], samples: Path) -> list[dict[str, Any]]:
    """Rows of answers side by side for the report, from samples.jsonl."""
    names = [model["name"] for model in content["models"]]
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    texts = {name: [line["text"] for line in lines if line["model"] == name] for name in names}
    return [
        {
            "prompt": prompt.prompt,
            "answers": {name: [{"answer": texts[name][at], "scores": {}}] for name in names},
        }
        for at, prompt in enumerate(prompts)
    ]
