"""Metric writers (console, metrics.jsonl, TensorBoard), throughput, and the peak FLOP/s of a device.

Every writer has the same four methods: `start` before the first step, `row` for metrics, `event` for a line of text,
`close` at the end. After `close` a writer can be started again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import jax.numpy as jnp
import rich.console
import rich.live
import rich.progress
import rich.text

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.files import sync_folder, write_file


class Writer(Protocol):
    """Interface of the metric writers of `fit`."""

    def start(self, step: int, steps: int) -> None:
        """Starts or resumes after `step` of `steps`; rows written earlier for later steps are discarded."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics after a step."""

    def event(self, step: int, message: str) -> None:
        """Writes a message about something that happened at a step."""

    def close(self) -> None:
        """Flushes everything to the system and restores the terminal."""


class Writers:
    """A writer that forwards to several writers."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def start(self, step: int, steps: int) -> None:
        for writer in self.writers:
            writer.start(step, steps)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.row(step, values)

    def event(self, step: int, message: str) -> None:
        for writer in self.writers:
            writer.event(step, message)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class JsonLines:
    """Writer of metrics.jsonl: one object per line, {"step": …, "time": …, name: number}, or "event": text.

    time is in seconds since 1970; a number that is not finite is null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None
        self._synced = -math.inf

    def start(self, step: int, steps: int) -> None:
        self.close()
        if not self.path.exists():
            return
        # A killed run leaves rows after its last checkpoint, the last one possibly truncated; those steps run again.
        # A run that starts again writes its row of step 0 again.
        lines = [line for line, row in _lines(self.path) if row["step"] <= step] if step else []
        kept = "".join(lines).encode("utf-8")
        if self.path.read_bytes().startswith(kept):
            # Cut in place, which needs no room on a full disk.
            with self._named(), self.path.open("r+b") as file:
                file.truncate(len(kept))
                os.fsync(file.fileno())
        else:
            write_file(self.path, kept)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._write({"step": step, "time": round(time.time(), 3)} | numbers)

    def event(self, step: int, message: str) -> None:
        self._write({"step": step, "time": round(time.time(), 3), "event": message})

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with file, self._named():
                os.fsync(file.fileno())

    def _write(self, row: Mapping[str, Any]) -> None:
        with self._named():
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a killed process loses no row. A crash of the machine costs those of the last second.
                self._file = self.path.open("ab", buffering=0)
                sync_folder(self.path.parent)
            rest, size = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"), self._file.tell()
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(size)
                raise
            if time.monotonic() - self._synced > 1.0:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Names the file in the error of a full disk."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl, without events and without a truncated last line; [] if there is no file."""
    path = Path(path)
    return [row for _, row in _lines(path) if "event" not in row] if path.exists() else []


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = []
    # Only \n ends a line; splitlines would cut at U+2028 inside an event.
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            lines.append((line + "\n", row))
    return lines


