"""Models out of runs and into runs, by the functions under `rlhf-jax convert`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.cli import convert
from rlhf_jax.config import LoraConfig, ModelConfig, to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.convert import export, import_model
from rlhf_jax.pretrained.source import Source, open_source
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_adapter, random_params, shapes_traced_once  # noqa: F401
from tests.made_runs import write_run

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("shapes_traced_once")]

TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) + 60
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the four stages with the recipe's kind of model; of SFT an adapter, of the others whole networks.

    `test_sources.py` exports what the stages themselves have written.
    """
    root, tokenizer = tmp_path_factory.mktemp("runs"), Tokenizer.bytes()
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, context=48, width=16, layers=2, heads=4, kv_heads=2, qk_norm=True,
        embedding_scale=4.0,
    )  # fmt: skip
    write_run(root / "base", "pretrain", random_params(model), model, tokenizer)
    fingerprint = open_source(str(root / "base"), stages=("pretrain",)).fingerprint
    beside = {"init": str(root / "base"), "fingerprint": fingerprint, "lora": to_plain(LORA)}
    adapter = random_adapter(model, LORA, trained=True)
    write_run(root / "sft", "sft", adapter, model, tokenizer, base=beside)
    scores = {"score_mean": 0.5, "score_scale": 2.0}
    write_run(root / "judge", "reward", random_params(model, scalar=True), model, tokenizer, **scores)
    both = {"policy": random_params(model, seed=1), "critic": random_params(model, scalar=True, seed=2)}
    # What is handed on is not always what was trained last: it may be the mean of many steps.
    write_run(root / "ppo", "ppo", both, model, tokenizer, released=random_params(model, seed=3))
    return root


@functools.cache
def network(model: ModelConfig, scalar: bool) -> Callable[..., Any]:
    return jax.jit(Transformer(model, scalar=scalar).apply)


def output(source: Source) -> np.ndarray:
    """What a model says of some tokens."""
    return np.asarray(network(source.model, source.scalar)({"params": source.params()}, TOKENS))


RUNS = [("base", ("pretrain",)), ("sft", ("sft",)), ("ppo", ("ppo",)), ("judge", ("reward",))]


def test_an_exported_run_computes_what_the_run_does(runs: Path, tmp_path: Path) -> None:
    for row in RUNS:
        with case(row) as (name, stages):
            said = export(str(runs / name), tmp_path / name)
            before = open_source(str(runs / name), stages=stages)
            after = open_source(f"hf:{tmp_path / name}", stages=stages)
            assert ("SequenceClassification" in said) == before.scalar
            assert (after.score_mean, after.score_scale) == (before.score_mean, before.score_scale)
            assert after.tokenizer.encode("Say grey!") == before.tokenizer.encode("Say grey!")
            assert (after.tokenizer.eos_id, after.tokenizer.bos_id) == (
                before.tokenizer.eos_id,
                before.tokenizer.bos_id,
            )
            values = [output(before), output(after)]
            shared = None if before.scalar else min(value.shape[-1] for value in values)
            first, second = (value if before.scalar else value[..., :shared] for value in values)
            np.testing.assert_allclose(first, second, atol=1e-4)


def test_there_and_back_the_parameters_are_the_same(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "base"), tmp_path / "hf")
    import_model(f"hf:{tmp_path / 'hf'}", tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "again")
    first, again = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("hf", "again"))
    assert first == again
    for name in first:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_an_adapter_alone_goes_out_and_comes_in(runs: Path, tmp_path: Path) -> None:
    said = export(str(runs / "sft"), tmp_path / "adapter", adapter=True)
    assert "adapter of rank 2" in said
    before, after = (
        open_source(str(runs / "sft"), stages=("sft",)),
        open_source(f"peft:{tmp_path / 'adapter'}", stages=("sft",)),
    )
    np.testing.assert_allclose(output(before), output(after), atol=1e-5)
    with pytest.raises(UserError, match=r"expected a run that trained an adapter .*, got a whole network"):
        export(str(runs / "base"), tmp_path / "other", adapter=True)


def test_the_value_network_is_written_as_a_model_with_a_score(runs: Path, tmp_path: Path) -> None:
    assert "SequenceClassification" in export(str(runs / "ppo"), tmp_path / "critic", critic=True)
    saved = RunFolder.open(runs / "ppo", stages=("ppo",)).load_params()["critic"]
    read = open_source(f"hf:{tmp_path / 'critic'}", stages=("reward",)).params()
    np.testing.assert_array_equal(read["score"]["kernel"], saved["score"]["kernel"])
    np.testing.assert_allclose(read["score"]["bias"], saved["score"]["bias"], rtol=1e-6)
    with pytest.raises(UserError, match="expected a ppo run, which has a value network, got a sft run"):
        export(str(runs / "sft"), tmp_path / "none", critic=True)


def test_a_folder_in_use_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        export(str(runs / "base"), tmp_path / "out")


def test_a_target_that_cannot_be_written_is_refused() -> None:
    for target in ["gguf:out", "pypi:out", "hf:", "peft:", ""]:
        with case(target), pytest.raises(UserError, match=f"^target: expected .*hf:FOLDER.* got '{target}'"):
            convert.Config(source="runs/base", target=target)
