"""The loop: exact resumption after any stop, rows by hand, and an end before nonsense is saved."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.runs import checkpoint
from rlhf_jax.runs import loop as fit_module
from rlhf_jax.runs.checkpoint import Checkpoints, fingerprint, saved_steps
from rlhf_jax.runs.loop import Stopped, fit
from rlhf_jax.runs.metrics import JsonLines, read_rows
from tests.cases import case

pytestmark = pytest.mark.core

OPTIMIZER = optax.adam(0.1)


class Recorder:
    """A writer that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[int, str]] = []
        self.open = False

    def start(self, step: int, steps: int) -> None:
        self.open = True

    def row(self, step: int, values: Any) -> None:
        self.rows.append((step, dict(values)))

    def event(self, step: int, message: str) -> None:
        self.events.append((step, message))

    def close(self) -> None:
        self.open = False


def initial() -> TrainState:
    params = {"w": jnp.zeros((3, 2))}
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params), jax.random.key(0), {"kl_coef": jnp.float32(0.1)})


@jax.jit
def update(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (2,))

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean((batch @ params["w"] - noise[None]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    extras = {"kl_coef": state.extras["kl_coef"] * jnp.float32(1.01)}
    state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.key, extras)
    return state, {"loss": loss, "tokens": jnp.float32(8)}


def batch_at(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


def run(folder: Path, kind: type[Checkpoints] = Checkpoints, batches: Callable[[int], Any] = batch_at) -> TrainState:
    """The run whose stops are tested: 10 steps, rows at 1, 5 and 10, checkpoints at 3, 6, 9 and 10, the last 1 kept."""
    checkpoints = kind(folder / "checkpoints", keep_last=1)
    state = checkpoints.restore(initial())
    writer = JsonLines(folder / "metrics.jsonl")
    return fit(state, update, batches, steps=10, writers=writer, checkpoints=checkpoints, save_every=3, log_every=5)


def figures(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl")]


def hash_of(state: TrainState) -> str:
    return fingerprint((state.step, state.params, state.opt_state, jax.random.key_data(state.key), state.extras))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[int, float]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return hash_of(run(folder)), figures(folder)


def test_rows_are_means_since_the_row_before(undisturbed: Any) -> None:
    state, losses = initial(), []
    for step in range(10):
        state, metrics = update(state, batch_at(step))
        losses.append(float(metrics["loss"]))
    rows, last = [], 0
    for step in (1, 3, 5, 6, 9, 10):
        rows.append((step, sum(losses[last:step]) / (step - last)))
        last = step
    assert undisturbed == (hash_of(state), rows)


def test_a_stop_is_saved_and_goes_on_with_the_same_bits(tmp_path: Path, undisturbed: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        folder, handler = tmp_path / number.name, signal.getsignal(number)

        def stopping(step: int, number: int = number) -> np.ndarray:
            if step == 6:
                os.kill(os.getpid(), number)
            return batch_at(step)

        with pytest.raises(Stopped) as stop:
            run(folder, batches=stopping)
        assert (stop.value.signal, stop.value.step, stop.value.saved) == (number, 7, True)
        assert signal.getsignal(number) is handler, number
        assert hash_of(run(folder)) == undisturbed[0], number
        # The stop made one more row, at 7; the others are there once, with the same figures up to it.
        rows = figures(folder)
        assert [step for step, _ in rows] == [1, 3, 5, 6, 7, 9, 10], number
        assert rows[:4] == undisturbed[1][:4] and rows[-1] == undisturbed[1][-1], number
        # A run that is complete has nothing left to do.
        assert hash_of(run(folder, batches=lambda step: pytest.fail("a batch after the end"))) == undisturbed[0], number


def test_sigkill_in_a_save_and_in_a_deletion(tmp_path: Path, undisturbed: Any) -> None:
    command = [sys.executable, "-m", "tests.kill_me", str(tmp_path)]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    deaths = [json.loads(line) for line in process.stdout.splitlines()]
    assert [(death["amid"], death["signal"]) for death in deaths] == [
        ("save", signal.SIGKILL),
        ("delete", signal.SIGKILL),
    ], process.stderr
    for death, left in zip(deaths, ("00000003", "00000006")):
        # It died amid the work: something unfinished lies beside.
        assert left in death["left"] and len(death["left"]) == 2, death
    assert hash_of(run(tmp_path)) == undisturbed[0]
    assert figures(tmp_path) == undisturbed[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000010"]


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = checkpoint.seal
    for failing, last, read in ((6, 3, 8), (10, 9, 10)):
        folder, steps_read = tmp_path / str(failing), list[int]()
        checkpoints, recorder = Checkpoints(folder, keep_last=1), Recorder()

        def full(folder: Path, about: Any, failing: int = failing) -> None:
            if about["step"] == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            sealed(folder, about)

        def batches(step: int, checkpoints: Checkpoints = checkpoints, seen: list[int] = steps_read) -> np.ndarray:
            seen.append(step)
            while step == 7 and checkpoints._background.running:
                time.sleep(0.01)
            return batch_at(step)

        monkeypatch.setattr(checkpoint, "seal", full)
        options: dict[str, Any] = {"steps": 10, "save_every": 3, "writers": recorder, "checkpoints": checkpoints}
        message = f"{folder}: step {failing} could not be saved: No space left on device; the last checkpoint is that"
        with case(failing):
            with pytest.raises(UserError, match=f"^{message} of step {last}$"):
                fit(initial(), update, batches, **options)
            assert len(steps_read) == read and not recorder.open
            assert [path.name for path in folder.iterdir()] == [f"{last:08d}"]


def test_whatever_ends_the_run_a_save_in_the_background_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        sealed(*args)

    sealed = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", slowly)

    def ending(step: int) -> np.ndarray:
        if step == 3:
            raise RuntimeError("a reader's")
        return batch_at(step)

    for name, step, batches, error in (
        ("data", update, ending, "a reader's"),
        ("guard", lossy({4, 5, 6}), batch_at, r"last at step 6; the last good checkpoint is that of step 3"),
    ):
        with case(name):
            checkpoints = Checkpoints(tmp_path / name)
            options: dict[str, Any] = {"steps": 10, "save_every": 3, "checkpoints": checkpoints}
            with pytest.raises((RuntimeError, UserError), match=error):
                fit(initial(), step, batches, writers=Recorder(), **options)
            assert [path.name for path in (tmp_path / name).iterdir()] == ["00000003"]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def stubborn(step: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("not interrupted")

    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(initial(), update, stubborn, steps=3, writers=recorder)
    assert not recorder.open


def test_the_host_reads_back_at_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = jax.device_get

    def counted(tree: Any) -> Any:
        reads.append(1)
        return real(tree)

    monkeypatch.setattr(fit_module.jax, "device_get", counted)
    fit(initial(), update, batch_at, steps=40, writers=Recorder(), log_every=20)
    assert len(reads) == 3  # after steps 1, 20 and 40


def test_evaluation_and_the_best(tmp_path: Path) -> None:
    recorder, checkpoints = Recorder(), Checkpoints(tmp_path, keep_last=1, best_metric="eval/distance")

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        return {"distance": jnp.abs(state.step - 4)}

    options: dict[str, Any] = {"save_every": 3, "log_every": 100, "evaluate": evaluate, "eval_every": 4}
    fit(initial(), update, batch_at, steps=10, writers=recorder, checkpoints=checkpoints, **options)
    distances = {step: row["eval/distance"] for step, row in recorder.rows if "eval/distance" in row}
    assert distances == {4: 0, 8: 4, 10: 6}
    assert checkpoints.steps() == [4, 10]  # an evaluated state is saved, or the best could not be kept
    for asked, expected in ((True, [(0, {"eval/distance": 4}), 1, 4, 8, 10]), (False, [1, 4, 8, 10])):
        recorder = Recorder()
        few = {"evaluate": evaluate, "eval_every": 4, "log_every": 100, "evaluate_first": asked}
        fit(initial(), update, batch_at, steps=10, writers=recorder, **few)
        assert [row if row[0] == 0 else row[0] for row in recorder.rows] == expected

    def stopping(step: int) -> np.ndarray:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    # A stop at an evaluation does not leave it out, or the best would be another one than without the stop.
    stopped = Checkpoints(tmp_path / "stopped", keep_last=1, best_metric="eval/distance")
    with pytest.raises(Stopped):
        fit(initial(), update, stopping, steps=10, writers=Recorder(), checkpoints=stopped, **options)
    fit(stopped.restore(initial()), update, batch_at, steps=10, writers=Recorder(), checkpoints=stopped, **options)
    assert stopped.steps() == [4, 10]


def test_a_stop_in_an_evaluation_does_not_wait_for_it(tmp_path: Path) -> None:
    recorder, checkpoints = Recorder(), Checkpoints(tmp_path)
    made: list[int] = []

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(int(state.step))
        return {"loss": jnp.float32(0)}

    options: dict[str, Any] = {"evaluate": evaluate, "eval_every": 2, "log_every": 100}
    with pytest.raises(Stopped) as stop:
        fit(initial(), update, batch_at, steps=10, writers=recorder, checkpoints=checkpoints, **options)
    assert (stop.value.step, stop.value.saved, made) == (4, True, [2])
    assert [(step, "eval/loss" in row) for step, row in recorder.rows] == [(1, False), (2, True), (4, False)]


def test_no_steps_evaluate_and_save_the_initial_state(tmp_path: Path) -> None:
    recorder, checkpoints = Recorder(), Checkpoints(tmp_path)
    options: dict[str, Any] = {"evaluate": lambda state: {"sum": state.params["w"].sum()}, "checkpoints": checkpoints}
    state = initial()
    none = fit(state, update, lambda step: pytest.fail("a batch"), steps=0, writers=recorder, **options)
    assert none is state and checkpoints.steps() == [0] and not recorder.open
    assert recorder.rows == [(0, {"eval/sum": float(state.params["w"].sum())})]


def test_throughput_leaves_compiling_and_saving_out() -> None:
    recorder = Recorder()
    fit(initial(), update, batch_at, steps=9, writers=recorder, log_every=3, flops_per_token=1e6)
    assert ["tokens_per_second" in row for _, row in recorder.rows] == [False, True, True, True]
    assert recorder.rows[-1][1]["peak_share"] > 0


def lossy(at: set[int], poison: bool = False) -> Any:
    """An update whose loss, and with `poison` whose parameters, are lost at certain steps."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = update(state, batch)
        if int(state.step) in at:
            metrics = metrics | {"loss": jnp.float32(jnp.nan)}
            params = {"w": state.params["w"] * jnp.nan} if poison else state.params
            state = TrainState(state.step, params, state.opt_state, state.key, state.extras)
        return state, metrics

    return step


def test_three_lost_losses_end_the_run(tmp_path: Path) -> None:
    recorder, checkpoints = Recorder(), Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"loss was not finite for 3 consecutive steps, last at step 8; .* of step 4"):
        options: dict[str, Any] = {"checkpoints": checkpoints, "save_every": 4, "log_every": 5}
        fit(initial(), lossy({2, 3, 6, 7, 8}), batch_at, steps=12, writers=recorder, **options)
    assert [event for event in recorder.events if "recompiled" not in event[1]] == [
        (step, "loss is nan") for step in (2, 3, 6, 7, 8)
    ]
    assert checkpoints.steps() == [4]
    assert not recorder.open


def test_nothing_is_saved_amid_bad_steps_and_a_restart_does_not_creep(tmp_path: Path) -> None:
    def fitted(folder: str, bad: set[int], save_every: int = 2, stop: int = 0) -> tuple[Recorder, Checkpoints]:
        recorder, checkpoints = Recorder(), Checkpoints(tmp_path / folder, keep_last=1)

        def batches(step: int) -> np.ndarray:
            if stop and step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch_at(step)

        options: dict[str, Any] = {"checkpoints": checkpoints, "save_every": save_every, "log_every": 100}
        fit(checkpoints.restore(initial()), lossy(bad), batches, steps=12, writers=recorder, **options)
        return recorder, checkpoints

    lost = set(range(5, 13))
    for _ in range(3):
        with pytest.raises(UserError, match=r"last at step 7; the last good checkpoint is that of step 4"):
            fitted("creeping", lost, save_every=1)
        assert saved_steps(tmp_path / "creeping") == [4]
    with pytest.raises(Stopped) as stopped:
        fitted("stopped", lost, stop=6)
    assert (stopped.value.saved, stopped.value.last) == (False, 4) and saved_steps(tmp_path / "stopped") == [4]
    # The checkpoint that was due at 6 is saved after the bad steps.
    recorder, _ = fitted("over", {6, 7}, save_every=6)
    assert [step for step, _ in recorder.rows] == [1, 6, 7, 8, 12]
    # The last step is saved: the run is over.
    assert fitted("end", {11, 12})[1].steps() == [12]


def test_numbers_that_leave_a_sane_range_end_the_run(tmp_path: Path) -> None:
    def saying(**absurd: float) -> Any:
        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            state, metrics = update(state, batch)
            return state, metrics | ({name: jnp.float32(v) for name, v in absurd.items()} if state.step > 4 else {})

        return step

    options: dict[str, Any] = {"steps": 12, "save_every": 2}
    for absurd, cause in (
        ({"score": 1e12}, "score was absurd (1e+12) for 3 consecutive steps, last at step 7"),
        ({"value": -2e6, "value_loss": 4e12}, "value was absurd (-2e+06) for 3"),
        ({"loss": 1e13}, "loss was absurd (1e+13) for 3"),
        ({"policy_param_norm": 1e6}, "the parameters have exploded: policy_param_norm is 1e+06 after step 5, and was"),
    ):
        with case(absurd):
            checkpoints = Checkpoints(tmp_path / cause[:9])
            with pytest.raises(UserError) as end:
                fit(initial(), saying(**absurd), batch_at, writers=Recorder(), checkpoints=checkpoints, **options)
            assert cause in str(end.value) and "the last good checkpoint is that of step 4" in str(end.value)
    # Rewards in a unit of the user's, and norms of a large model.
    usual = saying(score=9e5, value_loss=1e11, param_norm=200.0)
    fit(initial(), usual, batch_at, writers=Recorder(), steps=12)


def test_skipped_steps_are_told_and_end_the_run() -> None:
    # Two minibatches a step of two networks; the loss is finite throughout.
    def skipping(at: dict[int, float], names: tuple[str, ...] = ("policy_skipped", "critic_skipped")) -> Any:
        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            state, metrics = update(state, batch)
            share = at.get(int(state.step), 0.0)
            norm = jnp.float32(jnp.inf if share else 1.0)
            skipped = {"policy_skipped": jnp.float32(0), "critic_skipped": jnp.float32(0)}
            skipped |= dict.fromkeys(names, jnp.float32(share))
            return state, metrics | skipped | {"policy_grad_norm": jnp.float32(1), "critic_param_norm": norm}

        return step

    recorder = Recorder()
    fit(initial(), skipping({2: 0.5, 3: 1, 4: 1, 5: 0.5}), batch_at, steps=6, writers=recorder, log_every=4)
    half = "critic_param_norm is inf; 50% of its optimizer steps were skipped"
    whole = "critic_param_norm is inf; the step was skipped"
    assert recorder.events == [(2, half), (3, whole), (4, whole), (5, half)]
    # Of any network and stage, also where the others learn: a step's share is that of the network that learns least.
    for names in (("critic_skipped",), ("policy_skipped",), ("skipped",)):
        with case(names), pytest.raises(UserError, match=r"no optimizer step was made, .* steps, last at step 5;"):
            fit(initial(), skipping(dict.fromkeys((3, 4, 5), 1.0), names), batch_at, steps=9, writers=Recorder())
    for at, steps, last in (((4, 5, 6), 9, 6), ((1, 2), 2, 2), ((1,), 1, 1)):
        message = f"as critic_param_norm is inf, for {len(at)} consecutive steps, last at step {last};"
        with case(at), pytest.raises(UserError, match=message):
            fit(initial(), skipping(dict.fromkeys(at, 1.0)), batch_at, steps=steps, writers=Recorder())


def test_a_skipped_step_has_a_cause_and_a_reward_is_none() -> None:
    # A score that is replaced, as its response has no end, is in the count alone.
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = update(state, batch)
        at = jnp.float32(int(state.step) == 2)
        return state, metrics | {"policy_skipped": at, "nonfinite": at / 4, "reward/not_skipped": jnp.float32(1)}

    recorder = Recorder()
    fit(initial(), step, batch_at, steps=6, writers=recorder)
    assert recorder.events == [(2, "nonfinite is 0.25; the step was skipped")]


def test_the_cause_is_named_before_what_follows_from_it() -> None:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = update(state, batch)
        nan = jnp.float32(jnp.nan)
        return state, metrics | {
            "loss": nan,
            "value_loss": nan,
            "reward": nan,
            "value": nan,
            "policy_skipped": jnp.float32(1),
        }

    with pytest.raises(UserError, match=r"^value was not finite for 3 consecutive steps, last at step 3"):
        fit(initial(), step, batch_at, steps=9, writers=Recorder())


def test_a_lost_state_is_never_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"a parameter is not finite after step 4; .* of step 2"):
        options: dict[str, Any] = {"checkpoints": checkpoints, "save_every": 2}
        fit(initial(), lossy({4}, poison=True), batch_at, steps=6, writers=Recorder(), **options)
    assert checkpoints.steps() == [2]


def test_a_recompilation_is_an_event() -> None:
    recorder, fresh = Recorder(), jax.jit(lambda state, batch: update(state, batch))

    def batches(step: int) -> np.ndarray:
        return batch_at(step)[: 2 if step == 4 else 4]

    fit(initial(), fresh, batches, steps=8, writers=recorder)
    assert [step for step, _ in recorder.events] == [5]
    assert "recompiled in" in recorder.events[0][1] and "[2, 3]" in recorder.events[0][1]


def test_a_state_that_changes_its_types_is_refused() -> None:
    def drifting(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = update(state, batch)
        extras = {"kl_coef": state.extras["kl_coef"].astype(jnp.bfloat16)}
        return TrainState(state.step, state.params, state.opt_state, state.key, extras), metrics

    with pytest.raises(
        TypeError, match=r"extras\['kl_coef'\]: expected float32\[\] as before the step, got bfloat16\[\]"
    ):
        fit(initial(), drifting, batch_at, steps=8, writers=Recorder())


def test_training_does_not_start_from_a_parameter_that_is_not_finite() -> None:
    state = initial()
    damaged = dataclasses.replace(state, params={"w": state.params["w"].at[0, 0].set(jnp.nan)})
    with pytest.raises(UserError, match="a parameter is not finite before the first step"):
        fit(damaged, update, batch_at, steps=4, writers=Recorder())
