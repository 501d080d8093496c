"""Diversity and repetition of texts, counted in words.

A word is a run of letters, digits and underscores, a single Chinese or Japanese character, or a single other character
that is not white space; case is ignored.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Sequence

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])\w)+|[^\w\s]")
# In place of a count of 0 among matching n-grams (method 1 of Chen and Cherry 2014, as in Texygen).
SMOOTHING = 0.1


def words(text: str) -> list[str]:
    """The words of a text, lower-cased."""
    return _WORD.findall(text.casefold())


def _ngrams(sequence: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(sequence[i:] for i in range(n))))


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words over all n-grams of words, of all texts together; None if they have none.

    It falls with the number and the length of the texts, so only figures of equally many are comparable.

    Source: Li et al. 2016, section 5 (arXiv:1510.03055).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(words(text), n))
    return len(counts) / counts.total() if counts else None


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words of a text that have occurred in it before, 1 − distinct / all; 0 without n-grams.

    Source: seq-rep-n of Welleck et al. 2020, section 6 (arXiv:1908.04319).
    """
    counts = _ngrams(words(text), n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], n: int = 4) -> float | None:
    """Mean BLEU of each text with all others as its references: 1 if all are equal, near 0 if none shares its words.

    BLEU is the geometric mean over orders 1 … n of the share of a text's n-grams that occur in a reference, each
    counted at most as often as in the reference that has it most, times exp(1 − r / c) if the text's c words are fewer
    than the r words of the reference of the nearest length (the shorter one of two). A share of 0 is `SMOOTHING` over
    the number of n-grams; orders that the text is too short for are left out. A text without words has BLEU 1 if
    another has none either, else 0.

    Args:
      texts: answers, to one prompt or to several.
      n: largest order.

    Returns:
      The mean, None for fewer than two texts.

    Source: Zhu et al. 2018, section 3.1 (arXiv:1802.01886); BLEU: Papineni et al. 2002.
    """
    if len(texts) < 2:
        return None
    split = [words(text) for text in texts]
    lengths = sorted(map(len, split))
    log_shares: list[list[float]] = [[] for _ in split]
    for order in range(1, n + 1):
        counts = [_ngrams(sequence, order) for sequence in split]
        most = _two_most(counts)
        for own, shares in zip(counts, log_shares, strict=True):
            if own:
                # The most that any *other* text has: the second most where this one has the most.
                matches = sum(min(c, most[g][1] if c == most[g][0] else most[g][0]) for g, c in own.items())
                shares.append(math.log((matches or SMOOTHING) / own.total()))
    total = 0.0
    for sequence, shares in zip(split, log_shares, strict=True):
        if shares:
            total += math.exp(
                sum(shares) / len(shares) + min(0.0, 1 - _nearest(lengths, len(sequence)) / len(sequence))
            )
        else:
            total += float(lengths[1] == 0)  # in ascending order, and one of them is its own
    return total / len(split)


def _two_most(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """The largest and the second largest count of each n-gram among the texts."""
    most: dict[tuple[str, ...], tuple[int, int]] = {}
    for own in counts:
        for ngram, count in own.items():
            first, second = most.get(ngram, (0, 0))
            most[ngram] = (count, first) if count > first else (first, max(second, count))
    return most


def _nearest(lengths: Sequence[int], own: int) -> int:
    """The length nearest to `own` among sorted lengths, of which one is its own text's and is left out."""
    place = bisect.bisect_left(lengths, own)
    if place + 1 < len(lengths) and lengths[place + 1] == own:
        return own
    others = [*lengths[max(place - 1, 0) : place], *lengths[place + 1 : place + 2]]
    return min(others, key=lambda length: (abs(length - own), length))
