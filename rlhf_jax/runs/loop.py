"""The training loop of all stages, around a function `update(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes
from rlhf_jax.runs.background import saving_limit
from rlhf_jax.runs.metrics import Throughput, Writer, matmul_peak

if TYPE_CHECKING:
    from rlhf_jax.runs.checkpoint import Checkpoints

Metrics = Mapping[str, Any]
# (metrics of the newest steps with their "step", writer of a message) -> the last step whose state is beyond doubt, or
# None if the newest is. It may raise to end the run.
Watch = Callable[[list[dict[str, Any]], Callable[[str], None]], int | None]
# Consecutive steps with a bad metric or without any optimizer step, after which the run ends.
PATIENCE = 3
# Endings of the names of metrics that must be finite and at most this large, causes before what follows from them. A
# loss may be the square of a value.
GUARDED = {"score": 1e6, "value": 1e6, "kl": 1e6, "reward": 1e6, "_loss": 1e12, "loss": 1e12}
# Largest root mean square of the parameters, and largest growth since the start.
LARGEST_PARAMS = 100.0


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
    step = int(state.step)
    if step >= steps:
        if step == 0:
            _save_untrained(state, writers, checkpoints, evaluate)
        return state
    first = step + 1
    throughput = Throughput(flops_per_token, lambda: matmul_peak() * machines)
    guard = _Guard(writers, checkpoints, min(PATIENCE, steps))
    pending: list[Metrics] = []
    met: set[str] = set()
    # A checkpoint that is due within a streak of bad steps is saved after it.
    owed = False
    pace = _Pace()
    try:
        writers.start(step, steps)
        with _signals() as received, processes.steps(), _saves_end(checkpoints):
            if prepare is not None:
                processes.phase("compiling", step + 1, may_compile=True)
                state = prepare(state)
            kind = _kind(state)
            machines = _machines(state)
            guard.check_start(state)
            if evaluate is not None and evaluate_first and step == 0 and 0 < eval_every < steps:
                processes.phase("evaluating", 0, may_compile=True)
                row = _evaluated(state, evaluate, received, must=False)
                if row:
                    writers.row(0, row)
            while step < steps:
                if checkpoints is not None:
                    checkpoints.check()
                processes.phase("reading the batch", step + 1)
                batch = batch_at(step)
                shapes = _shapes(batch)
                new = shapes not in met
                processes.phase(
                    "computing", step + 1, waits=True, limit=pace.limit(len(pending) + 1, new), may_compile=new
                )
                met.add(shapes)
                compiled = compile_seconds()
                state, metrics = update(state, batch)
                step += 1
                compiled = compile_seconds() - compiled
                pace.begin(compiled)
                if step == first:
                    _refuse_drift(kind, _kind(state))
                elif compiled > 0:
                    throughput.exclude(compiled)
                    writers.event(step, f"recompiled in {compiled:.1f} s for a batch of {shapes}")
                pending.append(metrics)
                if processes.count() > 1 and processes.stop_asked(step):
                    received.append(signal.SIGTERM)
                stopping = bool(received)
                evaluating = (
                    evaluate is not None
                    and _due(step, eval_every, steps)
                    and not (
                        # The best of the evaluations may be what later stages take, so a stop does not skip one.
                        stopping and step < steps and (checkpoints is None or checkpoints.best_metric is None)
                    )
                )
                owed |= checkpoints is not None and (
                    _due(step, save_every, steps) or (evaluating and checkpoints.best_metric is not None)
                )
                if stopping or owed or evaluating or step == 1 or _due(step, log_every, steps):
                    processes.phase("waiting for the devices", step, waits=True, limit=pace.limit(len(pending)))
                    rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(pending)]
                    pending = []
                    pace.lap(len(rows))
                    guard.check_metrics(step, rows)
                    row = _means(rows)
                    if "tokens" in row and first <= step - len(rows):
                        row |= throughput.lap(sum(r["tokens"] for r in rows))
                    if evaluate is not None and evaluating:
                        processes.phase("evaluating", step)
                        keeps_best = checkpoints is not None and checkpoints.best_metric is not None
                        row |= _evaluated(state, evaluate, received, must=step == steps or keeps_best)
                        if processes.count() == 1:
                            stopping = bool(received)
                    writers.row(step, row)
                    if watch is not None:
                        doubt = watch(_numbered(step, rows, row), functools.partial(writers.event, step))
                        if checkpoints is not None:
                            checkpoints.beyond_doubt = doubt
                    if checkpoints is not None and (owed or stopping):
                        # Twice: the save before may have to be finished first.
                        processes.phase("saving", step, limit=2 * saving_limit(_size(state)))
                        guard.check_state(step, state)
                        if step == steps or not guard.in_a_row:
                            checkpoints.save_in_background(step, state, row)
                            owed = False
                    throughput.restart()
                if stopping and step < steps:
                    last = None
                    if checkpoints is not None:
                        checkpoints.finish()
                        last = checkpoints.latest()
                    raise Stopped(received[0], step, saved=last == step, last=last)
            if checkpoints is not None:
                processes.phase("saving", step, limit=saving_limit(_size(state)))
                checkpoints.finish()
    finally:
        writers.close()
    return state


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


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _numbered(step: int, rows: list[dict[str, float]], row: Mapping[str, float]) -> list[dict[str, Any]]:
    """The metrics of the steps up to `step`, each with its number, the last one with those of the evaluation too."""
    numbered: list[dict[str, Any]] = [{**each, "step": at} for at, each in enumerate(rows, step - len(rows) + 1)]
    numbered[-1] |= {name: value for name, value in row.items() if name.startswith("eval/")}
    return numbered


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric of the last row over the rows that have it."""
    columns = {name: [row[name] for row in rows if name in row] for name in rows[-1]}
    return {name: sum(values) / len(values) for name, values in columns.items()}


