"""Verifiable rewards by math-verify and reasoning-gym themselves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.data import Ledger, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.verifiers import equal_expression, gym, mathematics
from rlhf_jax.verifiers.tasks import write_task


def test_equal_expressions_are_found_in_any_spelling() -> None:
    pytest.importorskip("math_verify")
    rows = [
        (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        ("$x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        (r"\boxed{3}", "4", 0.0),
        ("I cannot say.", "4", 0.0),
        ("The answer is 12", ["11", "12"], 1.0),
        ("anything", None, None),
        ([{"role": "assistant", "content": r"\boxed{\sqrt{8}}"}], r"2\sqrt{2}", 1.0),
    ]
    said, right, wanted = zip(*rows, strict=True)
    assert equal_expression(said, right) == list(wanted)
    # What takes for ever to compare is unequal, and the next is compared all the same.
    start = time.monotonic()
    assert equal_expression(["$9^{9^{9^{9}}}$", "$2$"], ["$9^{9^{9^{9}}} + 1$", "$2$"], seconds=20) == [0.0, 1.0]
    assert time.monotonic() - start < 90


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_CODE", "raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    with pytest.raises(UserError, match=r"requires the package math-verify; run: pip install "):
        equal_expression(["1"], ["1"])
    monkeypatch.setattr(mathematics, "_CODE", "1 / 0")
    with pytest.raises(UserError, match=r"math-verify did not start: .*ZeroDivisionError"):
        equal_expression(["1"], ["1"])


def test_tasks_of_reasoning_gym(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    for name in ("leg_counting", "basic_arithmetic", "countdown"):
        folder = tmp_path / name
        write_task(f"gym:{name}", folder, train=8, test=4, demonstrations=3, seed=5)
        rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        answers, places = [row["answer"] for row in rows], [row["gym"] for row in rows]
        assert gym(answers, answers, places) == [1.0] * 4
        assert all(value is not None and value < 0.1 for value in gym(["no"] * 4, answers, places))
        assert gym([f"So {answers[0]}"], answers[:1], places[:1], after="Answer:") == [0.0]
        assert gym([f"So. Answer: {answers[0]}"], answers[:1], places[:1], after="Answer:") == [1.0]
        assert gym(["1"], [None], [None]) == [None]
        # What a task evaluates may take for ever.
        assert gym(["9**9**9**9", answers[0]], answers[:1] * 2, places[:1] * 2, seconds=5) == [0.0, 1.0]
        for kind, file, count in (("prompts", "prompts", 8), ("prompts", "test", 4), ("demonstrations",) * 2 + (3,)):
            records = read_records(folder / f"{file}.jsonl", kind, Ledger())  # type: ignore[call-overload]
            assert len(records) == count and all(record.turns for record in records)
        with pytest.raises(
            UserError, match=r"field 'answer': expected '.*', which reasoning-gym has for .*, got 'else'"
        ):
            gym(answers[:1], ["else"], places[:1])
    with pytest.raises(
        UserError, match=r"gym:nothing: expected a task of reasoning-gym, got no such name; it has .*leg_"
    ):
        write_task("gym:nothing", tmp_path, train=1, test=1, demonstrations=0, seed=0)
    with pytest.raises(UserError, match=r"field 'gym': expected .* as `rlhf-jax task gym:NAME` writes, got \{'task'"):
        gym(["1"], ["1"], [{"task": "leg_counting"}])


def test_the_packages_are_imported_by_what_needs_them_alone() -> None:
    code = "import rlhf_jax.verifiers, sys; sys.exit(bool({'sympy', 'reasoning_gym', 'jsonschema'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
