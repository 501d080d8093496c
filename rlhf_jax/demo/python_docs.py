"""The embedded default corpus: Python's own documentation, included in every installation.

The pretraining text is `pydoc_data.topics` and the docstrings of the standard library, each below its function's name
and signature as help() shows them. Demonstrations are pairs of a function's name and signature, written as words, and
the first sentence of its docstring, if that has most words of the name, as six in ten do: the simulated labeller
prefers responses about the function (gold_score.py), and people who write demonstrations know the labelling criteria.
Functions without a docstring give further prompts, and pages of name and signature alone. Source files are parsed,
never imported, so that none of their code runs.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.data.records import Demonstration, Prompt, Text
from rlhf_jax.demo.names import known_words, words_of
from rlhf_jax.demo.relevance import words_mentioned
from rlhf_jax.errors import UserError
from rlhf_jax.runs.atomic_files import read_json, user_cache, write_json

# C modules have no source file with docstrings; importing these has no side effect.
_C_MODULES = ("builtins", "math", "itertools", "time", "_collections", "_functools", "_operator", "array", "zlib",
              "_struct", "select", "unicodedata", "binascii", "_bisect", "_heapq", "_random", "cmath", "_socket",
              "_datetime", "_io", "_json", "_csv", "posix", "gc", "signal", "faulthandler", "mmap")  # fmt: skip
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "turtledemo",
}
_LEAST_DEMONSTRATIONS = 1000
# Minimum share of the name's words in a demonstration. One word would satisfy the labeller; but from sentences with
# most of them a small model learns better to stay on topic (docs/lab-notebook.md).
_LEAST_MENTIONED = 0.6
_READ_AS = 1  # version of the cache; increased when _functions_of_source returns other results
# help() of a function without a docstring is its name and its signature, which repeats the name. Including these pages
# twice makes a small model learn within minutes to stay on topic (docs/lab-notebook.md).
_TIMES_UNDOCUMENTED = 2
# Where the hash of a text or of a prompt must lie in [0, 1) for each held-out part. Functions are split by prompt; the
# test texts are their pages, and of the pages about no function those in _TEST_TEXTS.
_DEVELOPMENT, _TEST = (0.0, 0.1), (0.1, 0.15)
_DEVELOPMENT_TEXTS, _TEST_TEXTS = (0.0, 0.04), (0.04, 0.09)


@dataclasses.dataclass(frozen=True)
class Function:
    """A named function or class of the standard library, with its prompt and the first sentence of its docstring."""

    where: str
    prompt: str
    sentence: str | None


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out part of the corpus: functions and texts that are not trained on.

    texts: for the loss of pretraining. demonstrations: (prompt, first sentence). prompts: with or without a
    demonstration. sentences: prompt -> first sentence of its docstring, whether or not it is a demonstration.
    """

    texts: list[Text]
    demonstrations: list[Demonstration]
    prompts: list[Prompt]
    sentences: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The embedded corpus in three parts, split by a hash of the prompt or text, so that every seed has the same.

    texts: for pretraining. demonstrations: (prompt, first sentence). prompts: with or without a demonstration.
    descriptions: (prompt, first paragraph of the docstring) of the functions in texts.
    development: evaluated during training, and settings are chosen on it. A tenth of the functions.
    test: the recipe's figures are measured on it, and nothing else reads it. A twentieth of the functions.

    No docstring or sentence of a held-out part is anywhere in texts, and nothing of development is in test.
    """

    texts: list[Text]
    demonstrations: list[Demonstration]
    prompts: list[Prompt]
    descriptions: list[tuple[str, str]]
    development: HeldOut
    test: HeldOut


def signature_of(name: str, arguments: list[str], known: frozenset[str] = frozenset()) -> str:
    """Writes a function's name and up to four arguments as words: ` use posix spawn (args)`.

    The leading space gives the words the same tokens as in the middle of a sentence, so that a model can copy them.
    For the same reason unseparated names are split into known words.
    """
    inner = [" ".join(words_of(argument, known)) for argument in arguments if argument not in ("self", "cls")]
    signature = f" ({', '.join(a for a in inner[:4] if a)})" if any(inner) else ""
    return f" {' '.join(words_of(name, known))}{signature}"


def prompt_of(name: str, arguments: list[str], known: frozenset[str] = frozenset()) -> str:
    """Writes the prompt about a function: ` use posix spawn (args) ->`."""
    return f"{signature_of(name, arguments, known)} ->"


def help_page(name: str, arguments: list[str], docstring: str = "", known: frozenset[str] = frozenset()) -> str:
    """Writes a page like help(): ` use posix spawn: use posix spawn (args)`, with the docstring below."""
    page = f" {' '.join(words_of(name, known))}:{signature_of(name, arguments, known)}"
    return f"{page}\n\n {docstring}" if docstring else page


def first_paragraph(docstring: str) -> str:
    """The text before a docstring's first empty line."""
    return docstring.strip().partition("\n\n")[0]