class _Guard:
    """Ends a run that is lost: its losses, rewards or state are not finite, or its optimizer steps are all skipped."""

    def __init__(self, writers: Writer, checkpoints: Checkpoints | None, patience: int) -> None:
        self.writers = writers
        self.checkpoints = checkpoints
        self.patience = patience
        self.in_a_row = 0
        self.start_norm, self.largest_norm = 0.0, math.inf

    def check_metrics(self, step: int, rows: list[dict[str, float]]) -> None:
        """Checks the metrics of each step; `rows` are those of the steps up to `step`."""
        for at, row in enumerate(rows, start=step - len(rows) + 1):
            self._check_params(at, row)
            bad = {name: value for name, value in row.items() if not math.isfinite(value)}
            lost = [
                name
                for ending, largest in GUARDED.items()
                for name, value in row.items()
                if name.endswith(ending) and (name in bad or abs(value) > largest)
            ]
            share = max((row[name] for name in row if name.endswith("skipped") and "/" not in name), default=0.0)
            self.in_a_row = self.in_a_row + 1 if lost or share == 1 else 0
            if not lost and not share:
                continue
            causes = lost[:1] or [name for name in bad if name.endswith("_norm")]
            # A score that is replaced, since its response has no end, is in no metric but this count.
            cause = ", ".join(f"{name} is {row[name]:.6g}" for name in causes)
            cause = cause or f"nonfinite is {row.get('nonfinite', 0.0):g}"
            skips = f"; {f'{share:.0%} of its optimizer steps were' if share < 1 else 'the step was'} skipped"
            self.writers.event(at, cause + skips if share else cause)
            if self.in_a_row == self.patience:
                what = f"no optimizer step was made, as {cause},"
                if lost:
                    what = f"{lost[0]} was {'not finite' if lost[0] in bad else f'absurd ({row[lost[0]]:.3g})'}"
                self._end(f"{what} for {self.patience} consecutive steps, last at step {at}")

    def check_start(self, state: TrainState) -> None:
        """Raises UserError if training would start from a parameter that is not finite."""
        params_finite, _, norm = _sound(state)
        if not bool(params_finite):
            raise UserError("a parameter is not finite before the first step; the model to start from is damaged")
        self.start_norm = float(norm)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self.largest_norm = LARGEST_PARAMS * max(self.start_norm, math.sqrt(count))

    def _check_params(self, step: int, row: Mapping[str, float]) -> None:
        """Raises UserError if the parameters have exploded."""
        for name, norm in row.items():
            if name.endswith("param_norm") and math.isfinite(norm) and norm > self.largest_norm:
                self._end(
                    f"the parameters have exploded: {name} is {norm:.3g} after step {step}, and was at most "
                    f"{self.start_norm:.3g} at the start"
                )

    def check_state(self, step: int, state: TrainState) -> None:
        """Raises UserError if a parameter is not finite or anything else in the state is NaN."""
        params_finite, rest_defined, _ = jax.device_get(_sound(state))
        if not params_finite:
            self._end(f"a parameter is not finite after step {step}; this state is not saved")
        if not rest_defined:
            self._end(f"the optimizer's state is undefined (NaN) after step {step}; this state is not saved")

    def _end(self, what: str) -> None:
        latest = None
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
        good = "no checkpoint was saved" if latest is None else f"the last good checkpoint is that of step {latest}"
        raise UserError(f"{what}; {good}; try a lower learning rate under another --name")


@jax.jit
def _sound(state: TrainState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the parameters are finite, the rest of the state has no NaN, norm of the parameters)."""

    def every(keep: Callable[[jax.Array], jax.Array], tree: Any) -> jax.Array:
        floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.all(jnp.asarray([jnp.all(keep(leaf)) for leaf in floats], bool))

    # An optimizer may hold an infinity by design, such as the initial best loss.
    rest_defined = every(lambda x: ~jnp.isnan(x), (state.opt_state, state.extras))
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.params))
    return every(jnp.isfinite, state.params), rest_defined, norm


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
