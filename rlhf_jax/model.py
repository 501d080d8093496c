"""One decoder-only transformer: the configuration spans GPT-2 and Llama. The only file that imports flax.

Parameters are plain nested dicts of float32 arrays; `Transformer(config).apply({"params": params}, …)` is a pure
function.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array, Params, pytree
from rlhf_jax.errors import UserError

# Finite, so that a row whose every key is masked gives a uniform softmax and no NaN.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a transformer.

    The defaults are Llama's block; `gpt2` turns it into GPT-2's.
    """

    vocab_size: int = 1024
    """Token ids, the special ones included."""
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
    """Of the hidden layer; if not given 4 width for gelu, 8/3 width (up to a multiple of 16) for swiglu."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary embeddings of queries and keys, or a learned table added to the tokens."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (scale only) or LayerNorm (scale and bias)."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU, or the tanh approximation of GELU."""
    bias: bool = False
    """Biases in attention and feed-forward layers."""
    tied: bool = True
    """The language head is the transposed token embedding."""
    dropout: float = 0.0
    """Residual dropout in training, a fraction; 0.2 in InstructGPT's SFT. Never active in rollouts or PPO."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; norms, softmax and logits are float32 always."""
    qk_norm: bool = False
    """Norm each head's queries and keys, before the rotation (Qwen3): attention stays calm at high learning rates."""
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this on their way in; sqrt(width) in Gemma, which suits tied embeddings."""
    vocab_multiple: int = 1
    """The embedding has vocab_size rounded up to a multiple of this; the extra rows have no logit."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "layers", "heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: wanted at least 1")
        if self.head_width is None and self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}; set head_width or change one")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise UserError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(f"head width {self.head_size}: rotary positions want an even one")
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
    def hidden_width(self) -> int:
        """Width of the feed-forward hidden layer."""
        if self.ffn_width is not None:
            return self.ffn_width
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 3 // 16) * 16

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, vocab_size rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def matmul_parameters(self, *, language_head: bool = True) -> int:
        """Weights that multiply each token: those of the blocks, and of the language head where it is computed."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.key_heads)
        feed_forward = self.width * self.hidden_width * (3 if self.activation == "swiglu" else 2)
        return self.layers * (attention + feed_forward) + (self.width * self.vocab_rows if language_head else 0)

    def flops_per_token(self, length: int, *, language_head: bool = True) -> float:
        """FLOPs of one token's forward pass in a sequence of `length`.

        They are 2 a weight and 2 · 2 · heads · head · length/2 a layer; a training step takes three times that.
        Source: Kaplan et al. 2020, table 1 (arXiv:2001.08361).
        """
        attention = 2.0 * self.layers * self.heads * self.head_size * length
        return 2.0 * self.matmul_parameters(language_head=language_head) + attention


@pytree
class Cache:
    """Keys and values of the tokens already seen, one buffer a layer.

    keys, values: tuples of [B, key heads, S, head].
    mask_BS: slots that hold a real token.
    filled: scalar, slots written.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask_BS: Array
    filled: Array


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache of `slots` tokens for each of `rows` rows."""
    shape = (rows, config.key_heads, slots, config.head_size)
    buffers = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
    return Cache(buffers, buffers, jnp.zeros((rows, slots), bool), jnp.zeros((), jnp.int32))


def count_parameters(params: Params) -> int:
    """Numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def positions_of(segment_ids_BT: Array) -> Array:
    """Position of each token in its segment, counting real tokens only, [B, T] int32.

    Left padding therefore changes no position: the real tokens of a row are numbered from 0.
    """
    real = segment_ids_BT > 0
    # The largest so far, not the neighbour: a gap of padding within a segment starts no count anew.
    before = jax.lax.cummax(jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0))), axis=1)
    seen = jnp.cumsum(real, axis=1) - real
    first = jax.lax.cummax(jnp.where(real & (segment_ids_BT != before), seen, 0), axis=1)
    return (seen - first).astype(jnp.int32)


def rotate(x_BHTd: Array, positions_BT: Array, base: float) -> Array:
    """Rotary position embedding, first half against second half (Su et al. 2021, arXiv:2104.09864; Llama's layout)."""
    half = x_BHTd.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x_BHTd[..., :half].astype(jnp.float32), x_BHTd[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTd.dtype)


def _norm(config: ModelConfig, name: str) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(epsilon=config.norm_epsilon, dtype=jnp.float32, name=name)


