"""Published tokenizers give the ids that Hugging Face's own package gives, and no special id for any text."""

import importlib
import json
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Package
from tokenizers import models, normalizers

from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Dialogue,
    Ledger,
    Message,
    Prompt,
    Ranking,
    Text,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_text,
)
from rlhf_jax.data.chat import chat_ids
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import WORDS_PATTERN, Tokenizer
from rlhf_jax.tokenizers.export import to_hugging_face, write_folder
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.load import load_tokenizer
from rlhf_jax.tokenizers.merges import PATTERNS, from_letters, last_pair, nfc, table_of, to_letters, to_oniguruma
from tests.cases import case
from tests.tiny_tokenizers import BYTE_LEVEL, CHATML, CORPUS, SENTENCEPIECE, SPECIAL, content_of, load, package, strings

pytestmark = pytest.mark.pretrained

BYTES = {to_letters(bytes([byte])): byte for byte in range(256)}
EOS = {"eos_token": "<E>"}


def content(merges: list[list[str]], vocab: dict[str, int] | None = None, **model: Any) -> dict[str, Any]:
    """tokenizer.json of GPT-2's kind with these merges, and <E> to end a text."""
    if vocab is None:
        vocab = dict(BYTES)
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": max(vocab.values()) + 1, "content": "<E>", "special": True, **flags}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": False, "vocab": vocab, "merges": merges} | model,
    }


def test_ids_are_those_of_the_package() -> None:
    for kind in [*BYTE_LEVEL, *SENTENCEPIECE]:
        with case(kind):
            ours, theirs = load(kind), package(content_of(kind))
            assert ours.backend == ("tokenizers" if kind in SENTENCEPIECE else "tiktoken")
            for text in [*strings(500), "x" + " " * 10_000 + "y", ""]:
                ids = theirs.encode(text, add_special_tokens=False).ids
                assert ours.encode(text) == ids, repr(text)
                assert ours.special_ids.isdisjoint(ids) and max(ids, default=0) < ours.vocab_size
                assert ours.decode(ids) == theirs.decode(ids)
                if kind not in ("qwen2", *SENTENCEPIECE):
                    assert ours.decode(ids) == text


def test_the_pair_that_a_token_comes_down_to() -> None:
    ranks = {b"ab": 1, b"bc": 0, b"abc": 2, b"cd": 3}
    assert last_pair(b"ab", ranks) == (b"a", b"b")
    assert last_pair(b"abc", ranks) == (b"a", b"bc")
    assert last_pair(b"abcd", ranks) == (b"abc", b"d")
    assert last_pair(b"abd", {}) is None


