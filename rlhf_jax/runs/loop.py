"""The training loop of all stages, around a function `update(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import TrainState
from rlhf_jax.parallel import processes
from rlhf_jax.runs.background import saving_limit
from rlhf_jax.runs.guard import PATIENCE, Guard
from rlhf_jax.runs.metrics import Throughput, Writer, matmul_peak

if TYPE_CHECKING:
    from rlhf_jax.runs.checkpoint import Checkpoints

Metrics = Mapping[str, Any]
# (metrics of the newest steps with their "step", writer of a message) -> the last step whose state is beyond doubt, or
# None if the newest is. It may raise to end the run.
Watch = Callable[[list[dict[str, Any]], Callable[[str], None]], int | None]


class Stopped(Exception):
    """Raised when SIGTERM or SIGINT ended the run at a step boundary.

    signal: its number. step: updates done. saved: True if a checkpoint has all of them. last: the last checkpoint.
    """

    def __init__(self, signal: int, step: int, saved: bool, last: int | None = None) -> None:
        super().__init__(f"stopped by signal {signal} after step {step}")
        self.signal = signal
        self.step = step
        self.saved = saved
        self.last = last


class Ended(Exception):
    """Raised by a `Watch` to end a run.

    good: the last step whose state is beyond doubt. state: the newest saved one up to it, given by `lifecycle.train`.
    """

    def __init__(self, reason: str, good: int) -> None:
        super().__init__(reason)
        self.good = good
        self.state: TrainState | None = None


def fit(
    state: TrainState,
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    writers: Writer,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    log_every: int = 10,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    eval_every: int = 0,
    evaluate_first: bool = False,
    flops_per_token: float | None = None,
    prepare: Callable[[TrainState], TrainState] | None = None,
    watch: Watch | None = None,
) -> TrainState:
    """Updates the state until its step is `steps`.

    A row of metrics is written every `log_every` steps and at each checkpoint, so that a resumed run continues between
    two rows: the mean of each metric over the steps since the previous row. Between rows the host reads nothing back
    and runs ahead of the devices.

    With `steps` 0 the initial state is evaluated and saved.

    Args:
      update: one compiled step, which increments state.step by one; metrics are scalars. If "tokens" is among them
        (tokens in this batch), rows have tokens_per_second, and with `flops_per_token` peak_share.
      batch_at: the batch of a step, a pure function of the step.
      save_every, eval_every: interval in steps; 0 means at the end only. If checkpoints keep the best by a metric, each
        evaluated state is saved.
      evaluate: metrics of a state, written as "eval/…"; those of a checkpoint's step are saved with it.
      evaluate_first: with eval_every, also evaluate the initial state, in a row of step 0.
      flops_per_token: floating point operations per trained token.
      prepare: called with `state` before the first step to compile the programs, so that no step waits for it; returns
        the state to begin with. In the state it gets, only the step must be an array (`parallel.outline`).
      watch: called with each row of metrics that is read back; see `Watch`.

    Returns:
      The last state.

    Raises:
      Stopped: after SIGTERM or SIGINT, at the next step, once the state is saved.
      UserError: if a checkpoint could not be written, at the first step after that or at the end; if the state is not
        finite or its parameters have exploded; if a loss, reward, score, value or KL was not finite or absurdly large,
        or every optimizer step was skipped, for 3 consecutive steps, or for all steps of a shorter run. Nothing is
        saved between such steps, so the last checkpoint is from before the first.
    """
    if int(state.step) >= steps:
        if int(state.step) == 0:
            _save_untrained(state, writers, checkpoints, evaluate)
        return state
    loop = _Loop(
        state, update, batch_at, steps, writers, checkpoints, save_every, log_every, evaluate, eval_every, watch
    )
    del state
    try:
        writers.start(loop.step, steps)
        with _signals() as received, processes.steps(), _saves_end(checkpoints):
            loop.begin(received, prepare, flops_per_token, evaluate_first)
            while loop.step < steps:
                loop.advance()
                loop.report()
            if checkpoints is not None:
                processes.phase("saving", loop.step, limit=saving_limit(_size(loop.state)))
                checkpoints.finish()
    finally:
        writers.close()
    return loop.state


@dataclasses.dataclass
class _Loop:
    """The loop between two steps of a run; the fields are arguments of `fit`."""

    state: TrainState
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    batch_at: Callable[[int], Any]
    steps: int
    writers: Writer
    checkpoints: Checkpoints | None
    save_every: int
    log_every: int
    evaluate: Callable[[TrainState], Metrics] | None
    eval_every: int
    watch: Watch | None

    def __post_init__(self) -> None:
        self.step = int(self.state.step)
        self.first = self.step + 1
        self.guard = Guard(self.writers, self.checkpoints, min(PATIENCE, self.steps))
        self.pending: list[Metrics] = []
        self.met: set[str] = set()
        # A checkpoint that is due within a streak of bad steps is saved after it.
        self.owed = False
        self.keeps_best = self.checkpoints is not None and self.checkpoints.best_metric is not None
        self.pace = _Pace()

    def begin(
        self,
        received: _Received,
        prepare: Callable[[TrainState], TrainState] | None,
        flops_per_token: float | None,
        evaluate_first: bool,
    ) -> None:
        """Compile the programs, and check and evaluate the state to begin with."""
        self.received = received
        if prepare is not None:
            processes.phase("compiling", self.first, may_compile=True)
            self.state = prepare(self.state)
        self.kind = _kind(self.state)
        machines = _machines(self.state)
        self.throughput = Throughput(flops_per_token, lambda: matmul_peak() * machines)
        self.guard.check_start(self.state)
        if self.evaluate is not None and evaluate_first and self.step == 0 and 0 < self.eval_every < self.steps:
            processes.phase("evaluating", 0, may_compile=True)
            row = _evaluated(self.state, self.evaluate, received, must=False)
            if row:
                self.writers.row(0, row)

    def advance(self) -> None:
        """Make one step; its metrics are pending."""
        if self.checkpoints is not None:
            self.checkpoints.check()
        processes.phase("reading the batch", self.step + 1)
        batch = self.batch_at(self.step)
        shapes = _shapes(batch)
        new = shapes not in self.met
        limit = self.pace.limit(len(self.pending) + 1, new)
        processes.phase("computing", self.step + 1, waits=True, limit=limit, may_compile=new)
        self.met.add(shapes)
        compiled = compile_seconds()
        self.state, metrics = self.update(self.state, batch)
        self.step += 1
        compiled = compile_seconds() - compiled
        self.pace.begin(compiled)
        if self.step == self.first:
            _refuse_drift(self.kind, _kind(self.state))
        elif compiled > 0:
            self.throughput.exclude(compiled)
            self.writers.event(self.step, f"recompiled in {compiled:.1f} s for a batch of {shapes}")
        self.pending.append(metrics)

    def report(self) -> None:
        """Evaluate, write and save what is due after a step.

        Raises:
          Stopped: after a signal, once the state is saved.
        """
        if processes.count() > 1 and processes.stop_asked(self.step):
            self.received.append(signal.SIGTERM)
        stopping = bool(self.received)
        # The best of the evaluations may be what later stages take, so a stop does not skip one.
        skipped = stopping and self.step < self.steps and not self.keeps_best
        evaluating = self.evaluate is not None and self._due(self.eval_every) and not skipped
        self.owed |= self.checkpoints is not None and (self._due(self.save_every) or (evaluating and self.keeps_best))
        if stopping or self.owed or evaluating or self.step == 1 or self._due(self.log_every):
            rows, row = self._read()
            if self.evaluate is not None and evaluating:
                processes.phase("evaluating", self.step)
                must = self.step == self.steps or self.keeps_best
                row |= _evaluated(self.state, self.evaluate, self.received, must=must)
                if processes.count() == 1:
                    stopping = bool(self.received)
            self.writers.row(self.step, row)
            if self.watch is not None:
                doubt = self.watch(_numbered(self.step, rows, row), functools.partial(self.writers.event, self.step))
                if self.checkpoints is not None:
                    self.checkpoints.beyond_doubt = doubt
            if self.checkpoints is not None and (self.owed or stopping):
                self._save(self.checkpoints, row)
            self.throughput.restart()
        if stopping and self.step < self.steps:
            last = None
            if self.checkpoints is not None:
                self.checkpoints.finish()
                last = self.checkpoints.latest()
            raise Stopped(self.received[0], self.step, saved=last == self.step, last=last)

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _read(self) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Read the pending metrics back: (those of each step, their means with the throughput)."""
        processes.phase("waiting for the devices", self.step, waits=True, limit=self.pace.limit(len(self.pending)))
        rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self.pending)]
        self.pending = []
        self.pace.lap(len(rows))
        self.guard.check_metrics(self.step, rows)
        row = _means(rows)
        if "tokens" in row and self.first <= self.step - len(rows):
            row |= self.throughput.lap(sum(r["tokens"] for r in rows))
        return rows, row

    def _save(self, checkpoints: Checkpoints, row: Mapping[str, float]) -> None:
        # Twice: the save before may have to be finished first.
        processes.phase("saving", self.step, limit=2 * saving_limit(_size(self.state)))
        self.guard.check_state(self.step, self.state)
        if self.step == self.steps or not self.guard.in_a_row:
            checkpoints.save_in_background(self.step, self.state, row)
            self.owed = False


