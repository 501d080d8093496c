"""Splitting of identifiers into words: `use_posixSpawn2` by its form, `getdefaulttimeout` by a vocabulary."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable

# Minimum number of descriptions in which a word must occur, outside names such as `getpid()` or `os.getpid`.
_LEAST_DESCRIPTIONS = 5
# Words with fewer than three letters that occur in unseparated names: `asdict`, `isdir`.
_SHORT = frozenset("as at by do id if in is no of on or os to up".split())


def known_words(descriptions: Iterable[str]) -> frozenset[str]:
    """Words of three letters or more, in lower case, that occur in several descriptions."""
    found: collections.Counter[str] = collections.Counter()
    for description in descriptions:
        found.update({word.lower() for word in re.findall(r"(?<![\w.])[A-Za-z][a-z]{2,}(?![\w(])", description)})
    return frozenset(word for word, count in found.items() if count >= _LEAST_DESCRIPTIONS)


@functools.lru_cache(maxsize=1 << 16)
def words_of(name: str, known: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Splits an identifier into lower-case words: `use_posixSpawn2` gives use, posix, spawn2.

    Args:
      known: words into which an unseparated part is split, if it is not one of them and consists of them entirely:
        `getdefaulttimeout` gives get, default, timeout.
    """
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    spaced = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", spaced)
    parts = (part.lower() for part in re.split(r"[^A-Za-z0-9]+", spaced) if part)
    return tuple(word for part in parts for word in _cut(part, known))


def _cut(part: str, known: frozenset[str]) -> tuple[str, ...]:
    """Splits a part into the fewest known words, no two short ones in a row; returns the part if that is impossible."""
    if part in known:
        return (part,)
    best: list[tuple[str, ...] | None] = [(), *([None] * len(part))]  # best split of each prefix, by its length
    for end in range(1, len(part) + 1):
        for start in range(end):
            before, word = best[start], part[start:end]
            if before is None or not (word in known or (word in _SHORT and not (before and before[-1] in _SHORT))):
                continue
            there = best[end]
            if there is None or len(before) + 1 < len(there):
                best[end] = (*before, word)
    return best[-1] or (part,)
