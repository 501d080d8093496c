"""Models out of runs and into runs, by the functions under `rlhf-jax convert`."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.cli import convert
from rlhf_jax.config import EpisodeConfig, LoraConfig, ModelConfig
from rlhf_jax.data import Demonstration, Ledger, Prompt, Text, encode_rankings, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.convert import export, import_model
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.trainers import ppo, pretrain, reward, sft

TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) + 60
ANSWERS = [Demonstration(f"say {word}", f" {word}!") for word in ("red", "blue", "green", "grey")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four stages with the recipe's kind of model; SFT trains an adapter, the others whole networks."""
    root = tmp_path_factory.mktemp("runs")
    model = ModelConfig(context=48, width=16, layers=2, heads=4, kv_heads=2, qk_norm=True, embedding_scale=4.0)
    common: dict[str, Any] = {"batch": 4, "steps": 2, "log_every": 1}
    config = pretrain.Config(out=str(root / "base"), tokenizer="bytes", model=model, row_length=16, **common)
    pretrain.run(config, texts=[Text("red blue green grey " * 8)], heldout=[])
    lora = LoraConfig(rank=2, alpha=4.0)
    sft.run(
        sft.Config(out=str(root / "sft"), init=str(root / "base"), lora=lora, **common), records=ANSWERS, heldout=[]
    )
    pairs = root / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": a.prompt, "chosen": a.completion, "rejected": " no"}) + "\n" for a in ANSWERS)
    )
    tokenizer = RunFolder.open(root / "base", stages=("pretrain",)).tokenizer
    rows = encode_rankings(
        read_records([str(pairs)], "rankings", Ledger()), tokenizer, max_tokens=48, ledger=Ledger(), buckets=(32,)
    )
    reward.run(
        reward.Config(out=str(root / "judge"), init=str(root / "base"), **common),
        rankings=rows,
        heldout=rows,
        demonstrations=ANSWERS,
    )
    episode = EpisodeConfig(response_length=6)
    ppo.run(
        ppo.Config(
            out=str(root / "ppo"),
            init=str(root / "sft"),
            reward=str(root / "judge"),
            prompt_length=16,
            minibatches=2,
            episode=episode,
            **common,
        ),
        prompts=[Prompt(answer.prompt) for answer in ANSWERS],
    )
    return root


@pytest.mark.parametrize(
    ("name", "stages"), [("base", ("pretrain",)), ("sft", ("sft",)), ("ppo", ("ppo",)), ("judge", ("reward",))]
)
def test_an_exported_run_computes_what_the_run_does(
    runs: Path, tmp_path: Path, name: str, stages: tuple[str, ...]
) -> None:
    said = export(str(runs / name), tmp_path / "out")
    before = open_source(str(runs / name), stages=stages)
    after = open_source(f"hf:{tmp_path / 'out'}", stages=stages)
    assert ("SequenceClassification" in said) == before.scalar
    assert (after.score_mean, after.score_scale) == (before.score_mean, before.score_scale)
    assert after.tokenizer.encode("Say grey!") == before.tokenizer.encode("Say grey!")
    assert (after.tokenizer.eos_id, after.tokenizer.bos_id) == (before.tokenizer.eos_id, before.tokenizer.bos_id)
    values = [jax.jit(s.network().apply)({"params": s.params()}, TOKENS) for s in (before, after)]
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
    first, second = (jax.jit(s.network().apply)({"params": s.params()}, TOKENS) for s in (before, after))
    np.testing.assert_allclose(first, second, atol=1e-5)
    with pytest.raises(UserError, match="found a whole network, wanted a run that trained an adapter"):
        export(str(runs / "base"), tmp_path / "other", adapter=True)


def test_the_value_network_is_written_as_a_model_with_a_score(runs: Path, tmp_path: Path) -> None:
    assert "SequenceClassification" in export(str(runs / "ppo"), tmp_path / "critic", critic=True)
    saved = RunFolder.open(runs / "ppo", stages=("ppo",)).load_params()["critic"]
    read = open_source(f"hf:{tmp_path / 'critic'}", stages=("reward",)).params()
    np.testing.assert_array_equal(read["score"]["kernel"], saved["score"]["kernel"])
    np.testing.assert_allclose(read["score"]["bias"], saved["score"]["bias"], rtol=1e-6)
    with pytest.raises(UserError, match="found a sft run, wanted a ppo run, which has a value network"):
        export(str(runs / "sft"), tmp_path / "none", critic=True)


def test_a_folder_in_use_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(UserError, match="found something there, wanted a new or empty folder"):
        export(str(runs / "base"), tmp_path / "out")


@pytest.mark.parametrize("target", ["gguf:out", "pypi:out", "hf:", "peft:", ""])
def test_a_target_that_cannot_be_written_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=f"^target: found '{target}'.* wanted .*hf:FOLDER"):
        convert.Config(source="runs/base", target=target)
