"""Data of tasks whose answers are verified: sums, products with a calculator, and the tasks of reasoning-gym."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.verifiers.gym import questions

Row = dict[str, Any]
ADDENDS = 100
"""Addends are smaller than this, so that there are ADDENDS² sums."""


def write_task(name: str, folder: Path, *, train: int, test: int, demonstrations: int, seed: int) -> dict[str, int]:
    """Write the files of a task: {name of the file: number of its rows}.

    `prompts.jsonl` to train on by reward, `test.jsonl` to measure on, `demonstrations.jsonl` for SFT, and for sums and
    the calculator `text.jsonl`, the demonstrations as text to pretrain on. A test question is in no other file.

    Args:
      name: "sums", "calculator", or "gym:NAME" for a task of reasoning-gym.
      folder: that gets the files; it must not have any of them.
      train, test: number of prompts of each.
      demonstrations: number of training prompts that have a demonstration.
      seed: of the questions.

    Raises:
      UserError: for an unknown task, more questions than there are, and a folder that has such files.
    """
    kind, _, inner = name.partition(":")
    makers: dict[str, Callable[[], list[Row]]] = {
        "sums": lambda: sums(train + test, seed),
        "calculator": lambda: products(train + test, seed),
        "gym": lambda: gym_rows(inner, train + test, seed),
    }
    if kind not in makers or (kind == "gym") != bool(inner):
        raise UserError(f"task: expected sums, calculator or gym:NAME, got {name!r}")
    if demonstrations > train:
        raise UserError(f"demonstrations: expected at most the {train} training prompts, got {demonstrations}")
    rows = makers[kind]()
    shown = rows[test : test + demonstrations]
    files = {
        "prompts.jsonl": rows[test:],
        "test.jsonl": rows[:test],
        "demonstrations.jsonl": [{key: value for key, value in row.items() if key != "gym"} for row in shown],
    }
    if kind == "sums":
        files["demonstrations.jsonl"] = [{"prompt": row["prompt"], "completion": row["answer"]} for row in shown]
        files["text.jsonl"] = [{"text": row["prompt"] + row["answer"]} for row in shown]
    if kind == "calculator":
        dialogues = [calculator_dialogue(row, calls=at % 4 == 0) for at, row in enumerate(shown)]
        files["demonstrations.jsonl"] = files["text.jsonl"] = dialogues
    there = [file for file in files if (folder / file).exists()]
    if there:
        raise UserError(f"out: expected a folder without {there[0]}, got {folder}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_file(folder / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    return {file: len(content) for file, content in files.items()}


def sums(count: int, seed: int) -> list[Row]:
    """Distinct sums in random order, {"prompt": "7+35=", "answer": "42"}.

    Raises:
      UserError: if there are not as many.
    """
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in _pairs("sums", count, seed)]


def products(count: int, seed: int) -> list[Row]:
    """Distinct products in random order, {"prompt": [{"role": "user", "content": "7*35"}], "answer": "245"}.

    Raises:
      UserError: if there are not as many.
    """
    return [
        {"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)}
        for a, b in _pairs("products", count, seed)
    ]


def _pairs(what: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Distinct pairs of numbers in random order."""
    if count > ADDENDS**2:
        raise UserError(f"train + test: expected at most {ADDENDS**2} {what}, got {count}")
    return [divmod(place, ADDENDS) for place in random.Random(seed).sample(range(ADDENDS**2), count)]


def calculator_dialogue(row: Row, *, calls: bool) -> Row:
    """A demonstration for `environments.calculator`: the answer after a call, or at once, as people may know it."""
    question, answer = row["prompt"][0]["content"], row["answer"]
    said = [f"<calc>{question}=", answer, answer] if calls else [answer]
    roles = ("assistant", "user", "assistant")
    return {"messages": [*row["prompt"], *({"role": role, "content": text} for role, text in zip(roles, said))]}


def gym_rows(task: str, count: int, seed: int) -> list[Row]:
    """Questions of reasoning-gym as prompts, each once, with the columns that `verifiers.gym` reads.

    Raises:
      UserError: if the package is not installed, or has no such task or too few different questions.
    """
    size = 2 * count
    dataset = questions(task, seed, size)
    rows: dict[str, Row] = {}
    for index in range(size):
        entry = dataset[index]
        place = {"task": task, "seed": seed, "size": size, "index": index}
        rows.setdefault(entry["question"], {"question": entry["question"], "answer": entry["answer"], "gym": place})
        if len(rows) == count:
            return list(rows.values())
    raise UserError(f"gym:{task}: expected {count} different questions, got {len(rows)} among {size}; ask for fewer")