@contextlib.contextmanager
def _saves_end(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Lets a save in the background end, whatever ends the loop, and raises its error."""
    try:
        yield
    finally:
        if checkpoints is not None:
            checkpoints.wait()


class _Received(list[int]):
    """Signals received so far; with `at_once`, one that arrives raises `_Abandoned`."""

    at_once = False


class _Abandoned(Exception):
    """An evaluation was interrupted by a signal."""


def _evaluated(
    state: TrainState, evaluate: Callable[[TrainState], Metrics], received: _Received, *, must: bool
) -> dict[str, float]:
    """Metrics of the state as "eval/…"; none if a signal arrives meanwhile, unless the evaluation must be made."""
    try:
        received.at_once = not must
        return _figures(evaluate, state)
    except _Abandoned:
        return {}
    finally:
        received.at_once = False


def _save_untrained(
    state: TrainState,
    writers: Writer,
    checkpoints: Checkpoints | None,
    evaluate: Callable[[TrainState], Metrics] | None,
) -> None:
    """Evaluates and saves the initial state of a run of 0 steps."""
    row = {} if evaluate is None else _figures(evaluate, state)
    writers.start(0, 0)
    writers.row(0, row)
    writers.close()
    if checkpoints is not None:
        checkpoints.save(0, state, row)


def _figures(evaluate: Callable[[TrainState], Metrics], state: TrainState) -> dict[str, float]:
    return {f"eval/{name}": float(value) for name, value in jax.device_get(evaluate(state)).items()}


def _numbered(step: int, rows: list[dict[str, float]], row: Mapping[str, float]) -> list[dict[str, Any]]:
    """The metrics of the steps up to `step`, each with its number, the last one with those of the evaluation too."""
    numbered: list[dict[str, Any]] = [{**each, "step": at} for at, each in enumerate(rows, step - len(rows) + 1)]
    numbered[-1] |= {name: value for name, value in row.items() if name.startswith("eval/")}
    return numbered


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric of the last row over the rows that have it."""
    columns = {name: [row[name] for row in rows if name in row] for name in rows[-1]}
    return {name: sum(values) / len(values) for name, values in columns.items()}


@contextlib.contextmanager
def _signals() -> Iterator[_Received]:
    """Collects SIGTERM and SIGINT; a second SIGINT interrupts at once. The previous handlers are restored at the end.

    With several processes the signal may arrive at different steps, so jax's own SIGTERM handler stays installed and
    agrees on one step (processes.stop_asked); Ctrl-C is forwarded to it.
    """
    received = _Received()
    interrupted: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if (received or interrupted) and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if processes.count() > 1:
            received.clear()
            interrupted.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, b"\nstopping after this step\n")
        if received and received.at_once:
            received.at_once = False
            raise _Abandoned

    # Python allows signal handlers only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handled = (signal.SIGTERM, signal.SIGINT) if processes.count() == 1 else (signal.SIGINT,)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def _compile_clock() -> list[float]:
    """[seconds spent in the compiler], counted from the first call on."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return total


def compile_seconds() -> float:
    """Seconds this process has spent in XLA's compiler since the first call."""
    return _compile_clock()[0]


