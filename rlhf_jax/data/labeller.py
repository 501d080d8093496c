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

AGREEMENT = 0.73
LONGEST_CONCISE = 14  # words
SHORTEST_SENTENCE = 3


class Virtues(NamedTuple):
    """What the labelling instructions want of a response about a function."""

    finished: bool
    """It is one sentence, from a capital to a full stop, and has its end."""
    topic: bool
    """It mentions a word of the function's name, or of its arguments where the name has none of three letters."""
    known: bool
    """All its words are words of the corpus or of the question: a name may hold what no text does, as `fqname`."""


def virtues_of(prompt: str, response: str, vocabulary: frozenset[str], *, ended: bool = True) -> Virtues:
    """Which of them a response has; one without a word has none. Args: as in `gold_score`."""
    text = response.strip()
    words = words_in(text)
    given = frozenset(words_in(prompt))
    return Virtues(
        finished=bool(words) and ended and re.fullmatch(r"[A-Z][^.!?]*\.", text) is not None,
        topic=words_mentioned(prompt, text)[0] > 0,
        known=bool(words) and all(word in vocabulary or word in given for word in words),
    )


def gold_score(prompt: str, response: str, vocabulary: frozenset[str], *, ended: bool = True) -> float:
    """The rating from 1 to 7 that the labelling instructions of the default recipe give a response about a function.

    Start from 1 and
      add 2 if it is one finished sentence, from a capital to a full stop;
      add 2 if it mentions a word of the function's name;
      add 2 if all its words are words (those of the question are);
      take 1 if it says a word twice, 1 if it is longer than 14 words, 1 if shorter than 3.

    Args:
      prompt: as `prompt_of` writes it, ` use posix spawn (args) ->`.
      response: the decoded response.
      vocabulary: words of the corpus, lower case.
      ended: the response has its end-of-text token; one without is not finished, whatever it looks like.
    """
    words = words_in(response)
    content = [word for word in words if word not in STOP_WORDS]
    points = 2 * sum(virtues_of(prompt, response, vocabulary, ended=ended))
    points -= len(set(content)) < len(content)
    points -= len(words) > LONGEST_CONCISE or len(words) < SHORTEST_SENTENCE
    return float(max(1 + points, 1))


def words_in(text: str) -> list[str]:
    """The words of a text, lower case, in their order."""
    return re.findall(r"[a-z][a-z0-9]*", text.lower())


def words_mentioned(prompt: str, response: str) -> tuple[int, int]:
    """(how many words of the function asked about the response mentions, how many there are)."""
    words = words_in(response)
    asked = topic_words(prompt)
    return sum(any(same_word(a, w) for w in words) for a in asked), len(asked)


STOP_WORDS = frozenset("a an and are as at be by for from if in is it its not of on or s that the this to with".split())


def topic_words(prompt: str) -> list[str]:
    """The words of the function asked about: its name's, and its arguments' if that has none of three letters."""
    name, _, rest = prompt.removesuffix("->").partition("(")
    for part in (name, name + " " + rest):
        words = [word for word in words_in(part) if len(word) > 2 and word not in STOP_WORDS]
        if words:
            return list(dict.fromkeys(words))
    return []


def same_word(asked: str, word: str) -> bool:
    """Whether two words share a stem: equal, or one continues the other after three letters (`use`, `uses`)."""
    stem = asked[:-1] if len(asked) > 4 and asked[-1] in "es" else asked
    return word.startswith(stem) or (len(word) > 3 and asked.startswith(word))


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
