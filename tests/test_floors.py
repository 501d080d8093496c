"""The house of design.md: a file imports only from lower floors, and what must not be in the library is not in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOOR = {
    **dict.fromkeys(["errors", "arrays", "masked", "config", "witness"], 0),
    # Which of several processes this is: below all that asks.
    **dict.fromkeys(["watchdog", "distributed"], 1),
    **dict.fromkeys(["losses", "returns", "kl", "rope", "sharding", "packing"], 1),
    **dict.fromkeys(
        [
            "lora",
            "model_config",
            "attention",
            "cache",
            "families",
            "layouts",
            "model",
            "generate",
            "optim",
            "tokenizer",
            "durable",
        ],
        2,
    ),
    **dict.fromkeys(["gguf_file", "gguf_tokenizer", "gguf_reader"], 2),
    "byte_bpe": 1,
    **dict.fromkeys(["chat", "hf_encoders", "hf_tokenizer", "hf_export"], 2),
    **dict.fromkeys(["fields", "attention_fields", "safetensors_folder"], 2),
    **dict.fromkeys(["scoring", "episodes", "evaluation"], 3),
    **dict.fromkeys(["data", "parallel", "checkpoint", "run_folder", "metrics", "huggingface", "peft"], 3),
    **dict.fromkeys(["fit", "runs", "report", "sampling", "bigram", "sources", "convert"], 4),
    "feedback": 5,
    **dict.fromkeys(["stages.pretrain", "stages.sft", "stages.reward", "stages.ppo", "feedback"], 5),
    "plan": 6,
    # These two hold the public names and nothing else, and nothing below may import through them.
    "stages": 6,
    "rlhf_jax": 6,
}
# (importer, imported) on one floor. The files of data/ may import each other, stages never.
NEIGHBOURS = {
    ("tokenizer", "chat"),  # for the type alone
    ("tokenizer", "hf_tokenizer"),  # to load one and
    ("tokenizer", "hf_export"),  # to write one, when it is asked for
    ("chat", "tokenizer"),
    ("hf_tokenizer", "chat"),
    ("hf_tokenizer", "hf_encoders"),
    ("hf_tokenizer", "tokenizer"),
    ("hf_export", "hf_tokenizer"),
    ("hf_export", "tokenizer"),
    ("distributed", "watchdog"),
    ("masked", "arrays"),  # the array names are for all,
    ("config", "errors"),  # and so is the exception
    ("returns", "kl"),  # the KL in the reward is the one of kl.py
    ("gguf_tokenizer", "gguf_file"),
    ("gguf_reader", "gguf_file"),
    ("gguf_reader", "gguf_tokenizer"),
    ("cache", "model_config"),
    ("attention", "cache"),
    ("model", "attention"),
    ("model", "model_config"),
    ("model", "cache"),
    ("attention_fields", "fields"),
    ("attention_fields", "model_config"),
    ("families", "attention_fields"),
    ("families", "fields"),
    ("families", "model_config"),
    ("layouts", "model_config"),
    ("safetensors_folder", "durable"),
    ("generate", "cache"),
    ("generate", "model"),
    ("episodes", "scoring"),
    ("evaluation", "scoring"),
    ("evaluation", "data"),
    ("run_folder", "checkpoint"),
    ("runs", "fit"),
    ("peft", "huggingface"),
    ("sources", "runs"),
    ("convert", "sources"),
}

# Folders whose files may import each other.
ONE_ROOM = {"data", "plan", "report", "feedback"}

ONLY_IN = {"flax": "model.py", "orbax": "checkpoint.py"}
# The arrays and the maths on them know these, the standard library's plainest and each other.
MATHS = ["arrays", "masked", "losses", "returns", "kl"]
MATHS_KNOWS = {"jax", "optax", "rlhf_jax", "__future__", "collections", "dataclasses", "functools", "math", "typing"}
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def room(file: Path) -> str:
    """The name in FLOOR of a file: data/ as a whole is one room, so is report/; each stage is its own."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ONE_ROOM:
        return parts[0]
    return ".".join(part for part in parts if part != "__init__") or "rlhf_jax"


def modules(file: Path) -> Iterator[str]:
    """Dotted absolute names that a file imports, wherever in it: `from rlhf_jax import kl` gives rlhf_jax.kl."""
    package = ["rlhf_jax", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def own_room(module: str) -> str:
    """The name in FLOOR of an imported module or of a name in one; a name of the package itself is "rlhf_jax"."""
    parts = module.split(".")[1:]
    while parts and ".".join(parts) not in FLOOR:
        parts.pop()
    return ".".join(parts) or "rlhf_jax"


def ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_come_from_lower_floors(file: Path) -> None:
    here = room(file)
    if here == "rlhf_jax":
        return
    assert here in FLOOR, f"give {here} a floor in design.md and in FLOOR"
    for module in modules(file):
        if module.split(".")[0] != "rlhf_jax":
            continue
        there = own_room(module)
        allowed = FLOOR[there] < FLOOR[here] or (here, there) in NEIGHBOURS or here == there in ONE_ROOM
        assert allowed, f"{here} (floor {FLOOR[here]}) imports {module} (floor {FLOOR[there]})"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_each_library_has_its_one_file(file: Path) -> None:
    for module in modules(file):
        top = module.split(".")[0]
        assert file == PACKAGE / ONLY_IN.get(top, ids(file)), f"{top} belongs in {ONLY_IN.get(top)}"


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_knows_jax_and_optax_only(name: str) -> None:
    for module in modules(PACKAGE / f"{name}.py"):
        assert module.split(".")[0] in MATHS_KNOWS, f"{name} imports {module}"


@pytest.mark.parametrize("file", [*FILES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda file: file.name)
def test_no_code_from_data(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        at = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not RUNS_CODE & {name.name.split(".")[0] for name in node.names}, at
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in RUNS_CODE, at
            assert node.module != "yaml" or not UNSAFE_YAML & {name.name for name in node.names}, at
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "__import__"}, at
            assert called not in {f"yaml.{name}" for name in UNSAFE_YAML}, at
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords), at
            assert called != "getattr" or len(node.args) == 2, f"{at}: a default hides a missing name"
