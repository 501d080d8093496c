"""The embedded corpus: prompts and sentences by hand, and a split that keeps the held-out side unseen."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.demo import python_docs
from rlhf_jax.demo.python_docs import Corpus, HeldOut, first_sentence, help_page, load_corpus, prompt_of
from rlhf_jax.demo.relevance import Usage, words_mentioned

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_the_second_start_parses_nothing(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A part of what the start that made `corpus` has left, and no module written in C: read in no time.
    library = python_docs._remembered(Path(sysconfig.get_paths()["stdlib"]))[::20]
    monkeypatch.setattr(python_docs, "_C_MODULES", ())
    monkeypatch.setattr(python_docs, "_LEAST_DEMONSTRATIONS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parsed: list[Path] = []

    def counted(root: Path) -> Any:
        parsed.append(root)
        return library[:]

    monkeypatch.setattr(python_docs, "_functions_of_library", counted)
    few = load_corpus()
    assert load_corpus() == few and len(few.demonstrations) < len(corpus.demonstrations)
    assert len(parsed) == 1
    (kept,) = (tmp_path / "rlhf_jax").glob("library-*.json")
    kept.write_text(kept.read_text()[:-1000])
    assert load_corpus() == few
    assert len(parsed) == 2

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(python_docs, "user_cache", homeless)
    assert load_corpus() == few
    assert len(parsed) == 3


def test_prompt_of() -> None:
    cases = [
        ("use_posix_spawn", ["args"], " use posix spawn (args) ->"),
        ("isLoopback", ["self"], " is loopback ->"),
        ("f", [], " f ->"),
        ("read", ["cls", "fileName", "max_size"], " read (file name, max size) ->"),
        ("many", ["a", "b", "_", "c", "d", "e"], " many (a, b, c) ->"),
    ]
    for name, arguments, prompt in cases:
        assert prompt_of(name, arguments) == prompt, name


def test_run_together_words_are_cut_in_prompts_and_pages() -> None:
    known = frozenset(("get", "file", "name"))
    assert prompt_of("getfile", ["filename", "x"], known) == " get file (file name, x) ->"
    assert help_page("getfile", ["filename"], known=known) == " get file: get file (file name)"


def test_help_page() -> None:
    assert help_page("f", []) == " f: f"
    assert help_page("isLoopback", ["self", "x"], "True.") == " is loopback: is loopback (x)\n\n True."


def test_first_sentence() -> None:
    cases: list[tuple[str, str | None]] = [
        ("Return the path.", "Return the path."),
        ("  Return the\n    size of it.  More follows.\n\nAnd more.", "Return the size of it."),
        ("Return version 3.11 of it. More.", "Return version 3.11 of it."),
        ("return the path.", "Return the path."),
        ("Return the path", "Return the path."),
        ("Return RFC 821. More", "Return RFC 821."),
        ("B.find(sub[, start[, end]]) -> int\n\nReturn the first place.", "Return the first place."),
        ("find(sub)\n\nReturn the first place.", "Return the first place."),
        ("gethostbyname(host, port)", None),  # a signature alone
        ("Send `data' and `more' to the `server'.", "Send data and more to the server."),
        ("Return x*y*z of the numbers.", None),
        ("Raise an error if no vs. yes happens.", None),
        ("Check that it is U.S. based.", None),
        ("Return the first item\n:param item: the item.", None),
        ("Return the :class:`Path` of *name*, or ``None``.", "Return the Path of name, or None."),
        ("Return self.path of it", "Return path of it."),
        ("1 or 0, as the path is.", None),  # no word first
        ("Return a or b, e.g. the path of it.", None),
        ("Return it.", None),  # shorter than 15 characters
        ("Return " + "a very " * 20 + "long path.", None),
        ("Return **kwargs of the file.", None),
        ("Return x -> y for the file.", None),
        ("Same as a.b.c() ...", None),
        ("", None),
    ]
    for docstring, sentence in cases:
        assert first_sentence(docstring) == sentence, docstring


def test_the_corpus_is_large_and_shaped(corpus: Corpus) -> None:
    assert len(corpus.texts) > 3000 and sum(len(text.text) for text in corpus.texts) > 1_000_000
    assert len(corpus.demonstrations) > 1000
    functions = sum(len(part.prompts) for part in (corpus, *held_out(corpus)))
    for part, share, prompts in ((corpus.development, 0.1, 500), (corpus.test, 0.05, 256)):
        assert len(part.prompts) >= prompts and 0.8 * share < len(part.prompts) / functions < 1.2 * share
        # Every sentence of a held-out function is there to be shown, also one that is no demonstration.
        demonstrated = {record.prompt: record.completion[1:] for record in part.demonstrations}
        assert demonstrated.items() < part.sentences.items()
        assert part.sentences.keys() < {record.prompt for record in part.prompts}
        # Pages of functions, and pages about none.
        assert 0 < sum(not text.text.startswith(" ") for text in part.texts) < len(part.texts) / 4
    for record in [*corpus.demonstrations, *corpus.development.demonstrations, *corpus.test.demonstrations]:
        assert record.prompt.startswith(" ") and record.prompt.endswith(" ->")
        assert first_sentence(record.completion) == record.completion[1:] and record.completion[0] == " "
        said, asked = words_mentioned(record.prompt, record.completion)
        assert said > 0 and said >= 0.6 * asked


def held_out(corpus: Corpus) -> tuple[HeldOut, HeldOut]:
    return corpus.development, corpus.test


def docstring(page: str) -> str:
    """Most texts stand under their function's name and signature, a line that starts with a space."""
    return page.split("\n\n", 1)[-1] if page.startswith(" ") else page


