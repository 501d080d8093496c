"""Shape and kind of a transformer, from GPT-2 to Gemma 3."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a trained context are stretched to a longer one."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none; linear: all by factor; llama3: low ones by factor, high ones kept (Llama 3.1); yarn: the same by a ramp
    over the dimensions, with warmer attention (Peng et al. 2023, arXiv:2309.00071)."""
    factor: float = 1.0
    """How many times longer the context is than the trained one."""
    original_context: int = 8192
    """Tokens of the trained context (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are kept."""
    beta_fast: float = 32.0
    """yarn: turns in the trained context from which a dimension is kept."""
    beta_slow: float = 1.0
    """yarn: turns up to which it is divided by factor."""
    truncate: bool = True
    """yarn: round the ramp's ends to whole dimensions."""
    attention_factor: float | None = None
    """yarn: multiplies queries and keys; 0.1 ln(factor) + 1 if not given."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"rope factor: found {self.factor}, wanted more than 0")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope low_freq_factor: found {self.low_freq_factor}, wanted less than high_freq_factor "
                f"{self.high_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a transformer.

    The defaults are Llama's block; `gpt2` turns it into GPT-2's.
    """

    vocab_size: int = 1024
    """Token ids that have a logit, the special ones included."""
    context: int = 256
    """Longest sequence in tokens; the size of a learned position table."""
    width: int = 128
    """Of the residual stream."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads, a divisor of heads (grouped-query attention); as many as heads if not given."""
    head_width: int | None = None
    """Of one head; width / heads if not given."""
    ffn_width: int | None = None
    """Of the hidden layer; if not given 4 width without a gate, 8/3 width (up to a multiple of 16) with one."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary embeddings of queries and keys, or a learned table added to the tokens."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Stretches the rotary frequencies to a longer context."""
    rotary_fraction: float = 1.0
    """Share of a head's dimensions that is rotated; 0.25 in Pythia and StableLM."""
    windows: tuple[int, ...] = ()
    """One for each layer: a token sees so many tokens back, itself included; 0 sees all. () sees all in every layer."""
    rope_local_base: float | None = None
    """Base in the layers that have a window, with no scaling; rope_base and its scaling if not given (Gemma 3)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (scale only) or LayerNorm (scale and bias)."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    norm_offset: bool = False
    """RMSNorm multiplies by 1 + its parameter, which starts at 0 (Gemma)."""
    post_norms: bool = False
    """Norm what attention and feed-forward layer give, too, before it is added (Gemma 2 and 3)."""
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    """What the feed-forward layer reads: attention's sum, or the block's input (GPT-NeoX), normed once (StableLM 2)."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    """Gated SiLU, gated GELU by its tanh approximation, or no gate: that GELU, or the exact one."""
    bias: bool = False
    """Biases in attention and feed-forward layers."""
    qkv_bias: bool | None = None
    """Of queries, keys and values, where it is not as `bias` (Qwen2.5)."""
    ffn_bias: bool | None = None
    """Of the feed-forward layer, where it is not as `bias`."""
    tied: bool = True
    """The language head is the transposed token embedding."""
    dropout: float = 0.0
    """Residual dropout in training, a fraction; 0.2 in InstructGPT's SFT. Never active in rollouts or PPO."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; norms, softmax and logits are float32 always."""
    qk_norm: bool = False
    """Norm each head's queries and keys, before the rotation (Qwen3): attention stays calm at high learning rates."""
    query_scale: float | None = None
    """Multiplies the products of queries and keys; head_width^-0.5 if not given."""
    attention_softcap: float = 0.0
    """c: attention scores become c tanh(score / c); 0 for none (Gemma 2: 50)."""
    logit_softcap: float = 0.0
    """The same for logits (Gemma 2: 30)."""
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this on their way in; sqrt(width) in Gemma, which suits tied embeddings."""
    vocab_multiple: int = 1
    """The embedding has vocab_size rounded up to a multiple of this; the extra rows have no logit."""
    scan_layers: bool = False
    """Hold the blocks' parameters stacked and run them as one loop: compiled once whatever the depth."""
    remat: Literal["none", "full", "dots"] = "none"
    """What a block computes anew in the backward pass, to save memory: nothing, all, or all but matrix products."""
    attention: Literal["auto", "plain"] = "auto"
    """What computes attention over whole rows: a kernel where the platform has one (TPU, GPU), or plain products."""
    head_chunk: int | None = None
    """Positions of a row whose logits a loss holds at a time, computed anew in the backward pass; 0 for all of them. By
    default all where they take at most 256 MiB of a device, else as many as do."""
    embedding_rows: int | None = None
    """Rows of the embedding where given: those past vocab_size have no logit, so they are never sampled."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "layers", "heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: wanted at least 1")
        if self.head_width is None and self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}; set head_width or change one")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise UserError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and (self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_size):
            raise UserError(
                f"head width {self.head_size} with rotary_fraction {self.rotary_fraction}: rotary positions want an "
                f"even number of dimensions, found {self.rotary_width}"
            )
        if self.windows and len(self.windows) != self.layers:
            raise UserError(f"windows: found {len(self.windows)}, wanted one for each of {self.layers} layers, or none")
        if self.embedding_rows is not None and self.embedding_rows < self.vocab_size:
            raise UserError(f"embedding_rows {self.embedding_rows}: wanted vocab_size {self.vocab_size} or more")
        if self.head_chunk is not None and self.head_chunk < 0:
            raise UserError(f"head_chunk {self.head_chunk}: wanted 0 (all positions at once) or more")
        if self.norm_offset and self.norm != "rms":
            raise UserError("norm_offset: found it with LayerNorm, wanted norm rms")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout {self.dropout}: wanted 0 <= dropout < 1")

    @classmethod
    def gpt2(cls, **changes: Any) -> ModelConfig:
        """GPT-2's block: learned positions, LayerNorm, GELU, biases, tied."""
        kind: dict[str, Any] = {
            "positions": "learned",
            "norm": "layer",
            "activation": "gelu",
            "bias": True,
            "tied": True,
        }
        return cls(**(kind | changes))

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("swiglu", "geglu")

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward hidden layer."""
        if self.ffn_width is not None:
            return self.ffn_width
        return -(-8 * self.width // 3 // 16) * 16 if self.gated else 4 * self.width

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding."""
        if self.embedding_rows is not None:
            return self.embedding_rows
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window(self, layer: int) -> int:
        """Tokens that a token of a layer sees, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def matmul_parameters(self, *, language_head: bool = True) -> int:
        """Weights that multiply each token: those of the blocks, and of the language head where it is computed."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.key_heads)
        feed_forward = self.width * self.hidden_width * (3 if self.gated else 2)
        return self.layers * (attention + feed_forward) + (self.width * self.vocab_rows if language_head else 0)

    def flops_per_token(self, length: int, *, language_head: bool = True) -> float:
        """FLOPs of one token's forward pass in a sequence of `length`.

        They are 2 a weight and 2 · 2 · heads · head · length/2 a layer; a training step takes three times that.
        Source: Kaplan et al. 2020, table 1 (arXiv:2001.08361).
        """
        attention = 2.0 * self.layers * self.heads * self.head_size * length
        return 2.0 * self.matmul_parameters(language_head=language_head) + attention
