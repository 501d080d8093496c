"""scripts/tpu_pod.sh with a gcloud of our own: what that is asked, and what follows when workers end or are stopped."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.pods

SCRIPT = Path(__file__).parents[1] / "scripts" / "tpu_pod.sh"
POD = ["--pod", "my-pod", "--zone", "us-central2-b"]
# Writes down what it is asked, and answers from a file of lines, the last of them for ever. A run that is answered
# "run" is done here: in the worker's home, by its shell. Without site-packages Python starts in a third of the time.
GCLOUD = """#!{python} -IS
import json, os, pathlib, subprocess, sys
home = pathlib.Path(os.environ["FAKE_HOME"])
asked = sys.argv[1:]
with open(home / "asked.jsonl", "a") as file:
    file.write(json.dumps(asked) + chr(10))
kind = "states" if "describe" in asked else "statuses"
if kind == "statuses" and asked[-1].endswith("kill -TERM $(cat .tpu_pod.id)"):
    sys.exit(subprocess.run(["bash", "-c", asked[-1]], cwd=home).returncode)
answers = (home / kind).read_text().split()
(home / kind).write_text(" ".join(answers[1:] or answers))
if kind == "states":
    print(answers[0]) if answers[0] != "ABSENT" else sys.exit(1)
elif answers[0] == "run":
    # As a shell says it of a program that a signal ended.
    status = subprocess.run(["bash", "-c", asked[-1]], cwd=home).returncode
    sys.exit(status if status >= 0 else 128 - status)
else:
    sys.exit(int(answers[0]))
"""
# The worker's python: says what it was given, and stays where the test wants it to.
PYTHON = """#!{python} -IS
import os, pathlib, sys, time
home = pathlib.Path(os.environ["FAKE_HOME"])
with open(home / "ran.txt", "a") as file:
    file.write(repr(sys.argv[1:]) + chr(10))
if "--stay" in sys.argv:
    time.sleep(60)
"""
SLEEP = """#!/bin/sh
echo "$1" >>"$FAKE_HOME/slept"
"""


# Tests that were themselves started behind `&` ignore SIGINT, and a shell cannot trap what it was born ignoring.
HEARS_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


@dataclasses.dataclass
class Cloud:
    """A folder that is PATH, the worker's home, and where all is written down."""

    home: Path

    def answers(self, *statuses: str, states: str = "READY") -> None:
        (self.home / "statuses").write_text(" ".join(statuses))
        (self.home / "states").write_text(states)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        path = f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-ISc", HEARS_SIGINT, "bash", str(SCRIPT), *arguments],
            env={**os.environ, "PATH": path, "FAKE_HOME": str(self.home)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def asked(self, kind: str) -> list[list[str]]:
        file = self.home / "asked.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if kind in line]

    def ran(self) -> list[str]:
        return (self.home / "ran.txt").read_text().splitlines()


def make_cloud(folder: Path) -> Cloud:
    programs = {
        "bin/gcloud": GCLOUD.format(python=sys.executable),
        "bin/sleep": SLEEP,
        "rlhf_jax/.venv/bin/python": PYTHON.format(python=sys.executable),
    }
    for name, text in programs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return Cloud(folder)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return make_cloud(tmp_path)


def test_all_workers_run_the_command(cloud: Cloud) -> None:
    cloud.answers("run")
    status, said = cloud.run(*POD, "--", "scripts/ppo.py", "--name", "it's two words", "--mesh", "fsdp=8")
    assert (status, said) == (0, "")
    (asked,) = cloud.asked("ssh")
    wanted = "compute tpus tpu-vm ssh my-pod --zone us-central2-b --worker=all --command"
    assert asked[:-1] == shlex.split(wanted)
    assert cloud.ran() == [repr(["scripts/ppo.py", "--name", "it's two words", "--mesh", "fsdp=8", "--distributed"])]


def test_a_preempted_pod_is_awaited_and_started_again(cloud: Cloud) -> None:
    cloud.answers("255", "run", states="READY PREEMPTED ABSENT CREATING READY")
    status, said = cloud.run(*POD, "--", "scripts/sft.py")
    assert status == 0
    assert said.splitlines() == [
        "tpu_pod: ended with status 255; starting all workers again, 20 left",
        "tpu_pod: my-pod is PREEMPTED; looking again in a minute",
        "tpu_pod: my-pod is absent; looking again in a minute",
        "tpu_pod: my-pod is CREATING; looking again in a minute",
    ]
    assert (cloud.home / "slept").read_text().split() == ["10", "60", "60", "60"]
    assert len(cloud.asked("ssh")) == 2
    assert len(cloud.asked("describe")) == 5


def test_what_ended_on_demand_or_by_mistake_is_not_started_again(tmp_path: Path) -> None:
    for ended in (0, 2, 130, 143):
        cloud = make_cloud(tmp_path / str(ended))
        cloud.answers(str(ended))
        assert cloud.run(*POD, "--", "scripts/sft.py")[0] == ended
        assert len(cloud.asked("ssh")) == 1, ended


def test_restarts_come_to_an_end(cloud: Cloud) -> None:
    cloud.answers("7")
    assert cloud.run(*POD, "--restarts", "2", "--", "scripts/sft.py")[0] == 7
    assert len(cloud.asked("ssh")) == 3


def await_line(cloud: Cloud, count: int = 1) -> None:
    """Until the worker's python has started so often."""
    for _ in range(200):
        if (cloud.home / "ran.txt").exists() and len(cloud.ran()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the worker's python did not start")


def test_a_signal_ends_the_run_on_the_workers(tmp_path: Path) -> None:
    for sent in (signal.SIGTERM, signal.SIGINT):
        cloud = make_cloud(tmp_path / sent.name)
        cloud.answers("run")
        process = cloud.start(*POD, "--", "scripts/sft.py", "--stay")
        await_line(cloud)
        started = time.monotonic()
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert time.monotonic() - started < 30, sent
        assert process.returncode == 143, sent
        assert [asked[-1] for asked in cloud.asked("ssh")][1:] == ["cd rlhf_jax && kill -TERM $(cat .tpu_pod.id)"], sent


def test_the_next_start_ends_what_the_last_one_left(cloud: Cloud) -> None:
    cloud.answers("run")
    first = cloud.start(*POD, "--restarts", "0", "--", "scripts/sft.py", "--stay")
    await_line(cloud)
    # Another launcher of the same pod, as after this one's machine was lost: the worker still holds its chips.
    assert cloud.run(*POD, "--", "scripts/sft.py")[0] == 0
    assert len(cloud.ran()) == 2
    first.communicate(timeout=60)
    assert first.returncode == 137


def test_wrong_usage_is_one_line(cloud: Cloud) -> None:
    cases = [
        ([], "--pod: found nothing, wanted the name"),
        (["--pod"], "--pod: found nothing behind it"),
        (["--pod", "my-pod", "--", "scripts/sft.py"], "--zone: found nothing"),
        ([*POD, "scripts/sft.py"], "found scripts/sft.py, wanted --pod"),
        ([*POD], "found no script"),
        ([*POD, "--"], "found no script"),
        ([*POD, "--restarts", "many", "--", "scripts/sft.py"], "--restarts: found many, wanted a whole number"),
    ]
    for arguments, wanted in cases:
        status, said = cloud.run(*arguments)
        assert status == 2, arguments
        assert said.startswith(f"tpu_pod: {wanted}"), arguments
        assert said.count("\n") == 1, arguments
        assert not cloud.asked("ssh"), arguments
