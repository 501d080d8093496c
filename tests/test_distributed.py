"""Several processes: the same gradients and rows as one; a lost one is noticed; the run goes on, also elsewhere."""

import dataclasses
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.arrays import TokenBatch, TrainState
from rlhf_jax.data.batches import batch_at
from rlhf_jax.model import Transformer
from rlhf_jax.optim import new_state
from rlhf_jax.parallel.mesh import jit_update, make_mesh, place
from rlhf_jax.parallel.watchdog import FIRST_TIME, STUCK, Beat, Watchdog, verdict
from rlhf_jax.runs.checkpoint import Checkpoints, load_params
from rlhf_jax.runs.loop import fit
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages import pretrain
from scripts import local_cluster
from tests.forked_cluster import ForkedCluster
from tests.random_params import random_params
from tests.stress import cluster_stress
from tests.test_data_batches import numbered_rows
from tests.test_fit import Recorder
from tests.test_scripts import call
from tests.test_sharding import CONFIG, OPTIMIZER


def at(step: int, age: float, limit: float = STUCK, **changes: Any) -> Beat:
    return Beat("reading the batch", step, False, age, limit, **({"compiles": False} | changes))


def waiting(step: int, age: float, limit: float = STUCK) -> Beat:
    return Beat("waiting for the devices", step, True, age, limit, compiles=False)


@pytest.mark.core
def test_who_is_lost() -> None:
    cases: list[tuple[dict[int, Beat], dict[int, float], str | None]] = [
        ({0: waiting(5, 19), 1: at(5, 19)}, {0: 1, 1: 1}, None),
        ({0: waiting(5, 300), 1: at(5, 19)}, {0: 1, 1: 1}, None),  # the devices wait for 1, which is in time
        ({0: waiting(5, 300), 1: at(5, 300, FIRST_TIME, compiles=True)}, {0: 1, 1: 1}, None),  # it compiles
        ({0: waiting(5, 300), 1: Beat()}, {0: 1, 1: 1}, None),  # it has not come to the loop yet
        (
            {0: waiting(5, 21), 1: at(5, 21)},
            {0: 1, 1: 1},
            r"process 1 is stuck in step 5 \(reading the batch\): expected \d+ s or less, got 21 s",
        ),
        ({0: waiting(5, 21), 1: waiting(4, 21)}, {0: 1, 1: 1}, "the devices are stuck in step 4 .* of process 1"),
        ({0: waiting(5, 21, 600), 1: waiting(4, 21)}, {0: 1, 1: 1}, "the devices are stuck in step 4 .* of process 1"),
        (
            {0: at(5, 1), 1: at(6, 1)},
            {0: 1, 1: 11},
            r"process 1 has sent no heartbeat for 11 s, the last one in step 6",
        ),
        ({0: at(5, 1), 1: at(6, 1, compiles=True)}, {0: 1, 1: 11}, None),
    ]
    for beats, silence, wrong in cases:
        found = verdict(beats, silence)
        if wrong is None:
            assert found is None, beats
        else:
            assert found is not None and re.match(wrong, found), (beats, found)


