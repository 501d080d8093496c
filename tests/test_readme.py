"""What README.md names is there, and what it tells to type is understood."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data import Ledger, read_records
from scripts import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KINDS: tuple[Any, ...] = ("text", "demonstrations", "dialogues", "comparisons", "rankings", "prompts")
COMMANDS = re.findall(r"^python (scripts/\w+\.py.*)$", README, re.MULTILINE)


def block(language: str) -> str:
    """The first block of code in a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def exists(name: str, *folders: str) -> bool:
    return any((ROOT / folder / name).exists() for folder in folders)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_the_flags_of_their_script(command: str) -> None:
    # What a launcher starts stands behind its own flags.
    script, *arguments = shlex.split(command.rpartition(" -- ")[2])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "COMMANDS"):
        config_class = module.COMMANDS[arguments.pop(0)][1]
    else:
        stage = module if hasattr(module, "Config") else vars(module)[Path(script).stem]
        config_class = stage.Config
    assert cli.parse(config_class, argv=arguments)


@pytest.mark.parametrize(("kind", "row"), list(zip(KINDS, block("json").splitlines(), strict=True)), ids=KINDS)
def test_the_six_rows_are_read(kind: Any, row: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(row + "\n", encoding="utf-8")
    assert len(read_records(tmp_path / "data.jsonl", kind, Ledger())) == 1


def test_the_functions_files_and_links_are_there() -> None:
    functions = re.findall(r"`(losses|returns|kl|masked)\.(\w+)`", README)
    assert len(functions) == 11
    for module, name in functions:
        assert hasattr(importlib.import_module(f"rlhf_jax.{module}"), name)
    for name in re.findall(r"`((?:rlhf_jax|stages|scripts)/[\w/.]+)`", README):
        assert exists(name, "", "rlhf_jax"), name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert exists(link, ""), link


def test_the_tree_is_that_of_the_repository() -> None:
    drawn = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert drawn is not None
    names = set(re.findall(r"[\w-]+\.py\b|[\w-]+/", drawn[1].replace("test_<module>.py", "")))
    for name in names:
        assert exists(name, "", "rlhf_jax", "rlhf_jax/stages", "scripts", "tests", "benchmarks"), name
    package = {path.name for path in (ROOT / "rlhf_jax").glob("*.py")} - {"__init__.py"}
    assert not package - names, "in the package, not in the tree"


def test_the_example_in_python_runs() -> None:
    namespace: dict[str, Any] = {}
    exec(compile(block("python"), "README.md", "exec"), namespace)  # noqa: S102
    assert callable(namespace["update"])