def _machines(state: TrainState) -> int:
    """Number of devices that hold the state, for the peak FLOP/s; 1 on a CPU, where one device has all cores."""
    if jax.default_backend() == "cpu":
        return 1
    leaves = [leaf for leaf in jax.tree.leaves(state.params) if isinstance(leaf, jax.Array)]
    return len({device for leaf in leaves for device in leaf.devices()})


def _kind(state: TrainState) -> dict[str, str]:
    """Maps the path of each leaf of the state to its type."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    avals = {jax.tree_util.keystr(path): jax.typeof(leaf) for path, leaf in leaves}
    return {path: f"{a.dtype}{list(a.shape)}{' (weakly typed)' if a.weak_type else ''}" for path, a in avals.items()}


def _refuse_drift(before: dict[str, str], after: dict[str, str]) -> None:
    """Raises TypeError if an update changed the types of the state.

    The update would be compiled twice, and a resumed run would round differently.
    """
    for path in sorted({*before, *after}):
        got, expected = after.get(path, "nothing"), before.get(path, "nothing")
        if got != expected:
            raise TypeError(f"update changed state{path}: expected {expected} as before the step, got {got}")


class _Pace:
    """The longest time per step so far, and the time limits for the watchdog derived from it."""

    def __init__(self) -> None:
        self.slowest: float | None = None
        self._since: float | None = None

    def begin(self, compiled: float) -> None:
        """Marks a step as dispatched.

        Args:
          compiled: seconds spent in the compiler before it.
        """
        if self._since is None:
            self._since = time.monotonic()
        elif compiled > 0:
            self._since += compiled

    def lap(self, steps: int) -> None:
        """Marks the given number of steps as done."""
        if self._since is not None:
            self.slowest = max(self.slowest or 0.0, (time.monotonic() - self._since) / steps)
        self._since = None

    def limit(self, steps: int, new: bool = False) -> float:
        """Time limit in seconds for a number of steps.

        Args:
          new: True if one of them may have to be compiled.
        """
        return processes.slowest(None if new or self.slowest is None else self.slowest * steps)


def _size(state: TrainState) -> int:
    """Bytes of the state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _shapes(batch: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}{list(jnp.shape(leaf))}" for path, leaf in leaves
    )