def _dense(config: ModelConfig, features: int, name: str, scale: float = 1.0) -> nn.Dense:
    # Std 1/sqrt(width) trains small models faster than GPT-2's constant 0.02, which is the same at width 2500.
    init = nn.initializers.normal(scale * config.width**-0.5)
    return nn.Dense(features, use_bias=config.bias, dtype=config.dtype, kernel_init=init, name=name)


class Attention(nn.Module):
    """Grouped-query attention over the allowed keys."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, positions_BT: Array, allowed_BTS: Array, cached: tuple[Array, Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        rows, length, _ = x_BTD.shape
        groups, head = config.key_heads, config.head_size

        def split(name: str, heads: int) -> Array:
            flat = _dense(config, heads * head, name)(x_BTD)
            return flat.reshape(rows, length, heads, head).transpose(0, 2, 1, 3)

        query, key, value = split("query", config.heads), split("key", groups), split("value", groups)
        if config.qk_norm:
            query = _norm(config, "query_norm")(query).astype(config.dtype)
            key = _norm(config, "key_norm")(key).astype(config.dtype)
        if config.positions == "rotary":
            query = rotate(query, positions_BT, config.rope_base)
            key = rotate(key, positions_BT, config.rope_base)
        buffers = None
        if cached is not None:
            keys, values, filled = cached
            key = jax.lax.dynamic_update_slice_in_dim(keys, key, filled, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(values, value, filled, axis=2)
            buffers = (key, value)
        # Fold the query heads of a group into its rows: one product a key head, and no copy of the keys.
        query = query.reshape(rows, groups, (config.heads // groups) * length, head)
        scores = jnp.einsum("bgqd,bgsd->bgqs", query, key, preferred_element_type=jnp.float32) * head**-0.5
        scores = scores.reshape(rows, config.heads, length, key.shape[2])
        weights = jax.nn.softmax(jnp.where(allowed_BTS[:, None], scores, MASKED), axis=-1)
        weights = weights.astype(value.dtype).reshape(rows, groups, (config.heads // groups) * length, key.shape[2])
        mixed = jnp.einsum("bgqs,bgsd->bgqd", weights, value).reshape(rows, config.heads, length, head)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(rows, length, config.heads * head)
        return _dense(config, config.width, "out", (2 * config.layers) ** -0.5)(mixed), buffers


class FeedForward(nn.Module):
    """Position-wise layer: gated SiLU or GELU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        config = self.config
        hidden = _dense(config, config.hidden_width, "up")(x_BTD)
        if config.activation == "swiglu":
            hidden = jax.nn.silu(_dense(config, config.hidden_width, "gate")(x_BTD)) * hidden
        else:
            hidden = jax.nn.gelu(hidden, approximate=True)
        scale = (2 * config.layers * config.hidden_width / config.width) ** -0.5
        return _dense(config, config.width, "down", scale)(hidden)


