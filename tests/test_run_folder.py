"""A folder says what it is; another stage, other settings or a second writer are refused in one line."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import ModelConfig, PPOConfig, to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.checkpoint import Checkpoints, fingerprint
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.core

TOKENIZER = Tokenizer.bytes()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, context=16, width=8, layers=1, heads=2)


def create(path: Path, stage: str = "sft", defaults: dict[str, Any] | None = None, **changes: Any) -> RunFolder:
    config = {"steps": 10, "log_every": 5, "optim": {"learning_rate": 1e-3, "betas": (0.9, 0.95)}}
    return RunFolder.create(
        path,
        stage=stage,
        config=config | changes,
        model={"width": 8},
        tokenizer=TOKENIZER,
        inputs={"data/a.jsonl": "1f3c"},
        defaults=defaults,
    )


def test_what_a_folder_says(tmp_path: Path) -> None:
    create(tmp_path / "run")
    run = RunFolder.open(tmp_path / "run", stages=("pretrain", "sft"))
    assert (run.stage, run.model, run.inputs) == ("sft", {"width": 8}, {"data/a.jsonl": "1f3c"})
    assert run.config["optim"] == {"learning_rate": 1e-3, "betas": [0.9, 0.95]}
    assert run.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert not run.finished
    run.finish({"heldout_response_nll": 2.7})
    finished = RunFolder.open(tmp_path / "run", stages=("sft",))
    assert finished.finished
    assert finished.summary == {"heldout_response_nll": 2.7}


def test_parameters_and_their_fingerprint(tmp_path: Path) -> None:
    run = create(tmp_path)
    with pytest.raises(UserError, match="no intact checkpoint"):
        run.load_params()
    params = {"w": jnp.arange(3.0)}
    Checkpoints(run.checkpoints).save(1, TrainState(jnp.int32(1), params, (), jax.random.key(0), {}), {})
    assert run.load_params()["w"].tolist() == [0, 1, 2]
    assert run.fingerprint == fingerprint(params)


def test_the_same_run_goes_on_with_another_log(tmp_path: Path) -> None:
    create(tmp_path)
    assert create(tmp_path, log_every=1).config["log_every"] == 1
    # Settings that a later version added, and that are off.
    create(tmp_path, base="", tensors=False)
    # A start killed before config.json was there begins again.
    (tmp_path / "config.json").unlink()
    create(tmp_path)
    # Settings that a later version added, and that are what they were without them.
    defaults = {"estimator": "gae", "samples": 1}
    create(tmp_path, estimator="gae", samples=1, defaults=defaults)
    (tmp_path / "config.json").unlink()
    create(tmp_path)
    with pytest.raises(UserError, match=r"estimator: expected nothing .* got rloo"):
        create(tmp_path, estimator="rloo", samples=1, defaults=defaults)


def test_another_run_is_refused_by_the_field(tmp_path: Path) -> None:
    create(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 20}, "steps: expected 10 as in the earlier run, got 20"),
        ({"optim": {"learning_rate": 2e-3, "betas": [0.9, 0.95]}}, "optim.learning_rate: expected 0.001 .* got 0.002"),
        ({"clip": 0.2}, "clip: expected nothing .* got 0.2"),
        ({"teacher": "models/llama"}, "teacher: expected nothing .* got models/llama"),
        ({"stage": "reward"}, "expected the folder of a reward run, got one of sft"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message) as error:
            create(tmp_path, **change)
        assert "\n" not in str(error.value), change
        assert (tmp_path / "config.json").read_bytes() == before, change


def test_inputs_may_be_moved(tmp_path: Path) -> None:
    # Their content is compared, in `inputs` and as the fingerprint of an adapter's base.
    def start(**changes: Any) -> RunFolder:
        settings = {"data": ["a.jsonl"], "heldout": [], "init": "runs/sft", "pmap": False, "devices": 1}
        settings |= {"reward_function": ["a/f.py:few(most=3)", "package.module:g"]}
        base = {"init": changes.pop("base", "/old/base"), "fingerprint": changes.pop("fingerprint", "1f3c")}
        return RunFolder.create(
            tmp_path, stage="ppo", config=settings | changes, model={}, tokenizer=TOKENIZER, inputs={}, base=base
        )

    start()
    moved = start(data=["/elsewhere/b.jsonl"], init="/elsewhere/sft", heldout=["c"], base="/elsewhere/base", devices=2)
    assert (moved.config["data"], (moved.base or {})["init"]) == (["/elsewhere/b.jsonl"], "/elsewhere/base")
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["config"]["init"], about["base"]["init"]) == ("/elsewhere/sft", "/elsewhere/base")
    # In each setting that names a file or a folder, of every stage.
    for field, (one, other) in {
        **dict.fromkeys(
            ("data", "heldout", "demonstrations", "pretraining_data"), (["a.jsonl"], ["/b/a.csv", "c.txt"])
        ),
        **dict.fromkeys(("init", "reward", "reference", "base"), ("runs/a", "hf:/b/a")),
        "chat_template": ("chat.jinja", "/b/chat.jinja"),
        "reward_function": (["f.py:few(most=3)"], ["/b/c/f.py:few(most=3)"]),
    }.items():
        with case(field):
            make = {"stage": "ppo", "model": {}, "tokenizer": TOKENIZER, "inputs": {"x": "1f3c"}}
            for value in (one, other):
                run = RunFolder.create(tmp_path / field, config={field: value}, **make)  # type: ignore[arg-type]
            assert run.config[field] == other
            with pytest.raises(UserError, match=r"inputs\.x: expected 1f3c"):
                RunFolder.create(tmp_path / field, config={field: one}, **make | {"inputs": {"x": "0"}})  # type: ignore
    # Under pmap each device samples with a key of its own, so that other devices would sample other responses.
    settings: dict[str, Any] = {"name": "x", "init": "runs/a", "reward": "runs/b"}
    on, off = PPOConfig(pmap=True, devices=2, **settings), PPOConfig(devices=2, **settings)
    for earlier, given, refused in (
        (on, off, "pmap: expected True as in the earlier run, got False"),
        (off, on, "pmap: expected False as in the earlier run, got True"),
        (on, PPOConfig(pmap=True, devices=4, **settings), "devices: expected 2 as in the earlier run, got 4"),
        (on, PPOConfig(pmap=True, mesh="data=4", **settings), "devices: expected 2 as in the earlier run, got 1"),
        (off, PPOConfig(devices=4, **settings), ""),
    ):
        with case(refused):
            place = tmp_path / f"pmap{len(list(tmp_path.iterdir()))}"
            RunFolder.create(place, config=to_plain(earlier), **make)  # type: ignore[arg-type]
            with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
                RunFolder.create(place, config=to_plain(given), may_change=given.may_change, **make)  # type: ignore
    for change, message in (
        *(
            (
                {"reward_function": functions},
                r"reward_function: expected \['a/f.py:few\(most=3\)', .* as in the earlier run",
            )
            for functions in (
                ["a/f.py:few(most=4)", "package.module:g"],
                ["a/g.py:few(most=3)", "package.module:g"],
                ["a/f.py:few(most=3)", "module:g"],
                ["b/f.py:few(most=3)"],
                [],
            )
        ),
        ({"fingerprint": "0000"}, "base.fingerprint: expected 1f3c as in the earlier run, got 0000"),
        ({"pmap": True}, "pmap: expected False as in the earlier run, got True"),
        ({"seed": 1}, "seed: expected nothing as in the earlier run, got 1"),
    ):
        with pytest.raises(UserError, match=message):
            start(**change)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    create(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"inputs": {"data/a.jsonl": "0000"}}))
    with pytest.raises(UserError, match=r"inputs.data/a.jsonl: expected 0000 .* got 1f3c"):
        create(tmp_path)


def test_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("…")
    (tmp_path / "file").write_text("…")
    create(tmp_path / "sft")
    (tmp_path / "sft" / "tokenizer.json").unlink()
    create(tmp_path / "old")
    about = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(about | {"format_version": 0}))
    for path, message in [
        ("none", "expected the folder of a sft or ppo run, got no such folder"),
        ("notes", "got one without config.json"),
        ("sft", "tokenizer.json is missing"),
        ("old", "format_version: expected 1, got 0"),
    ]:
        with pytest.raises(UserError, match=message):
            RunFolder.open(tmp_path / path, stages=("sft", "ppo"))
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text('{"model_type": "llama"}')
    for path, message in [
        ("notes", "got todo.txt but no config.json"),
        ("file", "got a file"),
        ("published", "expected that of a run, got one without a field 'format_version'"),
    ]:
        with pytest.raises(UserError, match=message):
            create(tmp_path / path)
    # Not even a lock is left in them.
    assert [child.name for child in (tmp_path / "notes").iterdir()] == ["todo.txt"]
    assert [child.name for child in (tmp_path / "published").iterdir()] == ["config.json"]


def test_a_spoiled_config_is_one_line(tmp_path: Path) -> None:
    create(tmp_path)
    for text in ("", "{", "[]", "{}", '{"format_version": 1, "stage": 3}'):
        for use in (create, lambda path: RunFolder.open(path, stages=("sft",))):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(UserError, match=r"config\.json") as error:
                use(tmp_path)
                pytest.fail(f"taken for a config: {text}")
            assert "\n" not in str(error.value), text


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    create(tmp_path)
    Tokenizer.train(["to be or not to be"] * 9, 262).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected fingerprint"):
        RunFolder.open(tmp_path, stages=("sft",))


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = create(tmp_path)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        process.stdout.readline()
        with pytest.raises(UserError, match="is writing in this folder"), run.lock():
            pass
        process.kill()
    with run.lock():
        # The message names who holds it, here this very process through another file.
        with pytest.raises(UserError, match=f"process {os.getpid()} is writing"), run.lock():
            pass
    with run.lock():
        pass


def finished(path: Path, seed: int = 0, **given: Any) -> Path:
    """The folder of a finished run of PPO, whose released parameters are not its last ones."""
    released = random_params(MODEL, seed=seed + 1)
    write_run(path, "ppo", random_params(MODEL, seed=seed), MODEL, TOKENIZER, released=released, **given)
    return path


def opened(path: Path) -> str:
    """Fingerprint of what a later stage takes, which reads it."""
    source = open_source(str(path), stages=("ppo",))
    assert source.fingerprint == fingerprint(source.own())
    return source.fingerprint


def test_what_later_stages_read_is_sealed(tmp_path: Path) -> None:
    whole, other = finished(tmp_path / "whole", score_mean=0.5), finished(tmp_path / "other", seed=5)
    clean = opened(whole)
    assert clean != opened(other) and clean == fingerprint(random_params(MODEL, seed=1))
    random, refused = np.random.default_rng(0), 0
    for number, name in enumerate(sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())):
        arrays = name.name != "manifest.json" and {"checkpoints", "training"} & {*name.parts}
        if name.name == "run.lock" or arrays:
            continue  # nothing of the last checkpoint's arrays is handed on
        for how in ("flip", "truncate", "delete"):
            with case((str(name), how)):
                copy = tmp_path / f"{number}_{how}"
                shutil.copytree(whole, copy)
                content = bytearray((copy / name).read_bytes())
                content[random.integers(len(content))] ^= 1 << random.integers(8)
                (copy / name).write_bytes(content if how == "flip" else content[:-1])
                if how == "delete":
                    (copy / name).unlink()
                if (name.name, how) == ("manifest.json", "delete") and len(name.parts) == 1:
                    continue  # as a run of an earlier version
                with pytest.raises(UserError) as end:
                    opened(copy)
                assert str(copy) in str(end.value) and "\n" not in str(end.value)
                refused += 1
    assert refused > 20
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    for what, spoil, said in (
        ("no released", lambda run: shutil.rmtree(run / "released"), "released/00000000 is missing; copy the whole"),
        ("no summary", lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
        ("no checkpoints", lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints/00000000 is missing"),
        ("another's released", swapped(other / "released"), "released/00000000/manifest.json differs from what was"),
        (
            "another's step",
            lambda run: shutil.copytree(other / "released" / "00000000", run / "released" / "00000007"),
            "released/00000007 is not of this run",
        ),
    ):
        with case(what):
            run = shutil.copytree(whole, tmp_path / what)
            spoil(run)
            with pytest.raises(UserError, match=said):
                opened(run)


def swapped(folder: Path) -> Any:
    def spoil(run: Path) -> None:
        shutil.rmtree(run / folder.name)
        shutil.copytree(folder, run / folder.name)

    return spoil


def test_a_run_of_an_earlier_version_loads_and_is_said_to_be_unsealed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished(tmp_path / "old")
    (run / "manifest.json").unlink()
    source = open_source(str(run), stages=("ppo",))
    # As the runs that started from it have recorded it: by the last checkpoint.
    assert source.fingerprint == fingerprint(random_params(MODEL)) != fingerprint(source.own())
    assert [record.message.partition(",")[0] for record in caplog.records] == [f"{run}: made by an earlier version"]
    # Its own command seals it, as it is.
    write_run_again = RunFolder.create(
        run, stage="ppo", config={}, model=to_plain(MODEL), tokenizer=TOKENIZER, inputs={}
    )
    assert write_run_again.finished and opened(run) == fingerprint(random_params(MODEL, seed=1))
    # A start that was killed between the files and their seal is healed by the next.
    (run / "config.json").write_text((run / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"config\.json differs from what was written"):
        opened(run)
    RunFolder.create(run, stage="ppo", config={}, model=to_plain(MODEL), tokenizer=TOKENIZER, inputs={})
    opened(run)
