"""Alarms of PPO: each kind of collapse ends a run with its cause, and no healthy run is stopped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.cli import process
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.checkpoint import fingerprint, saved_steps
from rlhf_jax.runs.loop import Ended
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.answers import repeated_pairs, same_answer
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import ppo
from rlhf_jax.trainers.alarms import Alarms, Limits
from tests.cases import case
from tests.conftest import WAYS
from tests.made_params import random_params
from tests.made_runs import write_run

LIMITS = Limits(rows=3, response_length=20, kl_target=None, normalized=True)
# The first iteration of the default recipe, rounded.
START = {
    "score": 0.0,
    "kl": 0.0,
    "entropy": 2.2,
    "same_answer": 0.03,
    "repeated_pairs": 0.02,
    "missing_end": 0.08,
    "response_tokens": 12.4,
}


def history(*parts: tuple[int, dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of a run that starts as START: for each part so many, with these figures in place of the start's."""
    rows = [START, *({**START, **changed} for count, changed in parts for _ in range(count))]
    return [{**row, "step": step} for step, row in enumerate(rows, 1)]


def watched(rows: list[dict[str, Any]], limits: Limits = LIMITS, stop: bool = True, known: int = 0) -> Any:
    """What ends a run with these rows, the first `known` of which another process has made; None if nothing does."""
    # The row of step 0 has an evaluation alone.
    alarms, doubts = Alarms(limits, [{"step": 0, "eval/gold": 5.0}, *rows[: known + 2]], stop), []
    events: list[str] = []
    for row in rows[known:]:
        try:
            doubts.append(alarms([row], events.append))
        except Ended as end:
            return row["step"], end.good, str(end)
    return None if stop else (alarms.told, events, doubts)


COLLAPSED = [
    ({"kl": 31.0}, "kl is 31 nats a response, more than 26.2"),
    ({"kl": 144.0, "entropy": 0.0, "missing_end": 1.0, "same_answer": 1.0, "response_tokens": 20.0}, "kl is 144 nats"),
    ({"entropy": 0.05, "same_answer": 0.7}, "entropy is 0.05 nats a token, after 2.2"),
    ({"same_answer": 0.8}, "same_answer is 0.8, after 0.03 at the start: one answer to nearly every prompt"),
    ({"repeated_pairs": 0.7}, "repeated_pairs is 0.7, after 0.02 at the start"),
    ({"missing_end": 1.0, "response_tokens": 20.0}, "missing_end is 1, after 0.08 at the start"),
    ({"score": 31.0}, "score is 31 deviations"),
    ({"score": -1e12}, "score is -1e+12 deviations"),
    ({"response_tokens": 1.0, "score": 0.5}, "response_tokens went from 12.4 to 1 while score rose from 0 to 0.5"),
]
HEALTHY = [
    # The ends of the ranges that were seen: docs/reference/metrics.md.
    {"kl": 9.3, "entropy": 1.39, "score": 1.3, "missing_end": 0.0, "response_tokens": 7.0, "same_answer": 0.1},
    {"kl": 25.0, "score": -1.0, "missing_end": 0.8, "repeated_pairs": 0.4},
    # A policy that has become certain, of another answer to each prompt.
    {"entropy": 1e-3, "same_answer": 0.05},
    # Two answers, yes and no.
    {"same_answer": 0.6, "response_tokens": 2.0, "entropy": 0.3},
    {"response_tokens": 20.0, "score": -0.1},
    {"kl": float("nan"), "entropy": float("nan")},
]


@pytest.mark.core
def test_each_collapse_ends_the_run_within_ten_iterations_with_its_cause() -> None:
    for row in COLLAPSED:
        with case(row) as (changed, cause):
            step, good, said = watched(history((6, {}), (10, changed)))
            # Row 8 is the first bad one: it tells of the policy after 7 updates.
            assert (step, good) == (10, 6), said
            assert cause in said and "since iteration 8" in said and said.count("\n") == 0
            # Two rows are a fluctuation, and a run that goes on from the middle of a streak still counts it.
            assert watched(history((6, {}), (2, changed), (1, {}), (2, changed), (3, {}))) is None
            assert watched(history((6, {}), (10, changed)), known=9)[0] == 10
            # A run that goes on keeps the policy from before the sign, however long it lasts, also after a resume.
            told, events, doubts = watched(history((6, {}), (9, changed), (1, {})), stop=False)
            assert len(told) == len(events) >= 1 and told[0] in events[0]
            assert doubts == [None] * 7 + [6] * 9 + [None]
            assert watched(history((6, {}), (12, changed)), stop=False, known=14)[2] == [6] * 5


@pytest.mark.core
def test_healthy_figures_raise_no_alarm() -> None:
    for changed in HEALTHY:
        with case(changed):
            assert watched(history((3, {}), (40, changed))) is None
    for changed, limits in (
        ({"score": 500.0}, dataclasses.replace(LIMITS, normalized=False)),
        ({"kl": 55.0}, dataclasses.replace(LIMITS, kl_target=30.0)),
    ):
        with case(changed):
            assert watched(history((20, changed)), limits) is None
    # What the starting policy does already is no collapse.
    for start in ({"missing_end": 1.0}, {"same_answer": 0.9}, {"kl": 40.0}, {"repeated_pairs": 0.8}):
        with case(start):
            rows = [{**START, **start, "step": step} for step in range(1, 20)]
            assert watched(rows) is None
    # Rows of an earlier version, and null for a number that was not finite.
    assert watched([{"step": step, "kl": None} for step in range(1, 9)]) is None
    few = Limits.of(ppo.Config(batch=4, minibatches=1, name="x"))
    assert (few.rows, Limits.of(ppo.Config(batch=64, name="x")).rows) == (8, 3)


