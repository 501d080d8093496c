"""Rows that are whole and unique after any stop, and a console that fits terminals and logs."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs import metrics
from rlhf_jax.runs.metrics import Console, JsonLines, TensorBoard, Throughput, Writers, matmul_peak, read_rows
from rlhf_jax.runs.weights_and_biases import WeightsAndBiases

pytestmark = pytest.mark.core


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "monotonic", clock)
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def test_rows_beyond_the_restored_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLines(path)
    writer.start(0, 40)
    for step in (10, 20, 30):
        writer.row(step, {"loss": 1 / step})
        writer.event(step, "a line\u2028that is one line")
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 40, "ti')  # killed while writing
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    writer = JsonLines(path)
    writer.start(20, 40)
    writer.row(30, {"loss": 0.5})
    writer.close()
    writer.row(40, {"loss": float("nan")})
    writer.close()
    rows = read_rows(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 0.1), (20, 0.05), (30, 0.5), (40, None)]
    assert all(abs(row["time"] - rows[0]["time"]) < 60 for row in rows)
    events = [row for row in map(json.loads, path.read_text().rstrip("\n").split("\n")) if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [
        (step, "a line\u2028that is one line") for step in (10, 20)
    ]
    writer.start(0, 40)  # from the beginning: its row of step 0 is not there twice
    writer.row(0, {"eval/gold": 2.0})
    writer.close()
    writer.start(0, 40)
    writer.row(0, {"eval/gold": 2.0})
    writer.close()
    assert [row["step"] for row in read_rows(path)] == [0]


def test_rows_of_no_file_are_none(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_log_gets_a_line_each_interval(clock: Clock) -> None:
    log = io.StringIO()
    console = Console("sft", ("loss", "kl_nats"), interval=10, file=log)
    console.start(0, 100)
    console.row(0, {"eval/gold": 2.0})  # no line, and no pace yet
    clock.now += 100
    for step in range(10, 101, 10):
        console.row(step, {"loss": 1 / step, "hidden": 1.0, "tokens_per_second": 8712.3, "peak_share": 0.123})
        clock.now += 4
    console.event(100, "[recompiled]")
    console.close()
    assert log.getvalue().splitlines() == [
        "sft 10/100  loss 0.1  8,712 tokens/s  12% of peak",
        "sft 40/100  loss 0.025  8,712 tokens/s  12% of peak  0:24 left",
        "sft 70/100  loss 0.01429  8,712 tokens/s  12% of peak  0:12 left",
        "sft 100/100  loss 0.01  8,712 tokens/s  12% of peak  took 0:36",
        "sft 100: [recompiled]",
    ]


def test_a_terminal_gets_a_bar_and_is_left_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stdout = sys.stdout
    screen = Terminal()
    console = Console("ppo", ("reward",), file=screen)
    for _ in range(2):  # stages follow one another in a process
        console.start(0, 100)
        console.row(50, {"reward": 0.25, "eval/reward": 0.5})
        console.event(50, "recompiled")
        console.close()
    assert sys.stdout is stdout
    text = screen.getvalue()
    assert text.count("ppo 50: recompiled") == 2
    assert "50/100" in text and "reward 0.25  eval reward 0.5" in text and "━" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor is hidden, and back


def test_tensorboard_files_hold_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    writers = Writers([TensorBoard(tmp_path)])
    for start in (0, 10):
        writers.start(start, 20)
        writers.row(start + 10, {"loss": 0.5})
        writers.event(start + 10, "recompiled")
        writers.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert content.count(b"loss") == 2 and b"recompiled" in content


def test_wandb_gets_rows_and_events_and_a_resumed_run_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any]) -> None:
            calls.append(values)

        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append((name, step_metric))

        def finish(self) -> None:
            calls.append("finish")

    def init(**settings: Any) -> Run:
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 10):  # the second is another process, which resumes
        writers = Writers([WeightsAndBiases("rlhf", tmp_path / "aligned", {"seed": 3})])
        writers.start(start, 20)
        writers.row(start + 10, {"loss": 0.5})
        writers.event(start + 10, "recompiled")
        writers.close()
        writers.close()
    first, second = calls[:5], calls[5:]
    id = (tmp_path / "aligned" / "wandb_id").read_text().strip()
    settings = {"project": "rlhf", "name": "aligned", "id": id, "resume": "allow", "config": {"seed": 3}}
    assert len(id) == 8 and first[0] == settings | {"dir": str(tmp_path / "aligned")} == second[0]
    assert first[1:] == [("*", "step"), {"step": 10, "loss": 0.5}, {"step": 10, "event": "recompiled"}, "finish"]
    assert second[2:] == [{"step": 20, "loss": 0.5}, {"step": 20, "event": "recompiled"}, "finish"]
    # A run that ends before its first row makes none there.
    calls.clear()
    WeightsAndBiases("rlhf", tmp_path / "other", {}).close()
    assert calls == [] and not (tmp_path / "other").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^wandb: the package wandb is not installed; run: pip install") as error:
        WeightsAndBiases("rlhf", tmp_path, {})
    assert "\n" not in str(error.value)


def test_throughput_by_hand(clock: Clock) -> None:
    def peak() -> float:
        clock.now += 7  # what measuring it takes, which is no lap's
        return 20_000.0

    throughput = Throughput(flops_per_token=100.0, peak=peak)
    clock.now += 50
    throughput.restart()
    clock.now += 2
    assert throughput.lap(80) == {"tokens_per_second": 40.0, "peak_share": 0.2}
    clock.now += 3
    throughput.exclude(1)
    assert throughput.lap(80) == {"tokens_per_second": 40.0, "peak_share": 0.2}
    without_peak = Throughput()
    clock.now += 2
    assert without_peak.lap(80) == {"tokens_per_second": 40.0}


def test_the_peak_is_measured_once() -> None:
    assert matmul_peak() > 1e8
    assert matmul_peak() is matmul_peak()
