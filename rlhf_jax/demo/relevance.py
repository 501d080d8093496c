"""Whether a sentence is about a function: it says a word of its name, or one that is said of functions so named.

A docstring need not repeat a name to be about the function: `getpid` is "Return the current process id.". So beside the
words themselves counts what other functions' docstrings say of like-named ones. How well that tells is measured: of the
held-out functions' own docstrings nearly nine in ten pass, of those of other functions one in twenty. By words of the
name alone two in three do, and one in fifty (docs/lab-notebook.md).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

STOP_WORDS = frozenset("a an and are as at be by for from if in is it its not of on or s that the this to with".split())
# A word goes with a name's where descriptions have it so many times as often as by chance; an argument's word tells of
# the function where fewer than one description in so many has it.
LIFT = 30


@dataclasses.dataclass(frozen=True)
class Usage:
    """The words of the documentation, and which of them go together.

    vocabulary: words, lower case. functions: how many are described. described, named: in how many descriptions and in
    how many names a stem is. together: of how many functions a stem is in the name and another in the description.
    """

    vocabulary: frozenset[str] = frozenset()
    functions: int = 0
    described: Mapping[str, int] = dataclasses.field(default_factory=dict)
    named: Mapping[str, int] = dataclasses.field(default_factory=dict)
    together: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, texts: Iterable[str], descriptions: Iterable[tuple[str, str]]) -> Usage:
        """Counts. Args: texts for the vocabulary; (prompt, what is said of the function), one pair a function."""
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
        """Whether a stem is said of functions so named LIFT times as often as of all, or more often."""
        both = self.together.get((asked, said), 0)
        return both > 0 and both * self.functions >= LIFT * self.named[asked] * self.described[said]

    def is_about(self, prompt: str, response: str) -> bool:
        """Whether a response says a word of the name, one that goes with it, or a rare one of the arguments."""
        if words_mentioned(prompt, response)[0]:
            return True
        said = _content(response)
        if any(self.goes_with(stem(a), s) for a in topic_words(prompt) for s in said):
            return True
        rare = [w for w in words_in(response) if self.described.get(stem(w), 0) * LIFT < self.functions]
        return any(same_word(a, word) for a in _words_asked(prompt)[1] for word in rare)


def words_in(text: str) -> list[str]:
    """The words of a text, lower case, in their order."""
    return re.findall(r"[a-z][a-z0-9]*", text.lower())


def topic_words(prompt: str) -> tuple[str, ...]:
    """The words of the function asked about: its name's, and its arguments' if that has none of three letters."""
    name, arguments = _words_asked(prompt)
    return name if name else arguments


@functools.lru_cache(maxsize=1 << 15)
def _words_asked(prompt: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of three letters or more of a function's name and of its arguments."""
    name, _, arguments = prompt.removesuffix("->").partition("(")
    kept = ([w for w in words_in(part) if len(w) > 2 and w not in STOP_WORDS] for part in (name, arguments))
    first, second = (tuple(dict.fromkeys(words)) for words in kept)
    return first, second


def words_mentioned(prompt: str, response: str) -> tuple[int, int]:
    """(how many words of the function asked about the response mentions, how many there are)."""
    words = words_in(response)
    asked = topic_words(prompt)
    return sum(any(same_word(a, w) for w in words) for a in asked), len(asked)


def same_word(asked: str, word: str) -> bool:
    """Whether a word says one of a name's: it continues its stem after three letters (`use`, `uses`), or is four
    letters or more of it (`config` of `configuration`, `file` of `getfilename`)."""
    root = asked[:-1] if len(asked) > 4 and asked[-1] in "es" else asked
    return word.startswith(root) or (len(word) > 3 and word in asked)


@functools.cache
def stem(word: str) -> str:
    """A word without the first of the endings ing, ed, es, s, e that leaves three letters."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _content(text: str) -> frozenset[str]:
    """The stems of a text's words of three letters or more."""
    return frozenset(stem(word) for word in words_in(text) if len(word) > 2 and word not in STOP_WORDS)