class Table:
    """A board in memory."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def write(self, key: str, text: str) -> None:
        self.texts[key] = text

    def read(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in self.texts.items() if key.startswith(folder + "/")}


@pytest.mark.core
def test_a_process_that_leaves_is_named_and_a_limit_is_learned() -> None:
    table = Table()
    ends: list[str] = []
    watchdog = Watchdog(table, 0, 2, ends.append)
    watchdog.enter("reading the batch", 1)
    first = watchdog.now
    watchdog.enter("reading the batch", 2)
    second = watchdog.now
    assert [(now.limit, now.compiles) for now in (first, second)] == [(FIRST_TIME, True), (STUCK, False)]
    with watchdog.waiting("for the first process"):
        assert watchdog.now.waits and watchdog.now.step == 2 and math.isinf(watchdog.now.limit)
    assert watchdog.now.what == "reading the batch"
    table.write("farewell/1", "bad.jsonl:3: not JSON")
    watchdog.start()
    for _ in range(50):
        if ends:
            break
        watchdog._over.wait(0.1)
    assert ends == ["process 1 has ended: bad.jsonl:3: not JSON"]
    assert json.loads(table.texts["beat/0"])["step"] == 2
    watchdog.stop()


@pytest.mark.core
def test_processes_read_the_rows_of_their_devices() -> None:
    def rows(places: Any) -> list[int]:
        read = batch_at(numbered_rows(20), batch_size=8, seed=1, step=3, places=places)
        return [int(i) for i in read.tokens_BT[:, 0]]

    whole = rows(None)
    assert rows(lambda size: np.arange(size)[[0, 1, 4, 5]]) == [whole[i] for i in (0, 1, 4, 5)]


@pytest.mark.core
def test_one_status_for_all() -> None:
    assert local_cluster.status_of([0, 0]) == 0
    assert local_cluster.status_of([75, 2]) == 2
    assert local_cluster.status_of([-9, 75]) == 137
    assert local_cluster.status_of([75, 75]) == 75


@pytest.mark.core
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (("--process", "1"), "expected --distributed with them"),
        (
            ("--distributed", "--processes", "2"),
            "expected all three of coordinator, processes and process, or none on a pod",
        ),
        (("--distributed", "--coordinator", "h:1", "--processes", "2", "--process", "2"), "process: expected a number"),
        (("--distributed", "--coordinator", "h", "--processes", "2", "--process", "1"), "expected HOST:PORT"),
    ):
        assert call("pretrain", "--name", "x", *flags) == 2, flags
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (flags, said)


@pytest.mark.speed
def test_nine_pairs_of_device_counts(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, layers=1)
    params = random_params(Transformer(config))
    opt_state = jax.tree.map(np.asarray, jax.jit(OPTIMIZER.init)(params))
    steps = {n: jit_update(pretrain.make_update(Transformer(config), OPTIMIZER), make_mesh(n)) for n in (1, 2, 4)}
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16, 16)).astype(np.int32)
    batches = [TokenBatch(rows, np.ones_like(rows), np.ones(rows.shape, bool)) for rows in tokens]

    def train(devices: int, folder: Path, until: int) -> tuple[TrainState, list[float]]:
        checkpoints, recorder, asked = Checkpoints(folder), Recorder(), []

        def at_step(step: int) -> Any:
            asked.append(step)
            return batches[step]

        state = checkpoints.restore(place(new_state(params, opt_state, 0), make_mesh(devices)))
        state = fit(state, steps[devices], at_step, steps=until, writers=recorder, checkpoints=checkpoints, log_every=1)
        assert asked == list(range(until - 2, until))
        return state, [row["loss"] for _, row in recorder.rows]

    for first in (1, 2, 4):
        train(first, tmp_path / f"{first}", 2)
    ends = {}
    for first in (1, 2, 4):
        for second in (1, 2, 4):
            folder = tmp_path / f"{first}_{second}"
            folder.mkdir()
            os.symlink(tmp_path / f"{first}" / "00000002", folder / "00000002")
            ends[first, second] = train(second, folder, 4)
    right, losses = ends[1, 1]
    for state, other in ends.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), right.params, state.params)
        assert other == pytest.approx(losses, abs=1e-5)


def gradients() -> list[dict[str, tuple[float, int]]]:
    cluster = local_cluster.Cluster(["-m", "tests.two_processes"], 2, 4, echo=False)
    assert cluster.wait() == [0, 0], cluster.lines
    return [json.loads(lines[-1]) for lines in cluster.lines]


def struck_twice(folder: Path) -> dict[str, Any]:
    """A run whose first process is killed, and which, started again, has its second stopped; then left in peace."""
    outcomes: dict[str, Any] = {"killed": cluster_stress.strike(folder, "struck", "killed", 0, 12)}
    shutil.copytree(folder / "struck", folder / "killed")
    outcomes["stopped"] = cluster_stress.strike(folder, "struck", "stopped", 1, 18)
    return outcomes | {"finished": cluster_stress.finish(folder, "struck")}


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What takes processes of its own, side by side: much of it is waiting."""
    folder = tmp_path_factory.mktemp("clusters")
    cluster_stress.write_data(folder)
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setattr(cluster_stress, "CLUSTER", ForkedCluster)
        alone = pool.submit(gradients)
        # First the run that compiles: the one that is struck then finds its programs on the disk (see conftest.py).
        results: dict[str, Any] = {"undisturbed": cluster_stress.undisturbed(folder)}
        return folder, results | struck_twice(folder) | {"gradients": alone.result()}


@pytest.mark.slow
def test_gradients_and_a_step_are_those_of_one_process(clusters: Any) -> None:
    first, second = clusters[1]["gradients"]
    assert set(first) == set(second) == {"pretrain", "reward", "ppo"}
    for name in first:
        pair = (first[name], second[name])
        # One of the two has compared with one device, and both have found the same bits.
        (error,) = (error for error, _, _ in pair if error is not None)
        assert error < 1e-5, name
        assert pair[0][2] == pair[1][2], name
        assert [rows for _, rows, _ in pair] == [8, 8], name  # of 16


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_the_run_goes_on_with_the_same_bits(clusters: Any) -> None:
    results = clusters[1]
    for kind in ("killed", "stopped"):
        assert results[kind].ended_well, results[kind]
    assert results["finished"] == results["undisturbed"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(clusters: Any) -> None:
    folder, results = clusters
    struck = folder / "killed"
    flags = ["--data", str(folder / "texts.jsonl"), "--out", str(struck), *cluster_stress.SETTINGS]
    assert Checkpoints(struck / "checkpoints").latest() == 10
    assert call("pretrain", *flags, "--devices", "1") == 0
    losses = [(row["step"], row["loss"]) for row in read_rows(struck / "metrics.jsonl")]
    assert [step for step, _ in losses] == list(range(1, cluster_stress.STEPS + 1))
    assert losses == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in results["undisturbed"][1]]
    alone, together = (load_params(path / "checkpoints") for path in (struck, folder / "undisturbed"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, together)
