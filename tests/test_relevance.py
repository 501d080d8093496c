"""Whether a sentence is about a function: by hand, and on made-up descriptions whose counts are small enough to see."""

import pytest

from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.demo.relevance import LIFT, Usage, same_word, stem, topic_words, words_mentioned

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


@pytest.mark.parametrize(
    ("asked", "word", "same"),
    [
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
    ],
)
def test_same_word(asked: str, word: str, same: bool) -> None:
    assert same_word(asked, word) is same


@pytest.mark.parametrize(
    ("word", "cut"),
    [("parsing", "pars"), ("parse", "pars"), ("closed", "clos"), ("files", "fil"), ("file", "fil"), ("use", "use"),
     ("ring", "ring"), ("bus", "bus")],
)  # fmt: skip
def test_stem(word: str, cut: str) -> None:
    assert stem(word) == cut


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


def test_docstrings_are_about_their_own_functions_and_not_about_others() -> None:
    corpus = load_corpus()
    usage = Usage.of((), corpus.descriptions)
    prompts, sentences = zip(*corpus.heldout_sentences.items(), strict=True)
    own = sum(map(usage.is_about, prompts, sentences)) / len(prompts)
    # Those of other modules: the corpus has its functions in the order of their files, and neighbours speak alike.
    half = len(prompts) // 2
    others = sum(map(usage.is_about, prompts, sentences[half:] + sentences[:half])) / len(prompts)
    # 0.88 and 0.05 with Python 3.11.
    assert own > 0.8 and others < 0.1
