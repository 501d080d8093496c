"""Tables of the tensor names and layouts of each published family, and conversion between layouts."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from rlhf_jax.config import ModelConfig

Layout = Literal["same", "linear", "gpt2_qkv", "neox_qkv", "rows", "head"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file and the parameters that it holds.

    Attributes:
      name: name in the file.
      ours: dotted paths of the parameters, three for a fused tensor.
      layout: layout in the file. "same": as here; "linear": [out, in] for a kernel [in, out]; "gpt2_qkv":
        [in, q | k | v]; "neox_qkv": [heads x (q | k | v), in]; "rows": an embedding, which may have more rows here
        than in the file; "head": [rows, width], transposed here.
    """

    name: str
    ours: tuple[str, ...]
    layout: Layout


def _linear(theirs: str, ours: str, bias: bool, layout: Layout = "linear") -> list[Tensor]:
    found = [Tensor(f"{theirs}.weight", (f"{ours}.kernel",), layout)]
    return [*found, Tensor(f"{theirs}.bias", (f"{ours}.bias",), "same")] if bias else found


def _norm(theirs: str, ours: str, model: ModelConfig) -> list[Tensor]:
    found = [Tensor(f"{theirs}.weight", (f"{ours}.scale",), "same")]
    return [*found, Tensor(f"{theirs}.bias", (f"{ours}.bias",), "same")] if model.norm == "layer" else found


def _llama_tensors(model: ModelConfig) -> list[Tensor]:
    """Tensors under Llama's names, which Mistral, Qwen, Gemma and StableLM share."""
    table = [Tensor("model.embed_tokens.weight", ("embedding",), "rows")]
    qkv = model.bias if model.qkv_bias is None else model.qkv_bias
    ffn = model.bias if model.ffn_bias is None else model.ffn_bias
    for i in range(model.layers):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        for name, long in (("q", "query"), ("k", "key"), ("v", "value")):
            table += _linear(f"{theirs}.self_attn.{name}_proj", f"{ours}.attention.{long}", qkv)
        table += _linear(f"{theirs}.self_attn.o_proj", f"{ours}.attention.out", model.bias)
        if model.qk_norm:
            for name, long in (("q", "query"), ("k", "key")):
                table += _norm(f"{theirs}.self_attn.{name}_norm", f"{ours}.attention.{long}_norm", model)
        for name in ("gate", "up", "down"):
            table += _linear(f"{theirs}.mlp.{name}_proj", f"{ours}.ffn.{name}", ffn)
        table += _norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm", model)
        if model.post_norms:
            table += _norm(f"{theirs}.post_attention_layernorm", f"{ours}.attention_post_norm", model)
            table += _norm(f"{theirs}.pre_feedforward_layernorm", f"{ours}.ffn_norm", model)
            table += _norm(f"{theirs}.post_feedforward_layernorm", f"{ours}.ffn_post_norm", model)
        elif model.residual != "parallel_shared":
            table += _norm(f"{theirs}.post_attention_layernorm", f"{ours}.ffn_norm", model)
    return table + _norm("model.norm", "final_norm", model)


def _gpt2_tensors(model: ModelConfig) -> list[Tensor]:
    table = [
        Tensor("transformer.wte.weight", ("embedding",), "rows"),
        Tensor("transformer.wpe.weight", ("position_embedding",), "same"),
    ]
    for i in range(model.layers):
        theirs, ours = f"transformer.h.{i}", f"block_{i}"
        for kind, part in (("weight", "kernel"), ("bias", "bias")):
            names = tuple(f"{ours}.attention.{long}.{part}" for long in ("query", "key", "value"))
            table.append(Tensor(f"{theirs}.attn.c_attn.{kind}", names, "gpt2_qkv"))
        table += _linear(f"{theirs}.attn.c_proj", f"{ours}.attention.out", True, "same")
        table += _linear(f"{theirs}.mlp.c_fc", f"{ours}.ffn.up", True, "same")
        table += _linear(f"{theirs}.mlp.c_proj", f"{ours}.ffn.down", True, "same")
        table += _norm(f"{theirs}.ln_1", f"{ours}.attention_norm", model)
        table += _norm(f"{theirs}.ln_2", f"{ours}.ffn_norm", model)
    return table + _norm("transformer.ln_f", "final_norm", model)


