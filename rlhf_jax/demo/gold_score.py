"""Simulated labeller for the embedded corpus: a rule-based gold score, and rankings by it with Bradley-Terry noise.

It replaces the people of InstructGPT, who rated on a scale from 1 to 7. `gold_score` defines everything it prefers, so
that the improvement by RLHF is measured against the true preference, and not only against the reward model. The noise
is such that two labellers agree on 73% of the pairs whose scores differ, as InstructGPT's did (Ouyang et al. 2022,
section 3.4); pairs of equal score are ordered at random.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.demo.relevance import STOP_WORDS, Usage, words_in

AGREEMENT = 0.73
SHORTEST_CONCISE, LONGEST_CONCISE = 3, 8  # words


class Virtues(NamedTuple):
    """Criteria of the labelling instructions for a response about a function."""

    finished: bool
    """One sentence, from a capital to a full stop, followed by EOS."""
    topic: bool
    """About the function: it has a word of the name, or one that goes with such names (relevance.py)."""
    known: bool
    """All words occur in the corpus or in the prompt: a name may contain words that no text does, such as `fqname`."""
    concise: bool
    """Three to eight words, as in half of the docstrings."""
    fluent: bool
    """No word twice, stop words aside, as in nine of ten docstrings."""


def virtues_of(prompt: str, response: str, usage: Usage, *, ended: bool = True) -> Virtues:
    """Criteria that a response meets; none if it has no word. The arguments are those of `gold_score`."""
    text = response.strip()
    words = words_in(text)
    given = frozenset(words_in(prompt))
    return Virtues(
        finished=bool(words) and ended and re.fullmatch(r"[A-Z][^.!?]*\.", text) is not None,
        topic=usage.is_about(prompt, text),
        known=bool(words) and all(word in usage.vocabulary or word in given for word in words),
        concise=SHORTEST_CONCISE <= len(words) <= LONGEST_CONCISE,
        fluent=bool(words) and all(words.count(word) == 1 for word in words if word not in STOP_WORDS),
    )


def gold_score(prompt: str, response: str, usage: Usage, *, ended: bool = True) -> float:
    """Rating from 1 to 7 of a response about a function, by the labelling instructions of the default recipe.

    It is 1, plus 1.2 for each of these:
      it is one finished sentence, from a capital to a full stop;
      it is about the function;
      all its words occur in the corpus or in the prompt;
      it has 3 to 8 words;
      it has no word twice.

    Args:
      prompt: as written by `prompt_of`, ` use posix spawn (args) ->`.
      response: the decoded response.
      usage: word statistics of the documentation.
      ended: True if the response has its EOS token; one without it is not finished, whatever its text.
    """
    return 1 + 6 * sum(virtues_of(prompt, response, usage, ended=ended)) / len(Virtues._fields)


def noise_for_agreement(scores: NDArray[np.float64], agreement: float = AGREEMENT) -> float:
    """Temperature τ at which two labellers agree on the given share of pairs, found by bisection.

    A labeller prefers i to j with p = σ((g_i - g_j) / τ), so two agree with p² + (1 - p)².

    Args:
      scores: gold scores [prompts, K]; pairs are two responses to one prompt whose scores differ.
      agreement: the share, 0.5 to 1.
    """
    first, second = np.triu_indices(scores.shape[1], 1)
    gaps = np.abs(scores[:, first] - scores[:, second]).ravel()
    gaps = gaps[gaps > 0]
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        p = 1.0 / (1.0 + np.exp(-np.minimum(gaps / middle, 50.0)))
        low, high = (middle, high) if np.mean(p**2 + (1 - p) ** 2) > agreement else (low, middle)
    return float(np.sqrt(low * high))


def rank(scores: NDArray[np.float64], noise: float, random: np.random.Generator) -> NDArray[np.int64]:
    """A labeller's ranks [prompts, K], 1 is best: the order of gold / τ plus Gumbel noise.

    This is the Plackett-Luce model, whose pairs follow Bradley-Terry.
    """
    utility = scores / noise + random.gumbel(size=scores.shape)
    return np.argsort(np.argsort(-utility, axis=1), axis=1) + 1