def first_sentence(docstring: str) -> str | None:
    """A docstring's first sentence, from a capital to a full stop, with 15 to 120 characters and no markup; else None.

    A signature above it is skipped. A missing capital or full stop is added, and markup around a name is removed.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.strip().split("\n\n")]
    if re.match(r"[\w.]+\([^)]*\)? ?(--?>|$)", paragraphs[0]):
        del paragraphs[0]
    if not paragraphs:
        return None
    plain = re.sub(r"`(\w[^`']*)'", r"\1", paragraphs[0])  # `name', as TeX quotes
    plain = re.sub(r"(?::[a-z]+:)?``?([^`]*)``?", r"\1", plain)
    plain = re.sub(r"\bself\.(?=\w)|(?<!\w)\*(\w+)\*(?!\w)", r"\1", plain)
    match = re.match(r"[A-Za-z][a-z].*?[A-Za-z0-9\])](?=\.(?:\s|$)|$)", plain)
    if match is None:
        return None
    sentence = f"{match[0][0].upper()}{match[0][1:]}."
    # Other markup, and full stops that do not end a sentence.
    if re.search(r"[`*<>|{}=\\_]|->|\.\.|::| :\w|\b(?:etc|vs|cf|[A-Za-z]\.[A-Za-z])\.$", sentence):
        return None
    return sentence if 15 <= len(sentence) <= 120 else None


def _mentions_most_of(prompt: str, sentence: str) -> bool:
    """True if a sentence has most words of the function's name, and at least one."""
    mentioned, total = words_mentioned(prompt, sentence)
    return mentioned > 0 and mentioned >= _LEAST_MENTIONED * total


def _functions_of_source(path: Path, name: str) -> Iterator[tuple[str, str | None, str, list[str]]]:
    """Yields (where, docstring, name, arguments) for a module and everything defined in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the standard library has files with deliberate errors
        return
    yield f"{name}:1", ast.get_docstring(tree), "", []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        elif isinstance(node, ast.ClassDef):
            arguments = []
        else:
            continue
        yield f"{name}:{node.lineno}", ast.get_docstring(node), node.name, arguments


def _functions_of_c_module(module: str) -> Iterator[tuple[str, str | None, str, list[str]]]:
    try:
        owner = importlib.import_module(module)
    except ImportError:  # not on every platform
        return
    for name, member in sorted(vars(owner).items()):
        members = [(name, member)]
        if inspect.isclass(member):
            members += sorted(vars(member).items())
        for label, function in members:
            if callable(function) and not label.startswith("__"):
                docstring = inspect.getdoc(function)
                yield f"{module}.{name}", docstring, label, []


def _lies_in(part: tuple[float, float], text: str) -> bool:
    """True if a number in [0, 1) that depends on the text alone lies in the part."""
    return part[0] <= int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48 < part[1]


def _docstring(page: str) -> str:
    """The docstring on a page; the page of a function begins with a line that starts with a space."""
    return page.split("\n\n", 1)[-1] if page.startswith(" ") else page


def _plain(text: str) -> str:
    """Text with each run of white space as one space, so that indentation and line breaks hide no copy."""
    return " ".join(text.split())


def _functions_of_library(root: Path) -> list[tuple[str, str | None, str, list[str]]]:
    """Lists (where, docstring, name, arguments) of everything that the standard library's source files define."""
    found: list[tuple[str, str | None, str, list[str]]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and relative.parts[0] != "pydoc_data":
            found.extend(_functions_of_source(path, str(relative)))
    return found


def _remembered(root: Path) -> list[tuple[str, str | None, str, list[str]]]:
    """`_functions_of_library`, cached in the user's cache folder, since parsing takes seconds."""
    key = hashlib.sha256(f"{_READ_AS} {sys.version} {root}".encode()).hexdigest()
    try:
        path = user_cache() / f"library-{key[:16]}.json"
    except RuntimeError:  # a user without a home, as in some containers
        return _functions_of_library(root)
    try:
        rows = read_json(path)["functions"]
        return [(str(where), docstring, str(name), list(arguments)) for where, docstring, name, arguments in rows]
    except (UserError, KeyError, TypeError, ValueError):
        pass  # missing or damaged
    found = _functions_of_library(root)
    # The cache is optional: a read-only home cannot hold one.
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"functions": found})
    return found


