"""Do the tests notice broken code? Breaks one random line of the library's core at a time and runs that file's tests.

python tests/stress/mutations.py [--seed 1] [--count 40] [--json FILE]

A mutation is a smallest change of meaning: + becomes -, < becomes <=, a number one more, a keyword argument is left
out. It is made in a copy of the checkout, whose tests must pass. Which lines are changed and how follows from the seed
and the library's files alone, so the same changes can be tried before and after the tests are rewritten. The exit
status is 1 if one survived.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

# Seconds of processor time that the tests of a file may take, ten times that by the clock: the machine may be busy.
LIMIT = 300
# The files that are mutated, and of each the tests that cover it, the most direct first.
TESTS = {
    "losses": "losses",
    "returns": "returns rollout",
    "kl": "kl rollout",
    "masked": "masked losses",
    "model": "model cache shared_prompts attention sharding",
    "layers/attention": "attention model",
    "layers/kv_cache": "cache generate",
    "layers/rotary": "model",
    "generate": "generate cache sampling",
    "logprobs": "rollout shared_prompts episodes packing plan",
    "packing": "packing episodes",
    "optim": "optim packing parallel",
    "lora": "lora sources",
    "evaluation/heldout": "reward shared_prompts sources scripts",
    "stages/pretrain": "sources parallel scripts",
    "stages/sft": "sources parallel scripts",
    "stages/reward": "reward shared_prompts sources parallel scripts",
    "stages/ppo": "rollout episodes packing sources scripts reward_runs",
    "trainers/pretrain": "sources scripts",
    "trainers/sft": "sources scripts",
    "trainers/reward": "reward shared_prompts sources scripts",
    "trainers/ppo": "sources packing scripts reward_runs",
    "rewards": "rewards reward_runs",
    "inference": "inference scripts",
    "data/batches": "data_batches shared_prompts compilations",
    "data/encode": "data_encode scripts",
    "data/packing": "data_packing",
}
# Where nothing is mutated, and why no test should notice.
EXCLUDED = {
    r"^(BLOCK|    (refill|sizes|fit)) = .*|while sizes.*|sizes\.append\(sizes.*": "speed, not what is computed",
    r"(maxsize|prevent_cse|donate_argnums|block_\w+)=\w+": "speed, not what is computed",
    r"^(TURN_TABLE|LOGITS_BYTES) = .*|\b(parts|microbatches)(: int = 1|=.*| == 1)": "memory, not what is computed",
    r"flops_per_token[=(].*|\bshow=.*|\bsay\(.*": "is only shown",
    r"^MASKED = .*": "any number so far below a logit does",
    r"^    (scores|logp|ref_logp|reward|x) = jnp\.where\(mask.*": "any number does: what comes of it is masked again",
    r"0, 0, filled, 0": "a start on an axis that is written whole is clamped to 0",
    r"(frozen|strict|covariant)=True": "refuses what does not occur",
    r"stable=True": "as JAX has it by default",
}
SWAPS = {
    **{"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "**": "*", "&": "|", "|": "&"},
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "and": "or", "or": "and"},
    **{"is": "is not", "is not": "is", "in": "not in", "not in": "in"},
}
# What tells a running program nothing; an argument by itself is only its name and type.
SILENT = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr, ast.arg)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`new` in place of the bytes of a file from `start` to `end`."""

    path: str
    source: bytes
    start: int
    end: int
    new: str

    @property
    def line(self) -> int:
        """Where it begins, from 1."""
        return self.source.count(b"\n", 0, self.start) + 1

    @property
    def mutated(self) -> bytes:
        """The whole file; its lines keep their numbers."""
        lost = self.source.count(b"\n", self.start, self.end) - self.new.count("\n")
        return self.source[: self.start] + self.new.encode() + b"\n" * lost + self.source[self.end :]


