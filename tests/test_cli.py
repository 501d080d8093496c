"""Flags, files of defaults and exit codes, on a script's config."""

import dataclasses
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
from docstring_parser import parse_from_object

from rlhf_jax.cli import feedback, flags, process
from rlhf_jax.cli.app import main
from rlhf_jax.cli.other_names import OTHER_NAMES
from rlhf_jax.config import PPOConfig, PreferenceConfig, PretrainConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs.locks import hold, lock
from rlhf_jax.runs.loop import Stopped
from tests.cases import case

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Model:
    """The network."""

    width: int = 128
    """Width of the residual stream."""
    kind: Literal["gpt2", "llama"] = "llama"
    """Family."""

    def __post_init__(self) -> None:
        if self.width % 8:
            raise UserError(f"model.width: found {self.width}, wanted a multiple of 8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Trains."""

    data: tuple[str, ...]
    """Files of records; may be given more than once."""
    batch: int = 8
    """Rows in a batch."""
    steps: int = 100
    """Updates."""
    learning_rate: float = 1e-3
    """Step size."""
    model: Model = dataclasses.field(default_factory=lambda: Model(width=64))
    """The network."""


def parse(*arguments: str) -> Config:
    return flags.parse(Config, arguments, "Trains.")


def test_flags() -> None:
    config = parse("--data", "a", "b", "--seed=4", "--data=c", "--model.width", "32", "--log_every", "3", "--pmap")
    assert config == Config(data=("a", "b", "c"), seed=4, model=Model(width=32), log_every=3, pmap=True)
    assert type(config) is Config


def test_flags_override_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("learning-rate: 1e-2\ndata: [a, b]\nseed: 3\nmodel: {width: 12, kind: gpt2}\n")
    (tmp_path / "x.json").write_text('{"data": ["a"], "model": {"width": 16}}')
    # Width 12 is none, but the flag replaces it before anyone looks.
    config = parse("--config", str(tmp_path / "x.yaml"), "--data", "c", "--model.width", "64")
    assert config == Config(data=("c",), seed=3, learning_rate=0.01, model=Model(width=64, kind="gpt2"))
    assert parse(f"--config={tmp_path / 'x.json'}") == Config(data=("a",), model=Model(width=16))
    (tmp_path / "y.yaml").write_text("model: {kind: gpt2}")
    assert parse("--config", str(tmp_path / "y.yaml"), "--data", "a").model == Model(width=64, kind="gpt2")


WRONG_FLAGS = [
    (["--dta", "x"], "unknown flag --dta; did you mean --data?"),
    (["--learning-rat=3"], "unknown flag --learning-rat; did you mean --learning-rate?"),
    (["--width", "8"], r"unknown flag --width; did you mean --model\.width?"),
    (["--zzz"], "unknown flag --zzz; --help explains every flag"),
    (["--data", "a", "--batch", "9", "--devices", "2"], "^batch 9 is not divisible by .*; use --batch 8$"),
    (["--config", "none.yaml"], "^--config none.yaml: No such file or directory$"),
]


def test_a_wrong_flag_is_one_line_with_the_right_one() -> None:
    for row in WRONG_FLAGS:
        with case(row) as (arguments, message), pytest.raises(UserError, match=message):
            parse(*arguments)


WRONG_FILES = [
    ("x.yaml", "learning_rat: 1", r"x\.yaml: unknown field 'learning_rat'; did you mean 'learning_rate'"),
    ("x.yaml", "model: {width: wide}", r"x\.yaml: field 'model.width': expected a whole number, got 'wide'"),
    ("x.yaml", "- a", "expected a mapping of fields to values, got list"),
    ("x.yaml", "a: [", "unreadable"),
    ("x.yaml", "!!python/object/apply:os.system ['true']", "unreadable"),
    ("x.json", "{", "unreadable"),
]


def test_a_wrong_file_names_itself(tmp_path: Path) -> None:
    for row in WRONG_FILES:
        with case(row) as (name, text, message):
            (tmp_path / name).write_text(text)
            with pytest.raises(UserError, match=message) as error:
                parse("--config", str(tmp_path / name), "--data", "a")
            assert "\n" not in str(error.value)


WRONG_VALUES = [
    (["--data", "a", "--steps", "x"], "^--steps: expected a whole number, got 'x'$"),
    (["--data", "a", "--learning-rate", "x"], "^--learning-rate: expected a number, got 'x'$"),
    (["--data", "a", "--model.kind", "bert"], "'bert'.*--model.kind.*'gpt2', 'llama'"),
    (["--data", "a", "--model.width", "12"], "^model: model.width: found 12, wanted a multiple of 8$"),
    (["--data", "a", "--steps"], "Missing value for argument '--steps'"),
    ([], "Missing .* --data"),
]


def test_a_wrong_value_is_one_line() -> None:
    for row in WRONG_VALUES:
        with case(row) as (arguments, message):
            with pytest.raises(UserError, match=message) as error:
                parse(*arguments)
            assert not {"\n", "│", "─"} & set(str(error.value))


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for cls, prefix in ((Config, "--"), (Model, "--model.")):
        for field in dataclasses.fields(cls):
            if field.name != "model":
                assert prefix + field.name.replace("_", "-") in text
    for explained in (
        "Random seed for parameter initialization, data order and sampling",
        "Width of the residual stream",
        "flags override them",
    ):
        assert explained in text


def test_help_of_a_field_is_one_paragraph(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for cls in (feedback.Export, feedback.Active):  # in one box, and not in two side by side
        with pytest.raises(SystemExit):
            flags.parse(cls, ["--help"])
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        given = [field.description for owner in cls.__mro__[:-1] for field in parse_from_object(owner).params]
        texts = [" ".join(text.split())[:150] for text in given if text and "\n" in text]
        assert texts and all(any(text in line for line in lines) for text in texts)


def test_help_of_a_subcommand_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in feedback.COMMANDS.items():
        with case(name):
            with pytest.raises(SystemExit):
                main(["feedback", name, "--help"])
            text = capsys.readouterr().out
            assert f"\n{command.Config.__doc__}\n" in text and f"\nrlhf-jax feedback {name} --" in text


def test_help_of_a_stage_begins_with_the_basics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    basics = ("init", "reward", "data", "name", "epochs", "steps", "batch", "learning-rate", "config")
    titles = ("data and method", "run and checkpoints", "devices and processes")
    for cls in (PretrainConfig, SFTConfig, RewardConfig, PreferenceConfig, PPOConfig):
        with pytest.raises(SystemExit) as end:
            flags.parse(cls, ["--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        marks = re.findall(rf"^[│├─ -]*?(?:-h, |)(--[a-z][\w-]*|{'|'.join(titles)})(?= |$)", text, re.MULTILINE)
        here = [f"--{name}" for name in basics if f"--{name}" in marks]
        assert marks[1 : len(here) + 2] == [*here, titles[0]] and {"--init", "--data", "--name"} <= {*here}
        order = ["--heldout", titles[1], "--seed", titles[2], "--mesh"]
        assert [mark for mark in marks if mark in order] == order[cls is PPOConfig :]
        assert len(re.findall(r"\(required(?!, or --out)", text)) == {PretrainConfig: 1, PPOConfig: 3}.get(cls, 2)
        for field in dataclasses.fields(cls):
            assert field.name.replace("_", "-") in text


def test_learning_rate_is_short_for_that_of_the_optimizer(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("learning_rate: 1e-4\noptimizer: {weight_decay: 0.1}\n")
    (tmp_path / "y.yaml").write_text("learning_rate: 1e-4\noptimizer: {learning_rate: 1e-5}\n")
    config = flags.parse(SFTConfig, ["--config", str(tmp_path / "x.yaml")])
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-4, 0.1)
    assert flags.parse(SFTConfig, ["--learning_rate=2e-4"]).optimizer.learning_rate == 2e-4
    ppo = flags.parse(PPOConfig, ["--learning-rate", "2e-5"])
    assert (ppo.policy.learning_rate, ppo.critic, ppo.policy.schedule) == (2e-5, PPOConfig().critic, "linear")
    with pytest.raises(UserError, match=r"expected learning_rate or optimizer\.learning_rate, got both"):
        flags.parse(SFTConfig, ["--config", str(tmp_path / "y.yaml")])


def test_names_of_other_libraries_are_suggested() -> None:
    for cls, given, ours in (
        (SFTConfig, "--lr=1e-4", "--learning-rate"),
        (SFTConfig, "--model_name_or_path", "--init"),
        (SFTConfig, "--dataset-name", "--data with a JSONL file"),
        (SFTConfig, "--output_dir", "--out"),
        (RewardConfig, "--num_train_epochs", "--epochs"),
        (PretrainConfig, "--num_train_epochs", "--steps"),
        (RewardConfig, "--per_device_train_batch_size", "--batch, which counts the rows over all devices"),
        (PreferenceConfig, "--loss_type", "--method"),
        (PPOConfig, "--max_steps", "--steps"),
        (PPOConfig, "--gradient_accumulation_steps", "--microbatches; it splits --batch"),
        (PPOConfig, "--beta", "--kl-coef"),
        (PPOConfig, "--warmup_ratio", "--policy.warmup-fraction"),
    ):
        with case((cls, given)), pytest.raises(UserError) as error:
            flags.parse(cls, [given, "1"])
        assert str(error.value).startswith(f"unknown flag {given.partition('=')[0]}; use {ours}")
    every = {
        flag
        for cls in (PretrainConfig, SFTConfig, RewardConfig, PreferenceConfig, PPOConfig)
        for flag in flags._flags(cls)
    }
    assert {flag for ours in OTHER_NAMES.values() for flag in ours} <= every | {"--learning-rate"}


def raising(error: BaseException) -> Callable[[Any], NoReturn]:
    def run(config: Any) -> NoReturn:
        raise error

    return run


ENDS = [
    (lambda config: None, 0, ""),
    (
        raising(UserError("a.jsonl:3: field 'prompt' is missing")),
        2,
        "error: a.jsonl:3: field 'prompt' is missing\n",
    ),
    (
        raising(Stopped(signal.SIGTERM, 7, saved=True)),
        143,
        "stopped, saved after step 7; to resume: rlhf-jax sft --data a\n",
    ),
    (
        raising(Stopped(signal.SIGINT, 7, saved=False)),
        130,
        "stopped, nothing was saved; to start again: rlhf-jax sft --data a\n",
    ),
    (
        raising(Stopped(signal.SIGTERM, 7, saved=False, last=4)),
        143,
        "stopped, step 7 was not saved, as it was a bad one; to resume from step 4: rlhf-jax sft --data a\n",
    ),
    (raising(PermissionError(13, "Permission denied", "a.jsonl")), 2, "error: a.jsonl: Permission denied\n"),
    (raising(KeyboardInterrupt()), 130, "interrupted"),
]


def test_how_a_script_ends(capsys: pytest.CaptureFixture[str]) -> None:
    for row in ENDS:
        with case(row) as (run, code, line):
            with pytest.raises(SystemExit) as end:
                process.run(run, parse("--data", "a"), again="rlhf-jax sft --data a")
            assert end.value.code == code
            errors = capsys.readouterr().err
            assert errors.startswith(line) and errors.count("\n") <= 1


def test_ctrl_c_in_a_callback_ends_the_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    interrupt = raising(KeyboardInterrupt())

    def run(config: Config) -> None:
        gc.callbacks.append(lambda phase, info: interrupt(config) if phase == "start" else None)
        try:
            gc.collect()
        finally:
            gc.callbacks.pop()

    before = sys.unraisablehook
    with pytest.raises(SystemExit):
        process.run(run, parse("--data", "a"))
    assert left == [130]
    assert capsys.readouterr().err == process.INTERRUPTED + "\n"
    assert sys.unraisablehook is before


NO_JAX = """
import contextlib, io, sys
from rlhf_jax.cli.app import COMMANDS, main
for arguments in (["--help"], ["--version"], ["labl"], ["feedback", "--help"], ["feedback", "ai", "--x"],
                  *([name, flag] for name in COMMANDS if name != "feedback" for flag in ("--help", "--nmae"))):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(arguments)
    assert said.getvalue(), arguments
    assert not {"jax", "numpy"} & set(sys.modules), arguments
"""


def test_help_and_a_wrong_flag_of_every_command_answer_without_jax() -> None:
    subprocess.run([sys.executable, "-c", NO_JAX], check=True, cwd=Path(__file__).parents[1])


def test_a_reader_that_has_enough_is_no_error() -> None:
    # As of `rlhf-jax sft --help | head`.
    command = [sys.executable, "-m", "rlhf_jax", "sft", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_commands_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, text in (
        (["--version"], 0, "rlhf-jax "),
        (["--help"], 0, "usage: rlhf-jax COMMAND"),
        ([], 2, "error: rlhf-jax: no command given; expected one of recipe, pretrain"),
        (["pretrian"], 2, "error: rlhf-jax: unknown command 'pretrian'; did you mean pretrain?"),
        (["feedback", "exprot"], 2, "error: rlhf-jax feedback: unknown command 'exprot'; did you mean export?"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        assert (end.value.code, (said.out + said.err)[: len(text)]) == (status, text), arguments


STUCK = """
import hashlib, sys, time
from rlhf_jax.parallel import stopping
stopping.answer_sigterm("rlhf-jax sft --name a")
stopping.GRACE = 0.2
if sys.argv[1] != "start":
    import signal
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the training loop's, which waits for the step
    stopping.phase(sys.argv[1])
print(flush=True)
if sys.argv[1] == "saving":
    time.sleep(1)
    stopping.ending()
    sys.exit(3)
if sys.argv[1] == "computing":
    stopping.beside("saving")
    time.sleep(1)
    print("saved", file=sys.stderr)
    stopping.beside("")
while True:
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # no Python runs meanwhile
"""


def test_sigterm_is_answered_in_any_phase_with_one_line() -> None:
    for phase, code, said in (
        ("start", 143, "stopped while reading models and data; to start or resume: rlhf-jax sft --name a\n"),
        ("compiling", 143, "stopped while compiling; to start or resume: rlhf-jax sft --name a\n"),
        ("saving", 3, ""),  # is waited for
        ("computing", 143, "saved\nstopped while computing; to start or resume: rlhf-jax sft --name a\n"),
    ):
        # At the start, Python's own handler answers, here between two sleeps.
        script = STUCK if phase != "start" else STUCK.replace("hashlib.pbkdf2", "time.sleep(0.01) or str or hashlib.p")
        with (
            case(phase),
            subprocess.Popen(
                [sys.executable, "-c", script, phase],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
            ) as process,
        ):
            if process.stdout is None:
                raise RuntimeError("no pipe")
            process.stdout.readline()
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate()
            assert (process.returncode, errors) == (code, said)
            assert time.monotonic() - began < 8


def test_a_second_command_is_refused_before_it_reads_anything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "rlhf_jax", "sft", "--out", str(folder), "--data", "none.jsonl", "--init", "none"]
    options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
    with hold(folder):
        with hold(folder), lock(folder):  # this process may write in it
            pass
        second = subprocess.run(command, **options)
    said = f"error: {folder}: process {os.getpid()} is writing in this folder; wait for it or give another --name\n"
    assert (second.returncode, second.stderr, second.stdout) == (2, said, "")
    # Nothing is left of a start that made nothing.
    assert not folder.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with hold(tmp_path / "mine"):
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a run folder, got a file"), hold(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"cannot be made: Not a directory"), hold(tmp_path / "file" / "run"):
        pass