MERGES = [
    ([["a", "b"], ["ab", "c"]], "tiktoken"),
    # abc alone comes down to ab, c, which the list does not merge; a table would.
    ([["a", "b"], ["b", "c"], ["a", "bc"]], "tokenizers"),
    # Of several ways to one token that which it comes down to counts, if the order of tokens is the same.
    ([["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]], "tiktoken"),
    ([["a", "b"], ["b", "c"], ["a", "bc"], ["c", "d"], ["ab", "c"]], "tokenizers"),
    ([["a", "b"], ["a", "b"]], "tokenizers"),
    # No text ever comes to a, bcd: ab is merged first. The token is left out.
    ([["a", "b"], ["b", "c"], ["bc", "d"], ["a", "bcd"]], "tiktoken"),
]


def test_which_lists_of_merges_are_a_table() -> None:
    for row in MERGES:
        with case(row) as (merges, backend):
            ours = HuggingFaceTokenizer.from_content(content(merges), EOS, rows=999, name="tiny")
            theirs = package(content(merges))
            rng = random.Random(0)
            assert ours.backend == backend
            for text in ["abcd", *("".join(rng.choices("abcd", k=rng.randrange(9))) for _ in range(200))]:
                assert ours.encode(text) == theirs.encode(text).ids, text


def test_a_token_that_nothing_is_merged_into() -> None:
    vocab = {**BYTES, "ab": 300, "xyz": 301}
    for ignore_merges, ids in ((False, [*b"xyz"]), (True, [301])):
        made = content([["a", "b"]], vocab, ignore_merges=ignore_merges)
        ours = HuggingFaceTokenizer.from_content(made, EOS, rows=999, name="tiny")
        assert ours.backend == "tiktoken"
        assert ours.encode("xyz") == ids == package(made).encode("xyz").ids
        assert ours.encode("xyzxyz") == [*b"xyzxyz"]
        assert ours.decode([301]) == "xyz"


def random_list(rng: random.Random) -> dict[str, Any]:
    """Merges of a, b and c in any order, whole or with every way to each token; ids in any order."""
    vocab, merges, tokens = dict(BYTES), [], ["a", "b", "c"]
    for _ in range(rng.randrange(1, 12)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) <= 8 and [left, right] not in merges:
            merges.append([left, right])
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                tokens.append(left + right)
    if rng.random() < 0.3:
        rng.shuffle(merges)
    elif rng.random() < 0.5:
        merges = [[t[:at], t[at:]] for t in tokens for at in range(1, len(t)) if t[:at] in vocab and t[at:] in vocab]
    if rng.random() < 0.5:
        vocab = dict(zip(vocab, rng.sample(range(len(vocab)), len(vocab))))
    return content(merges, vocab, ignore_merges=rng.random() < 0.5)


def test_random_lists_of_merges() -> None:
    rng = random.Random(1)
    tables = 0
    for _ in range(150):
        made = random_list(rng)
        ours = HuggingFaceTokenizer.from_content(made, EOS, rows=999, name="tiny")
        tables += ours.backend == "tiktoken"
        theirs = package(made)
        for length in (3, 6, 12, 60):
            text = "".join(rng.choices("abc ", [9, 9, 9, 1], k=length))
            assert ours.encode(text) == theirs.encode(text).ids, (text, made["model"]["merges"])
    assert 50 < tables < 150


def test_a_character_without_a_token_is_for_the_package() -> None:
    made = content([["!", "!"]])
    del made["model"]["vocab"][to_letters(b"\x04")], made["model"]["vocab"][to_letters(b"\xf1")]
    ours, theirs = HuggingFaceTokenizer.from_content(made, EOS, rows=999, name="tiny"), package(made)
    assert ours.backend == "tiktoken"
    for text in ("a!!b", "a!\x04!b", "\U00040000é", "\U0010ffff"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("a!\x04!b") == ours.encode("a!!b")


def test_a_text_has_one_encoding() -> None:
    """Also if tokenizer.json asks for dropout of merges, in each kind of BPE and beside a backend of either kind."""
    odd = content([["a", "b"], ["b", "c"], ["a", "bc"]])  # no table, see MERGES
    for plain in (content_of("gpt2"), content_of("llama3"), content_of("llama2"), odd):
        for dropout in (0.5, 1.0, 0.0):
            made = {**plain, "model": plain["model"] | {"dropout": dropout}}
            config = {"eos_token": plain["added_tokens"][-1 if plain is odd else 1]["content"]}
            first, ours = (HuggingFaceTokenizer.from_content(c, config, rows=999, name="m") for c in (plain, made))
            assert ours.backend == first.backend
            for text in ["the cat sat abcabc"] * 5 + [*strings(20)]:
                assert (
                    ours.encode(text) == first.encode(text) == package(plain).encode(text, add_special_tokens=False).ids
                )


def test_letters() -> None:
    assert to_letters(b" a\n\xff\x00") == "ĠaĊÿĀ"
    assert from_letters("ĠaĊÿĀ") == b" a\n\xff\x00" and from_letters("a b") is None


def test_composed_as_the_package_composes() -> None:
    theirs = normalizers.NFC()
    marks = [chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code))]
    parts = [chr(code) for code in range(0xC0, 0x1F000) if unicodedata.decomposition(chr(code))[:1] not in ("", "<")]
    rng = random.Random(0)
    for mark in marks:
        for text in (f"a{mark}\u0301", f"e\u0315{mark}\u0334", rng.choice(parts) + mark + rng.choice(marks)):
            assert nfc(text) == theirs.normalize_str(text), ascii(text)


def test_no_text_is_a_special_token() -> None:
    for kind in ("gpt2", "qwen2", *SENTENCEPIECE):
        tokenizer = load(kind)
        for special in SPECIAL:
            for text in (special, f"a{special}b", special * 2):
                assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
                assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_special_token_that_is_a_word_is_no_whole_piece() -> None:
    made = content([["a", "b"]], {**BYTES, "ab": 256, "END": 257}, ignore_merges=True)
    made["added_tokens"][0] |= {"id": 257, "content": "END"}
    tokenizer = HuggingFaceTokenizer.from_content(made, {"eos_token": "END"}, rows=999, name="tiny")
    assert (tokenizer.eos_id, tokenizer.backend) == (257, "tiktoken")
    assert tokenizer.encode("END") == [*b"END"]


def test_a_model_that_makes_a_special_token_of_text_is_refused() -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("a", -1.0), ("<", -9.0), ("/", -9.0), ("s", -9.0), (">", -9.0)]
    made = Package(models.Unigram(pieces, unk_id=0))
    made.add_special_tokens(["</s>"])
    tokenizer = HuggingFaceTokenizer.from_content(
        json.loads(made.to_str()), {"eos_token": "</s>", "unk_token": "<unk>"}, rows=9, name="uni"
    )
    assert tokenizer.encode("a</a") == [2, 3, 4, 2]
    assert tokenizer.encode("b") == [0]
    with pytest.raises(UserError, match="tokenizer uni: expected a text without '</s>'"):
        tokenizer.encode("a</s>")


ROWS = 800
SIZE = package(content_of("gpt2")).get_vocab_size()
SIZE_GEMMA = package(content_of("gemma")).get_vocab_size()
FIRST = {token: id for id, token in enumerate(SPECIAL)}


def roles(config: dict[str, Any], rows: int = ROWS, **ids: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_content(content_of("gpt2"), config, rows=rows, name="m", ids=ids)


def test_roles() -> None:
    tokenizer = roles({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<|endoftext|>"})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.stop_ids == (2,) and tokenizer.start_ids == ()
    assert tokenizer.vocab_size == SIZE < tokenizer.rows
    assert tokenizer.special_tokens == FIRST and tokenizer.special_ids == set(FIRST.values())


ROLES = [
    ({"eos_token": "</s>", "pad_token": "</s>"}, {}, None, ROWS, (2,)),  # pad is eos
    ({"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<s>"}, {}, 1, ROWS, (2,)),
    ({"eos_token": "</s>", "pad_token": "<s>"}, {"eos": [2, 1]}, None, ROWS, (2, 1)),  # pad ends a response
    ({"eos_token": "</s>", "pad_token": "!"}, {}, None, ROWS, (2,)),  # text pads
    ({}, {"bos": 0, "eos": 0}, 0, ROWS, (0,)),  # GPT-2
    ({"bos_token": None}, {"bos": 0, "eos": [7, 2], "pad": 3}, None, 3, (7, 2)),  # Qwen
]


def test_roles_that_are_missing_or_shared() -> None:
    for row in ROLES:
        with case(row) as (config, ids, bos, pad, stop):
            tokenizer = roles(config, **ids)
            assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids) == (bos, pad, stop)
            assert tokenizer.eos_id == stop[0] and pad in tokenizer.special_ids
            assert tokenizer.token_bytes(pad) == b"" and tokenizer.decode([*tokenizer.encode("a"), pad]) == "a"
            assert tokenizer.encode("wow!!") == package(content_of("gpt2")).encode("wow!!").ids


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(UserError, match=r"m: tokenizer_config\.json: expected 'eos_token' .* got no end-of-text token"):
        roles({"bos_token": "<s>"})
    for role, wrong in (("eos", 3), ("bos", True), ("pad", ["</s>"]), ("unk", {"content": 3}), ("sep", 0.5)):
        with (
            case((role, wrong)),
            pytest.raises(UserError, match=rf"m: tok.*: field '{role}_token': expected a token's te"),
        ):
            roles({"eos_token": "</s>", f"{role}_token": wrong})
    with pytest.raises(UserError, match=r"expected an id below 400, the rows .* got 400 of"):
        roles({"eos_token": "</s>"}, rows=400)
    with pytest.raises(UserError, match="eos_token_id: expected an id or a list of ids, got 'x'"):
        roles({}, eos="x")
    with pytest.raises(UserError, match=r"m: tokenizer\.json: KeyError: 'model'; is the file complete\?"):
        HuggingFaceTokenizer.from_content({}, {}, rows=9, name="m")
    tokenizer = roles({"eos_token": "</s>"})
    with pytest.raises(UserError, match=f"token id {SIZE} is outside the vocabulary of {SIZE} ids"):
        tokenizer.decode([SIZE])
    with pytest.raises(UserError, match=r"lone surrogate U\+DC80 at character 2"):
        tokenizer.encode("ab\udc80")


END, USER = SIZE, SIZE + 1  # the ids that follow tokenizer.json's
SPOKEN = CHATML.replace("im_", "turn_")
DECODER = {
    "added_tokens_decoder": {
        str(USER): {"content": "<|turn_start|>", "special": True},
        str(END): {"content": "<|turn_end|>", "special": True, "normalized": False},
        str(USER + 1): {"content": "<tool>", "normalized": False},
    }
}
TURN = {"eos_token": "</s>", "chat_template": SPOKEN}
LISTED = {"added_tokens.json": {"<tool>": USER + 1, "<|turn_end|>": END, "<|turn_start|>": USER}}
EXTRA = ["<|turn_end|>", {"content": "<|turn_start|>"}]
# tokenizer_config.json, other files, whether <tool> in a text is a token: with each, the end of a turn is a token.
SOURCES: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    (TURN | DECODER, {}, True),
    (TURN | DECODER | {"eos_token": "<|turn_end|>"}, {}, True),
    (TURN | {"additional_special_tokens": EXTRA}, LISTED, True),
    (TURN | {"additional_special_tokens": EXTRA}, {}, False),
    (TURN | {"extra_special_tokens": {"end": "<|turn_end|>", "start": "<|turn_start|>"}}, {}, False),
    (TURN, {"special_tokens_map.json": {"additional_special_tokens": EXTRA}}, False),
    ({**TURN, "eos_token": "<|turn_end|>", "cls_token": "<|turn_start|>"}, {}, False),
]


def added(config: dict[str, Any], other: dict[str, Any], kind: str = "gpt2", rows: int = 2000) -> HuggingFaceTokenizer:
    """A tokenizer whose tokenizer.json does not have the tokens of turns."""
    files = {"tokenizer.json": content_of(kind), "tokenizer_config.json": config} | other
    return HuggingFaceTokenizer({name: json.dumps(file) for name, file in files.items()}, rows=rows, name="m", ids={})


def test_added_tokens_of_every_file(tmp_path: Path) -> None:
    for row in SOURCES:
        with case(row) as (config, other, tool):
            ours = added(config, other)
            assert {ours.special_tokens["<|turn_end|>"], ours.special_tokens["<|turn_start|>"]} == {END, USER}
            assert END in ours.stop_ids and ours.vocab_size == SIZE + 2 + tool
            ids = chat_ids([("user", "a<|turn_end|>")], ours)
            names = {"<|turn_start|>": USER, "<|turn_end|>": END}
            sections = ["<|turn_start|>", "user\na<|turn_end|>", "<|turn_end|>", "\n", "<|turn_start|>", "assistant\n"]
            assert ids == [id for part in sections for id in ([names[part]] if part in names else ours.encode(part))]
            assert ours.special_ids.isdisjoint(ours.encode("<|turn_end|>"))
            assert (ours.encode("a<tool>") == [*ours.encode("a"), USER + 1]) == tool
            ours.save(tmp_path / "t.json")
            assert load_tokenizer(tmp_path / "t.json") == ours and ours != added(TURN, {})
    ours = added(TURN, {"added_tokens.json": {"<tool>": SIZE_GEMMA, "<|turn_end|>": SIZE_GEMMA + 1}}, "gemma")
    assert ours.encode("a<tool>b") == [*ours.encode("a"), SIZE_GEMMA, *ours.encode("b")]


def decoder(id: object, entry: object) -> dict[str, Any]:
    return {"eos_token": "</s>", "added_tokens_decoder": {id: entry}}


WRONG_ADDED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (decoder(str(END + 1), {"content": "<x>"}), {}, f"expected id {END} for '<x>', got {END + 1}, which is another"),
    (decoder("4", {"content": "<x>"}), {}, f"expected id {END} for '<x>', got 4, which is '<|im_end|>' in tokenizer"),
    (decoder("9", {"content": "</s>"}), {}, "expected id 2 for '</s>', got 9, which is "),
    (decoder("x", {"content": "<x>"}), {}, r"field 'added_tokens_decoder\[x\]': expected an id for its name, got 'x'"),
    (
        decoder(str(END), "<x>"),
        {},
        r"_decoder\[\d+\]': expected an object with the token's text as 'content', got '<x>'",
    ),
    (decoder(str(END), {"special": True}), {}, "expected an object with the token's text as 'content', got {'special'"),
    (decoder(str(END), {"content": "<x>", "special": "yes"}), {}, "expected true or false for its flags, got"),
    (
        {"eos_token": "</s>", "added_tokens_decoder": []} | {"additional_special_tokens": "<x>"},
        {},
        "expected a list of",
    ),
    ({"eos_token": "</s>", "additional_special_tokens": [3]}, {}, "'additional_special_tokens': expected a list .* 3"),
    ({"eos_token": "</s>"}, {"added_tokens.json": {"<x>": "9"}}, "field '<x>': expected the id of a token, got '9'"),
    ({"eos_token": "</s>"}, {"added_tokens.json": {"<x>": 9}}, r"expected id \d+ for '<x>', got 9, which is"),
    ({"eos_token": "</s>"}, {"added_tokens.json": ["<x>"]}, "expected a JSON object, got list"),
]


def test_added_tokens_that_contradict_are_refused() -> None:
    for row in WRONG_ADDED:
        with case(row) as (config, other, message), pytest.raises(UserError, match=rf"m: \w+\.json: .*{message}"):
            added(config, other)
    gap = content_of("gemma")
    gap["added_tokens"].append(gap["added_tokens"][0] | {"id": 900, "content": "<tool>", "special": False})
    with pytest.raises(
        UserError, match=rf"m: tokenizer\.json: field 'added_tokens': expected id {SIZE_GEMMA} for '<tool>'"
    ):
        added({"eos_token": "</s>"}, {"tokenizer.json": gap})
    with pytest.raises(UserError, match=rf"m: tokenizer\.json: expected an id below {SIZE}, .* of '<\|turn_end\|>'"):
        added(TURN | DECODER | {"eos_token": "<|turn_end|>"}, {}, rows=SIZE)


def test_start_ids_are_what_the_file_puts_before_a_text() -> None:
    assert load("llama3", start="<|begin_of_text|>").start_ids == (FIRST["<|begin_of_text|>"],)
    assert load("llama2").start_ids == (package(content_of("llama2")).token_to_id("<s>"),)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_bytes(text.encode())
    return folder


def test_a_folder_comes_back_byte_for_byte(tmp_path: Path) -> None:
    files = {
        "tokenizer__json": json.dumps(content_of("llama2"), indent=3),
        "tokenizer_config__json": '{"bos_token":  "<s>", "chat_template": "old"}\r\n',
        "special_tokens_map__json": '{"eos_token": "</s>"}',
        "chat_template__jinja": "{{ bos_token }}{{ messages[0].content }}\n",
    }
    folder = write(tmp_path / "m", **files, generation_config__json='{"eos_token_id": [3, 4]}', config__json="{}")
    tokenizer = HuggingFaceTokenizer.from_folder(folder, rows=ROWS)
    assert (tokenizer.name, tokenizer.eos_id, tokenizer.stop_ids) == ("m", 3, (3, 4))
    assert tokenizer.chat_template is not None and tokenizer.chat_template.render([("user", "x")]) == "<s>x"
    tokenizer.save(tmp_path / "saved.json")
    loaded = load_tokenizer(tmp_path / "saved.json")
    assert isinstance(loaded, HuggingFaceTokenizer) and loaded == tokenizer and hash(loaded) == hash(tokenizer)
    assert (loaded.stop_ids, loaded.pad_id, loaded.chat_template) == ((3, 4), ROWS, tokenizer.chat_template)
    assert loaded.encode("a cat") == tokenizer.encode("a cat")
    write_folder(loaded, tmp_path / "out")
    assert {f.name.replace(".", "__"): f.read_bytes().decode() for f in (tmp_path / "out").iterdir()} == files


NONE = [None, -1, -1.0, [], [-1], [None], [None, -1], "", [""], "none", "null", "None", "NULL"]


def test_no_token_in_every_spelling(tmp_path: Path) -> None:
    for number, none in enumerate(NONE):
        with case(none):
            fields: dict[str, Any] = {"eos_token_id": [2, *(none if isinstance(none, list) else [none])]}
            fields |= {"pad_token_id": none, "bos_token_id": none}
            files = {
                "tokenizer__json": json.dumps(content_of("gpt2")),
                "tokenizer_config__json": json.dumps({"pad_token": "" if none is None else None, "chat_template": ""}),
                "config__json": json.dumps({"eos_token_id": 7, "pad_token_id": none}),
                "generation_config__json": json.dumps(fields),
            }
            tokenizer = HuggingFaceTokenizer.from_folder(write(tmp_path / f"{number}", **files), rows=ROWS)
            assert (tokenizer.stop_ids, tokenizer.bos_id, tokenizer.pad_id) == ((2,), None, ROWS)
            assert tokenizer.chat_template is None
    # Of a token's text too, which names no token of the vocabulary and adds none.
    texts: list[Any] = [None, "", "None", "null", {"content": "none"}, {"content": None}, -1, []]
    for text in texts:
        with case(text):
            tokenizer = roles({"eos_token": "</s>", **dict.fromkeys(("bos_token", "pad_token", "unk_token"), text)})
            assert (tokenizer.stop_ids, tokenizer.bos_id, tokenizer.pad_id) == ((2,), None, ROWS)
            assert tokenizer.special_tokens == FIRST and tokenizer.vocab_size == SIZE
    # Where generation_config.json has none, config.json has it.
    last = {"config__json": '{"eos_token_id": 2, "pad_token_id": 1}', "generation_config__json": '{"pad_token_id": -1}'}
    folder = write(tmp_path / "last", tokenizer__json=json.dumps(content_of("gpt2")), **last)
    tokenizer = HuggingFaceTokenizer.from_folder(folder, rows=ROWS)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 1)


