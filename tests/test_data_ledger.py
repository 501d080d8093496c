"""The books balance, and every row cut or dropped is in the file."""

import json
from pathlib import Path

import pytest

from rlhf_jax.data.ledger import Ledger

pytestmark = pytest.mark.core


def filled() -> Ledger:
    ledger = Ledger()
    for line in range(1, 6):
        ledger.read(f"a.jsonl:{line}")
    ledger.keep("a.jsonl:1", tokens=67_000)
    ledger.remark("a.jsonl:1", "odd")
    ledger.cut("a.jsonl:2", "half of it", tokens=33_500)
    ledger.drop("a.jsonl:3", "empty")
    ledger.drop("a.jsonl:4", "empty")
    ledger.keep("embedded:len", tokens=500)
    return ledger


def test_accepted_and_rejected_are_all() -> None:
    ledger = filled()
    assert (ledger.accepted, ledger.rejected, ledger.total, ledger.undecided) == (3, 2, 6, 1)
    ledger.drop("a.jsonl:5", "too long")
    assert (ledger.accepted + ledger.rejected, ledger.undecided) == (ledger.total, 0)


def test_saved_file(tmp_path: Path) -> None:
    filled().save(tmp_path / "ledger.json")
    saved = json.loads((tmp_path / "ledger.json").read_text())
    assert saved == filled().to_dict()
    assert saved["files"]["a.jsonl"] == {
        "read": 5,
        "kept": 1,
        "cut": 1,
        "dropped": 2,
        "held_out": 0,
        "remarked": 1,
        "tokens": 100_500,
    }
    assert saved["rows"][1] == {"where": "a.jsonl:2", "what": "cut", "reason": "half of it"}
    assert saved["reasons"]["dropped"] == {"empty": 2}
    empty = tmp_path / "empty.json"
    Ledger().save(empty)
    assert json.loads(empty.read_text())["rows"] == []


def test_summary() -> None:
    assert filled().summary(parameters=1000).splitlines() == [
        "6 rows: 2 kept, 1 cut, 2 dropped, 1 undecided",
        "101,000 tokens, as many as in 1.5 books, 101.00 for each of 1,000 parameters",
        "  remarked 1: odd (first at a.jsonl:1)",
        "  cut 1: half of it (first at a.jsonl:2)",
        "  dropped 2: empty (first at a.jsonl:3)",
    ]
    few = Ledger()
    few.keep("a.jsonl:1", tokens=2_941)
    assert few.summary(parameters=134_515_584).splitlines() == [
        "1 rows: 1 kept, 0 cut, 0 dropped",
        "2,941 tokens, as many as in 0.044 books, 2.2e-05 for each of 134,515,584 parameters",
    ]


def test_held_out_rows_are_neither_kept_nor_dropped() -> None:
    ledger = filled()
    ledger.hold_out("a.jsonl:1", "1 of 3 prompts", kept_tokens=67_000)
    ledger.hold_out("a.jsonl:5", "1 of 3 prompts")
    assert (ledger.accepted, ledger.rejected, ledger.held_out, ledger.total, ledger.undecided) == (2, 2, 2, 6, 0)
    assert ledger.tokens == 34_000 and ledger.to_dict()["held_out"] == 2
    assert ledger.counts().splitlines() == [
        "6 rows: 1 kept, 1 cut, 2 dropped, 2 held out",
        "  remarked 1: odd (first at a.jsonl:1)",
        "  cut 1: half of it (first at a.jsonl:2)",
        "  dropped 2: empty (first at a.jsonl:3)",
        "  held out 2: 1 of 3 prompts (first at a.jsonl:1)",
    ]
