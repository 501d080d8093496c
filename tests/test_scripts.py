"""The scripts on a user's own files: four stages and sampling, stops, and what a user may get wrong.

One small run of each stage, made once, serves every test here.
"""

import contextlib
import dataclasses
import gzip
import html
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import inference
from rlhf_jax.cli import comparing, completion, process
from rlhf_jax.cli.app import main
from rlhf_jax.cli.before_after import lines_of
from rlhf_jax.cli.flags import parse
from rlhf_jax.config import ModelConfig, to_plain
from rlhf_jax.data import Ledger, Prompt, encode_demonstrations, read_records
from rlhf_jax.data.dialogues import FullMessage
from rlhf_jax.evaluation import commands
from rlhf_jax.evaluation.commands import generate_command
from rlhf_jax.evaluation.heldout import row_scores
from rlhf_jax.evaluation.report.html import text
from rlhf_jax.model import Transformer
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import model_of, released_params
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.stages import pretrain as pretrain_stage
from rlhf_jax.stages import reward as reward_stage
from rlhf_jax.stages import sft as sft_stage
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import one_network
from rlhf_jax.trainers import ppo as ppo_trainer
from rlhf_jax.trainers import pretrain as pretrain_trainer
from rlhf_jax.trainers import reward as reward_trainer
from rlhf_jax.trainers import sft as sft_trainer
from tests.cases import case

pytestmark = pytest.mark.runs

COMPILER = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
WORDS = ("red", "blue", "green", "cat")
CONTEXT = 64
LONG = "why " * 20

SHAPE = ("--tokenizer", "bytes", "--model.width", "16", "--model.layers", "1", "--model.heads", "2")
PRETRAIN: tuple[str, ...] = ("--data", "texts.jsonl.gz", *SHAPE, "--model.context", f"{CONTEXT}", "--row-length", "24")
PRETRAIN += ("--batch", "4", "--steps", "3", "--save-every", "1")
SFT: tuple[str, ...] = (
    "--init",
    "runs/base",
    "--data",
    "answers.jsonl",
    "--batch",
    "4",
    "--steps",
    "2",
    "--buckets",
    "32",
)
REWARD: tuple[str, ...] = ("--init", "runs/answers", "--data", "pairs.jsonl", "--demonstrations", "answers.jsonl")
REWARD += ("--batch", "4", "--steps", "2", "--buckets", "32")
PPO: tuple[str, ...] = ("--init", "runs/answers", "--reward", "runs/judge", "--data", "prompts.jsonl", "--batch", "4")
PPO += ("--minibatches", "2", "--steps", "3", "--prompt-length", "16", "--episode.response-length", "4")


def call(*arguments: str) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