TEMPLATES: list[tuple[dict[str, str], str]] = [
    ({"tokenizer_config__json": "{"}, r"tokenizer_config\.json: not readable JSON"),
    ({"tokenizer__json": "[]"}, r"tokenizer\.json: expected a JSON object, got list"),
    ({"tokenizer__json": '{"model": {}}'}, r"tokenizer\.json: KeyError: 'vocab'; is the file complete\?"),
    ({"special_tokens_map__json": "3"}, r"special_tokens_map\.json: expected a JSON object, got int"),
    ({"added_tokens__json": "x"}, r"added_tokens\.json: not readable JSON"),
    ({"config__json": '{"pad_token_id": -2}'}, r"config\.json: field 'pad_token_id': expected an id .*, got -2"),
    (
        {"generation_config__json": '{"eos_token_id": [2, "x"]}'},
        r"n_config\.json: field 'eos_token_id': .*, got \[2, 'x'\]",
    ),
    ({"generation_config__json": '{"bos_token_id": true}'}, r"n_config\.json: field 'bos_token_id': .*, got True"),
    ({"generation_config__json": '{"eos_token_id": 2.5}'}, r"n_config\.json: field 'eos_token_id': .*, got 2\.5"),
    ({"generation_config__json": "[]"}, r"generation_config\.json: expected a JSON object, got list"),
    ({"tokenizer_config__json": "{}"}, r"tokenizer_config\.json: expected 'eos_token' here or 'eos_token_id' in conf"),
    (
        {"tokenizer_config__json": '{"chat_template": 3}'},
        r"r_config\.json: field 'chat_template': expected a templ.* 3",
    ),
    (
        {"tokenizer_config__json": '{"chat_template": [{"name": "default"}]}'},
        r"'chat_template': expected a template or a",
    ),
    (
        {"tokenizer_config__json": '{"chat_template": {"rag": "x"}}'},
        r"'chat_template': expected one named default, .* rag",
    ),
]


