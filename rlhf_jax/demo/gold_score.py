"""A simulated labeller for the embedded corpus: a written-down gold score, and rankings by it with Bradley-Terry noise.

It stands where InstructGPT had people, who rated on a scale from 1 to 7. Everything it prefers can be read off
`gold_score`, so that what RLHF gained is measured against what was wanted, and not only against the reward model. The
noise is such that two labellers agree on 73% of the pairs whose scores differ, as often as InstructGPT's did (Ouyang et
al. 2022, section 3.4); pairs of equal score they order by chance.
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
    """What the labelling instructions want of a response about a function."""

    finished: bool
    """It is one sentence, from a capital to a full stop, and has its end."""
    topic: bool
    """It is about the function: it says a word of the name, or one that goes with such names (relevance.py)."""
    known: bool
    """All its words are words of the corpus or of the question: a name may hold what no text does, as `fqname`."""
    concise: bool
    """It says enough and no more: three to eight words, as half of the docstrings."""
    fluent: bool
    """It says no word twice, stop words aside, as nine in ten docstrings."""


def virtues_of(prompt: str, response: str, usage: Usage, *, ended: bool = True) -> Virtues:
    """Which of them a response has; one without a word has none. Args: as in `gold_score`."""
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
    """The rating from 1 to 7 that the labelling instructions of the default recipe give a response about a function.

    It is 1, and 1.2 more for each of these:
      it is one finished sentence, from a capital to a full stop;
      it is about the function;
      all its words are words (those of the question are);
      it has 3 to 8 words;
      it says no word twice.

    Args:
      prompt: as `prompt_of` writes it, ` use posix spawn (args) ->`.
      response: the decoded response.
      usage: the words of the documentation.
      ended: the response has its end-of-text token; one without is not finished, whatever it looks like.
    """
    return 1 + 6 * sum(virtues_of(prompt, response, usage, ended=ended)) / len(Virtues._fields)


def noise_for_agreement(scores: NDArray[np.float64], agreement: float = AGREEMENT) -> float:
    """The temperature τ at which two labellers agree on that share of pairs, by bisection.

    A labeller prefers i to j with p = σ((g_i - g_j) / τ), so two agree with p² + (1 - p)².

    Args:
      scores: gold scores [prompts, K]; pairs are those of one prompt whose scores differ.
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

    That is Plackett-Luce, whose pairs are Bradley-Terry's.
    """
    utility = scores / noise + random.gumbel(size=scores.shape)
    return np.argsort(np.argsort(-utility, axis=1), axis=1) + 1
