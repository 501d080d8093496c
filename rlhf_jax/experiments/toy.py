"""Training and sampling of small models in memory, with the updates of the stages, for experiments.

All shapes are fixed, so that the seeds of an experiment share one compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, PromptBatch, TokenBatch
from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.generate import generate
from rlhf_jax.model import Transformer, init_params, to_scalar_head
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.rewards import Terms
from rlhf_jax.stages import ppo

PAD, BOS, EOS = 0, 1, 2
BLOCK = 120
"""Prompts that are answered at a time."""
Watch = Callable[[int, Params, dict[str, Any]], None]
"""Called after each iteration with the number of iterations done, the policy and the metrics."""


def nothing(step: int, policy: Params, metrics: dict[str, Any]) -> None:
    """A `Watch` that does nothing."""


class Words:
    """Vocabulary of whole words, for text of words with spaces between them.

    Args:
      words: its words; those that occur before are left out.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(dict.fromkeys(("<pad>", "<bos>", "<eos>", *words)))
        self._ids = {word: place for place, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without the special ones."""
        return " ".join(self.words[place] for place in ids if place > EOS)

    def texts(self, tokens_BR: Any, mask_BR: Any) -> list[str]:
        """Text of each response."""
        rows = zip(np.asarray(tokens_BR), np.asarray(mask_BR), strict=True)
        return [self.decode(tokens[mask].tolist()) for tokens, mask in rows]

    def rows(self, pairs: Sequence[tuple[str, str]], length: int) -> TokenBatch:
        """Rows BOS + prompt + response + EOS, right-padded, with a loss on the response; on all of it without a prompt.

        Args:
          pairs: (prompt, response) of each row.
          length: number of columns.
        """
        tokens = np.full((len(pairs), length), PAD, np.int32)
        real, loss = np.zeros((2, len(pairs), length), bool)
        for row, (prompt, response) in enumerate(pairs):
            before = [BOS, *self.encode(prompt)]
            ids = [*before, *self.encode(response), EOS]
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
            loss[row, len(before) : len(ids)] = True
        return TokenBatch(jnp.asarray(tokens), jnp.asarray(real, jnp.int32), jnp.asarray(loss))

    def prompts(self, texts: Sequence[str], length: int) -> PromptBatch:
        """Left-padded prompts with BOS."""
        tokens = np.full((len(texts), length), PAD, np.int32)
        for row, text in enumerate(texts):
            ids = [BOS, *self.encode(text)]
            tokens[row, length - len(ids) :] = ids
        return PromptBatch(jnp.asarray(tokens), jnp.asarray(tokens != PAD))


class Fit:
    """A stage with one network, as one compiled program of all its steps.

    Args:
      make_update: that of the stage.
      model: the network.
      rate: peak learning rate.
      steps: number of updates.
      batch: rows of each.
    """

    def __init__(
        self, make_update: Callable[..., Any], model: Transformer, *, rate: float, steps: int, batch: int
    ) -> None:
        self.optimizer = make_optimizer(OptimConfig(learning_rate=rate), steps)
        self.steps, self.batch = steps, batch
        self._run = _fit(make_update, model, self.optimizer)

    def __call__(self, params: Params, rows: Any, *frozen: Any, seed: int) -> tuple[Params, dict[str, Any]]:
        """Train on rows in random order, epoch by epoch: (parameters, metrics of each step).

        Args:
          params: initial parameters.
          rows: batch with all rows.
          *frozen: frozen networks, if the stage has some.
          seed: of the order.
        """
        count = len(jax.tree.leaves(rows)[0])
        draws, needed = np.random.default_rng(seed), self.steps * self.batch
        order = np.concatenate([draws.permutation(count) for _ in range(-(-needed // count))])[:needed]
        state = new_state(params, jax.jit(self.optimizer.init)(params), seed)
        state, metrics = self._run(state, rows, jnp.asarray(order.reshape(self.steps, self.batch), jnp.int32), *frozen)
        return state.params, metrics


@functools.cache
def _fit(make_update: Callable[..., Any], model: Transformer, optimizer: Any) -> Callable[..., Any]:
    """All steps of `Fit` as one program, which equal fits of several experiments share."""
    update = make_update(model, optimizer)

    def run(state: Any, rows: Any, order_NB: Any, *frozen: Any) -> Any:
        def step(state: Any, places_B: Any) -> Any:
            return update(state, jax.tree.map(lambda x: x[places_B], rows), *frozen)

        return jax.lax.scan(step, state, order_NB)

    return jax.jit(run)


class Optimise:
    """PPO against a reward model, or against a function of text, as compiled programs of one iteration.

    Args:
      networks: architectures.
      config: settings; seed and β are those of each call.
      words: vocabulary.
      by_text: the reward is a function of text, and there is no reward model.
    """

    def __init__(self, networks: ppo.Networks, config: ppo.Config, words: Words, *, by_text: bool = False) -> None:
        self.config, self._words = config, words
        self._sample, self._update = _iteration(networks, config, by_text)

    def __call__(
        self,
        policy: Params,
        critic: Params | None,
        frozen: ppo.Frozen,
        prompts: PromptBatch,
        draw: Callable[[np.random.Generator, int], np.ndarray],
        *,
        seed: int,
        kl_coef: float,
        reward: Callable[[Sequence[int], Sequence[str]], Sequence[float]] | None = None,
        watch: Watch = nothing,
        text: TokenBatch | None = None,
    ) -> Params:
        """Optimise a policy and return it.

        Args:
          policy: initial parameters.
          critic: those of the value network, if the estimator has one.
          frozen: the frozen networks.
          prompts: all prompts.
          draw: (random numbers, how many) -> numbers of the prompts of an iteration.
          seed: of sampling and order.
          kl_coef: β.
          reward: (numbers of the prompts, answers) -> values, with `by_text`.
          watch: see `Watch`.
          text: all rows of the pretraining mix, if the config has one.
        """
        config = dataclasses.replace(self.config, seed=seed, kl_coef=kl_coef)
        state, draws = ppo.initial_state(config, policy, critic), np.random.default_rng(seed)
        samples = config.samples_per_prompt
        for step in range(config.steps):
            places = draw(draws, config.batch // samples)
            mix = None if text is None else draws.integers(len(text.tokens_BT), size=config.pretraining_batch)
            batch = ppo.Batch(
                jax.tree.map(lambda x, at=places: x[at], prompts),
                None if text is None else jax.tree.map(lambda x, at=mix: x[at], text),
            )
            if reward is not None:
                sampled = self._sample(state, batch, frozen)
                values = reward(np.repeat(places, samples).tolist(), self._words.texts(sampled.tokens, sampled.mask))
                value_B1 = jnp.asarray(values, jnp.float32)[:, None]
                batch = dataclasses.replace(batch, scored=ppo.ScoredResponses(sampled, value_B1))
            state, metrics = self._update(state, batch, frozen)
            watch(step + 1, state.params["policy"], metrics)
        return state.params["policy"]


@functools.cache
def _iteration(networks: ppo.Networks, config: ppo.Config, by_text: bool) -> tuple[Callable[..., Any], ...]:
    """Sampling and the update of `Optimise`, which equal settings of several experiments share."""
    terms = Terms(("text",), (1.0,)) if by_text else None
    return (
        jax.jit(ppo.make_sampling(networks, config, eos_id=EOS, pad_id=PAD)),
        jax.jit(ppo.make_update(networks, config, eos_id=EOS, pad_id=PAD, terms=terms)),
    )


def small_model(vocabulary: int, *, context: int, width: int, layers: int, scalar: bool = False) -> Transformer:
    """A Llama block as in the recipe's tiny size."""
    config = ModelConfig(
        vocab_size=vocabulary,
        context=context,
        width=width,
        layers=layers,
        heads=max(width // 32, 1),
        rope_base=1000.0,
        qk_norm=True,
        embedding_scale=width**0.5,
    )
    return Transformer(config, scalar=scalar)


def fresh(model: Transformer, seed: int) -> Params:
    """Initial parameters."""
    return _fresh(model, jax.random.key(seed))


def with_head(params: Params, scorer: Transformer, seed: int) -> Params:
    """Parameters of a scalar-head model that starts from a language model, its head at 0."""
    made = to_scalar_head(params, scorer, jax.random.key(seed))
    return {**made, "score": jax.tree.map(jnp.zeros_like, made["score"])}


def answer(
    model: Transformer, words: Words, params: Params, prompts: PromptBatch, *, length: int, seed: int, samples: int = 4
) -> list[str]:
    """Sampled answers at temperature 1, those to a prompt after each other."""
    texts: list[str] = []
    for number, (part, count) in enumerate(_blocks(prompts)):
        found = generate(
            model,
            params,
            part.tokens_BP,
            part.mask_BP,
            jax.random.fold_in(jax.random.key(seed), number),
            max_new_tokens=length,
            stop_ids=(EOS,),
            pad_id=PAD,
            samples=samples,
        )
        texts += words.texts(found.tokens, found.mask)[: count * samples]
    return texts


def first_words(model: Transformer, params: Params, prompts: PromptBatch) -> Floats:
    """Probability of each word as the first of an answer, [B, V]."""
    parts = [np.asarray(_first_words(model, params, part), np.float64)[:count] for part, count in _blocks(prompts)]
    return np.concatenate(parts)


def _blocks(prompts: PromptBatch) -> Iterator[tuple[PromptBatch, int]]:
    """Parts of BLOCK prompts, so that one program serves any number of them, and how many of each count."""
    count = len(prompts.tokens_BP)
    for first in range(0, count, BLOCK):
        places = np.minimum(np.arange(first, first + BLOCK), count - 1)
        yield jax.tree.map(lambda x, at=places: x[at], prompts), min(BLOCK, count - first)


@functools.partial(jax.jit, static_argnums=0)
def _first_words(model: Transformer, params: Params, prompts: PromptBatch) -> Any:
    hidden = model.apply({"params": params}, prompts.tokens_BP, prompts.mask_BP, last=1, method="hidden")
    return jax.nn.softmax(model.apply({"params": params}, hidden, method="head")[:, 0], axis=-1)


_fresh = jax.jit(init_params, static_argnums=0)
