"""A small language of reviews with a gold score that is a fixed function, for experiments on rewards.

A prompt is a topic, an answer one or two sentences about it: "the film is warm and clever . it is kind ."
"""

from __future__ import annotations

import re

import numpy as np

from rlhf_jax.experiments.toy import Words

TOPICS = tuple("film book song meal walk game house garden".split())
GOOD = {"kind": 1.0, "bright": 0.9, "warm": 0.8, "clever": 0.7, "lovely": 0.6, "gentle": 0.5}
"""Good words with their value to the gold score."""
BAD = tuple("dull cold rude noisy bitter heavy".split())
_WORD = f"(very )?({'|'.join((*GOOD, *BAD))})"
_SENTENCE = f"is {_WORD}( (and|but) {_WORD})? \\."
WELL_FORMED = re.compile(f"the ({'|'.join(TOPICS)}) {_SENTENCE}( it {_SENTENCE})?")
"""Answers that people could have written."""
WORDS = Words(["the", "is", "and", "but", "very", "it", ".", *TOPICS, *GOOD, *BAD])


def prompt(topic: str) -> str:
    """Text of a prompt: the topic."""
    return topic


def review(topic: str, draws: np.random.Generator) -> str:
    """An answer as people write them: one or two sentences, mostly about the topic, as often bad as good."""
    subject = topic if draws.random() < 0.85 else str(draws.choice(TOPICS))
    sentences = [f"the {subject} is {_opinion(draws)} ."]
    if draws.random() < 0.4:
        sentences.append(f"it is {_opinion(draws)} .")
    return " ".join(sentences)


def page(draws: np.random.Generator, most: int) -> str:
    """A page of pretraining text: reviews of topics one after the other, without prompts, of at most `most` words."""
    told: list[str] = []
    while len(told) + len(more := review(str(draws.choice(TOPICS)), draws).split()) <= most:
        told += more
    return " ".join(told)


def _opinion(draws: np.random.Generator) -> str:
    first, second = (str(word) for word in draws.choice([*GOOD, *BAD], 2))
    very = "very " if draws.random() < 0.3 else ""
    if draws.random() < 0.6:
        return very + first
    return f"{very}{first} {'and' if (first in GOOD) == (second in GOOD) else 'but'} {second}"


def gold(topic: str, text: str) -> float:
    """The gold score of an answer, as somebody would judge it who reads the answer.

    1 for naming the topic first, the value of each different good word of the first three, −0.7 for each bad word, −0.5
    for each word that has been used before (but for "the", "is", "and", "it" and "."), −0.3 for each word beyond 14,
    and −1 for an answer that does not end with ".".
    """
    words = text.split()
    kinds = list(dict.fromkeys(word for word in words if word in GOOD))[:3]
    told = [word for word in words if word not in ("the", "is", "and", "it", ".")]
    score = float(words[:2] == ["the", topic]) + sum(GOOD[word] for word in kinds)
    score -= 0.7 * sum(word in BAD for word in words) + 0.5 * (len(told) - len(set(told)))
    return score - 0.3 * max(len(words) - 14, 0) - float(words[-1:] != ["."])
