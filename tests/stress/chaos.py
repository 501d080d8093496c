"""Guarantees of docs/explanation/machine-dies.md, tried many times: prints JSON, exits with 1 if one does not hold.

python tests/stress/chaos.py flip --n 500     damages files of a finished run; a later stage must refuse, or say which
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from rlhf_jax.config import ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.checkpoint import fingerprint
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.made_params import random_params
from tests.made_runs import write_run

WAYS = ("flip", "truncate", "delete")
MODEL = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=16, width=8, layers=1, heads=2)


class Said(logging.Handler):
    """Warnings that the library gave."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def handed_on(run: Path) -> Any:
    """All that a later stage takes of a run."""
    source = open_source(str(run), stages=("reward",))
    facts = (source.model, source.scalar, source.dialogues, source.score_mean, source.score_scale, source.warnings)
    return facts, source.tokenizer.fingerprint, source.fingerprint, fingerprint(source.own())


def damaged(content: bytes, how: str, rng: random.Random) -> bytes | None:
    """The content with a flipped bit, or cut; None for a file that is deleted."""
    if how == "delete" or not content:
        return None
    at = rng.randrange(len(content))
    if how == "truncate":
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def flip(n: int, seed: int) -> dict[str, Any]:
    """Damages a file of a finished reward model, n times, every file in turn."""
    rng, counts = random.Random(seed), collections.Counter[str]()
    said, wrong = Said(), []
    log = logging.getLogger("rlhf_jax")
    log.addHandler(said)
    log.propagate = False
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        params, released = (random_params(MODEL, True, seed) for seed in (1, 2))
        facts = {"score_mean": 0.5, "score_scale": 2.0, "dialogues": False, "warnings": []}
        write_run(run, "reward", params, MODEL, Tokenizer.bytes(), released=released, **facts)
        whole = handed_on(run)
        files = sorted(path for path in run.rglob("*") if path.is_file())
        for number in range(n):
            path, how = files[number % len(files)], WAYS[number // len(files) % len(WAYS)]
            # Warnings are given once for each folder.
            copy = Path(folder) / f"copy{number}"
            shutil.copytree(run, copy)
            target = copy / path.relative_to(run)
            content = damaged(target.read_bytes(), how, rng)
            target.unlink() if content is None else target.write_bytes(content)
            said.lines.clear()
            try:
                found = handed_on(copy)
                named = any(str(copy) in line for line in said.lines)
                outcome = "the same" if found == whole else "named" if named else "silent"
            except UserError as error:
                outcome = "refused" if str(copy) in str(error) and "\n" not in str(error) else "not named"
            except Exception:  # noqa: BLE001, any other exception is what is looked for
                outcome = "traceback"
                wrong.append(traceback.format_exc(limit=-1))
            counts[outcome] += 1
            if outcome in ("silent", "not named"):
                wrong.append(f"{outcome}: {how} {path.relative_to(run)}")
            shutil.rmtree(copy)
    bad = counts["silent"] + counts["not named"] + counts["traceback"]
    return {"name": "flip", "n": n, "files": len(files), **counts, "holds": bad == 0, "wrong": wrong[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["flip"])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = flip(given.n, given.seed)
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