def test_errors_name_the_file_in_its_folder(tmp_path: Path) -> None:
    whole = {"tokenizer__json": json.dumps(content_of("gpt2")), "special_tokens_map__json": '{"eos_token": "</s>"}'}
    for number, row in enumerate(TEMPLATES):
        with case(row) as (files, message):
            without = {"special_tokens_map__json": "{}"} if "'eos_token' here" in message else {}
            folder = write(tmp_path / f"{number}", **whole | without | files)
            with pytest.raises(UserError, match=rf"^{folder}/.*{message}"):
                HuggingFaceTokenizer.from_folder(folder, rows=ROWS)
    for number, files in enumerate(
        [{"chat_template__jinja": "{% if %}"}, {"tokenizer_config__json": '{"chat_template": "{% if %}"}'}]
    ):
        folder = write(tmp_path / f"t{number}", **whole | files)
        template = HuggingFaceTokenizer.from_folder(folder, rows=ROWS).chat_template
        place = ("chat_template.jinja", "tokenizer_config.json: field 'chat_template'")[number]
        assert template is not None
        with pytest.raises(UserError, match=rf"^{folder}/{place}: chat template: line 1: Expected an expression"):
            template.render([("user", "x")])


def test_a_damaged_saved_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    load("gpt2").save(path)
    saved = json.loads(path.read_text())
    for change, message in (
        ({"fingerprint": "0"}, "does not match its fingerprint"),
        ({"files": {}}, "KeyError"),
        ({"rows": 5}, "expected an id below 5"),
        ({"files": {"tokenizer.json": "{"}}, "not readable JSON"),
    ):
        path.write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(path)


