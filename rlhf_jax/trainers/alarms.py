"""Alarms of PPO: signs in the metrics that a policy has collapsed or exploits its reward.

`signs` is a pure function of the metrics so far. A sign that lasts is an alarm: the run ends, and the last policy from
before the sign is released. Limits and their reasons are in docs/reference/metrics.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import PPOConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs import lifecycle
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import release
from rlhf_jax.runs.loop import Ended
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.runs.sealed import RELEASED

Row = Mapping[str, Any]
# Results of `evaluate` that judge the policy by something else than its reward; higher is better.
JUDGES = ("eval/gold", "eval/judge", "eval/win_rate")
# Evaluations in a row below the best one.
EVALUATIONS = 3
# Shares of equal answers, and of repeated pairs of tokens, that are a collapse.
SAME, REPEATED = 0.8, 0.6


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the alarms must know of the run.

    Attributes:
      rows: iterations in a row with a sign, after which it is an alarm.
      response_length: most tokens of a response.
      kl_target: the KL in nats a response that the user asks for, None without.
      normalized: True if the score is the reward model's alone, in units of its deviation.
    """

    rows: int
    response_length: int
    kl_target: float | None
    normalized: bool

    @classmethod
    def of(cls, config: PPOConfig) -> Limits:
        """Limits of a run: three iterations, and more if they have few episodes."""
        return cls(
            rows=min(max(-(-64 // config.batch), 3), 8),
            response_length=config.episode.response_length,
            kl_target=config.kl_target,
            normalized=bool(config.reward) and not config.reward_function and not config.reward_weights,
        )


@dataclasses.dataclass(frozen=True)
class Sign:
    """A sign that is there in the newest row.

    Attributes:
      name: the metric.
      good: the last step whose state is from before the sign; below 0 if there is none.
      lasts: True if it has lasted for as many rows as make it an alarm.
      cause: what is wrong, with the figures.
      remedy: what to try.
    """

    name: str
    good: int
    lasts: bool
    cause: str
    remedy: str


class Alarms:
    """Watches the metrics of a run; called after each row that the loop reads back.

    Args:
      limits: facts of the run.
      history: rows of the run so far.
      stop: True to end the run at an alarm, False to report it only, in `told` and `lasted`.
    """

    def __init__(self, limits: Limits, history: Sequence[Row], stop: bool) -> None:
        self.limits = limits
        self.stop = stop
        self.told: list[str] = []
        self.lasted: list[Sign] = []
        self._named: set[str] = set()
        # By sign, the last step from before it. A sign that stays is judged on the newest rows, whose first then moves.
        self._good: dict[str, int] = {}
        self._history = list(history)
        self._first: list[Row] = []
        self._recent: list[Row] = []
        self._evaluated: list[Row] = []

    def __call__(self, rows: Sequence[Row], event: Callable[[str], None]) -> int | None:
        """Takes the metrics of the newest steps, of which the last may have been evaluated.

        Args:
          rows: metrics with "step".
          event: writes a message.

        Returns:
          The last step from before any sign that is there, None without a sign.

        Raises:
          Ended: at an alarm.
        """
        # A run that was killed has rows of steps after its last checkpoint, which are made again.
        # The row of step 0 has an evaluation alone.
        before, self._history = [row for row in self._history if 0 < row["step"] < rows[0]["step"]], []
        for row in before:
            self._take(row)
        for row in rows:
            for sign in self._take(row):
                if sign.lasts and self.stop:
                    event(f"alarm: {sign.cause}; {sign.remedy}")
                    raise Ended(f"{sign.cause}; {sign.remedy}", self._good[sign.name])
                if sign.lasts and sign.name not in self._named:
                    self._named.add(sign.name)
                    self.lasted.append(sign)
                    self.told.append(f"{sign.cause}; {sign.remedy}")
                    event(f"alarm: {self.told[-1]}")
        return min(self._good.values(), default=None)

    def _take(self, row: Row) -> list[Sign]:
        """The signs after one more row."""
        self._first = self._first or [row]
        self._recent = [*self._recent, row][-self.limits.rows :]
        self._evaluated += [row] if any(name in row for name in JUDGES) else []
        found = signs(self._first[0], self._recent, self._evaluated, self.limits)
        self._good = {sign.name: self._good.get(sign.name, sign.good) for sign in found}
        return found


def train(run: RunFolder, config: PPOConfig, *arguments: Any, **options: Any) -> tuple[TrainState, list[str]]:
    """Train as `lifecycle.train` does, with the alarms on: (final state, alarms that did not end the run).

    Raises:
      UserError: at an alarm, with config.alarms "stop". The last good policy is released then: that of the newest
        checkpoint from before the sign, or the initial one.
    """
    alarms = Alarms(Limits.of(config), read_rows(run.metrics), stop=config.alarms == "stop")
    try:
        return lifecycle.train(run, config, *arguments, watch=alarms, **options), alarms.told
    except Ended as end:
        if end.state is None:
            raise
        step, reason = int(end.state.step), str(end)
        release(run, end.state.extras["ema"] if config.ema_decay else end.state.params["policy"], step)
    raise UserError(
        f"{run.path}: an alarm ended the run: {reason}; {RELEASED}/ has the policy of step {step}, from before it"
    )


def signs(first: Row, recent: Sequence[Row], evaluated: Sequence[Row], limits: Limits) -> list[Sign]:
    """Signs in the newest row, from the most to the least telling.

    The metrics of a row describe the policy before that row's update, those of an evaluation the policy after it.

    Args:
      first: metrics of the first iteration, which are the starting policy's.
      recent: the newest rows, at most limits.rows.
      evaluated: all rows with an evaluation.
      limits: facts of the run.
    """
    found = []
    for name, check, remedy in CHECKS:
        streak = 0
        for row in reversed(recent):
            if check(first, row, limits) is None:
                break
            streak += 1
        if streak:
            cause = check(first, recent[-1], limits)
            since = recent[-streak]["step"]
            lasts = streak >= limits.rows
            found.append(Sign(name, since - 2, lasts, f"{cause}, since iteration {since}", remedy))
    judged = [sign for name in JUDGES if (sign := _judge(name, evaluated)) is not None]
    return found + judged


def _figure(row: Row, name: str) -> float | None:
    """A metric; None if it is missing, null or not finite, which the loop's own guard deals with."""
    value = row.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def _kl(first: Row, row: Row, limits: Limits) -> str | None:
    kl, tokens = _figure(row, "kl"), _figure(row, "response_tokens") or 0.0
    limit = max(20 + 0.5 * tokens, 2 * (_figure(first, "kl") or 0.0), 2 * (limits.kl_target or 0.0))
    if kl is None or kl <= limit:
        return None
    return f"kl is {kl:.3g} nats a response, more than {limit:.3g}: the policy has left the reference model"


def _entropy(first: Row, row: Row, limits: Limits) -> str | None:
    # A task with one right answer to each prompt makes a policy certain; its answers then differ between prompts.
    share = _figure(row, "same_answer")
    return None if share is None or share < 0.5 else lost_entropy(first, row)


def lost_entropy(first: Row, row: Row) -> str | None:
    """What is wrong with the entropy of a row, whether or not its answers are all the same; None if nothing is."""
    entropy, start = _figure(row, "entropy"), _figure(first, "entropy")
    if entropy is None or start is None or entropy >= min(0.05 * start, 0.1):
        return None
    return f"entropy is {entropy:.2g} nats a token, after {start:.3g} at the start: the policy no longer explores"


def _same_answer(first: Row, row: Row, limits: Limits) -> str | None:
    share, start = _figure(row, "same_answer"), _figure(first, "same_answer")
    if share is None or start is None or share < SAME or start > 0.4:
        return None
    return f"same_answer is {share:.2g}, after {start:.2g} at the start: one answer to nearly every prompt"


def _repetition(first: Row, row: Row, limits: Limits) -> str | None:
    share, start = _figure(row, "repeated_pairs"), _figure(first, "repeated_pairs")
    if share is None or start is None or share < max(REPEATED, start + 0.3):
        return None
    return f"repeated_pairs is {share:.2g}, after {start:.2g} at the start: answers repeat the same words"


def _missing_end(first: Row, row: Row, limits: Limits) -> str | None:
    missing, start = _figure(row, "missing_end"), _figure(first, "missing_end")
    if missing is None or start is None or start > 0.75 or 1 - missing > 0.1 * (1 - start):
        return None
    return f"missing_end is {missing:.2g}, after {start:.2g} at the start: answers no longer end"


def _length(first: Row, row: Row, limits: Limits) -> str | None:
    tokens, start = _figure(row, "response_tokens"), _figure(first, "response_tokens")
    score, score_start = _figure(row, "score"), _figure(first, "score")
    if tokens is None or start is None or score is None or score_start is None or score <= score_start:
        return None
    grown = tokens >= 0.9 * limits.response_length and start <= 0.5 * limits.response_length
    shrunk = tokens < 1.1 and start >= 4
    if not grown and not shrunk:
        return None
    where = "the limit" if grown else "nothing"
    return (
        f"response_tokens went from {start:.3g} to {tokens:.3g} while score rose from {score_start:.3g} to "
        f"{score:.3g}: the reward is for length, and answers have reached {where}"
    )


def _score(first: Row, row: Row, limits: Limits) -> str | None:
    score = _figure(row, "score")
    if score is None or not limits.normalized or abs(score) <= 30:
        return None
    return (
        f"score is {score:.3g} deviations of the reward model's scores: its score_mean and score_scale are not those "
        "of such answers"
    )


STEP = "try a lower --policy.learning-rate or a higher --kl-coef under another --name, or --alarms warn to go on"
REWARD = (
    "look at the answers: the reward pays for them; try a higher --kl-coef or another reward under another --name, or "
    "--alarms warn to go on"
)
# In the order of how much a sign explains.
CHECKS: tuple[tuple[str, Callable[[Row, Row, Limits], str | None], str], ...] = (
    ("score", _score, "train the reward model on answers to such prompts, or give a folder that is whole"),
    ("kl", _kl, STEP),
    ("repeated_pairs", _repetition, STEP),
    ("same_answer", _same_answer, REWARD),
    ("missing_end", _missing_end, STEP),
    ("response_tokens", _length, REWARD),
    ("entropy", _entropy, STEP),
)
# The ranges that the checks above leave alone, for `rlhf-jax doctor`.
HEALTHY = {
    "score": "within ±30 deviations",
    "kl": "at most 20 nats + ½ nat a token, twice its start or twice --kl-target, whichever is most",
    "repeated_pairs": f"below {REPEATED:g}, or within 0.3 of its start",
    "same_answer": f"below {SAME:g}",
    "missing_end": "a tenth or more of the responses that ended at the start still end",
    "response_tokens": "neither nine tenths of the limit nor the end alone, while score rises",
    "entropy": "at least 5% of its start, or 0.1 nats a token",
    "judge": "no three evaluations in a row a tenth below the best, at a higher score",
}


def _judge(name: str, evaluated: Sequence[Row]) -> Sign | None:
    """The sign that a judge of held-out answers says the opposite of the reward."""
    rows = [row for row in evaluated if _figure(row, name) is not None and _figure(row, "score") is not None]
    if len(rows) < 2:
        return None
    at = max(range(len(rows)), key=lambda i: (rows[i][name], i))
    best, worse = rows[at], rows[at + 1 :]
    # Of the evaluations up to the best, the noise: later ones differ since the policy gets worse.
    steps = [abs(a[name] - b[name]) for a, b in itertools.pairwise(rows[: at + 1])]
    margin = max(0.1 * abs(best[name]), 2 * statistics.median(steps) if len(steps) > 1 else 0.0)
    streak = 0
    for row in reversed(worse):
        if row[name] > best[name] - margin or row["score"] <= best["score"]:
            break
        streak += 1
    if not streak:
        return None
    last = rows[-1]
    return Sign(
        name,
        best["step"],
        streak >= EVALUATIONS,
        f"{name} fell from {best[name]:.3g} to {last[name]:.3g} while score rose from {best['score']:.3g} to "
        f"{last['score']:.3g}, since iteration {best['step']}: the policy exploits the reward",
        "stop earlier (--steps), raise --kl-coef, or label answers of this policy and train the reward model again",
    )
