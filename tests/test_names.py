"""The words of identifiers, by hand."""

import pytest

from rlhf_jax.demo.names import known_words, words_of

pytestmark = pytest.mark.core

KNOWN = frozenset("get default time out timeout file name dict month range".split())


def test_words_of() -> None:
    cases = [
        ("use_posixSpawn2", ("use", "posix", "spawn2")),
        ("HTTPServer", ("http", "server")),
        ("_get_URL", ("get", "url")),
        ("__init__", ("init",)),
        ("parseHTMLPage", ("parse", "html", "page")),
        ("___", ()),
        ("getfile", ("getfile",)),
    ]
    for name, words in cases:
        assert words_of(name) == words, name


def test_known_words_are_cut_apart() -> None:
    cases = [
        ("getdefaulttimeout", ("get", "default", "timeout")),  # not time, out: fewer words
        ("get_filename", ("get", "file", "name")),
        ("getFilename2", ("get", "filename2")),  # a part is cut whole or not at all
        ("asdict", ("as", "dict")),
        ("isasdict", ("isasdict",)),  # two short words in a row
        ("timeout", ("timeout",)),
        ("outtime", ("out", "time")),
        ("range", ("range",)),
        ("monthrange", ("month", "range")),
        ("getx", ("getx",)),
        ("", ()),
    ]
    for name, words in cases:
        assert words_of(name, KNOWN) == words, name


def test_words_are_known_from_five_descriptions_and_not_from_names() -> None:
    often = ["Open a file, or path."] * 5
    assert known_words(often) == {"open", "file", "path"}
    assert known_words(often[1:]) == frozenset()
    assert known_words(["file file file file file"]) == frozenset()  # one description
    assert known_words(["See os.getpid, getpid(), get_pid, PATH and pid2."] * 5) == {"see", "and"}
