"""Every family against transformers: the same config, the same logits, with padding and the cache too, tensors back."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.numpy import load_file

from rlhf_jax.model import Transformer, empty_cache
from rlhf_jax.pretrained.config_fields import Fields
from rlhf_jax.pretrained.families import FAMILIES
from rlhf_jax.pretrained.huggingface import read_folder, write_folder

COMMON: dict[str, Any] = {"vocab_size": 43, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2}
ODD = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE_HEAD = {"head_dim": 10}  # 4 heads of 10 in a stream of 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "mscale": 1.0, "mscale_all_dim": 0.5}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: tr.GPT2Config(
        vocab_size=43, n_positions=48, n_embd=20, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1
    ),
    "gpt2_untied": lambda: tr.GPT2Config(
        vocab_size=43,
        n_positions=48,
        n_embd=20,
        n_layer=2,
        n_head=2,
        n_inner=36,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=1,
        activation_function="gelu",
    ),
    "gpt_neox": lambda: tr.GPTNeoXConfig(
        **COMMON,
        **(ODD | {"hidden_size": 24}),
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    ),
    "gpt_neox_sequential": lambda: tr.GPTNeoXConfig(
        **COMMON,
        **(ODD | {"hidden_size": 24}),
        num_attention_heads=3,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "llama2": lambda: tr.LlamaConfig(**COMMON, **ODD, **GROUPED),
    "llama_wide_head_biases": lambda: tr.LlamaConfig(
        **COMMON, **ODD, **GROUPED, **WIDE_HEAD, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3": lambda: tr.LlamaConfig(**COMMON, **ODD, **GROUPED, **WIDE_HEAD, rope_parameters=dict(LLAMA3)),
    "llama_linear": lambda: tr.LlamaConfig(
        **COMMON, **ODD, **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    ),
    "llama_yarn": lambda: tr.LlamaConfig(
        **COMMON,
        **ODD,
        **GROUPED,
        **WIDE_HEAD,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 12,
        },
    ),
    "llama_dynamic": lambda: tr.LlamaConfig(
        **COMMON, **ODD, **GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    ),
    "llama_yarn_deepseek": lambda: tr.LlamaConfig(
        **COMMON, **ODD, **GROUPED, rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 1000.0}
    ),
    "mistral": lambda: tr.MistralConfig(**COMMON, **ODD, **GROUPED, **WIDE_HEAD, sliding_window=5),
    "mistral_no_window": lambda: tr.MistralConfig(**COMMON, **ODD, **GROUPED, sliding_window=None),
    "qwen2": lambda: tr.Qwen2Config(**COMMON, **ODD, **GROUPED),
    "qwen2_wide_head": lambda: tr.Qwen2Config(**COMMON, **ODD, **GROUPED, **WIDE_HEAD),
    "qwen2_windows": lambda: tr.Qwen2Config(
        **COMMON,
        **ODD,
        **GROUPED,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: tr.Qwen3Config(**COMMON, **ODD, **GROUPED, **WIDE_HEAD),
    "qwen3_tied": lambda: tr.Qwen3Config(**COMMON, **ODD, **GROUPED, **WIDE_HEAD, tie_word_embeddings=True),
    "gemma2": lambda: tr.Gemma2Config(
        **COMMON,
        **ODD,
        **GROUPED,
        **WIDE_HEAD,
        pad_token_id=0,
        sliding_window=4,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
    "gemma3": lambda: tr.Gemma3TextConfig(
        **COMMON,
        **(ODD | {"num_hidden_layers": 4}),
        **GROUPED,
        **WIDE_HEAD,
        pad_token_id=0,
        sliding_window=4,
        query_pre_attn_scalar=9,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "stablelm": lambda: tr.StableLmConfig(
        **COMMON,
        **(ODD | {"hidden_size": 32}),
        **GROUPED,
        use_qkv_bias=True,
    ),
    "stablelm_parallel": lambda: tr.StableLmConfig(
        **COMMON,
        **(ODD | {"hidden_size": 32}),
        **GROUPED,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ),
}

# What the smallest config.json of a family says, and of what older files say otherwise, one of each kind.
SIZES = {
    "vocab_size": 43,
    "max_position_embeddings": 48,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "intermediate_size": 80,
}
GPT2_SIZES = {"vocab_size": 43, "n_positions": 48, "n_embd": 512, "n_layer": 3, "n_head": 64}
OLDER: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in FAMILIES),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "pretraining_tp": 2, "torch_dtype": "float16"}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": {name: x for name, x in LLAMA3.items() if name != "rope_theta"}}),
    ("mistral", {"sliding_window": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mistral", {"attention_bias": True, "use_sliding_window": False}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}),
    ("qwen2", {"sliding_window": 4, "max_window_layers": 0, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 4, "max_window_layers": 2, "use_sliding_window": True, "head_dim": 16}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", {"hidden_act": "gelu", "final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window_pattern": 2, "rope_theta": 1e3, "rope_local_base_freq": 50.0}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.5, "rope_theta": 7.0}),
    ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rotary_pct": 0.5}),
    ("stablelm", {"rope_theta": 500, "partial_rotary_factor": 0.5}),
    ("stablelm", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}),
    ("gpt2", {"n_ctx": 7, "n_inner": None}),
]


@pytest.mark.parametrize(("model_type", "changes"), OLDER)
def test_transformers_reads_the_same_out_of_a_config(model_type: str, changes: dict, tmp_path: Path) -> None:
    config = {"model_type": model_type} | (GPT2_SIZES if model_type == "gpt2" else SIZES) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    # With every default written out, and the keys of transformers 5.
    full = tr.AutoConfig.from_pretrained(tmp_path).to_dict()
    ours, theirs = (FAMILIES[model_type].read(Fields(fields, "config.json")) for fields in (config, full))
    assert ours == theirs


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(transformers' model, its folder in several shards) of each family, all weights random and of size that shows."""
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(CONFIGS[request.param](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder


def rows(length: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 43, (3, length)).astype(np.int32)


def theirs(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    given: dict[str, Any] = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
    if mask is not None:
        given["attention_mask"] = torch.tensor(mask, dtype=torch.long)
        given["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0), dtype=torch.long)
    with torch.no_grad():
        return model(**given).logits.numpy()


def test_logits(case: tuple) -> None:
    model, folder = case
    read = read_folder(folder)
    ours = Transformer(read.model).apply({"params": read.load()}, rows())
    np.testing.assert_allclose(ours, theirs(model, rows()), atol=1e-4)


def test_logits_with_left_padding(case: tuple) -> None:
    model, folder = case
    read = read_folder(folder)
    mask = np.arange(17)[None, :] >= np.array([0, 3, 9])[:, None]
    ours = Transformer(read.model).apply({"params": read.load()}, rows(), mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs(model, rows(), mask)[mask], atol=1e-4)


def test_logits_with_the_cache(case: tuple) -> None:
    model, folder = case
    read = read_folder(folder)
    apply = jax.jit(lambda p, t, m, c: Transformer(read.model).apply({"params": p}, t, m, cache=c))
    params, cache = read.load(), empty_cache(read.model, 3, 17)
    mask = np.arange(17)[None, :] >= np.array([0, 3, 9])[:, None]
    parts = []
    for start, end in ((0, 10), *((i, i + 1) for i in range(10, 17))):
        logits, cache = apply(params, rows()[:, start:end], jnp.asarray(mask[:, start:end]), cache)
        parts.append(logits)
    ours = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(ours[mask], theirs(model, rows(), mask)[mask], atol=1e-4)


def test_written_back_every_tensor_is_the_same(case: tuple, tmp_path: Path) -> None:
    model, folder = case
    read = read_folder(folder)
    write_folder(tmp_path / "out", read.load(), read.model, origin=read.origin, shard_bytes=20_000)

    def tensors(path: Path) -> dict[str, np.ndarray]:
        return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}

    before, after = tensors(folder), tensors(tmp_path / "out")
    assert sorted(before) == sorted(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    again = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(theirs(again, rows()), theirs(model, rows()), atol=1e-5)
    saved = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out")]
    assert saved[0] == saved[1]


def test_a_pad_of_our_own_changes_nothing(case: tuple) -> None:
    model, folder = case
    read = read_folder(folder).for_tokenizer(41, 43)
    params = read.load()
    assert params["embedding"].shape[0] == 44
    ours = Transformer(read.model).apply({"params": params}, rows())
    np.testing.assert_allclose(ours, theirs(model, rows())[..., :41], atol=1e-4)
