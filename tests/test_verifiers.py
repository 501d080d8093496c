"""Verifiable rewards: what counts as right, programs in a process with limits, and the data of tasks."""

import json
import os
import signal
import time
import tracemalloc
from pathlib import Path

import pytest

from rlhf_jax.data import Ledger, read_records
from rlhf_jax.environments import calculator
from rlhf_jax.errors import UserError
from rlhf_jax.verifiers import exact, follows_schema, number, unit_tests
from rlhf_jax.verifiers.programs import passes
from rlhf_jax.verifiers.tasks import write_task
from rlhf_jax.verifiers.worker import Worker
from tests.cases import case

pytestmark = pytest.mark.core


def test_an_answer_is_right_as_text_or_as_a_number() -> None:
    for check, said, right, options, verdict in (
        (exact, " 42\n", "42", {}, 1.0),
        (exact, "42.", "42", {}, 0.0),
        (exact, "42", 42, {}, 1.0),
        (exact, "b", ["a", "b"], {}, 1.0),
        (exact, "anything", None, {}, None),
        (exact, "It is #### 1, or #### 7", "7", {"after": "####"}, 1.0),
        (exact, "7", "7", {"after": "####"}, 0.0),
        (exact, [{"role": "assistant", "content": "7"}], "7", {}, 1.0),
        (number, "so 3 and 4 make 7", 7, {}, 1.0),
        (number, "7 cows, or 8", "7", {}, 0.0),
        (number, "1,234.50 dollars", "1234.5", {}, 1.0),
        (number, "1e3", 1000, {}, 1.0),
        (number, "1e9999999", 5, {}, 0.0),
        (number, "1e9999999", "1e9999999", {}, 1.0),
        (number, "-3", "3", {}, 0.0),
        (number, "x-3 = .5", "0.5", {}, 1.0),
        (number, "version v2", "2", {}, 0.0),
        (number, "3.14", "3.1416", {"tolerance": 0.01}, 1.0),
        (number, "no digit", "0", {}, 0.0),
        (number, "Answer: 12. Then 13", 12, {"after": "Answer:"}, 0.0),
        (number, "anything", None, {}, None),
    ):
        with case((check.__name__, said, right, options)):
            assert check([said], [right], **options) == [verdict]
    with pytest.raises(UserError, match=r"field 'answer': expected a number, got 'blue'; use verifiers:exact for text"):
        number(["7"], ["blue"])


def test_json_follows_the_schema_of_its_row() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    said = ['{"a": 1}', '```json\n{"a": 1}\n```', '{"a": "1"}', "{}", "a: 1", "[" * 100_000, '{"a": 1}']
    wanted = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, None]
    assert follows_schema(said, [schema, json.dumps(schema)] + [schema] * 4 + [None]) == wanted
    assert follows_schema(["1e999"], [{"multipleOf": 0.1}]) == [0.0]
    for bad in ({"type": "thing"}, "{"):
        with case(bad), pytest.raises(UserError, match=r"field 'schema': expected a JSON schema, got "):
            follows_schema(["1"], [bad])


ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
PROGRAMS = [
    (ADD, TESTS, 1.0),
    (f"Here:\n```python\n{ADD}```\nDone.", TESTS[0], 1.0),
    (ADD, None, None),
    (ADD.replace("+", "-"), TESTS, 0.0),
    ("def add(", TESTS, 0.0),
    # It ends before its tests, or says that they passed.
    ("raise SystemExit(0)", TESTS, 0.0),
    ("import os\nprint('passed', flush=True)\nos._exit(0)", TESTS, 0.0),
    # It does not end and prints without end, takes all memory, or fills the disk.
    ("while True: print('x' * 10**6)", TESTS, 0.0),
    ("x = bytearray(10**10)", TESTS, 0.0),
    (f"{ADD}open('big', 'wb').write(bytes(10**7))", TESTS, 0.0),
    # What it leaves running ends with it.
    (f"{ADD}import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(61.75)'])", TESTS,
     1.0),
    # It sees no variable of the environment, and no file of the working directory.
    (f"import os\nassert 'SECRET' not in os.environ and not os.listdir('.')\n{ADD}", TESTS, 1.0),
]  # fmt: skip


def test_programs_run_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    tracemalloc.start()
    found = unit_tests([program for program, _, _ in PROGRAMS], [tests for _, tests, _ in PROGRAMS], seconds=6)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()
    for program, verdict in zip(PROGRAMS, found, strict=True):
        with case(program) as (_, _, wanted):
            assert verdict == wanted
    left = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert left and not any(b"61.75" in words for words in left)
    # One that leaves the group and holds the pipe open is not waited for.
    start = time.monotonic()
    assert not passes(f"{ADD}import os, time\nif not os.fork():\n os.setsid()\n time.sleep(12)", TESTS, 1.0, 512)
    assert time.monotonic() - start < 10