def test_a_folder_without_the_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json in it; let transformers write one"):
        HuggingFaceTokenizer.from_folder(tmp_path, rows=9)


def test_the_fingerprint_is_of_what_decides_the_ids() -> None:
    first = roles({"eos_token": "</s>", "pad_token": "<s>"})
    assert first == roles({"eos_token": {"content": "</s>"}, "pad_token": "<s>", "model_max_length": 9}, rows=900)
    assert first != roles({"eos_token": "</s>"})
    assert first != roles({"eos_token": "</s>", "pad_token": "<s>", "chat_template": CHATML})
    assert first != roles({"eos_token": "</s>", "pad_token": "<s>"}, eos=[2, 3])


def test_spaces_of_sentencepiece() -> None:
    for kind, whole, middle in (("llama2", b" the", b"the"), ("metaspace", b" the", b"the"), ("gemma", b"the", b"the")):
        tokenizer = load(kind)
        read = lambda ids: b"".join(map(tokenizer.token_bytes, ids))  # noqa: B023, E731
        assert read(tokenizer.encode("the")) == whole
        assert read(tokenizer.encode_continuation("the")) == middle
        assert read(tokenizer.encode_continuation(" the")) == b" the"
        assert tokenizer.decode(tokenizer.encode("the\x01é")) == "the\x01é"
        ids = tokenizer.encode_sections(["a", "b</s>", "c", "d"], {ord("d"): "the"})
        assert [read(row) for row in ids[:2]] == [b" a" if kind != "gemma" else b"a", b"b"]
        assert ids[1][-1] == tokenizer.special_tokens["</s>"]
        # After a special token the space comes again where the normalizer puts it, as in one call to the package.
        assert read(ids[2]) == (b" c" if kind == "llama2" else b"c") and read(ids[3]) == b"the"
    newline = tokenizer.encode("\x02")
    assert [tokenizer.token_bytes(id) for id in newline] == [b"\x02"]