@pytest.mark.core
def test_a_score_that_rises_while_a_judge_falls_is_an_alarm() -> None:
    def evaluated(*figures: tuple[float, float]) -> list[dict[str, Any]]:
        return [
            {**START, "score": score, "eval/gold": gold, "step": 10 * i} for i, (score, gold) in enumerate(figures, 1)
        ]

    up = [(0.2, 5.6), (0.5, 5.8), (0.8, 6.1)]
    step, good, said = watched(evaluated(*up, (1.0, 5.4), (1.2, 5.3), (1.4, 5.2), (1.5, 5.2)))
    assert (step, good) == (60, 30)
    assert "eval/gold fell from 6.1 to 5.2 while score rose from 0.8 to 1.4, since iteration 30" in said
    for healthy in (
        [(1.0, 5.9), (1.1, 6.0), (1.2, 5.95), (1.2, 5.9)],
        [(1.0, 5.3), (1.2, 5.3), (1.1, 6.0), (1.3, 5.9)],
        [(0.7, 5.3), (0.6, 5.2), (0.5, 5.1), (0.4, 5.0)],  # both fall
    ):
        with case(healthy):
            assert watched(evaluated(*up, *healthy)) is None
    # A noisy judge: it went up and down by as much before.
    assert watched(evaluated((0.1, 0.3), (0.2, 0.6), (0.3, 0.35), (0.4, 0.7), *[(0.5, 0.4)] * 4)) is None


@pytest.mark.core
def test_one_answer_and_repetition_by_hand() -> None:
    tokens = np.array([[5, 6, 5, 6, 5, 6], [1, 2, 3, 0, 0, 0], [1, 2, 3, 9, 9, 9], [7, 7, 7, 7, 7, 2]], np.int32)
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6], bool)
    # Rows 2 and 3 are equal but for the padding. Pairs: 5 with 3 again, 2, 2, and 5 with 3 again.
    for way, parts in (("plain", 1), ("jit", 1), ("pmap", 2)):
        with case(way):
            axis = "x" if way == "pmap" else None

            def both(tokens: Any, mask: Any, axis: str | None = axis) -> Any:
                return same_answer(tokens, mask, axis), repeated_pairs(tokens, mask, axis)

            split = [x.reshape(parts, -1, 6) for x in (tokens, mask)]
            mapped = jax.pmap(both, axis_name="x") if axis else WAYS[way](both)
            same, again = (np.sum(x) for x in mapped(*split))
            assert same == pytest.approx(2 / 4) and again == pytest.approx(6 / 14)
    assert repeated_pairs(jnp.ones((3, 1), jnp.int32), jnp.ones((3, 1), bool)) == 0
    assert same_answer(jnp.asarray(tokens), jnp.zeros_like(mask)) == 1


MODEL = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=32, width=16, layers=1, heads=2)


def config(folder: Path, **settings: Any) -> ppo.Config:
    return ppo.Config(
        init=str(folder / "sft"),
        reward_function=(f"{folder / 'own.py'}:reward",),
        data=(str(folder / "prompts.jsonl"),),
        out=str(folder / "run"),
        **{"batch": 16, "steps": 12, "minibatches": 1, "prompt_length": 16, "save_every": 2}
        | {"episode": EpisodeConfig(response_length=8, missing_end="keep"), **settings},
    )


@pytest.mark.slow
def test_a_learning_rate_that_destroys_the_policy_ends_the_run_and_the_good_policy_is_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_run(tmp_path / "sft", "sft", random_params(MODEL), MODEL, Tokenizer.bytes())
    (tmp_path / "own.py").write_text(
        "def reward(prompts, completions, **_):\n    return [c.count('a') for c in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}:"}) + "\n" for i in range(16)))
    absurd = config(tmp_path, policy=OptimConfig(learning_rate=3.0, warmup_steps=4, schedule="constant"))
    with pytest.raises(SystemExit) as end:
        process.run(ppo.run, absurd)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "an alarm ended the run: " in said and "since iteration" in said
    rows, good = read_rows(tmp_path / "run" / "metrics.jsonl"), int(said.split("the policy of step ")[1].split(",")[0])
    assert len(rows) < 12 and saved_steps(tmp_path / "run" / "released") == [good]
    assert not (tmp_path / "run" / "summary.json").exists()
    if good == 0:
        assert fingerprint(open_source(str(tmp_path / "run"), stages=("ppo",)).own()) == source.fingerprint
    warned = ppo.run(dataclasses.replace(absurd, alarms="warn"))
    assert warned.summary["warnings"] and warned.run.finished
    assert saved_steps(tmp_path / "run" / "released") == [12]