class Block(nn.Module):
    """Pre-norm transformer block."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        positions_BT: Array,
        allowed_BTS: Array,
        cached: tuple[Array, Array, Array] | None,
        deterministic: bool,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        normed = _norm(config, "attention_norm")(x_BTD).astype(config.dtype)
        mixed, buffers = Attention(config, name="attention")(normed, positions_BT, allowed_BTS, cached)
        x_BTD = x_BTD + dropout(mixed)
        normed = _norm(config, "ffn_norm")(x_BTD).astype(config.dtype)
        return x_BTD + dropout(FeedForward(config, name="ffn")(normed)), buffers


class Transformer(nn.Module):
    """Decoder-only transformer with a language head (logits [B, T, V]) or a scalar head (scores [B, T]).

    `apply({"params": params}, tokens_BT, mask=…)` runs both halves; the halves are methods of their own, so that a loss
    computes heads on the positions it needs: `apply(…, method="hidden")` and `apply(…, hidden, method="head")`.
    """

    config: ModelConfig
    scalar: bool = False

    def setup(self) -> None:
        config = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(config.width**-0.5), (config.vocab_rows, config.width)
        )
        if config.positions == "learned":
            self.position_embedding = self.param(
                "position_embedding", nn.initializers.normal(0.1 * config.width**-0.5), (config.context, config.width)
            )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = [Block(config, name=f"block_{i}") for i in range(config.layers)]
        self.final_norm = _norm(config, "final_norm")
        if self.scalar:
            # N(0, 1/(d+1)), bias 0: Stiennon et al. 2020.
            init = nn.initializers.normal((config.width + 1) ** -0.5)
            self.score = nn.Dense(1, dtype=jnp.float32, kernel_init=init, name="score")
        elif not config.tied:
            self.unembedding = self.param(
                "unembedding", nn.initializers.normal(config.width**-0.5), (config.width, config.vocab_rows)
            )

    def __call__(
        self,
        tokens_BT: Array,
        mask: Array | None = None,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Logits [B, T, V] float32 (scores [B, T] with the scalar head); with a cache, (those, the new cache).

        Args:
          tokens_BT: int32 ids.
          mask: [B, T] bool, True for real tokens; all are if not given. No real token sees another.
          segment_ids: [B, T] int32 instead of a mask, 0 for padding: tokens attend within their own segment.
          positions: [B, T] int32; counted from the mask if not given.
          cache: what came before these tokens, which are written behind it; room must be left.
          deterministic: no dropout; False wants a "dropout" key in `rngs`.
        Raises: ValueError for a sequence longer than the context, or segments with a cache.
        """
        out = self.hidden(
            tokens_BT, mask, segment_ids=segment_ids, positions=positions, cache=cache, deterministic=deterministic
        )
        if cache is None:
            return self.head(out)
        hidden_BTD, cache = out
        return self.head(hidden_BTD), cache

    def hidden(
        self,
        tokens_BT: Array,
        mask: Array | None = None,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> Any:
        """The normed residual stream [B, T, D] float32 under the head, as in `__call__`."""
        config = self.config
        length = tokens_BT.shape[1]
        if length > config.context:
            raise ValueError(f"sequence of {length} tokens is longer than the context {config.context}")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_BT) if mask is None else mask.astype(jnp.int32)
        elif cache is not None:
            raise ValueError("segment_ids with a cache: a cached row is one segment; pass mask instead")
        real_BT = segment_ids > 0
        if positions is None:
            positions = positions_of(segment_ids)
            if cache is not None:
                positions += jnp.sum(cache.mask_BS, axis=1, dtype=jnp.int32)[:, None]
        slot_T = jnp.arange(length)
        if cache is None:
            allowed_BTS = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real_BT[:, None, :]
            allowed_BTS &= slot_T[None, :, None] >= slot_T[None, None, :]
        else:
            keys_mask_BS = jax.lax.dynamic_update_slice_in_dim(cache.mask_BS, real_BT, cache.filled, axis=1)
            slot_S = jnp.arange(keys_mask_BS.shape[1])
            allowed_BTS = keys_mask_BS[:, None, :] & (cache.filled + slot_T[None, :, None] >= slot_S[None, None, :])
        x_BTD = self.embedding[tokens_BT] * config.embedding_scale
        if config.positions == "learned":
            x_BTD += self.position_embedding[jnp.minimum(positions, config.context - 1)]
        x_BTD = self.dropout(x_BTD.astype(config.dtype), deterministic=deterministic)
        buffers = []
        for i, block in enumerate(self.blocks):
            cached = None if cache is None else (cache.keys[i], cache.values[i], cache.filled)
            x_BTD, buffer = block(x_BTD, positions, allowed_BTS, cached, deterministic)
            buffers.append(buffer)
        x_BTD = self.final_norm(x_BTD)
        if cache is None:
            return x_BTD
        keys, values = zip(*buffers, strict=True)
        return x_BTD, Cache(keys, values, keys_mask_BS, cache.filled + length)

    def head(self, hidden_BTD: Array) -> Array:
        """Logits [..., V] (or scores [...]) of hidden states [..., D]; float32."""
        if self.scalar:
            return self.score(hidden_BTD)[..., 0]
        config = self.config
        weights = self.embedding.T if config.tied else self.unembedding
        logits = jnp.matmul(
            hidden_BTD.astype(config.dtype), weights.astype(config.dtype), preferred_element_type=jnp.float32
        )
        return logits[..., : config.vocab_size]


def init_params(model: Transformer, key: Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays."""
    return jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(key)


def to_scalar_head(params: Params, model: Transformer, key: Array) -> Params:
    """Parameters of the scalar-head `model` on the backbone of `params`, the head fresh: how a reward model starts."""
    fresh = init_params(model, key)
    return {name: value if name == "score" else params[name] for name, value in fresh.items()}