def test_a_special_token_may_take_white_space_away() -> None:
    made = content([])
    made["added_tokens"][0] |= {"rstrip": True}
    tokenizer = HuggingFaceTokenizer.from_content(made, EOS, rows=999, name="tiny")
    assert tokenizer.encode_sections(["a <E> \n", "b"], {}) == [[97, 32, 256], [98]]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load("gpt2").decode(load("gpt2").encode("a cat")) == "a cat"
    with pytest.raises(UserError, match=r"gemma: tokenizer\.json: needs .* run: pip install 'gguf>="):
        load("gemma")


def tiny_ranks(pattern: str) -> Tokenizer:
    """A table with a gap, and with a token that no pair comes down to."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"  ": 256, b"he": 257, b" the": 300, b"12": 301, b"123": 302, b"\n\n": 303}
    return Tokenizer("tiny", pattern, ranks)


def named_patterns() -> list[str]:
    """The patterns of tiktoken's encodings, whose tables would have to be downloaded."""
    module = importlib.import_module("tiktoken_ext.openai_public")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        patch.setattr(module, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: {})
        for name, make in module.ENCODING_CONSTRUCTORS.items():
            if name != "gpt2":  # it counts the ranks that it has just downloaded
                found.append(make()["pat_str"])
    return sorted(set(found))


