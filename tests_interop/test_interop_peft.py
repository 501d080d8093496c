"""Adapters against PEFT itself: each side's adapter gives the other side's logits, and scores."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers as tr
from safetensors.numpy import load_file

from rlhf_jax.arrays import Params
from rlhf_jax.config import LoraConfig
from rlhf_jax.lora import attach, init_adapter
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.huggingface import Pretrained, read_folder
from rlhf_jax.pretrained.peft import base_of, read_adapter, write_adapter

COMMON: dict[str, Any] = {
    "vocab_size": 43,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_labels": 1,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
GPT2 = {"vocab_size": 43, "n_positions": 48, "n_embd": 20, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tr.LlamaConfig(**COMMON, **GROUPED),
    "qwen3": lambda: tr.Qwen3Config(**COMMON, **GROUPED),
    "gpt2": lambda: tr.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1, pad_token_id=0, num_labels=1),
    "gpt_neox": lambda: tr.GPTNeoXConfig(**COMMON, num_attention_heads=3),
    "gemma2": lambda: tr.Gemma2Config(**COMMON, **GROUPED, sliding_window=4, query_pre_attn_scalar=9),
}
KINDS: dict[bool, Any] = {False: tr.AutoModelForCausalLM, True: tr.AutoModelForSequenceClassification}
LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS = np.random.default_rng(0).integers(3, 43, (3, 17)).astype(np.int32)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """PEFT says in warnings which tensors of a folder it had no use for, and which it missed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module", params=[(name, scalar) for name in CONFIGS for scalar in KINDS], ids=str)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained, Params]:
    """(transformers' folder, as we read it, our parameters) of each family as a language model and as a classifier."""
    name, scalar = request.param
    torch.manual_seed(0)
    model = KINDS[scalar].from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    read = read_folder(folder)
    return folder, read, read.load()


def reopened(folder: Path, scalar: bool) -> Any:
    return KINDS[scalar].from_pretrained(folder).eval()


def theirs(model: Any) -> np.ndarray:
    """Logits, or a score a row."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def ours(read: Pretrained, params: Params) -> np.ndarray:
    out = np.asarray(Transformer(read.model, scalar=read.scalar).apply({"params": params}, TOKENS))
    return out[:, -1:] if read.scalar else out


def shaken(tree: Params) -> Params:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), tree)


@pytest.mark.parametrize("targets", [LORA.targets, ("query", "value", "down")], ids=["every", "some"])
def test_our_adapter_in_peft(base: tuple, targets: tuple[str, ...], tmp_path: Path) -> None:
    folder, read, params = base
    there = [target for target in targets if target != "gate" or read.model.gated]
    adapter = shaken(init_adapter(params, LoraConfig(rank=3, targets=tuple(there)), jax.random.key(0)))
    # PEFT's head has no bias: ours is kept beside what it reads.
    bias = 0.5 if read.scalar else 0.0
    if read.scalar:
        adapter["score"] = {"kernel": shaken(params["score"])["kernel"], "bias": np.full(1, bias, np.float32)}
    write_adapter(tmp_path / "a", adapter, LORA, read.model, read.model_type, base=str(folder))
    model = peft.PeftModel.from_pretrained(reopened(folder, read.scalar), tmp_path / "a").eval()
    attached = ours(read, attach(params, adapter, LORA.scale))
    assert np.abs(attached - ours(read, params)).max() > 0.1
    np.testing.assert_allclose(theirs(model) + bias, attached, atol=1e-4)
    # PEFT keeps every tensor of ours under the name that it has.
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert sorted(before) == sorted(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize("rooted", [False, True])
def test_an_adapter_of_peft_here(base: tuple, rooted: bool, tmp_path: Path) -> None:
    folder, read, params = base
    fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(read.model_type, "q_proj")
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if read.scalar else "CAUSAL_LM",
        r=6,
        lora_alpha=9,
        target_modules="all-linear",
        rank_pattern={fused: 4},
        alpha_pattern={f"1.+{fused}": 7},
        use_rslora=rooted,
        fan_in_fan_out=read.model_type == "gpt2",
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        # It is about weights that are turned back into the base's, which these are not.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA")
        model = peft.get_peft_model(reopened(folder, read.scalar), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    adapter, lora = read_adapter(tmp_path / "a", read.model, read.model_type)
    assert base_of(tmp_path / "a") == str(folder)
    assert ("score" in adapter) == read.scalar
    found = ours(read, attach(params, adapter, lora.scale))
    assert np.abs(found - ours(read, params)).max() > 0.1
    np.testing.assert_allclose(found, theirs(model), atol=1e-4)
