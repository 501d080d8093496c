"""Reward models made by transformers: its score of a row's last token here, and every tensor written back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr

from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import last_token_scores
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.huggingface import read_folder, write_folder

PAD = 0
COMMON: dict[str, Any] = {
    "vocab_size": 43,
    "max_position_embeddings": 48,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "num_labels": 1,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tr.LlamaConfig(**COMMON, **GROUPED),
    "mistral": lambda: tr.MistralConfig(**COMMON, **GROUPED, sliding_window=5),
    "qwen2": lambda: tr.Qwen2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": lambda: tr.Qwen3Config(**COMMON, **GROUPED),
    "gpt2": lambda: tr.GPT2Config(
        vocab_size=43,
        n_positions=48,
        n_embd=24,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
        num_labels=1,
    ),
    "gpt_neox": lambda: tr.GPTNeoXConfig(**COMMON, num_attention_heads=3),
    "stablelm": lambda: tr.StableLmConfig(
        **(COMMON | {"hidden_size": 32}), num_attention_heads=4, num_key_value_heads=2
    ),
    "gemma2": lambda: tr.Gemma2Config(**COMMON, **GROUPED, sliding_window=4),
    "gemma3_text": lambda: tr.Gemma3TextConfig(**COMMON, **GROUPED, sliding_window=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers' classifier, its folder), all weights random and of a size that shows."""
    torch.manual_seed(0)
    model = tr.AutoModelForSequenceClassification.from_config(CONFIGS[request.param](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval(), folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores(case: tuple[Any, Path], side: str) -> None:
    model, folder = case
    slots = np.arange(17)[None, :]
    lengths = np.array([17, 12, 4])[:, None]
    mask = slots < lengths if side == "right" else slots >= 17 - lengths
    tokens = np.where(mask, np.random.default_rng(0).integers(3, 43, mask.shape), PAD).astype(np.int32)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0), dtype=torch.long),
        ).logits
    read = read_folder(folder)
    assert read.scalar
    ours = last_token_scores(Transformer(read.model, scalar=True), read.load(), *map(jnp.asarray, (tokens, mask)))
    assert np.ptp(ours) > 0.1
    np.testing.assert_allclose(ours, theirs[:, 0], atol=1e-4)


def test_written_back_it_is_the_same(case: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = case
    read = read_folder(folder)
    write_folder(tmp_path / "out", read.load(), read.model, origin=read.origin)
    before = read_folder(folder).tensors
    after = read_folder(tmp_path / "out").tensors
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        np.testing.assert_array_equal(before.tensor(name), after.tensor(name), err_msg=name)
    saved = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out")]
    # Ours says besides how many labels there are in the older key, and the bias that the class lacks.
    assert saved[1].pop("rlhf_jax") == {"score_bias": 0.0} and saved[1].pop("num_labels") == 1
    assert saved[0] == saved[1]


def test_two_labels_are_no_reward(tmp_path: Path) -> None:
    """transformers writes nothing about two labels: they are what is meant where nothing is said."""
    config = tr.LlamaConfig(**COMMON | {"num_labels": 2}, **GROUPED)
    tr.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"num_labels.*one label"):
        read_folder(tmp_path)
