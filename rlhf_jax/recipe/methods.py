"""Methods beside one another: the same SFT model, comparisons, prompts and gold score, each method its own command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.data.batches import RaggedRows
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import best_of_n_kl, expected_best_of_n
from rlhf_jax.evaluation.frontier import steps_to
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.intervals import Floats, over_seeds
from rlhf_jax.evaluation.samples import sequence_kl, win_rate
from rlhf_jax.files import write_file
from rlhf_jax.model import Transformer
from rlhf_jax.recipe.labels import Judge, Sampler, prompt_rows
from rlhf_jax.recipe.sizes import SIZES, Size
from rlhf_jax.runs.atomic_files import write_json
from rlhf_jax.runs.checkpoint import load_params, saved_steps
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import model_of, released_params

Method = Literal["ppo", "rloo", "grpo", "dpo", "kto", "orpo", "simpo", "best-of-n"]
GROUPED = {"rloo": "rloo", "grpo": "grpo"}
POINTS = 5
"""Checkpoints of a run that are measured."""
ANSWERS = 2
"""Answers per test prompt."""
AT_NATS = 5.0
"""KL to the SFT model at which methods are compared."""
CANDIDATES = 64
"""Samples per test prompt for best-of-n."""
CANDIDATE_PROMPTS = 128
Run = Callable[[Sequence[str], Path], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all methods of one seed have in common.

    Attributes:
      recipe: folder of a finished recipe.
      folder: that gets the runs.
      size: the recipe's.
      seed: of training and of sampling.
      kl_coef: β of the policy-gradient methods.
      rate: learning rate of the preference methods.
      share: of the full length of training, for a short try.
    """

    recipe: Path
    folder: Path
    size: Size
    seed: int
    kl_coef: float
    rate: float
    share: float = 1.0