class TensorBoard:
    """Writer of TensorBoard event files.

    Raises:
      UserError: if tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise UserError(
                f"tensorboard: tensorboardX is not installed; run: {install_command('tensorboard')}"
            ) from None
        self.folder = Path(folder)
        self._make = tensorboardX.SummaryWriter
        self._writer: Any = None
        self._after = 0
        self._opened = 0

    def start(self, step: int, steps: int) -> None:
        self.close()
        self._after = step

    def row(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def event(self, step: int, message: str) -> None:
        self._open().add_text("events", message, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            self._opened += 1
            self._writer = self._make(
                str(self.folder),
                # TensorBoard hides what an earlier start wrote for these steps.
                purge_step=self._after + 1 if self._after else None,
                # File names contain the time in seconds; a second file within one second would replace the first.
                filename_suffix=f".{os.getpid()}.{self._opened}",
            )
        return self._writer


class Console:
    """Progress with time left: a bar and metrics on a terminal, a line every `interval` seconds in a log.

    Args:
      title: start of the line, e.g. the stage's name.
      show: names of the metrics to show, in this order; the latest value of each is shown.
      interval: seconds between lines if the output is not a terminal.
      file: output stream; None for standard error.
    """

    def __init__(
        self, title: str, show: Sequence[str] = ("loss",), *, interval: float = 10.0, file: TextIO | None = None
    ) -> None:
        self.title = title
        self.show = tuple(show)
        self.interval = interval
        self._console = rich.console.Console(file=file, stderr=file is None, highlight=False, soft_wrap=True)
        self._bar = rich.progress.Progress(
            "[bold]{task.description}",
            rich.progress.BarColumn(bar_width=None),
            "{task.completed:.0f}/{task.total:.0f}",
            "[cyan]{task.fields[left]}",
            console=self._console,
            expand=True,
        )
        self._live: rich.live.Live | None = None
        self._latest: dict[str, float] = {}
        self._steps = 0
        self._clock = _Clock()
        self._printed = -math.inf

    def start(self, step: int, steps: int) -> None:
        self.close()
        self._latest, self._steps, self._clock, self._printed = {}, steps, _Clock(), -math.inf
        if self._console.is_terminal:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(self.title, total=steps, completed=step, left="compiling")
            self._live = rich.live.Live(get_renderable=self._lines, console=self._console, refresh_per_second=4)
            self._live.start()
        elif step:
            self._console.print(f"{self.title} resumes after step {step}", markup=False)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._latest.update(values)
        if step == 0 < self._steps:  # the initial state: the pace counts from the first step on
            return
        left = self._clock.left(step, self._steps)
        if self._live is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, left=left)
        elif time.monotonic() - self._printed >= self.interval or step >= self._steps:
            self._printed = time.monotonic()
            self._console.print(f"{self.title} {step}/{self._steps}  {self._figures()}  {left}".rstrip(), markup=False)

    def event(self, step: int, message: str) -> None:
        self._console.print(f"{self.title} {step}: {message}", markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _lines(self) -> rich.console.RenderableType:
        figures = rich.text.Text("  " + self._figures(), no_wrap=True, overflow="ellipsis")
        return rich.console.Group(self._bar.get_renderable(), figures)

    def _figures(self) -> str:
        names = (*self.show, *(f"eval/{name}" for name in self.show), "tokens_per_second", "peak_share")
        return "  ".join(_figure(name, self._latest[name]) for name in names if name in self._latest)


class _Clock:
    """Estimate of the time left, from the pace since the first row; the time before it is mostly compilation."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def left(self, step: int, steps: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        done, spent = step - self.first[0], now - self.first[1]
        if step >= steps:
            return f"took {_minutes(spent)}"
        return f"{_minutes(spent / done * (steps - step))} left" if done else ""


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _figure(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    if name == "peak_share":
        return f"{value:.0%} of peak"
    return f"{name.replace('_', ' ').replace('/', ' ')} {value:.4g}"


class Throughput:
    """Tokens per second and the share of peak FLOP/s (MFU), over the time since the last lap.

    Args:
      flops_per_token: floating point operations per token in training; None leaves out the share.
      peak: peak FLOP/s to compare with, e.g. `matmul_peak`; called at a lap and not before.
    """

    def __init__(self, flops_per_token: float | None = None, peak: Callable[[], float] | None = None) -> None:
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Restarts the clock: the time since the last lap is not counted."""
        self._since = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Excludes seconds from this lap that were spent elsewhere, e.g. in the compiler."""
        self._since += seconds

    def lap(self, tokens: float) -> dict[str, float]:
        """Returns tokens_per_second and peak_share for `tokens` since the last lap."""
        seconds = time.perf_counter() - self._since
        row = {"tokens_per_second": tokens / seconds}
        if self.flops_per_token is not None and self.peak is not None:
            row["peak_share"] = row["tokens_per_second"] * self.flops_per_token / self.peak()
        self.restart()
        return row


@functools.cache
def matmul_peak() -> float:
    """FLOP/s of the fastest large matrix product on one device, measured once per process, in under half a second.

    float32 on a CPU, where one device has all cores; bfloat16 elsewhere, the faster of the two training dtypes.
    """
    device = jax.local_devices()[0]
    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply(a, a).block_until_ready()
    best, stop = math.inf, time.perf_counter() + 0.25
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
