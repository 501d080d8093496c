"""Architecture of a transformer, covering the families from GPT-2 to Gemma 3."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling: stretches the rotary frequencies of the trained context to a longer one."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """RoPE scaling method. none: unscaled; linear: all frequencies divided by factor; llama3: low frequencies divided,
    high ones kept (Llama 3.1); yarn: the same with a ramp over the dimensions and scaled attention logits (Peng et al.
    2023, arXiv:2309.00071)."""
    factor: float = 1.0
    """Ratio of the extended context length to the trained one."""
    original_context: int = 8192
    """Trained context length in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: frequencies with wavelengths above original_context / low_freq_factor are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: frequencies with wavelengths below original_context / high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that make at least this many rotations within the trained context keep their frequency."""
    beta_slow: float = 1.0
    """yarn: dimensions that make at most this many rotations have their frequency divided by factor."""
    truncate: bool = True
    """yarn: round the ends of the ramp to whole dimensions."""
    attention_factor: float | None = None
    """yarn: factor applied to both queries and keys; 0.1 ln(factor) + 1 by default."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"rope factor: expected more than 0, got {self.factor}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope low_freq_factor: expected less than high_freq_factor {self.high_freq_factor}, got "
                f"{self.low_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """Factor applied to cos and sin."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Transformer architecture.

    The defaults give Llama's block; the class method `gpt2` gives GPT-2's.
    """

    vocab_size: int = 1024
    """Vocabulary size: token ids that have a logit, special tokens included."""
    context: int = 256
    """Context length in tokens; also the size of a learned position table."""
    width: int = 128
    """Width of the residual stream (hidden size)."""
    layers: int = 4
    """Number of transformer blocks."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int | None = None
    """Number of key and value heads for grouped-query attention, a divisor of heads; equal to heads by default."""
    head_width: int | None = None
    """Width of one attention head; width / heads by default."""
    ffn_width: int | None = None
    """Hidden width of the feed-forward layer; by default 4 width, or 8/3 width rounded up to a multiple of 16 if
    gated."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Position encoding: rotary embeddings of queries and keys, or a learned table added to the token embeddings."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies (RoPE theta)."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Scaling of the rotary frequencies to a longer context."""
    rotary_fraction: float = 1.0
    """Fraction of each head's dimensions that is rotated; 0.25 in Pythia and StableLM."""
    windows: tuple[int, ...] = ()
    """Sliding attention window of each layer, in tokens, the token itself included; 0 means full attention. Empty means
    full attention in every layer."""
    rope_local_base: float | None = None
    """RoPE base of the layers with a sliding window, without scaling (Gemma 3); rope_base with its scaling by
    default."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalization: RMSNorm (scale only) or LayerNorm (scale and bias)."""
    norm_epsilon: float = 1e-5
    """Epsilon added to the variance in normalization."""
    norm_offset: bool = False
    """Multiply by 1 + scale in RMSNorm, with scale initialized to 0 (Gemma)."""
    post_norms: bool = False
    """Also normalize the outputs of attention and feed-forward layers before the residual addition (Gemma 2 and 3)."""
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    """Input of the feed-forward layer. sequential: the residual stream after attention; parallel: the block's input,
    with its own norm (GPT-NeoX); parallel_shared: the block's input, with one norm shared with attention (StableLM
    2)."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    """Feed-forward activation. swiglu: gated SiLU; geglu: gated tanh-approximated GELU; gelu: tanh-approximated GELU
    without a gate; gelu_exact: exact GELU without a gate."""
    bias: bool = False
    """Use biases in attention and feed-forward layers."""
    qkv_bias: bool | None = None
    """Use biases in the query, key and value projections (Qwen2.5); the value of bias by default."""
    ffn_bias: bool | None = None
    """Use biases in the feed-forward layer; the value of bias by default."""
    tied: bool = True
    """Tie the language head to the token embedding."""
    dropout: float = 0.0
    """Residual dropout rate in training; 0.2 in InstructGPT's SFT. Never active in rollouts or PPO."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products; norms, softmax and logits are always float32."""
    qk_norm: bool = False
    """Normalize each head's queries and keys before the rotation (Qwen3); stabilizes attention at high learning
    rates."""
    query_scale: float | None = None
    """Scale of the query-key products; head_width^-0.5 by default."""
    attention_softcap: float = 0.0
    """Soft cap c of attention scores, c tanh(score / c); 0 disables it (Gemma 2: 50)."""
    logit_softcap: float = 0.0
    """Soft cap c of logits, c tanh(logit / c); 0 disables it (Gemma 2: 30)."""
    embedding_scale: float = 1.0
    """Factor applied to input token embeddings; sqrt(width) in Gemma, which suits tied embeddings."""
    vocab_multiple: int = 1
    """Multiple to which vocab_size is rounded up for the rows of the embedding; the extra rows have no logit."""
    scan_layers: bool = False
    """Stack the blocks' parameters and scan over layers, so that one block is compiled whatever the depth."""
    remat: Literal["none", "full", "dots"] = "none"
    """Rematerialization: activations of a block that the backward pass recomputes to save memory. none: nothing; full:
    everything; dots: everything but matrix products."""
    attention: Literal["auto", "plain"] = "auto"
    """Attention implementation for full rows. auto: a flash attention kernel where the platform has one (TPU, GPU);
    plain: explicit matrix products."""
    head_chunk: int | None = None
    """Positions per row whose logits a loss computes at once; the backward pass recomputes each chunk. 0 computes all
    at once. By default, as many as fit in 256 MiB of a device's memory."""
    embedding_rows: int | None = None
    """Number of embedding rows, overriding vocab_multiple; rows past vocab_size have no logit, so they are never
    sampled."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "layers", "heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head_width is None and self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}; set head_width or change one")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise UserError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and (self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_size):
            raise UserError(
                f"head width {self.head_size} with rotary_fraction {self.rotary_fraction}: expected an even number of "
                f"rotated dimensions, from 2 to the head width, got {self.rotary_width}"
            )
        if self.windows and len(self.windows) != self.layers:
            raise UserError(f"windows: expected one for each of {self.layers} layers, or none, got {len(self.windows)}")
        if self.embedding_rows is not None and self.embedding_rows < self.vocab_size:
            raise UserError(f"embedding_rows: expected vocab_size {self.vocab_size} or more, got {self.embedding_rows}")
        if self.head_chunk is not None and self.head_chunk < 0:
            raise UserError(f"head_chunk: expected 0 (all positions at once) or more, got {self.head_chunk}")
        if self.norm_offset and self.norm != "rms":
            raise UserError(f"norm_offset: expected norm rms, got {self.norm}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")

    @classmethod
    def gpt2(cls, **changes: Any) -> ModelConfig:
        """GPT-2's architecture: learned positions, LayerNorm, GELU, biases, tied embeddings."""
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
        """Number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def rotary_width(self) -> int:
        """Number of rotated dimensions per head."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """True if the feed-forward layer is gated."""
        return self.activation in ("swiglu", "geglu")

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward hidden layer."""
        if self.ffn_width is not None:
            return self.ffn_width
        return -(-8 * self.width // 3 // 16) * 16 if self.gated else 4 * self.width

    @property
    def vocab_rows(self) -> int:
        """Number of embedding rows."""
        if self.embedding_rows is not None:
            return self.embedding_rows
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window(self, layer: int) -> int:
        """Sliding window of a layer in tokens, 0 for full attention."""
        return self.windows[layer] if self.windows else 0

    def matmul_parameters(self, *, language_head: bool = True) -> int:
        """Number of weights used in matrix products per token: the blocks and, optionally, the language head."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.key_heads)
        feed_forward = self.width * self.hidden_width * (3 if self.gated else 2)
        return self.layers * (attention + feed_forward) + (self.width * self.vocab_rows if language_head else 0)

    def flops_per_token(self, length: int, *, language_head: bool = True) -> float:
        """FLOPs of the forward pass per token in a sequence of `length` tokens.

        2 per weight plus 2 · 2 · heads · head_width · length/2 per layer. A training step takes three times as many.

        Source:
          Kaplan et al. 2020, table 1 (arXiv:2001.08361).
        """
        attention = 2.0 * self.layers * self.heads * self.head_size * length
        return 2.0 * self.matmul_parameters(language_head=language_head) + attention