def compare(
    recipes: Sequence[Path], folder: Path, methods: Sequence[Method], size: str, say: Callable[[str], None], run: Run,
    **settings: float,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure each method from each recipe, and write methods.json: its content.

    Finished runs are kept, so the same command goes on where it was stopped.

    Args:
      recipes: folders of finished recipes, one for each seed.
      folder: that gets everything.
      methods: to compare.
      size: the recipes' --size.
      say: prints a line.
      run: runs a command line with its output in a file: {"seconds", "gib"}.
      settings: kl_coef, rate and share of `Ground`.

    Raises:
      UserError: for a folder that is no finished recipe, or a command that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = []
    for recipe in recipes:
        for part in ("sft", "reward"):
            RunFolder.open(recipe / part, stages=(part,))  # says what is wrong with it
        summary = json.loads((recipe / "summary.json").read_text(encoding="utf-8"))
        ground = Ground(recipe, folder / f"seed{summary['seed']}", SIZES[size], summary["seed"], **settings)
        seeds.append(_of_seed(ground, methods, say, run))
    content = {
        "recipes": [str(recipe) for recipe in recipes],
        "size": size,
        "nats": AT_NATS,
        "settings": settings,
        "seeds": seeds,
        "methods": {name: _over_seeds([seed["methods"][name] for seed in seeds]) for name in methods},
        "wins": _mean_wins(seeds, [name for name in methods if name != "best-of-n"]),
    }
    write_json(folder / "methods.json", content)
    return content


def _of_seed(ground: Ground, methods: Sequence[Method], say: Callable[[str], None], run: Run) -> dict[str, Any]:
    corpus = load_corpus()
    tuned = RunFolder.open(ground.recipe / "sft", stages=("sft",))
    tokenizer, model, start = tuned.tokenizer, Transformer(model_of(tuned)), released_params(tuned)
    sampler, judge = Sampler(model, tokenizer, ground.size.response_tokens), Judge(corpus, tokenizer)
    train = prompt_rows(corpus.prompts, tokenizer, ground.size.prompt_tokens)
    test = prompt_rows(corpus.test.prompts, tokenizer, ground.size.prompt_tokens)
    ground.folder.mkdir(parents=True, exist_ok=True)
    lines = (prompt_row(p.turns) if p.turns else {"prompt": p.prompt} for p in train.sources)
    write_file(ground.folder / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def measured(params: Any) -> tuple[dict[str, float], Floats]:
        answers = sampler(params, test, ground.seed + 6, ANSWERS)
        gold = judge.scores(list(test.sources), answers)
        kl = [
            sequence_kl(model, params, start, test, [row[at] for row in answers],
                        max_new_tokens=ground.size.response_tokens).mean()
            for at in range(ANSWERS)
        ]  # fmt: skip
        return {"kl": max(float(np.mean(kl)), 0.0), "gold": float(gold.mean())}, gold

    begin, _ = measured(start)
    found: dict[str, Any] = {}
    nearest: dict[str, Floats] = {}
    for name in methods:
        if name == "best-of-n":
            found[name] = _best_of_n(ground, sampler, judge, start, begin["gold"])
            continue
        out = ground.folder / name
        cost = _trained(command_of(name, ground, out), out, say, run)
        points, golds = [{"step": 0, **begin}], []
        for step in saved_steps(out / "checkpoints"):
            tree = load_params(out / "checkpoints", step)
            point, gold = measured(tree.get("policy", tree))
            points.append({"step": step, **point})
            golds.append((abs(point["kl"] - AT_NATS), gold))
        nearest[name] = min(golds, key=lambda pair: pair[0])[1]
        found[name] = {"points": points, **at_nats(points), **cost}
        say(f"seed {ground.seed}: {name}: " + ", ".join(f"{p['gold']:.2f} at {p['kl']:.1f}" for p in points))
    wins = {one: {other: win_rate(nearest[one], nearest[other])[0] for other in nearest} for one in nearest}
    return {"seed": ground.seed, "methods": found, "wins": wins}


def command_of(name: Method, ground: Ground, out: Path) -> list[str]:
    """The command line that trains a method, which anybody may repeat."""
    size, recipe = ground.size, ground.recipe
    both = ["--out", str(out), "--init", str(recipe / "sft"), "--seed", str(ground.seed), "--examples", "0"]
    if name not in ("ppo", *GROUPED):
        # As many responses as the policy-gradient methods sample are read: four to a prompt.
        steps = max(round(ground.share * size.iterations * size.episodes / (4 * 16)), 1)
        data = ["--data", str(recipe / "rankings.jsonl"), "--method", name, "--batch", "16", "--steps", str(steps)]
        rate = ["--optimizer.learning-rate", f"{ground.rate:g}", "--optimizer.warmup-fraction", "0.1"]
        return ["preference", *both, *data, *rate, *_saving(steps)]
    steps = max(round(ground.share * size.iterations), 1)
    command = ["ppo", *both, "--reward", str(recipe / "reward"), "--data", str(ground.folder / "prompts.jsonl")]
    command += ["--steps", str(steps), "--batch", str(size.episodes), "--minibatches", str(size.minibatches)]
    command += ["--prompt-length", str(size.prompt_tokens), "--kl-coef", f"{ground.kl_coef:g}", "--alarms", "warn"]
    command += ["--episode.response-length", str(size.response_tokens), "--episode.missing-end", "subtract"]
    networks = [("policy", size.policy_rate)]
    if name in GROUPED:
        command += ["--estimator", GROUPED[name], "--samples-per-prompt", "4"]
    else:
        networks.append(("critic", size.critic_rate))
    for network, each in networks:
        command += [f"--{network}.learning-rate", f"{each:g}", f"--{network}.schedule", "linear"]
        command += [f"--{network}.epsilon", "1e-5", f"--{network}.warmup-fraction", "0.05"]
    return [*command, *_saving(steps)]


def _saving(steps: int) -> list[str]:
    return ["--save-every", str(math.ceil(steps / POINTS)), "--keep-last", str(POINTS + 1)]


def _trained(command: Sequence[str], out: Path, say: Callable[[str], None], run: Run) -> dict[str, float]:
    """Runs a command, unless it has run: {"seconds", "gib"} of its process."""
    cost = out.with_suffix(".json")
    if cost.exists():
        return json.loads(cost.read_text(encoding="utf-8"))
    say(f"rlhf-jax {shlex.join(command)}")
    found = dict(run(command, out.with_suffix(".log")))
    write_json(cost, found)
    return found


def in_process_of_its_own(command: Sequence[str], log: Path) -> dict[str, float]:
    """Runs `rlhf-jax` with the arguments: wall seconds, and the process's peak memory in GiB.

    SIGINT and SIGTERM are handed on to it, and take effect here when it has saved and ended.

    Raises:
      UserError: if it fails, with the end of its output.
    """
    start = time.monotonic()
    # In a group of its own, so that Ctrl-C in a terminal, which goes to the whole group, reaches it only once.
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "rlhf_jax", *command], stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
    received: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
    if child.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"rlhf-jax {command[0]} ended with {child.returncode}: {' '.join(said)}; see {log}")
    # Kibibytes on Linux, bytes on macOS.
    return {
        "seconds": time.monotonic() - start,
        "gib": usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20),
    }


