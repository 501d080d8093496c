"""Text comes back from its ids, no special id comes from text, and a tokenizer is read back as it was saved."""

import json
import random
from pathlib import Path

import pytest
import requests
import tiktoken

from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.export import write_folder as write_tokenizer
from rlhf_jax.tokenizers.load import load_tokenizer
from tests.cases import case

pytestmark = pytest.mark.core

CORPUS = ["The cat sat on the mat. ", "the other cat, the better cat\n", "naïve café — 你好 0123"] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CORPUS, 300)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("Aé\n") == [65, 0xC3, 0xA9, 10]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 258, 259)
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert tokenizer.decode([257, 65, 0xC3, 256, 258]) == "A�"
    assert (tokenizer.start_ids, tokenizer.stop_ids, tokenizer.chat_template) == ((257,), (256,), None)
    assert tokenizer.encode_continuation("A") == [65]
    assert tokenizer.encode_sections(["A", "<|pad|>x"], {ord("x"): "B"}) == [[65], [*b"<|pad|>B"]]


def test_training_counts_every_id(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    assert sorted(trained.special_ids) == [297, 298, 299]
    assert len(trained.encode("The cat sat on the mat. ")) < 12
    # A corpus of one repeated letter has no 41 merges to give, and says so by its size.
    assert Tokenizer.train(["aaaa"], 300).vocab_size == 256 + 2 + 3


def test_training_is_repeatable(trained: Tokenizer) -> None:
    again = Tokenizer.train(iter(CORPUS), 300)
    assert again == trained and again.fingerprint == trained.fingerprint
    assert Tokenizer.train(CORPUS, 299) != trained


def test_too_small_a_vocabulary_is_named() -> None:
    with pytest.raises(UserError, match=r"vocab_size: expected at least 259 .*, got 258"):
        Tokenizer.train(["x"], 258)


def hostile_strings(count: int) -> list[str]:
    """Random strings of all that has broken tokenizers: special texts, controls, astral and combining characters."""
    rng = random.Random(0)
    parts = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|fim_prefix|>",
        "[PAD]",
        "</s>",
        "<s>",
        "<unk>",
        "\n\nHuman:",
        "'LL",
        "'ſ",
    ]
    parts += [
        "\0",
        "\r\n",
        "\u2028",
        "\u0085",
        "\ufeff",
        "\u202e",
        "\u200d",
        "e\u0301" * 9,
        "👩‍👩‍👧",
        "\U0010ffff",
        "\ud7ff",
    ]
    parts += [" " * 40, "\t\n ", "1234567", "ﷺ", "İ", "ǅ", "\x7f", "\x1b[2J", "word", " word", "Ωმ你"]
    strings = []
    for _ in range(count):
        pieces = [rng.choice(parts) for _ in range(rng.randrange(6))]
        pieces += [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(3)]
        rng.shuffle(pieces)
        strings.append("".join(pieces))
    return strings


def test_hostile_strings_come_back_without_special_ids(trained: Tokenizer) -> None:
    for kind in ["bytes", "trained"]:
        with case(kind):
            tokenizer = Tokenizer.bytes() if kind == "bytes" else trained
            strings = hostile_strings(10_000)
            rows = tokenizer.encode_batch(strings)
            assert tokenizer.decode_batch(rows) == strings
            assert max(max(row) for row in rows) < min(tokenizer.special_ids)


def test_long_runs_do_not_overflow_the_regex_engine(trained: Tokenizer) -> None:
    for character in [" ", "\n", "a", "\u2028", "^", "7"]:
        with case(character):
            text = "x" + character * 1_000_000 + "y"
            assert trained.decode(trained.encode(text)) == text


def test_training_survives_long_white_space() -> None:
    assert Tokenizer.train([" " * 1_000_000], 265).vocab_size == 265


def test_lone_surrogates_and_unknown_ids_are_errors(trained: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate U\+DC80 at character 2"):
        trained.encode("ab\udc80")
    with pytest.raises(UserError, match="token id 300 is outside the vocabulary of 300 ids"):
        trained.decode([65, 300])
    with pytest.raises(UserError, match="token id -1"):
        trained.decode([-1])


def test_save_and_load(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    loaded = load_tokenizer(path)
    assert loaded == trained and loaded.name == "bpe"
    assert loaded.encode("the café") == trained.encode("the café")
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (trained.eos_id, trained.bos_id, trained.pad_id)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    write_tokenizer(trained, tmp_path / "published")
    files = sorted(file.name for file in (tmp_path / "published").iterdir())
    assert files == ["tokenizer.json", "tokenizer_config.json"]


DAMAGES = [
    ({"format": "other"}, "expected the tokenizer.json of a run folder"),
    ({"format_version": 9}, "format_version: expected 1, got 9"),
    ({"tokens": {"0": "AA=="}}, "expected a token for each of 256 bytes, got none for 255"),
    ({"tokens": {"0": "?"}}, "damaged"),
    ({"tokens": None}, "damaged"),
    ({"pattern": "(?s)."}, "does not match its fingerprint"),
]


def test_a_damaged_file_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    for row in DAMAGES:
        with case(row) as (change, message):
            path = tmp_path / "tokenizer.json"
            trained.save(path)
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
            with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
                load_tokenizer(path)


def test_no_tokenizer_file(tmp_path: Path) -> None:
    for number, content in enumerate(["", "[]", "{", "[" * 100_000]):
        with case(content):
            path = tmp_path / f"{number}" / "tokenizer.json"
            path.parent.mkdir()
            with pytest.raises(UserError, match="not a readable tokenizer file"):
                load_tokenizer(path)
            path.write_text(content)
            with pytest.raises(UserError, match=r"tokenizer\.json: (expected|not a) "):
                load_tokenizer(path)


def test_named_encoding_needs_no_cache_once_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 300}  # with a gap, as p50k_base has one
    encoding = tiktoken.Encoding("r50k_base", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={"<|end|>": 301})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "r50k_base", encoding)
    tokenizer = Tokenizer.named("r50k_base")
    assert tokenizer.encode("ab<|end|>")[:2] == [300, ord("<")]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (301, 304)
    assert tokenizer.token_bytes(299) == b""
    tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.undo()
    assert load_tokenizer(tmp_path / "tokenizer.json") == tokenizer


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"'gpt2'.*no network.*TIKTOKEN_CACHE_DIR.*'bytes'"):
        Tokenizer.named("gpt2")
    with pytest.raises(UserError, match=r"expected one of tiktoken's .*cl100k_base.* got 'gpt5'"):
        Tokenizer.named("gpt5")