def mutations(path: str, source: bytes) -> Iterator[Mutation]:
    """All of a file."""
    lines = [0, *(match.end() for match in re.finditer(b"\n", source))]

    def span(node: Any) -> tuple[int, int]:
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    def text(node: Any) -> str:
        return source[slice(*span(node))].decode()

    def swapped(*operands: ast.expr) -> Iterator[tuple[int, int, str]]:
        for left, right in pairwise(operands):
            (_, start), (end, _) = span(left), span(right)
            gap = re.sub(rb"#.*", lambda comment: b" " * len(comment[0]), source[start:end])
            for operator in re.finditer(rb"is not|not in|[a-z]+|[<>=!]=|\*\*|//|[-+*/%&|<>]", gap):
                if new := SWAPS.get(operator[0].decode()):
                    yield start + operator.start(), start + operator.end(), new

    def changes(node: Any) -> Iterator[tuple[int, int, str]]:
        match node:
            case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
                yield from swapped(left, right)
            case ast.BoolOp(values=values):
                yield from swapped(*values)
            case ast.Compare(left=first, comparators=others):
                yield from swapped(first, *others)
            case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()):
                yield *span(node), re.sub(r"^(not\s*|~|-)", "", text(node))
            case ast.Constant(value=bool(value)):
                yield *span(node), str(not value)
            case ast.Constant(value=int(value) | float(value)):
                yield *span(node), str(value + 1)
            case ast.Slice(lower=lower, upper=upper):
                bounds = (bound for bound in (lower, upper) if bound and not isinstance(bound, ast.Constant))
                yield from ((*span(bound), f"({text(bound)}) + 1") for bound in bounds)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
                yield *span(test), f"not ({text(test)})"
            case ast.Return(value=ast.Tuple(elts=items) | ast.Call(args=items)) if "imum(" not in text(node.value):
                for left, right in ((left, right) for left, right in pairwise(items) if text(left) != text(right)):
                    (start, middle), (after, end) = span(left), span(right)
                    yield start, end, text(right) + source[middle:after].decode() + text(left)
            case ast.Call(keywords=keywords):
                for start, end in (span(keyword) for keyword in keywords if keyword.arg):
                    comma = re.compile(rb"\s*,[ ]?").match(source, end)
                    yield start, comma.end() if comma else end, ""

    def walk(node: ast.AST) -> Iterator[tuple[int, int, str]]:
        yield from changes(node)
        types = (getattr(node, "annotation", None), getattr(node, "returns", None))
        for child in ast.iter_child_nodes(node):
            if child not in types and not isinstance(child, SILENT):
                yield from walk(child)

    excluded = [match.span() for pattern in EXCLUDED for match in re.finditer(pattern.encode(), source, re.M)]
    for start, end, new in walk(ast.parse(source)):
        if not any(start < last and first < end for first, last in excluded):
            yield Mutation(path, source, start, end, new)


def choose(checkout: Path, seed: int, count: int) -> list[Mutation]:
    """One mutation of each of `count` random lines; a change of one line moves no other one's chance."""
    of_line = defaultdict(list)
    for path in (f"rlhf_jax/{name}.py" for name in TESTS):
        for mutation in mutations(path, (checkout / path).read_bytes()):
            of_line[path, mutation.line].append(mutation)
    dice = {line: random.Random(f"{seed} {line}") for line in of_line}
    lines = sorted(of_line, key=lambda line: dice[line].random())
    return [dice[line].choice(of_line[line]) for line in lines[:count]]


def failed(copy: Path, *arguments: str) -> list[str]:
    """The tests that fail, when pytest gets these arguments."""
    compiled = {"JAX_COMPILATION_CACHE_DIR": f"{copy}_compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    try:
        # Not `-m pytest`: some tests see how they were called.
        tests = subprocess.run(
            [sys.executable, Path(sys.executable).with_name("pytest"), "-q", "-p", "no:cacheprovider", *arguments],
            cwd=copy,
            env={**os.environ, **compiled, "PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=10 * LIMIT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 9)),
        )
    except subprocess.TimeoutExpired:
        return ["the time limit"]
    found = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", tests.stdout, re.MULTILINE)
    # A crash, or the limit (SIGXCPU); whatever else ended the tests says nothing about the mutation.
    if -tests.returncode in (signal.SIGXCPU, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE):
        found = [signal.Signals(-tests.returncode).name]
    if bool(found) != bool(tests.returncode):
        raise RuntimeError(f"pytest ended with status {tests.returncode}\n{tests.stdout}")
    return found


def noticed_by(mutation: Mutation, copy: Path) -> str | None:
    """The first test that fails with the mutation, None if all pass."""
    names = TESTS[mutation.path.removeprefix("rlhf_jax/").removesuffix(".py")].split()
    (copy / mutation.path).write_bytes(mutation.mutated)
    try:
        return next((found[0] for name in names if (found := failed(copy, "-x", f"tests/test_{name}.py"))), None)
    finally:
        (copy / mutation.path).write_bytes(mutation.source)


def main() -> None:
    """Tries them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes what became of each")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[2])
    arguments = parser.parse_args()
    for name in " ".join(TESTS.values()).split():
        (arguments.checkout / f"tests/test_{name}.py").stat()
    chosen, rows = choose(arguments.checkout, arguments.seed, arguments.count), []
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "checkout")
        shutil.copytree(arguments.checkout, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"))
        for mutation in chosen:
            began, by = time.monotonic(), noticed_by(mutation, copy)
            seconds = time.monotonic() - began
            files = (mutation.source, mutation.mutated)
            old, new = (file.decode().splitlines()[mutation.line - 1].strip() for file in files)
            where = f"{mutation.path}:{mutation.line}"
            rows.append({"where": where, "old": old, "new": new, "noticed_by": by, "seconds": round(seconds, 1)})
            verdict = f"noticed in {seconds:.1f} s by {by}: {where}" if by else f"SURVIVED {where}"
            print(f"{verdict}  {old} -> {new}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        # Without a mutation the same tests must pass.
        reasons = sorted({str(row["noticed_by"]) for row in rows})
        files_of_tests = groupby(filter(re.compile("tests/").match, reasons), key=lambda test: test.split("::")[0])
        spoiled = [test for _, tests in files_of_tests for test in failed(copy, *tests)]
    if spoiled:
        sys.exit(f"fails without a mutation: {', '.join(spoiled)}")
    noticed = sum(row["noticed_by"] is not None for row in rows)
    print(f"{noticed} of {len(rows)} noticed")
    sys.exit(0 if noticed == len(rows) else 1)


if __name__ == "__main__":
    main()
