"""Models of our own, language models and reward models, are in transformers what they are here."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr

from rlhf_jax.arrays import Params, nested
from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.logprobs import last_token_scores
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.huggingface import parameter_shapes, write_folder

SMALL: dict[str, Any] = {"vocab_size": 43, "context": 48, "width": 24, "layers": 3, "ffn_width": 28}
GROUPED: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_width": 10}
GEMMA: dict[str, Any] = {
    "norm_offset": True,
    "post_norms": True,
    "activation": "geglu",
    "embedding_scale": math.sqrt(24),
}
# What transformers' class is called -> a model of our own that becomes one.
OWN = {
    "Llama": ModelConfig(**SMALL, **GROUPED, bias=True, tied=False),
    "Llama, llama3": ModelConfig(
        **SMALL, **GROUPED, rope_base=500.0, rope_scaling=RopeScaling("llama3", 8.0, 24), activation="geglu"
    ),
    "Llama, yarn": ModelConfig(**SMALL, **GROUPED, rope_scaling=RopeScaling("yarn", 4.0, 12, attention_factor=1.5)),
    "Mistral, window": ModelConfig(**SMALL, heads=3, windows=(5, 5, 5)),
    "Mistral, heads of any width": ModelConfig(**SMALL, heads=5, head_width=6),
    "Qwen2": ModelConfig(**SMALL, heads=3, qkv_bias=True),
    "Qwen2, wide heads, windows": ModelConfig(**SMALL, **GROUPED, qkv_bias=True, windows=(0, 4, 4)),
    "Qwen3, the recipe's": ModelConfig(
        **SMALL, heads=3, qk_norm=True, embedding_scale=math.sqrt(24), vocab_multiple=16
    ),
    "Qwen3, windows": ModelConfig(**SMALL, **GROUPED, qk_norm=True, windows=(4, 0, 4), tied=False),
    "GPT2": ModelConfig.gpt2(**SMALL, heads=4),
    "GPT2, exact GELU": ModelConfig.gpt2(**SMALL, heads=4, activation="gelu_exact", tied=False),
    "GPTNeoX": ModelConfig(
        **SMALL, heads=3, norm="layer", residual="parallel", activation="gelu_exact", bias=True, rotary_fraction=0.25
    ),
    "GPTNeoX, linear": ModelConfig(
        **SMALL,
        heads=2,
        norm="layer",
        activation="gelu",
        bias=True,
        rotary_fraction=0.5,
        rope_base=500.0,
        rope_scaling=RopeScaling("linear", 4.0),
        tied=False,
    ),
    "StableLm": ModelConfig(**SMALL, heads=3, kv_heads=1, norm="layer", qkv_bias=True),
    "StableLm, parallel": ModelConfig(
        **SMALL, heads=3, norm="layer", residual="parallel_shared", rotary_fraction=0.5, rope_base=500.0, tied=False
    ),
    "Gemma2": ModelConfig(**SMALL, **GROUPED, **GEMMA, attention_softcap=2.0, logit_softcap=1.5, windows=(4, 0, 4)),
    "Gemma2, no window": ModelConfig(**SMALL, **GROUPED, **GEMMA, query_scale=1 / 3),
    "Gemma3": ModelConfig(
        **SMALL,
        **GROUPED,
        **GEMMA,
        qk_norm=True,
        rope_local_base=50.0,
        rope_scaling=RopeScaling("linear", 8.0),
        windows=(4, 4, 0),
    ),
    "Gemma3, one base": ModelConfig(**SMALL, **GROUPED, **GEMMA, qk_norm=True, windows=(4, 4, 0)),
}
SPECIAL = {"bos": 1, "eos": 2, "pad": 0}


@pytest.fixture(params=OWN)
def case(request: pytest.FixtureRequest) -> tuple[str, ModelConfig]:
    return request.param.split(",")[0], OWN[request.param]


def params_of(model: ModelConfig, scalar: bool = False) -> Params:
    """Random ones, so that every one shows."""
    draws = np.random.default_rng(0)
    shapes = parameter_shapes(model, scalar)
    return nested({path: 0.3 * draws.standard_normal(shapes[path]).astype(np.float32) for path in sorted(shapes)})


def rows() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask): a whole row, one padded on the left and one on the right."""
    slots = np.arange(17)
    mask = np.stack([slots >= 0, slots >= 5, slots < 11])
    tokens = np.random.default_rng(0).integers(3, 43, mask.shape)
    return np.where(mask, tokens, SPECIAL["pad"]).astype(np.int32), mask


def loaded(kind: Any, folder: Path, **how: Any) -> Any:
    """transformers' model of a folder, every tensor of which has its place."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", **how)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def theirs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return (
            model(
                input_ids=torch.tensor(tokens, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                position_ids=torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0), dtype=torch.long),
            )
            .logits.float()
            .numpy()
        )


def ours(model: ModelConfig, params: Params) -> np.ndarray:
    tokens, mask = rows()
    return np.asarray(jax.jit(Transformer(model).apply)({"params": params}, tokens, mask))


def test_logits(case: tuple[str, ModelConfig], tmp_path: Path) -> None:
    name, model = case
    params = params_of(model)
    written = write_folder(tmp_path / "out", params, model, special_ids=SPECIAL, shard_bytes=9_000)
    assert written == name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM")
    found = theirs(loaded(tr.AutoModelForCausalLM, tmp_path / "out"), *rows())
    mask = rows()[1]
    np.testing.assert_allclose(ours(model, params)[mask], found[..., :43][mask], atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Qwen3, the recipe's", "GPT2", "GPTNeoX", "StableLm", "Gemma3"])
def test_logits_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = OWN[name]
    params = params_of(model)
    write_folder(tmp_path / "out", params, model, special_ids=SPECIAL, dtype="bfloat16")
    # Rounded weights in exact arithmetic; then the arithmetic that the config asks for, 8 bits over a few layers.
    for how, tolerance in (({"dtype": torch.float32}, 0.03), ({}, 0.06)):
        there = loaded(tr.AutoModelForCausalLM, tmp_path / "out", **how)
        assert there.dtype == (torch.float32 if how else torch.bfloat16)
        mask = rows()[1]
        wanted, found = ours(model, params)[mask], theirs(there, *rows())[..., :43][mask]
        assert np.sqrt(np.mean((wanted - found) ** 2)) < tolerance * np.sqrt(np.mean(wanted**2))


def test_scores(case: tuple[str, ModelConfig], tmp_path: Path) -> None:
    name, model = case
    params = params_of(model, scalar=True)
    text = "Text" if name == "Gemma3" else ""
    written = write_folder(tmp_path / "out", params, model, special_ids=SPECIAL)
    assert written == f"{name}{text}ForSequenceClassification"
    there = loaded(tr.AutoModelForSequenceClassification, tmp_path / "out")
    wanted = last_token_scores(Transformer(model, scalar=True), params, *map(jnp.asarray, rows()))
    bias = params["score"]["bias"]
    assert there.config.rlhf_jax == {"score_bias": float(bias[0])}
    np.testing.assert_allclose(theirs(there, *rows())[:, 0], wanted - bias, atol=1e-4)