def _neox_tensors(model: ModelConfig) -> list[Tensor]:
    table = [Tensor("gpt_neox.embed_in.weight", ("embedding",), "rows")]
    for i in range(model.layers):
        theirs, ours = f"gpt_neox.layers.{i}", f"block_{i}"
        for kind, part in (("weight", "kernel"), ("bias", "bias"))[: 2 if model.bias else 1]:
            names = tuple(f"{ours}.attention.{long}.{part}" for long in ("query", "key", "value"))
            table.append(Tensor(f"{theirs}.attention.query_key_value.{kind}", names, "neox_qkv"))
        table += _linear(f"{theirs}.attention.dense", f"{ours}.attention.out", model.bias)
        table += _linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.ffn.up", True)
        table += _linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.ffn.down", True)
        table += _norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm", model)
        table += _norm(f"{theirs}.post_attention_layernorm", f"{ours}.ffn_norm", model)
    return table + _norm("gpt_neox.final_layer_norm", "final_norm", model)


# Suffixes of constants in older files, which are not parameters.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def head_of(model_type: str) -> str:
    """Name of the language head's tensor."""
    return "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"


def tensors_of(model_type: str, model: ModelConfig, *, scalar: bool) -> list[Tensor]:
    """All tensors of a model's file: the backbone's, then the head's."""
    tables = {"gpt2": _gpt2_tensors, "gpt_neox": _neox_tensors}
    table = tables[model_type](model) if model_type in tables else _llama_tensors(model)
    if scalar:
        return [*table, Tensor("score.weight", ("score.kernel",), "linear")]
    if model.tied:
        return table
    return [*table, Tensor(head_of(model_type), ("unembedding",), "head")]


def split(tensor: Tensor, value: np.ndarray, model: ModelConfig) -> tuple[np.ndarray, ...]:
    """Convert a file's tensor to parameters, in the order of tensor.ours."""
    if tensor.layout == "linear":
        return (value.T,)
    if tensor.layout in ("rows", "head"):
        # Rows beyond the file's, such as an added pad token's, have no logit and are never trained.
        value = np.pad(value, ((0, model.vocab_rows - len(value)), (0, 0)))
        return (value,) if tensor.layout == "rows" else (value.T,)
    if tensor.layout == "gpt2_qkv":
        return tuple(np.split(value, 3, axis=-1))
    if tensor.layout == "neox_qkv":
        parts = value.reshape(model.heads, 3, model.head_size, *value.shape[1:])
        flat = (parts[:, i].reshape(model.heads * model.head_size, *value.shape[1:]) for i in range(3))
        return tuple(part.T for part in flat)
    return (value,)


def join(tensor: Tensor, values: tuple[np.ndarray, ...], model: ModelConfig, rows: int) -> np.ndarray:
    """The inverse of `split`.

    Args:
      tensor: name and layout.
      values: parameters in the order of tensor.ours.
      model: configuration.
      rows: of the embedding in the file.
    """
    if tensor.layout == "linear":
        return values[0].T
    if tensor.layout == "rows":
        return values[0][:rows]
    if tensor.layout == "head":
        return values[0].T[:rows]
    if tensor.layout == "gpt2_qkv":
        return np.concatenate(values, axis=-1)
    if tensor.layout == "neox_qkv":
        rest = values[0].T.shape[1:]
        parts = np.stack([value.T.reshape(model.heads, model.head_size, *rest) for value in values], axis=1)
        return parts.reshape(3 * model.heads * model.head_size, *rest)
    return values[0]


def shape_in_file(tensor: Tensor, ours: tuple[tuple[int, ...], ...], rows: int) -> tuple[int, ...]:
    """The shape of a tensor in the file, from the shapes of the parameters that it holds."""
    first = ours[0]
    if tensor.layout == "linear":
        return first[::-1]
    if tensor.layout == "rows":
        return (rows, first[1])
    if tensor.layout == "head":
        return (rows, first[0])
    if tensor.layout == "gpt2_qkv":
        return (*first[:-1], 3 * first[-1])
    if tensor.layout == "neox_qkv":
        return (3 * first[-1], *first[:-1])
    return first