def test_our_own_tokenizer_in_hugging_faces_layout() -> None:
    own = {"bytes": Tokenizer.bytes(), "trained": Tokenizer.train(CORPUS * 3, 450), "tiny": tiny_ranks(WORDS_PATTERN)}
    for kind in [*own, *named_patterns()]:
        with case(kind):
            tokenizer = own[kind] if kind in own else tiny_ranks(kind)
            made = to_hugging_face(tokenizer)
            theirs = package(made)
            assert theirs.get_vocab_size() == len(tokenizer._bytes) + 3
            assert theirs.token_to_id("<|pad|>") == tokenizer.pad_id
            for text in [*strings(300, seed=4), "  the 1234\n\n\n", "the", "a  ", "12"]:
                assert theirs.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)], repr(text)
            if to_oniguruma(tokenizer.pattern) in PATTERNS or kind == "bytes":
                back = HuggingFaceTokenizer.from_content(made, {"eos_token": "<|endoftext|>"}, rows=999, name="back")
                assert back.backend == "tiktoken"
                assert all(back.encode(text) == tokenizer.encode(text) for text in strings(100, seed=5))


def test_a_pattern_that_may_mean_something_else_is_refused() -> None:
    for pattern in (r"a$|(?s).", r"\p{N}{1,2}+|(?s:.)", "^a|[^a]"):
        with pytest.raises(UserError, match="tokenizer tiny: expected a pattern"):
            to_hugging_face(tiny_ranks(pattern))
    with pytest.raises(UserError, match=r"got '<\|pad\|>'"):
        to_hugging_face(Tokenizer("x", WORDS_PATTERN, {bytes([b]): b for b in range(256)} | {b"<|pad|>": 256}))


