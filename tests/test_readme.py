"""What README.md names is there, and what it tells to type is understood."""

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.cli.app import module_of
from rlhf_jax.cli.flags import parse
from rlhf_jax.config import ModelConfig
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.made_params import random_params
from tests.made_runs import write_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:rlhf-jax|python .* -- -m rlhf_jax) (.*)$", README, re.MULTILINE)


def block(language: str, word: str = "", page: str = README) -> str:
    """The first block of code in a language that has a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return next(code for code in blocks if word in code)


@pytest.mark.core
def test_the_commands_have_the_flags_of_their_program() -> None:
    assert len(COMMANDS) >= 6
    for line in COMMANDS:
        command, *arguments = shlex.split(line)
        program = module_of(command)
        if hasattr(program, "COMMANDS"):
            program = program.COMMANDS[arguments.pop(0)]
        assert parse(program.Config, arguments), line


@pytest.mark.core
def test_the_files_and_links_are_there() -> None:
    for name in re.findall(r"`((?:rlhf_jax|stages|scripts)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.core
def test_the_example_in_python_runs() -> None:
    namespace: dict[str, Any] = {}
    # README sends there.
    code = block("python", "init_params", (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8"))
    small = code.replace("vocab_size=1024, context=128", "vocab_size=32, context=8, width=8, layers=1, heads=1")
    assert small != code
    exec(compile(small, "api.md", "exec"), namespace)  # noqa: S102
    assert callable(namespace["update"])


@pytest.mark.runs
def test_ppo_with_a_function_in_a_dozen_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python", "reward_funcs")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    model = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=128, width=8, layers=1, heads=1)
    write_run(tmp_path / "runs" / "answers", "sft", random_params(model), model, Tokenizer.bytes())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Q: Why?"}\n')
    small = code.replace("steps=30", "steps=1, batch=4, minibatches=1")
    assert small != code
    with contextlib.chdir(tmp_path):
        exec(compile(small, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
    assert capsys.readouterr().out.startswith("[")
    assert "reward/fewer_commas" in (tmp_path / "runs" / "plain" / "metrics.jsonl").read_text()
