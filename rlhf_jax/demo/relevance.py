"""Relevance of a sentence to a function: it has a word of its name, or one that describes functions so named.

A docstring need not repeat the name: that of `getpid` is "Return the current process id.". So words that other
docstrings use for functions with such a name count as well. Measured on held-out functions, nearly nine in ten of their
own docstrings pass, and one in twenty of those of other functions; with words of the name alone it is two in three, and
one in fifty (docs/lab-notebook.md).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

STOP_WORDS = frozenset("a an and are as at be by for from if in is it its not of on or s that the this to with".split())
# A word goes with a word of a name if they occur together at least this many times as often as by chance; a word of an
# argument counts if fewer than one description in this many has it.
LIFT = 30


@dataclasses.dataclass(frozen=True)
class Usage:
    """Word statistics of the documentation.

    vocabulary: lower-case words. functions: number of functions described. described, named: number of descriptions and
    of names that contain a stem. together: number of functions with one stem in the name, the other in the description.
    """

    vocabulary: frozenset[str] = frozenset()
    functions: int = 0
    described: Mapping[str, int] = dataclasses.field(default_factory=dict)
    named: Mapping[str, int] = dataclasses.field(default_factory=dict)
    together: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, texts: Iterable[str], descriptions: Iterable[tuple[str, str]]) -> Usage:
        """Counts the words.

        Args:
          texts: for the vocabulary.
          descriptions: (prompt, description), one pair per function.
        """
        described: collections.Counter[str] = collections.Counter()
        named: collections.Counter[str] = collections.Counter()
        together: collections.Counter[tuple[str, str]] = collections.Counter()
        functions = 0
        for prompt, description in descriptions:
            asked = {stem(word) for word in topic_words(prompt)}
            said = _content(description)
            functions += 1
            named.update(asked)
            described.update(said)
            together.update((a, s) for a in asked for s in said)
        return cls(frozenset(word for text in texts for word in words_in(text)), functions, described, named, together)

    def goes_with(self, asked: str, said: str) -> bool:
        """True if a stem occurs at least LIFT times as often for functions so named as for all functions."""
        both = self.together.get((asked, said), 0)
        return both > 0 and both * self.functions >= LIFT * self.named[asked] * self.described[said]

    def is_about(self, prompt: str, response: str) -> bool:
        """True if a response has a word of the name, one that goes with it, or a rare one of the arguments."""
        if words_mentioned(prompt, response)[0]:
            return True
        said = _content(response)
        if any(self.goes_with(stem(a), s) for a in topic_words(prompt) for s in said):
            return True
        rare = [w for w in words_in(response) if self.described.get(stem(w), 0) * LIFT < self.functions]
        return any(same_word(a, word) for a in _words_asked(prompt)[1] for word in rare)


def words_in(text: str) -> list[str]:
    """Words of a text, in lower case and in order."""
    return re.findall(r"[a-z][a-z0-9]*", text.lower())


def topic_words(prompt: str) -> tuple[str, ...]:
    """Words of the function's name; those of its arguments if the name has none of three letters or more."""
    name, arguments = _words_asked(prompt)
    return name if name else arguments


@functools.lru_cache(maxsize=1 << 15)
def _words_asked(prompt: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words of three letters or more in a function's name and in its arguments."""
    name, _, arguments = prompt.removesuffix("->").partition("(")
    kept = ([w for w in words_in(part) if len(w) > 2 and w not in STOP_WORDS] for part in (name, arguments))
    first, second = (tuple(dict.fromkeys(words)) for words in kept)
    return first, second


def words_mentioned(prompt: str, response: str) -> tuple[int, int]:
    """Returns (number of the function's words that the response mentions, number of the function's words)."""
    words = words_in(response)
    asked = topic_words(prompt)
    return sum(any(same_word(a, w) for w in words) for a in asked), len(asked)


def same_word(asked: str, word: str) -> bool:
    """True if a word matches one of a name: it continues its stem (`use`, `uses`), or is a part of it of four letters
    or more (`config` of `configuration`, `file` of `getfilename`)."""
    root = asked[:-1] if len(asked) > 4 and asked[-1] in "es" else asked
    return word.startswith(root) or (len(word) > 3 and word in asked)


@functools.cache
def stem(word: str) -> str:
    """Strips the first of the endings ing, ed, es, s, e that leaves three letters or more."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _content(text: str) -> frozenset[str]:
    """Stems of a text's words of three letters or more, without stop words."""
    return frozenset(stem(word) for word in words_in(text) if len(word) > 2 and word not in STOP_WORDS)