def plain(text: str) -> str:
    return " ".join(text.split())


def test_nothing_held_out_is_trained_on(corpus: Corpus) -> None:
    texts = {text.text for text in corpus.texts}
    # Neither a page nor its docstring under another name, another signature, or other white space, whole or as a part.
    every = "\0".join(map(plain, texts))
    trained_sentences = {first_sentence(docstring(text)) for text in texts}
    demonstrated = {record.completion for record in corpus.demonstrations}
    prompts = {record.prompt for record in corpus.prompts}
    pages = {f"{text.split(chr(10))[0].split(':')[-1]} ->" for text in texts if text.startswith(" ")}
    assert len(trained_sentences) > 2000 and len(pages & prompts) > 3000 and len(prompts) == len(corpus.prompts)
    assert {record.prompt for record in corpus.demonstrations} <= prompts
    for part, count in zip(held_out(corpus), (200, 100), strict=True):
        assert len(part.texts) > 200 and len(part.demonstrations) > count
        for page in part.texts:
            assert plain(docstring(page.text)) not in every, page.where
        for record in part.demonstrations:
            assert plain(record.completion) not in every, record.where
        assert trained_sentences.isdisjoint(part.sentences.values())
        assert demonstrated.isdisjoint(record.completion for record in part.demonstrations)
        asked = {record.prompt for record in part.prompts}
        assert prompts.isdisjoint(asked) and pages.isdisjoint(asked) and len(asked) == len(part.prompts)
        assert {record.prompt for record in part.demonstrations} <= asked


def test_nothing_that_settings_are_chosen_on_is_measured_on(corpus: Corpus) -> None:
    development, test = (
        [plain(docstring(text.text)) for text in part.texts]
        + [plain(record.completion) for record in part.demonstrations]
        + list(map(plain, part.sentences.values()))
        for part in held_out(corpus)
    )
    # Neither whole nor as a part, in either direction.
    for some, others in ((development, test), (test, development)):
        every = "\0".join(others)
        assert [text for text in some if text in every] == []
    asked, measured = ({record.prompt for record in part.prompts} for part in held_out(corpus))
    assert asked.isdisjoint(measured)
    # A function's page is in the part of its prompt, so that its answer cannot be looked up in the other part's.
    pages, tested = (
        {f"{text.text.split(chr(10))[0].split(':')[-1]} ->" for text in part.texts if text.text.startswith(" ")}
        for part in held_out(corpus)
    )
    assert len(pages) > 100 and pages.isdisjoint(measured)
    assert len(tested) > 100 and tested <= measured


def test_docstrings_are_about_their_own_functions_and_not_about_others(corpus: Corpus) -> None:
    usage = Usage.of((), corpus.descriptions)
    prompts, sentences = zip(*(corpus.development.sentences | corpus.test.sentences).items(), strict=True)
    own = sum(map(usage.is_about, prompts, sentences)) / len(prompts)
    # Those of other modules: the corpus has its functions in the order of their files, and neighbours speak alike.
    half = len(prompts) // 2
    others = sum(map(usage.is_about, prompts, sentences[half:] + sentences[:half])) / len(prompts)
    # 0.88 and 0.05 with Python 3.11.
    assert own > 0.8 and others < 0.1