def _best_of_n(ground: Ground, sampler: Sampler, judge: Judge, start: Any, begin: float) -> dict[str, Any]:
    """Expected gold of the best of n by the reward model, for n up to CANDIDATES, from one set of samples."""
    clock = time.monotonic()
    corpus, tokenizer = load_corpus(), judge.tokenizer
    test = prompt_rows(corpus.test.prompts, tokenizer, ground.size.prompt_tokens)
    few = dataclasses.replace(test, rows=test.rows[:CANDIDATE_PROMPTS], sources=test.sources[:CANDIDATE_PROMPTS])
    answers = sampler(start, few, ground.seed + 7, CANDIDATES)
    gold_PN = judge.scores(list(few.sources), answers)
    rows = [
        ([*ids, *said], [*[False] * len(ids), *[True] * len(said)])
        for ids, several in zip(few.rows, answers, strict=True)
        for said in several
    ]
    limit = ground.size.prompt_tokens + ground.size.response_tokens
    reward = RunFolder.open(ground.recipe / "reward", stages=("reward",))
    ragged = RaggedRows(rows, limit, tokenizer.pad_id, (limit,))
    proxy_N = row_scores(Transformer(model_of(reward), scalar=True), released_params(reward), ragged, batch_size=256)
    best_PN = expected_best_of_n(proxy_N.reshape(gold_PN.shape), gold_PN)
    gain = (best_PN - best_PN[:, :1]).mean(axis=0)
    # From the mean of all test prompts, as the other methods start from it.
    points = [{"n": n, "kl": best_of_n_kl(n), "gold": begin + float(gain[n - 1])} for n in steps_to(CANDIDATES)]
    return {"points": points, **at_nats(points), "seconds": time.monotonic() - clock, "gib": None}


def at_nats(points: Sequence[Mapping[str, float]], nats: float = AT_NATS) -> dict[str, float | None]:
    """The gold score where a curve of points crosses a KL, on a line over √KL, and the best of all points.

    Returns:
      {"at_nats": None where no two points lie on both sides, "best", "best_kl"}.
    """
    best = max(points, key=lambda point: point["gold"])
    crossed = None
    for before, after in itertools.pairwise(points):
        low, high = math.sqrt(before["kl"]), math.sqrt(after["kl"])
        if low <= math.sqrt(nats) <= high and high > low:
            share = (math.sqrt(nats) - low) / (high - low)
            crossed = before["gold"] + share * (after["gold"] - before["gold"])
            break
    return {"at_nats": crossed, "best": best["gold"], "best_kl": best["kl"]}


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with half the width of their 95% interval, by Student's t, where there are several."""
    figures: dict[str, Any] = {}
    for name in ("at_nats", "best", "best_kl", "seconds", "gib"):
        values = [one[name] for one in found if one[name] is not None]
        figures[name] = float(np.mean(values)) if len(values) == len(found) else None
        if name in ("at_nats", "best") and len(values) == len(found) > 1:
            estimate = over_seeds(values)
            figures[f"{name}_spread"] = estimate.high - estimate.value
    figures["reached"] = sum(one["at_nats"] is not None for one in found)
    return figures


def _mean_wins(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {one: {other: float(np.mean([s["wins"][one][other] for s in seeds])) for other in names} for one in names}