def test_a_table_of_a_real_size_takes_a_moment() -> None:
    words = Tokenizer.train(["".join(map(chr, range(0x4E00, 0x5E00)))], 4000)
    assert WORDS_PATTERN in PATTERNS
    assert table_of(to_hugging_face(words)["model"], words.special_ids) is not None


def test_characters_that_the_vocabulary_has_no_token_for_are_in_the_ledger() -> None:
    content = content_of("gpt2")
    # The letters of the bytes 0x04, 0x16 and 0xF4, and of a continuation byte, 0x9D; no merge may build on them.
    gone = "ĄĖôĿ"
    model = content["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if not set(token) & set(gone)}
    model["merges"] = [merge for merge in model["merges"] if not set("".join(merge)) & set(gone)]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    tokenizer = HuggingFaceTokenizer.from_content(content, {"eos_token": "<|endoftext|>"}, rows=2000, name="small")
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"
    for text, lost in (
        ("plain \x05 é \ufffd 👩 \n\t ", ""),
        ("a\x04b\x16\x04", "\x04\x16"),
        ("\U00100000", "\U00100000"),
        ("\u275d", "\u275d"),  # e2 9d 9d
        ("", ""),
    ):
        with case(text):
            assert tokenizer.lost(text) == lost
    for kind in ("gpt2", "qwen2", "llama3", "llama2", "metaspace", "gemma"):
        with case(kind):
            assert load(kind).lost("plain é 👩\x04") == ""
    texts = [Text("fine", "t:1"), Text("\x04", "t:2")]
    answers = [
        Demonstration("p", "c\x16", "d:1"),
        Dialogue((Message("user", "q"), Message("assistant", "\x04\x16")), "d:2"),
    ]
    rankings = [Comparison("p", "\x04", "r", "c:1"), Ranking("p", ("a", "b\x16"), (1, 2), "r:1")]
    ledger = Ledger()
    encode_text(texts, tokenizer, ledger=ledger)
    encode_demonstrations(answers, tokenizer, max_tokens=60, ledger=ledger)
    encode_rankings(rankings, tokenizer, max_tokens=60, ledger=ledger)
    encode_prompts([Prompt("p\x04", "p:1")], tokenizer, max_tokens=60, ledger=ledger)
    said = "characters that the vocabulary has no token for are lost: "
    assert [(decision.where, decision.reason.removeprefix(said)) for decision in ledger.decisions] == [
        ("t:2", "U+0004"),
        ("d:1", "U+0016"),
        ("d:2", "U+0004 U+0016"),
        ("c:1", "U+0004"),
        ("r:1", "U+0016"),
        ("p:1", "U+0004"),
    ]
