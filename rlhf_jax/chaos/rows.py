"""Hostile data: each row is kept, in the ledger or refused by file and line; text makes no special token."""

from __future__ import annotations

import collections
import json
import random
import resource
import string
import traceback
from pathlib import Path
from typing import Any

from rlhf_jax.chaos.forks import result
from rlhf_jax.chaos.outcome import Command, Outcome
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import read_records
from rlhf_jax.errors import UserError
from rlhf_jax.tokenizers.bpe import Tokenizer

KINDS = ("text", "demonstrations", "dialogues", "comparisons", "rankings", "prompts")
GOOD: dict[str, dict[str, Any]] = {
    "text": {"text": "a\u2028b"},
    "demonstrations": {"prompt": "p", "response": "r"},
    "dialogues": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "comparisons": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "rankings": {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]},
    "prompts": {"prompt": "p"},
}
# In place of a value, as JSON.
VALUES = (
    *(
        '""',
        '" "',
        "null",
        "5",
        "true",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "[]",
        "{}",
        '[""]',
        "[null]",
        '"\\ud800"',
    ),
    *(
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"a\u2028b"',
        '"\u202e"',
        "[[[[]]]]",
        '{"": ""}',
        '[{"role": "user"}]',
        "9" * 400,
    ),
    *(
        "[" * 3000 + "]" * 3000,
        '"' + "x" * 100_000 + '"',
        '[{"role": 1, "content": []}]',
        "[1, 1]",
        "[2.5, 1]",
        "[0, 1]",
    ),
)
# In place of a line.
LINES = (
    *(b"", b"   ", b"{", b"}", b"[]", b"null", b'"text"', b'{"text"}', b"{'text': 'a'}", b"\xff\xfe", b"\x00", b"{}{}"),
    *(
        b'{"text": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"text": "a" "b"}',
        b'{"text": "\\x"}',
        b'{"text": "a\nb"}',
    ),
    *(b"[" * 200_000, b'{"a":' * 50_000, b'{"text": "a", "text": "b"}', b"\xef\xbb\xbf{}", b'{"text": "unfinished'),
)
LIMIT = 64 * 2**20
"""Bytes of memory that a hostile line may take in addition."""


def _line(kind: str, dice: random.Random) -> bytes:
    """A hostile line: another value or no value in a field, an odd name, or something that is no row."""
    if dice.random() < 0.3:
        return dice.choice(LINES)
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in GOOD[kind].items()}
    name = dice.choice(list(fields))
    match dice.randrange(4):
        case 0:
            del fields[name]
        case 1:
            fields[dice.choice(("", name.upper(), "train", "weight", "ended", "messages", "chosen"))] = dice.choice(
                VALUES
            )
        case _:
            fields[name] = dice.choice(VALUES)
    row = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}"
    return row.encode("utf-8", "surrogatepass")


def data(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Reads files with one hostile line between two good ones, and a line of a gigabyte."""
    outcome, found, dice = Outcome(), collections.Counter[str](), random.Random(seed)
    path = folder / "data.jsonl"
    for number in range(n):
        kind: Any = KINDS[number % len(KINDS)]
        line, good = _line(kind, dice), json.dumps(GOOD[kind], ensure_ascii=False).encode()
        path.write_bytes(b"\n".join((good, line, good)) + b"\n")
        ledger, case = Ledger(), f"{kind}: {line[:80]!r}"
        try:
            records = read_records(path, kind, ledger)
        except UserError as error:
            found["refused"] += 1
            lines = [f"{path}:{at}" for at in (2, 3)]  # a line break in a string makes two lines
            outcome.expect("\n" not in str(error), f"{case}: several lines: {error}")
            outcome.expect(any(where in str(error) for where in lines), f"{case}: without file and line: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            found["traceback"] += 1
            outcome.expect(False, f"{case}: {traceback.format_exception_only(error)[-1].strip()}")
        else:
            found["dropped" if ledger.rejected else "kept"] += 1
            outcome.expect(len(records) + ledger.rejected == ledger.total, f"{case}: rows without an entry")
            outcome.expect(len(records) >= 2, f"{case}: a good row was lost")
    path.unlink(missing_ok=True)
    size = 2**30 if n >= 100 else LIMIT + 2**24
    grown = result(_memory_of_a_line, folder / "large.jsonl", size)
    outcome.expect(grown["refused"], f"a line of {size:,} bytes was not refused by its number")
    outcome.expect(grown["bytes"] < LIMIT, f"a line of {size:,} bytes took {grown['bytes']:,} bytes of memory")
    outcome.counts = {"rows": n, **found, "line of bytes": size, "its memory in MB": grown["bytes"] // 2**20}
    return outcome


def _memory_of_a_line(path: Path, size: int) -> dict[str, Any]:
    """Reads a file of one line; whether it was refused by its number, and the memory that it took."""
    block = b"a" * 2**20
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(size // len(block)):
            file.write(block)
        file.write(b'"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_records(path, "text", Ledger())
        refused = False
    except UserError as error:
        refused = f"{path}:1" in str(error)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.unlink()
    return {"refused": refused, "bytes": (after - before) * 1024}


def tokens(command: Command, n: int, seed: int, folder: Path) -> Outcome:
    """Encodes hostile strings: no special id, and decoding gives the text back."""
    outcome, dice = Outcome(), random.Random(seed)
    texts = ["the red cat and the blue dog, " * 20, string.printable * 5, "α β γ — «ünïcode» 漢字 " * 20]
    tokenizers = {"bytes": Tokenizer.bytes(), "trained": Tokenizer.train(texts, 300)}
    names = [tokenizer.decode([id]) for tokenizer in tokenizers.values() for id in tokenizer.special_ids]
    names += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[PAD]", "<pad>", "<unk>", "<|user|>"]
    for _ in range(n):
        text = _hostile(names, dice)
        for name, tokenizer in tokenizers.items():
            ids = tokenizer.encode(text)
            outcome.expect(not tokenizer.special_ids.intersection(ids), f"{name}: a special id of {text!r}")
            outcome.expect(tokenizer.decode(ids) == text, f"{name}: not given back: {text!r}")
    outcome.counts = {"strings": n, "tokenizers": list(tokenizers)}
    return outcome


def _hostile(names: list[str], dice: random.Random) -> str:
    """A string of names of special tokens and parts of them, spaces, controls, marks and any characters."""

    def part() -> str:
        match dice.randrange(8):
            case 0:
                return dice.choice(names)
            case 1:
                name = dice.choice(names)
                return name[: dice.randrange(len(name) + 1)]
            case 2:
                return dice.choice(" \t\n\r\u00a0\u2028\u3000") * dice.choice((1, 2, 3, 17, 300))
            case 3:
                return chr(dice.randrange(32))
            case 4:
                return dice.choice(
                    ("e\u0301", "👩\u200d👩\u200d👧", "\u202eabc", "\u0300" * 20, "\ufeff", "\ufffd", "ﷺ", "🇩🇪")
                )
            case 5:
                return "".join(dice.choice(string.printable) for _ in range(dice.randrange(12)))
            case _:
                # Any character but halves of a pair.
                point = dice.randrange(0x110000 - 0x800)
                return chr(point if point < 0xD800 else point + 0x800)

    return "".join(part() for _ in range(dice.randrange(12)))
