"""Whether a sentence is about a function: by hand, and on made-up descriptions whose counts are small enough to see."""

import pytest

from rlhf_jax.demo.relevance import LIFT, Usage, same_word, stem, topic_words, words_mentioned

pytestmark = pytest.mark.demo

PROMPT = " use posix spawn (args) ->"


def test_topic_is_the_name_or_else_the_arguments() -> None:
    assert topic_words(PROMPT) == ("use", "posix", "spawn")
    assert topic_words(" is it (url path, ok) ->") == ("url", "path")
    assert topic_words(" get get the item ->") == ("get", "item")
    assert topic_words(" f ->") == ()
    assert not Usage().is_about(" f ->", "Return the path.")


def test_words_mentioned_are_counted_once_each() -> None:
    assert words_mentioned(PROMPT, " Uses posix, posix.") == (2, 3)
    assert words_mentioned(" f ->", "Return f.") == (0, 0)


def test_same_word() -> None:
    cases = [
        ("use", "uses", True),
        ("parse", "parsing", True),
        ("files", "file", True),
        ("config", "configuration", True),
        ("configuration", "conf", True),
        ("getfilename", "file", True),
        ("getfilename", "get", False),  # three letters are in too many words
        ("path", "pat", False),
        ("open", "close", False),
        ("get", "set", False),
    ]
    for asked, word, same in cases:
        assert same_word(asked, word) is same, (asked, word)


def test_stem() -> None:
    cases = [("parsing", "pars"), ("parse", "pars"), ("closed", "clos"), ("files", "fil"), ("file", "fil"),
             ("use", "use"), ("ring", "ring"), ("bus", "bus")]  # fmt: skip
    for word, cut in cases:
        assert stem(word) == cut, word


def described(fetching: int, others: int) -> Usage:
    """Of the functions described, so many are called `fetch` and download; the others close."""
    return Usage.of([], [(" fetch (key) ->", "Downloads it.")] * fetching + [(" stop ->", "Close it.")] * others)


def test_what_is_counted() -> None:
    pairs = [(" fetch all (key) ->", "Download the pages, download.")]
    usage = Usage.of(["Read the PATH 2", "read it"], pairs)
    assert usage.vocabulary == {"read", "the", "path", "it"}
    assert usage.functions == 1
    assert usage.named == {"fetch": 1, "all": 1}  # not the argument, which is no word of the name
    assert usage.described == {"download": 1, "pag": 1}
    assert usage.together == {("fetch", "download"): 1, ("fetch", "pag"): 1, ("all", "download"): 1, ("all", "pag"): 1}


def test_a_word_goes_with_a_name_where_both_are_found_together_often() -> None:
    # Two of N are called so, both say it, and nobody else does: N · 2 / (2 · 2) times as often as by chance.
    enough, few = described(2, 2 * LIFT - 2), described(2, 2 * LIFT - 3)
    assert enough.is_about(" fetch page ->", "Downloading the whole of it.")
    assert not few.is_about(" fetch page ->", "Downloading the whole of it.")
    assert not enough.is_about(" fetch page ->", "Close the whole of it.")
    assert not enough.is_about(" stop ->", "Downloading the whole of it.")
    assert enough.is_about(" stop ->", "Stops it.")  # a word of the name, of which nothing need be known


def test_an_argument_tells_where_few_descriptions_have_it() -> None:
    rare = Usage.of([], [(" f ->", "Open the key.")] + [(" f ->", "Open it.")] * LIFT)
    common = Usage.of([], [(" f ->", "Open the key.")] * 2 + [(" f ->", "Open it.")] * LIFT)
    for usage, about in ((rare, True), (common, False)):
        assert usage.is_about(" shut (key) ->", "Return the keys.") is about
    assert not rare.is_about(" shut (door) ->", "Return the keys.")