def load_corpus() -> Corpus:
    """Reads the corpus from the running Python, in a few seconds at first, in one later.

    Raises:
      UserError: if this Python was installed without its documentation.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, undocumented, functions = _documented(root)
    demonstrations = [
        Demonstration(f.prompt, " " + f.sentence, f.where)
        for f in functions.values()
        if f.sentence and _mentions_most_of(f.prompt, f.sentence)
    ]
    if len(demonstrations) < _LEAST_DEMONSTRATIONS:
        raise UserError(
            f"the embedded corpus: expected at least {_LEAST_DEMONSTRATIONS} docstrings that describe a function in "
            f"{root} ({sys.version.split()[0]}), got {len(demonstrations)}; this Python was installed without its "
            "documentation, pass files with --data"
        )
    prompts = [Prompt(f.prompt, f.where) for f in functions.values()]
    pages = [(Text(text, where), prompt) for text, (where, prompt) in documents.items() if len(text) >= 40]
    development = {prompt for prompt in functions if _lies_in(_DEVELOPMENT, prompt)}
    test = {prompt for prompt in functions if _lies_in(_TEST, prompt)}
    unseen = development | test
    sentences = {f.prompt: f.sentence for f in functions.values() if f.sentence and f.prompt in unseen}
    # Nothing of a held-out function is in the pretraining text: neither its page nor one with the same first sentence.
    unsaid = set(sentences.values())

    def tested(text: str, prompt: str) -> bool:
        return prompt in test if prompt else _lies_in(_TEST_TEXTS, text)

    def held_out(text: str, prompt: str) -> bool:
        return (
            prompt in unseen
            or tested(text, prompt)
            or _lies_in(_DEVELOPMENT_TEXTS, text)
            or first_sentence(_docstring(text)) in unsaid
        )

    demonstrated = [d for d in demonstrations if d.prompt not in unseen]
    training = [(text, prompt) for text, prompt in pages if not held_out(text.text, prompt)]
    # A method overridden with another signature, or under another name, has the same docstring, and a class may quote
    # its method's: what is in training, whole or as a part, is not held-out.
    trained = "\0".join(_plain(text.text) for text, _ in training)
    shown = {d.completion for d in demonstrated}

    def part(prompts_of_part: set[str], texts: list[Text]) -> HeldOut:
        return HeldOut(
            texts=[text for text in texts if _plain(_docstring(text.text)) not in trained],
            demonstrations=[
                d
                for d in demonstrations
                if d.prompt in prompts_of_part and d.completion not in shown and _plain(d.completion) not in trained
            ],
            prompts=[p for p in prompts if p.prompt in prompts_of_part],
            sentences={prompt: sentence for prompt, sentence in sentences.items() if prompt in prompts_of_part},
        )

    test_part = part(test, [text for text, prompt in pages if tested(text.text, prompt)])
    watched = [
        text for text, prompt in pages if _lies_in(_DEVELOPMENT_TEXTS, text.text) and not tested(text.text, prompt)
    ]
    return Corpus(
        texts=[text for text, _ in training]
        + [t for p, t in undocumented.items() if functions[p].sentence is None and p not in unseen]
        * _TIMES_UNDOCUMENTED,
        demonstrations=demonstrated,
        prompts=[p for p in prompts if p.prompt not in unseen],
        descriptions=[(prompt, first_paragraph(text.text.partition("\n\n")[2])) for text, prompt in training if prompt],
        development=_apart(part(development, watched), test_part),
        test=test_part,
    )


def _documented(
    root: Path,
) -> tuple[dict[str, tuple[str, str]], dict[str, Text], dict[str, Function]]:
    """Pages of documentation, pages of functions without any, and functions, of the library under a folder."""
    documents: dict[str, tuple[str, str]] = {}  # text -> (source, prompt of its function)
    undocumented: dict[str, Text] = {}  # prompt -> page
    functions: dict[str, Function] = {}
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    for topic, text in sorted(topics.items()):
        documents.setdefault(text.strip(), (f"pydoc_data.topics:{topic}", ""))
    found = _remembered(root)
    for module in _C_MODULES:
        found.extend(_functions_of_c_module(module))
    # The words of held-out docstrings are included: a bare list of words does not leak an answer.
    known = known_words(first_paragraph(docstring) for _, docstring, _, _ in found if docstring)
    for where, docstring, name, arguments in found:
        named = bool(name) and not name.startswith("__") and bool(words_of(name))
        prompt = prompt_of(name, arguments, known) if named else ""
        if docstring:
            text = inspect.cleandoc(docstring).strip()
            documents.setdefault(help_page(name, arguments, text, known) if named else text, (where, prompt))
        elif named:
            undocumented.setdefault(prompt, Text(help_page(name, arguments, known=known), where))
        if not named:
            continue
        sentence = first_sentence(docstring) if docstring else None
        if prompt not in functions or (functions[prompt].sentence is None and sentence is not None):
            functions[prompt] = Function(where, prompt, sentence)
    return documents, undocumented, functions


def _apart(development: HeldOut, test: HeldOut) -> HeldOut:
    """The development part without what is in the test part too: a page or sentence, or one that is a part of another.

    Functions with the same first sentence fall on both sides, as methods do that are overridden.
    """
    tested = [*(_plain(_docstring(text.text)) for text in test.texts), *map(_plain, test.sentences.values())]
    every = "\0".join(tested)

    def in_both(text: str) -> bool:
        plain = _plain(text)
        return plain in every or any(other in plain for other in tested)

    both = {prompt for prompt, sentence in development.sentences.items() if in_both(sentence)}
    return HeldOut(
        texts=[text for text in development.texts if not in_both(_docstring(text.text))],
        demonstrations=[d for d in development.demonstrations if d.prompt not in both],
        prompts=[p for p in development.prompts if p.prompt not in both],
        sentences={prompt: sentence for prompt, sentence in development.sentences.items() if prompt not in both},
    )
