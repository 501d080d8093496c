"""Small models of the language of reviews, for several experiments: sampling, measurement, comparisons and PPO."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, RankingBatch, TokenBatch
from rlhf_jax.config import EpisodeConfig, OptimConfig, PPOConfig
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.experiments.reviews import TOPICS, WORDS, gold, page, review
from rlhf_jax.experiments.toy import EOS, PAD, Fit, Optimise, Watch, nothing, small_model, with_head
from rlhf_jax.generate import generate
from rlhf_jax.logprobs import last_token_scores, sequence_logps
from rlhf_jax.model import Transformer
from rlhf_jax.stages import ppo, pretrain, reward, sft

PROMPT, RESPONSE = 2, 24
LENGTH = PROMPT + RESPONSE + 1
TINY = {
    "width": 32,
    "layers": 1,
    "demonstrations": 64,
    "sft_steps": 4,
    "pages": 128,
    "pretrain_steps": 4,
    "comparisons": 64,
    "reward_steps": 3,
    "iterations": 2,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of models that are fine-tuned from scratch.

    Attributes:
      width: of the models.
      layers: of the models.
      demonstrations: answers to fine-tune on.
      sft_steps: updates on them, of 64 answers each; of 32 after pretraining.
    """

    width: int = 64
    layers: int = 2
    demonstrations: int = 4096
    sft_steps: int = 250

    @classmethod
    def short(cls, **own: Any) -> Self:
        """Tiny sizes, for tests; those given differ from TINY's."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: value for name, value in TINY.items() if name in names} | own)


@dataclasses.dataclass(frozen=True)
class PretrainedSizes(Sizes):
    """Sizes of models that are pretrained, then fine-tuned.

    Attributes:
      pages: pages of pretraining text.
      pretrain_steps: updates on them, of 64 pages each.
    """

    demonstrations: int = 512
    sft_steps: int = 100
    pages: int = 20_000
    pretrain_steps: int = 600


@dataclasses.dataclass(frozen=True)
class RLHFSizes(Sizes):
    """Sizes of a reward model and of PPO after fine-tuning.

    Attributes:
      comparisons: pairs of the start's answers that the reward model is trained on.
      reward_steps: updates on them, of 32 pairs each.
      iterations: of PPO, of 128 answers each.
    """

    comparisons: int = 1024
    reward_steps: int = 64
    iterations: int = 60


class Measured(NamedTuple):
    """Answers of a policy, those to a topic after each other, [B] each.

    Attributes:
      texts: the answers.
      ratio: log π(y|x) − log π_start(y|x) in nats, whose mean is the KL.
      logp: log π(y|x) in nats, whose negative mean is the entropy.
      score: raw scores of the reward model.
      gold: gold scores.
    """

    texts: list[str]
    ratio: Floats
    logp: Floats
    score: Floats
    gold: Floats

    @property
    def kl(self) -> float:
        """KL to the start in nats per answer; the estimate may be below 0, which the KL is not."""
        return max(float(self.ratio.mean()), 0.0)


class Judge(NamedTuple):
    """A reward model with the scale of its scores.

    Attributes:
      params: its parameters.
      start: measured answers of the policy's start.
      mean: of the scores of these answers.
      scale: their standard deviation.
    """

    params: Params
    start: Measured
    mean: float
    scale: float

    def proxy(self, measured: Measured) -> float:
        """Mean normalized score of answers."""
        return float((measured.score.mean() - self.mean) / self.scale)


class ReviewModels:
    """A language model and a reward model of one shape, and the programs that run them, which all seeds share.

    Args:
      sizes: of the models.
    """

    def __init__(self, sizes: Sizes) -> None:
        shape = functools.partial(small_model, context=LENGTH + 1, width=sizes.width, layers=sizes.layers)
        self.model = shape(len(WORDS))
        self.scorer = shape(len(WORDS), scalar=True)
        self._measure = functools.partial(_measured, self.model, self.scorer)
        self._scores = jax.jit(functools.partial(last_token_scores, self.scorer))

    def pretraining(self, sizes: PretrainedSizes) -> Fit:
        """Pretraining on pages."""
        return Fit(pretrain.make_update, self.model, rate=3e-3, steps=sizes.pretrain_steps, batch=64)

    def tuning(self, steps: int, *, pretrained: bool) -> Fit:
        """Fine-tuning on answers, from scratch or from a pretrained model."""
        rate, batch = (1e-3, 32) if pretrained else (3e-3, 64)
        return Fit(sft.make_update, self.model, rate=rate, steps=steps, batch=batch)

    def comparing(self, steps: int, *, batch: int = 32) -> Fit:
        """Training of a reward model on rankings."""
        return Fit(reward.make_update, self.scorer, rate=1e-3, steps=steps, batch=batch)

    def judge(self, compare: Fit, start: Params, pairs: RankingBatch, *, answers: int, seed: int) -> Judge:
        """Train a reward model from `start`, and measure it on `answers` answers of the start to each topic."""
        params, _ = compare(with_head(start, self.scorer, seed), pairs, seed=seed)
        found = self.measure(answers, start, start, params, seed=seed + 1)
        return Judge(params, found, float(found.score.mean()), float(found.score.std()))

    def optimise(self, iterations: int, *, by_text: bool = False, **changes: Any) -> Optimise:
        """PPO with a value network, of 128 answers an iteration, at a constant learning rate.

        Args:
          iterations: number of them.
          by_text: the reward is a function of text.
          **changes: fields of PPO's settings that differ.
        """
        config = PPOConfig(
            batch=128,
            steps=iterations,
            minibatches=2,
            prompt_length=PROMPT,
            policy=OptimConfig(learning_rate=1e-3, schedule="constant", epsilon=1e-5),
            critic=OptimConfig(learning_rate=1e-3, schedule="constant", epsilon=1e-5),
            episode=EpisodeConfig(response_length=RESPONSE, missing_end="subtract"),
            **changes,
        )
        return Optimise(ppo.Networks(self.model, self.scorer), config, WORDS, by_text=by_text)

    def rlhf(
        self,
        optimise: Optimise,
        start: Params,
        judge: Judge,
        *,
        seed: int,
        kl_coef: float,
        watch: Watch = nothing,
        text: TokenBatch | None = None,
    ) -> Params:
        """PPO from `start` against a reward model, which the value network starts from.

        Args:
          optimise: see `optimise`.
          start: initial policy and reference.
          judge: reward model.
          seed: of sampling and order.
          kl_coef: β.
          watch: see `Optimise`.
          text: rows of the pretraining mix.
        """
        return optimise(
            start,
            ppo.rescaled(judge.params, judge.mean, judge.scale),
            ppo.Frozen(start, judge.params, jnp.float32(judge.mean), jnp.float32(judge.scale)),
            WORDS.prompts(TOPICS, PROMPT),
            lambda draws, count: draws.integers(len(TOPICS), size=count),
            seed=seed,
            kl_coef=kl_coef,
            watch=watch,
            text=text,
        )

    def measure(self, each: int, policy: Params, start: Params, judge: Params, *, seed: int) -> Measured:
        """Sample `each` answers of a policy to every topic and measure them."""
        prompts = WORDS.prompts(TOPICS, PROMPT)
        tokens, mask, *figures = self._measure(each, policy, start, judge, prompts, jax.random.key(seed))
        texts = WORDS.texts(tokens, mask)
        ratio, logp, score = (np.asarray(x, np.float64) for x in figures)
        return Measured(texts, ratio, logp, score, golds(texts))

    def ranked(self, start: Params, answers: int, *, seed: int, size: int = 2) -> RankingBatch:
        """Rankings of `size` answers of a model each by the gold score, equal ones tied.

        Args:
          start: the model that answers.
          answers: least number of answers, which are as many to each topic.
          seed: of sampling.
          size: K.
        """
        each = -(-answers // (len(TOPICS) * size)) * size
        prompts = WORDS.prompts(TOPICS, PROMPT)
        tokens, mask, rows = _sampled(self.model, each, start, prompts, jax.random.key(seed))
        gold_BK = golds(WORDS.texts(tokens, mask)).reshape(-1, size)
        ranks_BK = 1 + (gold_BK[:, None, :] > gold_BK[:, :, None]).sum(axis=2)
        shape = (-1, size, rows.tokens_BT.shape[1])
        return RankingBatch(
            rows.tokens_BT.reshape(shape),
            rows.segment_ids_BT.reshape(shape) > 0,
            jnp.asarray(ranks_BK, jnp.int32),
            jnp.ones(ranks_BK.shape, bool),
        )

    def scores(self, judge: Params, rankings: RankingBatch) -> Floats:
        """Scores of all answers, [B, K]."""
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (rankings.tokens_BKT, rankings.mask_BKT))
        return np.asarray(self._scores(judge, tokens, mask), np.float64).reshape(rankings.ranks_BK.shape)

    def accuracy(self, judge: Params, rankings: RankingBatch) -> float:
        """Share of the ordered pairs that the scores order correctly."""
        score_BK, ranks_BK = self.scores(judge, rankings), np.asarray(rankings.ranks_BK)
        better = ranks_BK[:, :, None] < ranks_BK[:, None, :]
        return float((score_BK[:, :, None] > score_BK[:, None, :])[better].mean())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sampled(model: Transformer, each: int, policy: Params, prompts: Any, key: Any) -> tuple[Any, Any, TokenBatch]:
    """Sampled responses, their mask, and prompts and responses as rows with a loss on the responses."""
    found = generate(
        model,
        policy,
        prompts.tokens_BP,
        prompts.mask_BP,
        key,
        max_new_tokens=RESPONSE,
        stop_ids=(EOS,),
        pad_id=PAD,
        samples=each,
    )
    tokens = jnp.concatenate([jnp.repeat(prompts.tokens_BP, each, axis=0), found.tokens], axis=1)
    real = jnp.concatenate([jnp.repeat(prompts.mask_BP, each, axis=0), found.mask], axis=1)
    return found.tokens, found.mask, TokenBatch(tokens, real.astype(jnp.int32), real.at[:, :PROMPT].set(False))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(
    model: Transformer,
    scorer: Transformer,
    each: int,
    policy: Params,
    start: Params,
    judge: Params,
    prompts: Any,
    key: Any,
) -> Any:
    tokens, mask, rows = _sampled(model, each, policy, prompts, key)
    logp = sequence_logps(model, policy, rows)[0]
    ratio = logp - sequence_logps(model, start, rows)[0]
    score = last_token_scores(scorer, judge, rows.tokens_BT, rows.segment_ids_BT > 0)
    return tokens, mask, ratio, logp, score


def golds(texts: Sequence[str]) -> Floats:
    """Gold scores of answers, as many to each topic, those to a topic after each other."""
    each = len(texts) // len(TOPICS)
    return np.array([gold(TOPICS[at // each], text) for at, text in enumerate(texts)])


def demonstrations(count: int, draws: np.random.Generator) -> TokenBatch:
    """Rows of topics with an answer as people write them."""
    topics = [str(topic) for topic in draws.choice(TOPICS, count)]
    return WORDS.rows([(topic, review(topic, draws)) for topic in topics], LENGTH)


def pages(count: int, draws: np.random.Generator) -> TokenBatch:
    """Rows of pretraining text."""
    return WORDS.rows([("", page(draws, LENGTH - 2)) for _ in range(count)], LENGTH)
