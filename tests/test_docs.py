"""The pages of docs/: what they tell to type is understood, their Python runs, their lists leave nothing out."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rlhf_jax
from rlhf_jax.arrays import PreferenceBatch, PromptBatch, RankingBatch, TokenBatch
from rlhf_jax.cli.app import COMMANDS, module_of
from rlhf_jax.cli.flags import _flags, parse
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.data import Ledger, read_records
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.runs.metrics import Throughput
from rlhf_jax.stages import ppo, preference, pretrain, reward, sft
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Entries of the lab notebook are as of their day.
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.name != "lab-notebook.md"]
# Programs of others, which the pages name too.
OTHERS = {"source", "rsync", "head", "pip download", "vllm", "llama-cli", "python convert_hf_to_gguf.py"}
OTHERS_FLAGS = {
    "--allow-root",
    "--peer-python",
    "--outfile",
    "--model",
    "--name",
    "--no-name",
    "--pod",
    "--zone",
    "--restarts",
    "--help",
    "--no-deps",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of code in these languages; "" is one without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def programs() -> Iterator[tuple[str, Any]]:
    """(command, its settings) of every command."""
    for name in COMMANDS:
        module = module_of(name)
        if hasattr(module, "COMMANDS"):
            yield from ((f"{name} {inner}", one.Config) for inner, one in module.COMMANDS.items())
        else:
            yield name, module.Config


CONFIGS: dict[str, Any] = dict(programs())


def understood(words: list[str]) -> None:
    """Fails unless the flags of a command are those of its program."""
    length = 2 if words[0] == "feedback" else 1
    assert parse(CONFIGS[" ".join(words[:length])], words[length:])


@pytest.mark.core
def test_the_commands_have_the_flags_of_their_program() -> None:
    count = 0
    for page in PAGES:
        for code in blocks(page, ""):
            for line in re.split(r"^(?=rlhf-jax |\S*python )", code, flags=re.MULTILINE):
                start = re.match(r"rlhf-jax |\S*python .*?-m rlhf_jax ", line)
                if start is not None:
                    with case((page.name, line)):
                        understood(shlex.split(line[start.end() :]))
                        count += 1
        # In the text, whole commands such as `rlhf-jax sft --pack 256`; a placeholder is in capitals.
        for words in re.findall(r"`rlhf-jax ([a-z][^`]* [^`]*)`", prose(page)):
            if not re.search(r"\b[A-Z]{4,}\b|…", words):
                with case((page.name, words)):
                    understood(shlex.split(words))
                    count += 1
    assert count > 50


@pytest.mark.core
def test_the_flags_in_the_text_are_those_of_a_program() -> None:
    known = {flag for config in CONFIGS.values() for flag in _flags(config)}
    known |= OTHERS_FLAGS | {"--distributed", "--coordinator", "--config", "--processes"}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]*)`", prose(page)):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", span):
                with case((page.name, span)):
                    assert flag in known or any(other.startswith(flag + ".") for other in known), flag


@pytest.mark.core
def test_what_a_shell_is_told_is_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for code in blocks(page, "sh"):
            for line in code.replace("\\\n", " ").replace(" && ", "\n").splitlines():
                with case((page.name, line)):
                    words = shlex.split(line)
                    if words[0] == "make":
                        assert words[1] in targets
                        assert all(word.removeprefix("EXTRAS=") in extras for word in words[2:])
                    elif words[0] == "sh":
                        assert (ROOT / words[1]).exists()
                    elif words[0].startswith("scripts/"):
                        assert (ROOT / words[0]).exists()
                        understood([Path(words[words.index("--") + 1]).stem, *words[words.index("--") + 2 :]])
                    elif words[:2] == ["pip", "install"]:
                        asked = [re.fullmatch(r"rlhf_jax\[(\w+)\]", word) for word in words[2:]]
                        assert all(found[1] in extras for found in asked if found)
                    else:
                        assert words[0] in OTHERS or " ".join(words[:2]) in OTHERS


@pytest.mark.core
def test_rows_of_data_are_read(tmp_path: Path) -> None:
    text = (DOCS / "reference" / "data-formats.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    kinds: tuple[Any, ...] = ("text", "demonstrations", "dialogues", "comparisons", "rankings", "prompts")
    assert tuple(title.lower() for title, _ in sections) == kinds
    for kind, (_, section) in zip(kinds, sections, strict=True):
        with case(kind):
            row = re.search(r"```json\n(.*?)```", section, re.DOTALL)
            assert row is not None
            (tmp_path / "data.jsonl").write_text(row[1], encoding="utf-8")
            assert len(read_records(tmp_path / "data.jsonl", kind, Ledger())) == 1
    for page in PAGES:
        for code in blocks(page, "json"):
            assert all(isinstance(json.loads(line), dict) for line in code.splitlines())


@pytest.mark.core
def test_links_lead_to_files() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose(page)):
            target = (page.parent / link).resolve()
            if target.parent.name == "notebooks":  # copied there when the site is built
                target = ROOT / "notebooks" / target.name
            assert target.exists(), (page.name, link)
        for name in re.findall(r"`((?:scripts|examples|tests|tests_interop|benchmarks)/[\w/.]+)`", prose(page)):
            # A placeholder is in capitals.
            assert (ROOT / name).exists() or name.isupper() or "COMMAND" in name, (page.name, name)


@pytest.mark.core
def test_the_front_page_leads_there() -> None:
    front = (DOCS / "index.md").read_text(encoding="utf-8")
    for link in (
        "explanation/recipe.md#equation-function",
        "tutorials/own-data.md",
        "how-to/reward-does-not-rise.md",
        "reference/metrics.md#ppo",
    ):
        assert f"({link})" in front
    assert "\n## Equation → function\n" in (DOCS / "explanation" / "recipe.md").read_text(encoding="utf-8")


@pytest.mark.core
def test_the_reference_has_every_command_every_setting_and_every_public_name() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    nested = {"ModelConfig", "RopeScaling", "OptimConfig", "EpisodeConfig", "LoraConfig", "Cluster"}
    assert set(re.findall(r"```\{flags\} (.+)", page)) == set(CONFIGS) | nested
    modules = {
        name
        for path in (DOCS / "reference" / "api").glob("*.md")
        for name in re.findall(r"automodule:: (\S+)", path.read_text(encoding="utf-8"))
    }
    names = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    for name in rlhf_jax.__all__:
        with case(name):
            assert f"`{name} <{getattr(rlhf_jax, name).__module__}.{name}>`" in names
            assert getattr(rlhf_jax, name).__module__ in modules
    for folder in ("stages", "trainers"):
        for path in (ROOT / "rlhf_jax" / folder).glob("[!_]*.py"):
            assert f"rlhf_jax.{folder}.{path.stem}" in modules


def traced(make_update: Any, model: Transformer, batch: Any, *frozen: Any) -> set[str]:
    """The names of the metrics of one update, which is traced and not compiled."""
    optimizer = make_optimizer(OptimConfig(), steps=1)

    def metrics(batch: Any) -> dict[str, Any]:
        params = init_params(model, jax.random.key(0))
        return make_update(model, optimizer)(new_state(params, optimizer.init(params), 0), batch, *frozen)[1]

    return set(jax.eval_shape(metrics, batch))


def written_by_the_stages() -> set[str]:
    """The names of the metrics of all updates, with every part of PPO in use."""
    shape = ModelConfig(vocab_size=11, context=12, width=4, layers=1, heads=1)
    model, scorer = Transformer(shape), Transformer(shape, scalar=True)
    ids, mask = jnp.ones((2, 2, 4), jnp.int32), jnp.ones((2, 2, 4), bool)
    text = TokenBatch(ids[0], ids[0], mask[0])
    names = traced(pretrain.make_update, model, text) | traced(sft.make_update, model, text)
    ranking = RankingBatch(ids, mask, ids[:, :, 0], mask[:, :, 0])
    names |= traced(reward.make_update, scorer, ranking)
    kto = functools.partial(preference.make_update, config=preference.Config(method="kto"))
    names |= traced(
        kto, model, PreferenceBatch(ranking, mask, text), preference.Frozen(init_params(model, jax.random.key(0)))
    )
    config = ppo.Config(
        batch=4,
        minibatches=2,
        pretraining_coef=1.0,
        pretraining_batch=2,
        kl_target=1.0,
        ema_decay=0.5,
        importance_max=2.0,
        episode=EpisodeConfig(response_length=3),
    )

    def metrics(batch: ppo.Batch) -> dict[str, Any]:
        language, score = (init_params(one, jax.random.key(0)) for one in (model, scorer))
        frozen = ppo.Frozen(language, score, jnp.float32(0), jnp.float32(1))
        update = ppo.make_update(ppo.Networks(model, scorer), config, eos_id=8, pad_id=10)
        return update(ppo.initial_state(config, language, score), batch, frozen)[1]

    prompts = PromptBatch(ids.reshape(4, 4), mask.reshape(4, 4))
    return names | set(jax.eval_shape(metrics, ppo.Batch(prompts, text)))


def keys_in(function: str, tree: ast.AST) -> set[str]:
    """The string keys of the dicts below what a module names so: a function, a keyword's value, an assigned value."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            found |= literal_keys(node)
        elif isinstance(node, ast.keyword) and node.arg == function:
            found |= literal_keys(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == function:
            found |= literal_keys(node.value)
    return found


def literal_keys(tree: ast.AST) -> set[str]:
    """The string keys of all dicts in a tree."""
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return {str(key.value) for node in dicts for key in node.keys if isinstance(key, ast.Constant)}


@pytest.mark.slow
def test_every_metric_is_explained_and_none_that_is_not_written() -> None:
    throughput = Throughput(1.0, lambda: 1.0).lap(1.0)
    evaluated: set[str] = set()
    summaries: set[str] = set()
    for path in (ROOT / "rlhf_jax" / "trainers").glob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        evaluated |= {f"eval/{name}" for name in keys_in("evaluate", tree)}
        summaries |= keys_in("summary", tree)
    assert {"eval/loss", "eval/accuracy", "eval/bits_per_byte"} == evaluated and "shift" in summaries
    written = written_by_the_stages() | {"reward/NAME", "turns"} | set(throughput) | evaluated | summaries
    page = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    # The names of a table are before its last cell or two.
    rows = re.findall(r"^\|(.*)\|$", page, re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")[:-1]] for row in rows]
    named = {
        name
        for row in cells
        for cell in row[:2]
        if re.fullmatch(r"(`[\w/]+`(, )?)+", cell)
        for name in cell.split("`")[1::2]
    }
    assert named == written


@pytest.mark.core
def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    loaded("docs/_ext/pictures.py").draw(tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").iterdir()}


def loaded(name: str) -> Any:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_python_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.csv").write_text(
        'question,better,worse\nWhy?,"Since, so.",No\nHow?,Thus.,\n', encoding="utf-8"
    )
    shape = ModelConfig(vocab_size=259, context=8, width=4, layers=1, heads=1)
    policy = jax.tree.map(jnp.asarray, {"policy": random_params(shape), "critic": random_params(shape, True)})
    write_run(tmp_path / "runs" / "aligned", "ppo", policy, shape, Tokenizer.bytes())
    row = dict.fromkeys(written_by_the_stages(), 0.0) | {"step": 1, "time": 0.0}
    (tmp_path / "runs" / "aligned" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    count = 0
    # The tutorial about a CSV writes what the others read.
    for page in sorted(PAGES, key=lambda page: page.name != "own-data.md"):
        namespace: dict[str, Any] = {}
        for code in blocks(page, "python"):
            small = code.replace("context=128)", "context=8, width=8, layers=1, heads=1)")
            with case((page.name, code)):
                exec(compile(small, page.name, "exec"), namespace)  # noqa: S102
                count += 1
    assert count > 12
    rows = [json.loads(line) for line in (tmp_path / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": "Q: Why?\nA:", "chosen": " Since, so.", "rejected": " No"}]  # the unanswered row is out


@pytest.mark.slow
def test_the_examples_run_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
    loaded("examples/new_loss.py").main(steps=2)
    assert re.fullmatch(r"ranking_loss: .*\nhinge_loss: .*\n", capsys.readouterr().out)

    shape = ModelConfig(vocab_size=259, context=32, width=8, layers=1, heads=1)
    params = jax.tree.map(jnp.asarray, random_params(shape))
    write_run(tmp_path / "answers", "sft", params, shape, Tokenizer.bytes())
    pairs = [{"prompt": f"{n}?", "chosen": " Yes, it is.", "rejected": " No."} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    flags = f"--out {tmp_path}/judge --init {tmp_path}/answers --data {tmp_path}/pairs.jsonl --batch 8 --steps 1"
    loaded("examples/reward_on_comparisons.py").main(flags.split())
    said = capsys.readouterr().out
    assert "the longer response is preferred in 100% of 40 pairs" in said and said.count("people: Yes, it is.") == 5