def test_a_package_that_hangs_dies_or_talks_ends_no_training() -> None:
    code = """
import os, sys, time
def answer(question):
    if question == "hang":
        time.sleep(60)
    if question == "die":
        os._exit(1)
    if question == "talk":
        print("x" * 10**6)
        sys.stderr.write("x" * 10**6)
    if question == "memory":
        bytearray(10**11)
    if question == "pid":
        return os.getpid()
    return question
"""
    worker = Worker("check", "some-package", code)
    for question, seconds, answer in (
        ("a", 20, "a"), ("hang", 0.3, None), ("b", 20, "b"), ("die", 20, None), ("talk", 20, "talk"),
        ("memory", 20, None), (["c", None], 20, ["c", None]),
    ):  # fmt: skip
        with case(question):
            assert worker.ask(question, seconds) == answer
    # Ctrl-C does not reach it, and its death between two questions costs no answer.
    for sent in (signal.SIGINT, signal.SIGKILL):
        pid = worker.ask("pid", 20)
        os.kill(pid, sent)
        time.sleep(0.3)
        assert (worker.ask("pid", 20) == pid) == (sent == signal.SIGINT)
    worker.close()
    for broken, message in (
        ("import some_package", "check: requires the package some-package; run: pip install "),
        ("1 / 0", "check: some-package did not start: ZeroDivisionError: division by zero"),
    ):
        with case(broken), pytest.raises(UserError, match=message):
            Worker("check", "some-package", broken).ask("a", 20)


def test_sums_are_distinct_and_tested_on_others(tmp_path: Path) -> None:
    counts = write_task("sums", tmp_path, train=50, test=20, demonstrations=30, seed=1)
    assert counts == {"prompts.jsonl": 50, "test.jsonl": 20, "demonstrations.jsonl": 30, "text.jsonl": 30}
    rows = {name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in counts}
    asked = [row["prompt"] for name in ("prompts.jsonl", "test.jsonl") for row in rows[name]]
    assert len(set(asked)) == 70
    for row in rows["prompts.jsonl"] + rows["test.jsonl"]:
        left, right = row["prompt"].removesuffix("=").split("+")
        assert int(row["answer"]) == int(left) + int(right)
    assert {row["prompt"] for row in rows["demonstrations.jsonl"]} <= {row["prompt"] for row in rows["prompts.jsonl"]}
    assert rows["text.jsonl"][0]["text"] == "".join(rows["demonstrations.jsonl"][0].values())
    for kind, name in (("prompts", "prompts"), ("demonstrations", "demonstrations"), ("text", "text")):
        assert len(read_records(tmp_path / f"{name}.jsonl", kind, Ledger())) == counts[f"{name}.jsonl"]  # type: ignore[call-overload]
    again = tmp_path / "again"
    write_task("sums", again, train=50, test=20, demonstrations=30, seed=1)
    assert (again / "test.jsonl").read_bytes() == (tmp_path / "test.jsonl").read_bytes()
    for name, settings, message in (
        ("sums", {}, "out: expected a folder without prompts.jsonl"),
        ("sum", {}, "task: expected sums, calculator or gym:NAME, got 'sum'"),
        ("gym:", {}, "task: expected sums, calculator or gym:NAME, got 'gym:'"),
        ("sums", {"train": 9_990}, r"train \+ test: expected at most 10000 sums, got 10010"),
        ("sums", {"demonstrations": 60}, "demonstrations: expected at most the 50 training prompts, got 60"),
    ):
        with case((name, settings)), pytest.raises(UserError, match=message):
            write_task(name, tmp_path, **({"train": 50, "test": 20, "demonstrations": 30, "seed": 1} | settings))


def test_products_are_dialogues_of_which_a_quarter_calls_the_calculator(tmp_path: Path) -> None:
    counts = write_task("calculator", tmp_path, train=40, test=8, demonstrations=20, seed=0)
    assert counts == {"prompts.jsonl": 40, "test.jsonl": 8, "demonstrations.jsonl": 20, "text.jsonl": 20}
    prompts = read_records(tmp_path / "prompts.jsonl", "prompts", Ledger())
    for prompt in prompts:
        left, right = prompt.turns[0].content.split("*")
        assert prompt.columns == {"answer": str(int(left) * int(right))} and len(prompt.turns) == 1
    dialogues = read_records(tmp_path / "demonstrations.jsonl", "dialogues", Ledger())
    assert [len(dialogue.messages) for dialogue in dialogues] == [4, 2, 2, 2] * 5
    question, call, seen, answer = (message.content for message in dialogues[0].messages)
    right = prompts[0].columns["answer"]
    assert (question, call) == (prompts[0].turns[0].content, f"<calc>{question}=") and seen == answer == right
    assert calculator(prompts[0].columns, call)[1:] == (right, 0, False)
    assert calculator(prompts[0].columns, answer)[2:] == (1, True)
    assert len(read_records(tmp_path / "text.jsonl", "text", Ledger())) == 20