def write(path: Path, rows: list[Any]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a user's files and a run of each stage in runs/."""
    folder = tmp_path_factory.mktemp("user")
    pairs = [(a, b) for a in WORDS for b in WORDS]
    write(folder / "texts.jsonl.gz", [{"text": ""}, *({"text": f"{a} and {b}, {b} and {a}. " * 3} for a, b in pairs)])
    answers: list[Any] = [{"prompt": f"{a} {b} ->", "completion": f" {b}."} for a, b in pairs]
    answers += [{"prompt": "what?", "completion": " "}, {"prompt": LONG, "response": " Because."}]
    answers += [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    write(folder / "answers.jsonl", answers)
    compared: list[Any] = [{"prompt": f"{a} {b} ->", "chosen": f" {b}.", "rejected": f" {a}"} for a, b in pairs]
    compared += [{"prompt": "a", "chosen": " b", "rejected": " b"}]
    compared += [{"prompt": "a", "responses": [" b", " c", " d"], "ranks": [2, 1, 2]}]
    write(folder / "pairs.jsonl", compared)
    write(folder / "prompts.jsonl", [{"prompt": f"{a} {b} ->"} for a, b in pairs] + [{"prompt": LONG}, {"prompt": ""}])
    # Every start of a stage compiles its update anew; the cache of the scripts makes the second one quick.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in COMPILER:
        monkeypatch.delenv(name.upper(), raising=False)
    before = {name: jax.config.values[name] for name in COMPILER}
    process.use_compilation_cache()
    compilation_cache.reset_cache()
    with contextlib.chdir(folder):
        assert call("pretrain", "--name", "base", *PRETRAIN) == 0
        assert call("sft", "--name", "answers", *SFT) == 0
        assert call("reward", "--name", "judge", *REWARD) == 0
        assert call("ppo", "--name", "aligned", *PPO) == 0
    assert list(folder.glob("cache/rlhf_jax/compiled/jit_update-*"))
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    monkeypatch.undo()
    shutil.rmtree(folder)


@pytest.fixture
def user(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, with the user in it."""
    monkeypatch.chdir(made)
    return made


def ledger(run: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("runs", run, "ledger.json").read_text())
    return content


def dropped(run: str) -> set[tuple[str, str]]:
    """(file:line, reason) of the rows that a run could not use."""
    rows = ledger(run)["rows"]
    return {(row["where"], row["reason"]) for row in rows if row["what"] != "held out"}


@pytest.mark.usefixtures("user")
def test_scores_are_centred_on_demonstrations_and_dialogues() -> None:
    judge = RunFolder.open("runs/judge", stages=("reward",))
    model = Transformer(model_of(judge), scalar=True)
    records = read_records(["answers.jsonl"], "demonstrations", Ledger())
    rows = encode_demonstrations(records, judge.tokenizer, max_tokens=CONTEXT, ledger=Ledger())
    assert len(rows) == 17  # 16 pairs of words and the dialogue
    scores = row_scores(model, released_params(judge), rows)
    assert abs(scores.mean()) < 1e-5 < scores.std()


@pytest.mark.usefixtures("user")
def test_useless_rows_are_in_the_ledger() -> None:
    beside = json.loads(Path("runs/judge/ledger_demonstrations.json").read_text())
    assert (beside["total"], beside["files"]["answers.jsonl"]["kept"], beside["rejected"]) == (19, 17, 2)
    # One of the 17 prompts of the pairs, and of those of the answers, is held out.
    assert (ledger("judge")["held_out"], ledger("answers")["held_out"]) == (1, 1)
    assert dropped("base") == {("texts.jsonl.gz:1", "empty text")}
    assert dropped("answers") == {
        ("answers.jsonl:17", "empty completion"),
        ("answers.jsonl:18", "longer than 32 tokens"),
    }
    assert dropped("judge") == {("pairs.jsonl:17", "chosen equals rejected")}
    assert dropped("aligned") == {
        ("prompts.jsonl:17", "longer than 16 tokens"),
        ("prompts.jsonl:18", "empty prompt"),
    }
    for run, rows in (("base", 17), ("answers", 19), ("judge", 18), ("aligned", 18)):
        assert (ledger(run)["total"], ledger(run)["undecided"]) == (rows, 0)


@pytest.mark.usefixtures("user")
def test_a_finished_run_is_not_trained_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path: path.stat().st_mtime_ns for path in Path("runs/aligned").rglob("*.jsonl")}
    monkeypatch.setattr(ppo_trainer, "train", None)
    assert call("ppo", "--name", "aligned", *PPO) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    out = capsys.readouterr().out
    assert "runs/aligned: ppo was finished before; nothing was trained\n" in out
    summary = RunFolder.open("runs/aligned", stages=("ppo",)).summary
    assert summary["first_ratio_error"] <= 1e-4 and abs(summary["first_kl"]) <= 1e-4
    assert all(name.replace("_", " ") in out for name in summary)


@pytest.mark.usefixtures("user")
def test_a_stage_ends_with_answers_before_and_after_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command, name, arguments, keys, following in (
        ("pretrain", "base", PRETRAIN, {"prompt", "after"}, "sft --name answers --init runs/base --data answers.jsonl"),
        ("sft", "answers", SFT, {"prompt", "before", "after"}, "reward --name judge --init runs/answers --data "),
        (
            "reward",
            "judge",
            REWARD,
            {"prompt", "preferred", "preferred_score", "other", "other_score"},
            "ppo --name aligned --init runs/answers --reward runs/judge --data prompts.jsonl",
        ),
        ("ppo", "aligned", PPO, {"prompt", "before", "after"}, "generate runs/aligned --prompt 'red red ->'"),
    ):
        with case(command):
            assert call(command, "--name", name, *arguments) == 0
            out = capsys.readouterr().out
            (after,) = re.findall("^next: rlhf-jax (.*)$", out, re.MULTILINE)
            assert after.startswith(following)
            program, *rest = shlex.split(after)
            assert parse(importlib.import_module(f"rlhf_jax.cli.{program}").Config, rest)
            samples = json.loads(Path("runs", name, "samples.json").read_text())["samples"]
            page = Path("runs", name, "report.html").read_text()
            assert f"report: runs/{name}/report.html\n" in out and html.escape(after) in page
            answer = samples[0].get("after", samples[0].get("preferred"))
            assert text(answer).strip() in page and ("Warnings" in page) == (name in ("judge", "aligned"))
            assert "<svg" in page
            assert 1 <= len(samples) <= 4 and all(set(sample) == keys for sample in samples)
            assert len(re.findall("^prompt: ", out, re.MULTILINE)) == len(samples)
            assert len(re.findall("^  (?:after|preferred)[^:]*: ", out, re.MULTILINE)) == len(samples)
    # Trained on, the words after an arrow are more likely; the same random numbers show it.
    answers = json.loads(Path("runs/answers/samples.json").read_text())["samples"]
    assert any(sample["before"] != sample["after"] for sample in answers)
    assert samples[0]["prompt"] == "red red ->" and len(samples) == 4
    judged = json.loads(Path("runs/judge/samples.json").read_text())["samples"][0]
    assert re.fullmatch(r"\w+ \w+ ->|a", judged["prompt"]) and judged["preferred"] != judged["other"]
    assert re.match(r" \w", judged["preferred"])  # the whole answer, and not what the two do not share


@pytest.mark.usefixtures("user")
def test_ppo_after_a_continued_reward_model_starts_from_the_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    again = (*changed(REWARD, init="runs/judge", steps="0"), "--examples", "0")
    assert call("reward", "--name", "judge 2", *again) == 0
    assert call("reward", "--name", "judge3", *changed(again, init="runs/judge 2")) == 0
    assert re.findall("^next: rlhf-jax (.*)$", capsys.readouterr().out, re.MULTILINE) == [
        f"ppo --name aligned --init runs/answers --reward {judge} --data prompts.jsonl"
        for judge in ("'runs/judge 2'", "runs/judge3")
    ]


@pytest.mark.usefixtures("user")
def test_runs_are_put_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    write(Path("few.jsonl"), [{"prompt": "red blue ->"}, {"prompt": ""}, {"prompt": LONG}, chat])
    asked = ("--data", "few.jsonl", "--max-new-tokens", "4", "--temperature", "0")
    assert call("report", "runs/answers", "runs/aligned", "runs/judge", *asked) == 0
    said = capsys.readouterr()
    assert said.out == "report: comparison.html\n"
    assert "1 prompts left out: empty prompt" in said.err and "1 of 3 prompts are left out: too long" in said.err
    page = Path("comparison.html").read_text()
    answer = inference.load("runs/aligned").generate(["red blue ->"], max_new_tokens=4, temperature=0)[0]
    assert f'data-label="aligned">{text(answer).strip()}<span' in page
    # The reward model that PPO had is the judge, with what it was warned of.
    for words in ("Scored by runs/judge", "do not trust this reward model", "aligned against answers: ", "2 prompts."):
        assert words in page
    # A folder of runs stands for the runs in it, whose own prompts are asked; a judge that is named.
    shutil.copytree("runs/base", "group/pretrain")
    shutil.copytree("runs/answers", "group/sft")
    flags = ("--examples", "3", "--reward", "runs/judge", "--out", "group.html", "--max-new-tokens", "4")
    assert call("report", "group", *flags) == 0
    page = Path("group.html").read_text()
    assert page.index('scope="col" role="columnheader">pretrain') < page.index('role="columnheader">sft')
    own = [json.loads(Path("group", run, "samples.json").read_text())["samples"] for run in ("pretrain", "sft")]
    prompts = tuple(dict.fromkeys(sample["prompt"] for samples in own for sample in samples))[:3]
    assert f"{len(prompts)} prompts, those that the runs’ own reports show" in page
    assert "sft against pretrain: " in page and all(f"<code>{text(prompt).strip()}<" in page for prompt in prompts)
    assert call("report", "runs/base", "--examples", "0") == 0 and "Answers" not in Path("comparison.html").read_text()
    Path("nothing").mkdir(exist_ok=True)
    capsys.readouterr()
    for arguments, message in (
        (
            ("runs/base", "runs/nowhere"),
            "runs/nowhere: expected the folder of a run or of a recipe, got no such folder",
        ),
        (("nothing",), "nothing: expected the folder of a run or of a recipe, got one without a run in it"),
        (("runs/base", "runs/base"), "runs: expected each run once, got runs/base twice"),
        ((), "runs: expected the folders of one or more runs, got nothing; use runs/NAME"),
        (("runs/base", "--out", "x.jsonl"), "out: expected a file that ends in .html, got 'x.jsonl'"),
        (("runs/base", "--out", "gone/x.html"), "out: expected a file in a folder that exists, got 'gone/x.html'"),
        (("runs/base", "--reward", "runs/base"), "reward: expected a reward model, got the language model runs/base"),
        (("runs/base", "--columns", "prompt=x"), "columns: expected --data with it, got no files"),
    ):
        with case(arguments):
            assert call("report", *arguments) == 2
            assert capsys.readouterr().err == f"error: {message}\n"


def test_prompts_to_compare_are_those_that_runs_and_recipes_show(tmp_path: Path) -> None:
    turns = [["user", "Hi"], ["assistant", "", '{"content": null, "tool_calls": []}']]
    shown = [{"prompt": " a ->", "before": "x", "after": "y"}, {"prompt": "…Hi…", "messages": turns, "after": "z"}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.json").write_text(json.dumps({"samples": [*shown, shown[0]]}))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "samples.json").write_text(json.dumps([{"prompt": " b ->", "sft": "x"}]))
    runs = (str(tmp_path / "run"), str(tmp_path / "recipe"), str(tmp_path))
    called = tuple(FullMessage.of(turn) for turn in turns)
    assert called[1].as_row() == {"role": "assistant", "content": None, "tool_calls": []}
    prompts = comparing.prompts_of(importlib.import_module("rlhf_jax.cli.report").Config(runs=runs), [])
    assert prompts == [Prompt(" a ->"), Prompt("…Hi…", turns=called), Prompt(" b ->")]
    assert comparing.names_of([Path("runs/a"), Path("runs/b/sft")]) == ["a", "b/sft"]
    assert comparing.names_of([Path("runs/a")]) == ["a"] and comparing.names_of([]) == []


def test_commands_survive_a_paste(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "rlhf-jax"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    path = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    awkward = (
        'it\'s "so"',
        "Q: Why?\nA:",
        "$HOME `id` $(id) !x \\n",
        "a; ls & # *",
        "-5 °C",
        "--samples 3",
        "'",
        "„é“ 漢 🙂",
    )
    for prompt in awkward:
        for run in (f"runs/{prompt}".replace("\n", " "), "-x", "runs/plain"):
            with case((prompt, run)):
                command = generate_command(run, [prompt])
                pasted = subprocess.run(["sh", "-c", command], env=path, capture_output=True, check=True).stdout
                words = pasted.decode().split("\0")[:-1]
                assert words[0] == "generate"
                config = parse(importlib.import_module("rlhf_jax.cli.generate").Config, words[1:])
                assert (Path(config.run), config.prompt) == (Path(run), (prompt,))
    # A shell would take a tab or an escape for a key; and a prompt of one line is preferred.
    assert generate_command("r", ["a\tb", "\x1b[A", "c\nd"]) == "rlhf-jax generate r --prompt 'c\nd'"
    assert generate_command("r", ["c\nd", "e"]) == "rlhf-jax generate r --prompt e"
    assert generate_command("r", ["\t", " "]) == "rlhf-jax generate r --prompt Hello"
    assert generate_command("a b", ["x"], chat=True) == "rlhf-jax generate 'a b' --chat"


def test_commands_are_in_the_form_in_which_the_program_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for started, found, expected in (
        ("/env/bin/rlhf-jax", {"rlhf-jax": "/env/bin/rlhf-jax"}, "rlhf-jax"),
        (".venv/bin/rlhf-jax", {}, ".venv/bin/rlhf-jax"),
        ("my env/bin/rlhf-jax", {}, "'my env/bin/rlhf-jax'"),
        ("/x/rlhf_jax/__main__.py", {"python": sys.executable}, "python -m rlhf_jax"),
        ("scripts/sft.py", {"python": "/usr/bin/false"}, f"{shlex.quote(os.path.relpath(sys.executable))} -m rlhf_jax"),
        ("/x/pytest/__main__.py", {}, "rlhf-jax"),
    ):
        with case(started):
            monkeypatch.setattr(sys, "argv", [started])
            monkeypatch.setattr(commands.shutil, "which", found.get)
            assert commands.program() == expected


def test_lines_of_a_sample() -> None:
    rows = [{"prompt": "\nHuman: Hi\x07", "before": "a\tb", "after": "x" * 241}]
    assert lines_of(rows) == ["prompt: Human: Hi·", "  before: a·b", "  after: " + "x" * 239 + "…"]
    assert lines_of(
        [{"prompt": "p", "preferred": "a\nb", "preferred_score": 0.5, "other": "", "other_score": -1.0}]
    ) == [
        "prompt: p",
        "  preferred +0.50: a⏎b",
        "  other -1.00: ",
    ]


@pytest.mark.parametrize(
    ("command", "stage", "arguments", "undisturbed"),
    [("pretrain", one_network, PRETRAIN, "base"), ("ppo", ppo_trainer, PPO, "aligned")],
)
@pytest.mark.usefixtures("user")
def test_a_stopped_run_goes_on_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    stage: Any,
    arguments: tuple[str, ...],
    undisturbed: str,
) -> None:
    name = f"stopped_{undisturbed}"
    asked: list[int] = []
    batch_at = stage.batch_at

    def and_stop(*rows: Any, step: int, **settings: Any) -> Any:
        asked.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(*rows, step=step, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf-jax"])
        patch.setattr(stage, "batch_at", and_stop)
        assert call(command, "--name", name, *arguments) == 143
    assert asked == [0, 0, 1]  # the first one also to compile for
    assert f"stopped, saved after step 2; to resume: rlhf-jax {command} --name {name}" in capsys.readouterr().err
    assert not Path("runs", name, "summary.json").exists()
    # Where checkpoints are written and how often may change on the way.
    assert call(command, "--name", name, *arguments, "--keep-last", "1") == 0
    runs = [RunFolder.open(Path("runs", which), stages=("pretrain", "ppo")) for which in (name, undisturbed)]
    assert runs[0].fingerprint == runs[1].fingerprint
    assert runs[0].summary == runs[1].summary
    steps = [[json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] for run in runs]
    assert steps[0] == sorted(set(steps[0])) and {1, 3} <= set(steps[0])


@pytest.mark.usefixtures("user")
def test_sft_keeps_the_best_and_says_that_it_over_fits(capsys: pytest.CaptureFixture[str]) -> None:
    # What is held out has other answers, so the loss on it falls while words are learned and rises with the pairs.
    write(Path("other.jsonl"), [{"prompt": f"{a} {b} ->", "completion": f" {a}."} for a in WORDS for b in WORDS])
    arguments = (*SFT[: SFT.index("--steps")], "--heldout", "other.jsonl", "--buckets", "32", "--epochs", "20")
    arguments += ("--optimizer.learning-rate", "0.02")
    assert call("sft", "--name", "over", *arguments) == 0
    said = capsys.readouterr().err
    run = RunFolder.open("runs/over", stages=("sft",))
    best, steps = run.summary["released_step"], run.summary["steps"]
    assert steps == 85 and run.summary["epochs"] == 20  # 17 rows, 4 at a time
    curve = {row["step"]: row["eval/loss"] for row in read_rows(run.metrics) if "eval/loss" in row}
    assert list(curve) == [*range(9, 85, 9), 85]
    assert min(curve, key=lambda step: curve[step]) == best < steps
    assert run.summary["heldout_response_nll"] == pytest.approx(curve[best], abs=1e-5)
    jax.tree.map(np.testing.assert_array_equal, released_params(run), run.load_params("best"))
    (warning,) = run.summary["warnings"]
    assert f"it over-fits; later stages take the model of step {best}" in warning and f"warning: {warning}\n" in said
    # The default batch is a multiple of the devices, so that other devices would have other batches.
    at = arguments.index("--batch")
    default = ("--name", "default", *arguments[:at], *arguments[at + 2 : arguments.index("--epochs")], "--steps", "1")
    assert call("sft", *default) == 0 and call("sft", *default, "--devices", "8") == 2
    assert "batch: expected 4 as in the earlier run, got 8" in capsys.readouterr().err
    # Said again of a finished run; and the last model is there for whoever asks for it.
    assert call("sft", "--name", "over", *arguments) == 0
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert call("sft", "--name", "last", *arguments, "--release", "last", "--eval-every", "40") == 0
    run = RunFolder.open("runs/last", stages=("sft",))
    assert (run.summary["released_step"], run.summary["heldout_response_nll"]) == (85, pytest.approx(curve[85]))
    jax.tree.map(np.testing.assert_array_equal, released_params(run), run.load_params("last"))


@pytest.mark.usefixtures("user")
def test_a_reward_model_that_may_be_chance_says_so_and_ppo_again(capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunFolder.open("runs/judge", stages=("reward",)).summary
    (doubt,) = summary["warnings"]
    assert doubt.startswith("do not trust this reward model: ")
    assert call("ppo", "--name", "doubtful", *changed(PPO, steps="0")) == 0
    assert f"warning: runs/judge: {doubt}\n" in capsys.readouterr().err
    # All pairs of the same two words, so that 60 comparisons are enough to be sure.
    rows = [{"prompt": f"{n}", "chosen": " red.", "rejected": " blue."} for n in range(60)]
    write(Path("clear.jsonl"), rows)
    flags = ("--init", "runs/answers", "--data", "clear.jsonl", "--heldout", "clear.jsonl", "--buckets", "32")
    assert call("reward", "--name", "clear", *flags, "--epochs", "2", "--optimizer.learning-rate", "0.01") == 0
    said = capsys.readouterr().err
    summary = RunFolder.open("runs/clear", stages=("reward",)).summary
    assert "60 rankings, batch 4: 30 steps, 2 epochs\n" in said and "warning" not in said
    assert (summary["heldout_accuracy"], summary["heldout_prompts"], summary["warnings"]) == (1.0, 60, [])
    assert summary["heldout_accuracy_interval"] == [pytest.approx(0.9398, abs=1e-4), 1.0]  # 1 / (1 + 1.96² / 60)


@pytest.mark.usefixtures("user")
def test_no_steps_evaluate_and_save_the_initial_model() -> None:
    for command, arguments, origin in (
        ("pretrain", changed(PRETRAIN, init="runs/base"), "runs/base"),
        ("sft", SFT, "runs/base"),
        ("reward", REWARD, "runs/answers"),
        ("ppo", PPO, "runs/answers"),
    ):
        with case(command):
            assert call(command, "--name", f"none/{command}", *changed(arguments, steps="0")) == 0
            run = RunFolder.open(f"runs/none/{command}", stages=(command,))
            first = released_params(RunFolder.open(origin, stages=("pretrain", "sft")))
            last = {name: tree for name, tree in released_params(run).items() if name != "score"}
            first = {name: first[name] for name in last}
            jax.tree.map(np.testing.assert_array_equal, last, first)
            assert (run.load_params() is not None) and run.finished


@pytest.mark.usefixtures("user")
def test_a_file_of_settings_and_a_flag_over_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("init: runs/base\ndata: answers.jsonl\nbatch: 4\nbuckets: [32]\nsteps: 7\n")
    assert call("sft", "--name", "answers", "--config", "mine.yaml", "--steps", "2") == 0
    assert "was finished before" in capsys.readouterr().out
    assert call("sft", "--name", "answers", "--config", "mine.yaml") == 2
    assert capsys.readouterr().err == (
        "error: runs/answers: steps: expected 2 as in the earlier run, got 7; give the same settings to resume it, "
        "or another --name to start a new run\n"
    )


def test_completions(user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--max-new-tokens", "4", "--samples", "2", "--temperature")
    for run in ("base", "answers", "aligned"):
        assert call("generate", f"runs/{run}", "--prompt", "red", "--prompt", "blue", *few, "0") == 0
        out = capsys.readouterr().out
        answers = [part.strip("\n") for part in re.split(r"\n\n(?=red|blue)", out)]
        assert len(answers) == 4 and answers[0] == answers[1] != answers[2] == answers[3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red\nblue\n")))
    assert call("generate", "runs/aligned", *few, "0") == 0
    assert capsys.readouterr().out == out
    seeds = []
    for seed in ("1", "1", "2"):
        assert call("generate", "--prompt", "red", "--prompt", "blue", "runs/aligned", *few, "1", "--seed", seed) == 0
        seeds.append(capsys.readouterr().out)
    assert seeds[0] == seeds[1] != seeds[2]
    # One answer alone is shown as it is sampled; it is the first of many.
    assert call("generate", "--prompt", "red", "runs/aligned", "--max-new-tokens", "4", "--temperature", "1") == 0
    alone = capsys.readouterr().out
    assert call("generate", "--prompt", "red", "runs/aligned", *few, "1") == 0
    assert capsys.readouterr().out.startswith(alone)


@pytest.mark.usefixtures("user")
def test_prompts_of_like_length_are_answered_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    passed: list[tuple[int, str]] = []
    plain = inference.generate

    def watched(model: Any, params: Any, tokens_BP: Any, *rest: Any, **settings: Any) -> Any:
        shapes.append(tokens_BP.shape)
        sampling = rest[-1]
        passed.append((sampling.segments, sampling.cache_dtype))
        return plain(model, params, tokens_BP, *rest, **settings)

    prompts = ("red", "red and " * 5, "blue", "a cat " * 5, "green", "blue " * 8)
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    monkeypatch.setattr(inference, "generate", watched)
    monkeypatch.setattr(inference, "ROWS", 2)

    def said(*more: str) -> str:
        shapes.clear()
        assert call("generate", "runs/aligned", *flags, "--max-new-tokens", "4", "--temperature", "1", *more) == 0
        return capsys.readouterr().out

    together = said()
    assert shapes == [(2, 16), (2, 32), (2, 48)]
    # Each part as it came, which pads the short prompts beside the long ones, gives the same answers.
    monkeypatch.setattr(inference, "by_length", lambda lengths, rows: list(np.arange(len(lengths)).reshape(-1, rows)))
    assert said() == together
    assert shapes == [(2, 48), (2, 32), (2, 48)]
    said("--segments", "2", "--cache-dtype", "int8")
    assert passed == [(1, "model")] * 6 + [(2, "int8")] * 3


@pytest.mark.usefixtures("user")
def test_a_dialogue_goes_on_until_quit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[int]] = []

    def answers(self: Any, prompts: list[list[int]]) -> list[str]:
        heard.extend(prompts)
        return [f" answer {len(heard)}\n\nHuman: and"]

    monkeypatch.setattr(completion.Speaker, "answers", answers)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nHo Ho Ho\n/quit\nnever\n")))
    assert call("generate", "runs/answers", "--chat", "--max-new-tokens", "4") == 0
    said = capsys.readouterr()
    assert said.out == "answer 1\nanswer 2\n"
    decode = Tokenizer.bytes().decode
    # The context holds 60 tokens beside four new ones, which both exchanges exceed: the first exchange is forgotten.
    assert [decode(ids) for ids in heard] == ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Ho Ho Ho\n\nAssistant:"]
    assert said.err.count("\n") == 1 and "dropped the oldest message" in said.err


BAD_ROWS: dict[str, tuple[str, tuple[str, ...], bytes, str]] = {
    "missing key": ("sft", SFT, b'{"prompt": "a"}', r"bad.jsonl:1: field 'completion': missing"),
    "wrong type": (
        "pretrain",
        PRETRAIN,
        b'{"text": "a"}\n{"text": 3}',
        r"bad.jsonl:2: field 'text': expected text, got the number 3",
    ),
    "bad UTF-8": ("reward", REWARD, b'{"prompt": "\xff"}', r"bad.jsonl:1: bad UTF-8: .* got byte 0xff"),
    "not JSON": ("ppo", PPO, b"hello", r"bad.jsonl:1: not JSON: .* expected one JSON object"),
    "no rows": ("sft", SFT, b"\n", r"bad.jsonl: expected one JSON object on each line, got a file without rows"),
    "only an empty response": (
        "sft",
        SFT,
        b'{"prompt": "a", "completion": ""}',
        r"data: none of 1 demonstrations is left to train on; 1 dropped, the first at bad.jsonl:1: empty completion",
    ),
    "only chosen equal to rejected": (
        "reward",
        REWARD,
        b'{"prompt": "a", "chosen": "b", "rejected": "b"}',
        r"data: none of 1 rankings is left .* bad.jsonl:1: chosen equals rejected",
    ),
    "only prompts that are too long": (
        "ppo",
        PPO,
        json.dumps({"prompt": LONG}).encode(),
        r"data: none of 1 prompts is left .* bad.jsonl:1: longer than 16 tokens; --prompt-length allows more$",
    ),
}


def refused(capsys: pytest.CaptureFixture[str], command: str, arguments: tuple[str, ...]) -> str:
    """The one line with which a script refuses its arguments."""
    before = set(Path("runs").iterdir())
    capsys.readouterr()
    assert call(command, *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    # The user corrects the mistake and gives the same command again: no folder stands in the way.
    assert set(Path("runs").iterdir()) == before
    return said.err


@pytest.mark.usefixtures("user")
def test_a_bad_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, row in BAD_ROWS.items():
        with case(name):
            command, arguments, content, message = row
            Path("bad.jsonl").write_bytes(content + b"\n")
            place = arguments.index("--data") + 1
            arguments = ("--name", "bad", *arguments[:place], "bad.jsonl", *arguments[place + 1 :])
            assert re.search(message, refused(capsys, command, arguments))


def changed(arguments: tuple[str, ...], **flags: str) -> tuple[str, ...]:
    """The arguments with other values of some flags."""
    return (*arguments, *(part for flag, value in flags.items() for part in (f"--{flag}", value)))


MISTAKES = [
    ("pretrain", PRETRAIN[2:], "data: expected files of text, got nothing; .* or --data embedded"),
    ("sft", SFT[:2], "data: expected files of demonstrations, got nothing; .* or --data embedded"),
    ("reward", REWARD[:2], "data: expected comparisons or rankings, got nothing"),
    ("reward", changed(REWARD, data="embedded"), "data: expected files of comparisons .*got embedded, which has none"),
    ("ppo", PPO[:4], "data: expected files of prompts, got nothing; .* or --data embedded"),
    (
        "ppo",
        (*PPO, "--pretraining-coef", "1", "--pretraining-batch", "2"),
        "pretraining_data: expected files of text for the pretraining mix, got nothing; use --pretraining-data FILE",
    ),
    ("sft", (*SFT, "--epochs", "3"), "epochs: expected epochs or steps, got 3 epochs and 2 steps"),
    (
        "sft",
        changed(SFT, init="runs/judge"),
        "runs/judge: expected the folder of a pretr",
    ),
    (
        "reward",
        changed(REWARD, init="nowhere"),
        "nowhere: expected the folder of a pretrain or sft or ppo or preference or reward run, got no such folder",
    ),
    (
        "ppo",
        changed(PPO, reward="runs/answers"),
        "runs/answers: expected the folder of a rew",
    ),
    (
        "ppo",
        changed(PPO, init="runs/judge"),
        "expected the folder of a sft or pretrain or ppo or preference run, got one of reward",
    ),
    (
        "ppo",
        changed(PPO, reference="nowhere"),
        "nowhere: expected the folder of a sft or pretrain or ppo or preference run, got no s",
    ),
    (
        "sft",
        changed(SFT, init="nobody/model"),
        "nobody/model: no such folder; .* hf download nobody/model --local-dir m",
    ),
    ("ppo", changed(PPO, reward="hf:nobody/model"), "nobody/model: no such folder; .*, and give hf:model\n"),
    ("sft", changed(SFT, init="runs/nothing"), "runs/nothing: expected the folder of a .* run, got no such folder\n"),
    ("ppo", changed(PPO, reward="other"), "other: its vocabulary of 300 tokens is not that of runs/answers"),
    (
        "pretrain",
        changed(PRETRAIN, name="judge"),
        "runs/judge: expected the folder of a p",
    ),
    ("pretrain", changed(PRETRAIN, data="none.jsonl"), "none.jsonl: cannot be read: No such file"),
    ("pretrain", changed(PRETRAIN, devices="3"), "batch 4 is not divisible by devices 3 .* use --batch 3"),
    ("ppo", changed(PPO, minibatches="3"), "batch 4 is not divisible by minibatches 3 .* use --batch 3"),
    ("pretrain", changed(PRETRAIN, **{"model.width": "15"}), "model: width 15 is not divisible by heads 2"),
    (
        "pretrain",
        changed(PRETRAIN, **{"row-length": "99"}),
        "row_length: expected at most the context 64, got 99",
    ),
    (
        "pretrain",
        changed(PRETRAIN, **{"optimizer.learning-rate": "-1"}),
        "optimizer: learning_rate: expected 0 or more, got -1.0",
    ),
    (
        "pretrain",
        changed(PRETRAIN, **{"model.vocab-size": "9", "tokenizer": "bpe"}),
        "vocab_size: expected at le",
    ),
    ("ppo", changed(PPO, **{"episode.temperature": "0"}), "episode: temperature: expected more than 0, got 0.0"),
    (
        "ppo",
        changed(PPO, **{"prompt-length": "63"}),
        "prompt_length 63 .* exceeds .* use --prompt-length 60 or l",
    ),
    ("sft", changed(SFT, dropuot="0.1"), "unknown flag --dropuot; did you mean --dropout"),
    (
        "generate",
        ("runs/judge",),
        "runs/judge: expected the folder of a pretrain or sft or ppo or preference run, got one of reward",
    ),
    ("generate", ("runs/base", "--max-new-tokens", "64"), "to leave room .* use --max-new-tokens 32"),
    (
        "generate",
        ("runs/base", "--max-new-tokens", "4", "--prompt", "ok", "--prompt", LONG),
        "--prompt 2: expected at most 60 tokens, the context of 64 minus max_new_tokens 4, got 81",
    ),
    (
        "generate",
        ("runs/base", "--max-new-tokens", "4", "--prompt", "a\udcff"),
        "--prompt 1: character 2: expected UTF-8, got other bytes",
    ),
    ("generate", ("runs/base", "--top-p", "0"), "top_p: expected more than 0 and at most 1, got 0.0"),
]


def test_a_mistake_is_one_line(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in MISTAKES:
        with case(row) as (command, arguments, message):
            if "other" in arguments and not Path("other").exists():
                words = Tokenizer.train([LONG * 9, *(chr(97 + i % 26) * i for i in range(90))], 300)
                model = to_plain(ModelConfig(vocab_size=words.vocab_size))
                judge = RunFolder.create("other", stage="reward", config={}, model=model, tokenizer=words, inputs={})
                judge.finish({"score_mean": 0.0, "score_scale": 1.0})
            if command != "generate" and "judge" not in arguments[-1:]:
                arguments = ("--name", "bad", *arguments)
            assert re.search(message, refused(capsys, command, arguments))


def test_messages_that_are_too_long_or_no_text(
    user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, message in (
        (
            LONG.encode(),
            "standard input:1: expected at most 60 tokens, the context of 64 minus max_new_tokens 4, got 102",
        ),
        (b"a\n\xff", "standard input:2: byte 1"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
        arguments = ("runs/base", "--max-new-tokens", "4", *(["--chat"] if said.endswith(b" ") else []))
        assert message in refused(capsys, "generate", arguments)


def test_a_script_starts_from_anywhere(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, root / "scripts" / "sft.py", "--nmae", "x"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --nmae; did you mean --name?\n")


def test_every_stage_has_its_names() -> None:
    for stage in (pretrain_stage, sft_stage, reward_stage, ppo_stage):
        assert dataclasses.is_dataclass(stage.Config)
        assert callable(stage.objective) and callable(stage.make_update)
    for trainer in (pretrain_trainer, sft_trainer, reward_trainer, ppo_trainer):
        assert callable(trainer.run)
