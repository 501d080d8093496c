"""Decoder-only transformer, configurable from GPT-2 to Gemma 3. The only file that imports flax.

Parameters are plain nested dicts of float32 arrays; `Transformer(config).apply({"params": params}, …)` is a pure
function.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params, pytree
from rlhf_jax.config import ModelConfig, RopeScaling
from rlhf_jax.layers.attention import MASKED, attend, choose
from rlhf_jax.layers.kv_cache import Cache, empty_cache, write
from rlhf_jax.layers.rotary import frequencies, rotate, turns
from rlhf_jax.parallel.sharding import constrain, constrain_cache, on_a_mesh

__all__ = [
    "MASKED",
    "Cache",
    "ModelConfig",
    "Transformer",
    "count_parameters",
    "empty_cache",
    "init_params",
    "positions_of",
    "stack_blocks",
    "to_scalar_head",
    "unstack_blocks",
]


# Maximum size of a lookup table of cosines and sines: half a megabyte in a program. Longer contexts compute them.
TURN_TABLE = 2**17


def count_parameters(params: Params) -> int:
    """Count the parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def positions_of(segment_ids_BT: Array) -> Array:
    """Position of each token in its segment, counting real tokens only, [B, T] int32.

    Left padding therefore does not shift positions: the real tokens of a row are numbered from 0.
    """
    real = segment_ids_BT > 0
    # Compare with the largest id so far, not the previous one: padding within a segment must not restart its positions.
    before = jax.lax.cummax(jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0))), axis=1)
    seen = jnp.cumsum(real, axis=1) - real
    first = jax.lax.cummax(jnp.where(real & (segment_ids_BT != before), seen, 0), axis=1)
    return (seen - first).astype(jnp.int32)


def _visible(
    segment_ids: Array, positions: Array, cache: Cache | None, prompt_period: int
) -> tuple[Array, Array, Array]:
    """Places of the tokens [B, T] and of the slots [B, S], and True where a token may attend to a slot [B, T, S].

    Places count real tokens of the row, for the windows: padding must not increase a distance.
    """
    real_BT, slot_T = segment_ids > 0, jnp.arange(segment_ids.shape[1])
    place_BT = (jnp.cumsum(real_BT, axis=1) - real_BT).astype(jnp.int32)
    if cache is not None:
        place_BT += _cached_tokens(cache)
        new_BT = jnp.where(real_BT, place_BT, -1)
        place_BS = jax.lax.dynamic_update_slice_in_dim(cache.places_BS, new_BT, cache.filled, axis=1)
        return place_BT, place_BS, (place_BS[:, None, :] >= 0) & (place_BS[:, None, :] <= place_BT[:, :, None])
    allowed_BTS = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real_BT[:, None, :]
    if prompt_period:
        place_BT = positions
        allowed_BTS |= _prompt_of(segment_ids, prompt_period)
    return place_BT, place_BT, allowed_BTS & (slot_T[None, :, None] >= slot_T[None, None, :])


def _prompt_of(segment_ids_BT: Array, period: int) -> Array:
    """True [B, T, S] where S is a token of the prompt that the segment of T continues, another one; see `hidden`."""
    first_BT = jnp.where(segment_ids_BT > 0, (segment_ids_BT - 1) // period * period + 1, -1)
    return (first_BT[:, :, None] == segment_ids_BT[:, None, :]) & (first_BT != segment_ids_BT)[:, :, None]


def _cached_tokens(cache: Cache) -> Array:
    """Number of real tokens in each row of a cache, [B, 1]."""
    return jnp.max(cache.places_BS, axis=1, keepdims=True) + 1


def as_matrix_product(x: Array, weights: Array, **how: Any) -> Array:
    """Compute x [..., D] @ weights [D, E] as one two-dimensional matrix product.

    With more axes, XLA's gradient on a CPU copies both operands transposed, a third more time per block. On a mesh the
    axes are kept, because they are sharded separately.
    """
    if on_a_mesh():
        return jnp.matmul(x, weights, **how)
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), weights, **how)
    return flat.reshape(*x.shape[:-1], weights.shape[-1])


class OffsetRMSNorm(nn.Module):
    """RMSNorm with an offset scale: x / rms(x) · (1 + scale), with scale initialized to 0 (Gemma)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return normed * (1.0 + scale.reshape((1,) * (x.ndim - 1) + (-1,)))


def _norm(config: ModelConfig, name: str) -> nn.Module:
    if config.norm_offset:
        return OffsetRMSNorm(config.norm_epsilon, name=name)
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.float32, name=name)
    # The fast variance, E[x²] - E[x]², loses precision where a trained model's residual stream has a large mean.
    return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


class Dense(nn.Module):
    """Dense layer x W (+ b), plus (x A) B if the parameters contain a LoRA adapter for the kernel (lora.py)."""

    features: int
    use_bias: bool
    dtype: str
    scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.scale), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = as_matrix_product(x, kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):
            down, up = self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b")
            y += (x @ down.astype(self.dtype)) @ up.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def _dense(config: ModelConfig, features: int, name: str, scale: float = 1.0, bias: bool | None = None) -> Dense:
    # Std 1/sqrt(width) trains small models faster than GPT-2's constant 0.02, to which it is equal at width 2500.
    use_bias = config.bias if bias is None else bias
    return Dense(features, use_bias, config.dtype, scale * config.width**-0.5, name=name)


@pytree
class Row:
    """Inputs shared by all blocks.

    Attributes:
      positions_BT: positions for the rotary embeddings.
      allowed_BTS: True for keys that a token may attend to.
      behind_BTS: distance from token to key in real tokens, for sliding windows.
      filled: scalar, number of cache slots written before, or None without a cache.
      at_BQ: columns whose output the last block computes, or None for all.
      segments_BT: segment ids if they alone determine the attention mask, else None.
    """

    positions_BT: Array
    allowed_BTS: Array
    behind_BTS: Array
    filled: Any
    at_BQ: Any
    segments_BT: Any

    def select_columns(self, x: Array, last: int) -> Array:
        """Select columns of x [B, T, …]: those at `at_BQ` if given, else the last ones; all of them if last is 0."""
        if self.at_BQ is not None:
            return jnp.take_along_axis(x, self.at_BQ.reshape(self.at_BQ.shape + (1,) * (x.ndim - 2)), axis=1)
        return x[:, -last:]


@pytree
class Layer:
    """Inputs of one block, or of all blocks with a leading axis of layers.

    Attributes:
      window: sliding window in tokens, 0 for full attention.
      frequency: [F], rotary frequencies in radians per position.
      amplitude: factor of cos and sin.
      keys: buffer of the KV cache, or None; the stack of all blocks if layers are scanned.
      values: likewise.
      number: index of the block in that stack.
      turn: (cos, sin) [B, T, F] of the rotation, if looked up in a table.
    """

    window: Any
    frequency: Any
    amplitude: Any
    keys: Any = None
    values: Any = None
    number: Array | None = None
    turn: Any = None

    def append_to_cache(self, buffer: Any, new: Array, filled: Array) -> tuple[Any, Any]:
        """Append `new` to a cache buffer: (the updated buffer, this block's part of it)."""
        if self.number is None:
            buffer = write(buffer, new, (0, 0, filled, 0))
            return buffer, buffer
        # Write only the new slots into the stack: as a loop carry it is updated in place.
        buffer = write(buffer, new[None], (self.number, 0, 0, filled, 0))
        number = self.number
        return buffer, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), buffer)


def _layers(config: ModelConfig) -> list[tuple[int, np.ndarray, float]]:
    """List (window, frequency, amplitude) of each block."""
    found = []
    for layer in range(config.layers):
        base, scaling, window = config.rope_base, config.rope_scaling, config.window(layer)
        if window and config.rope_local_base is not None:
            base, scaling = config.rope_local_base, RopeScaling()
        found.append((window, frequencies(config.rotary_width, base, scaling), scaling.amplitude))
    return found


class Attention(nn.Module):
    """Grouped-query attention over the allowed keys."""

    config: ModelConfig
    last: int = 0

    @nn.compact
    def __call__(self, x_BTD: Array, row: Row, layer: Layer) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        groups, head = config.key_heads, config.head_size
        selected_BTD = row.select_columns(x_BTD, self.last)
        rows, length, _ = selected_BTD.shape

        def split(name: str, heads: int, x: Array = x_BTD) -> Array:
            flat = _dense(config, heads * head, name, bias=config.qkv_bias)(x)
            return flat.reshape(rows, -1, heads, head).transpose(0, 2, 1, 3)

        query, key, value = split("query", config.heads, selected_BTD), split("key", groups), split("value", groups)
        if config.qk_norm:
            query = _norm(config, "query_norm")(query).astype(config.dtype)
            key = _norm(config, "key_norm")(key).astype(config.dtype)
        if config.positions == "rotary":
            turn = layer.turn
            if turn is None:
                turn = turns(row.positions_BT, layer.frequency, layer.amplitude)
            query = rotate(query, *(row.select_columns(x, self.last) for x in turn))
            key = rotate(key, *turn)
        buffers = None
        if layer.keys is not None and layer.values is not None:
            # Constrain the query too, or the sharding of the logits would determine where attention is computed.
            query = constrain_cache(query, groups)
            keys, key = layer.append_to_cache(layer.keys, constrain_cache(key), row.filled)
            values, value = layer.append_to_cache(layer.values, constrain_cache(value), row.filled)
            buffers = (keys, values)
        allowed_BTS = row.allowed_BTS
        if any(config.windows):
            window_111 = jnp.reshape(layer.window, (1, 1, 1))
            allowed_BTS = allowed_BTS & ((row.behind_BTS < window_111) | (window_111 == 0))
        allowed_BTS = row.select_columns(allowed_BTS, self.last)
        mixed = attend(
            query,
            key,
            value,
            allowed_BTS,
            row.segments_BT,
            scale=head**-0.5 if config.query_scale is None else config.query_scale,
            softcap=config.attention_softcap,
            kind=choose(
                config.attention,
                queries=length,
                head=head,
                dtype=config.dtype,
                softcap=config.attention_softcap,
                by_segments=row.segments_BT is not None and row.at_BQ is None,
                cached=buffers is not None,
            ),
        )
        mixed = mixed.transpose(0, 2, 1, 3).reshape(rows, length, config.heads * head)
        return _dense(config, config.width, "out", (2 * config.layers) ** -0.5)(mixed), buffers


class FeedForward(nn.Module):
    """Position-wise feed-forward layer, with or without a gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        config = self.config
        hidden = _dense(config, config.hidden_width, "up", bias=config.ffn_bias)(x_BTD)
        if config.gated:
            gate = _dense(config, config.hidden_width, "gate", bias=config.ffn_bias)(x_BTD)
            act = jax.nn.silu(gate) if config.activation == "swiglu" else jax.nn.gelu(gate, approximate=True)
            hidden = act * hidden
        else:
            hidden = jax.nn.gelu(hidden, approximate=config.activation == "gelu")
        scale = (2 * config.layers * config.hidden_width / config.width) ** -0.5
        return _dense(config, config.width, "down", scale, bias=config.ffn_bias)(hidden)


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
      last: number of columns to compute, from the end; 0 for all.
    """

    config: ModelConfig
    deterministic: bool = True
    last: int = 0

    @nn.compact
    def __call__(self, x_BTD: Array, row: Row, layer: Layer) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)

        def norm(name: str, x: Array) -> Array:
            return _norm(config, name)(x).astype(config.dtype)

        normed = norm("attention_norm", x_BTD)
        mixed, buffers = Attention(config, self.last, name="attention")(normed, row, layer)
        x_BTD, normed = row.select_columns(x_BTD, self.last), row.select_columns(normed, self.last)
        if config.post_norms:
            mixed = norm("attention_post_norm", mixed)
        attended = x_BTD + dropout(mixed)
        if config.residual != "parallel_shared":
            normed = norm("ffn_norm", attended if config.residual == "sequential" else x_BTD)
        fed = FeedForward(config, name="ffn")(normed)
        if config.post_norms:
            fed = norm("ffn_post_norm", fed)
        return constrain(attended + dropout(fed), "batch", "none", "none"), buffers


class Transformer(nn.Module):
    """Decoder-only transformer with a language head (logits [B, T, V]) or a scalar head (scores [B, T]).

    `apply({"params": params}, tokens_BT, mask=…)` runs backbone and head. They are separate methods, so that a loss can
    apply the head to the positions it needs: `apply(…, method="hidden")` and `apply(…, hidden, method="head")`.
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
        """Compute logits [B, T, V] or, with the scalar head, scores [B, T], float32.

        Args:
          tokens_BT: int32 token ids.
          mask: [B, T] bool, True for real tokens, which attend to real tokens only; all True by default.
          segment_ids: [B, T] int32 in place of a mask, 0 for padding; tokens attend within their own segment.
          positions: [B, T] int32; counted from the mask by default.
          cache: KV cache of the preceding tokens, to which these are appended; it must have room for them.
          deterministic: disables dropout; if False, `rngs` must have a "dropout" key.

        Returns:
          The logits or scores; with a cache, (logits or scores, new cache).

        Raises:
          ValueError: for a sequence longer than the context, or segment ids with a cache.
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
        last: int = 0,
        at_BQ: Array | None = None,
        prompt_period: int = 0,
    ) -> Any:
        """Compute the hidden states [B, T, D] float32 that the head reads: the normalized residual stream.

        Args:
          tokens_BT: as in `__call__`, like the other arguments not listed here.
          last: number of columns to return, from the end, [B, last, D]; 0 for all. For all other columns the last
            block computes keys and values only.
          at_BQ: columns to return in place of the last ones, [B, Q, D].
          prompt_period: S above 0 takes the segments of a row in groups 1 to S, S + 1 to 2 S, …: the first of a group
            is a prompt that the others continue and attend to, as if in rows of their own. Such a row may be longer
            than the context.

        Returns:
          The hidden states; with a cache, (hidden states, new cache).

        Raises:
          ValueError: for a sequence longer than the context, or segment ids with a cache.
        """
        config = self.config
        length = tokens_BT.shape[1]
        if length > config.context and not prompt_period:
            raise ValueError(f"sequence of {length} tokens is longer than the context {config.context}")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_BT) if mask is None else mask.astype(jnp.int32)
        elif cache is not None:
            raise ValueError("segment_ids with a cache: a cached row is one segment; pass mask instead")
        below = 0
        if positions is None:
            slots = length if cache is None else cache.places_BS.shape[1]
            # Counted positions stay below the context if it has room for all slots.
            below = config.context if slots <= config.context and not on_a_mesh() else 0
            positions = positions_of(segment_ids)
            if cache is not None:
                positions += _cached_tokens(cache)
            if prompt_period:
                positions += jnp.sum(_prompt_of(segment_ids, prompt_period), axis=2, dtype=jnp.int32)
        place_BT, place_BS, allowed_BTS = _visible(segment_ids, positions, cache, prompt_period)
        x_BTD = self.embedding[tokens_BT] * config.embedding_scale
        if config.positions == "learned":
            x_BTD += self.position_embedding[jnp.minimum(positions, config.context - 1)]
        x_BTD = constrain(x_BTD.astype(config.dtype), "batch", "none", "none")
        x_BTD = self.dropout(x_BTD, deterministic=deterministic)
        behind_BTS = place_BT[:, :, None] - place_BS[:, None, :]
        # A sliding window counts real tokens back, which segment ids cannot express.
        windowed = any(0 < window < length for window in config.windows)
        segments_BT = None if cache is not None or prompt_period or windowed else segment_ids
        row = Row(positions, allowed_BTS, behind_BTS, None if cache is None else cache.filled, None, segments_BT)
        x_BTD, keys, values = self._blocks(x_BTD, row, cache, deterministic, last, at_BQ, below)
        x_BTD = self.final_norm(x_BTD)
        if cache is None:
            return x_BTD
        return x_BTD, Cache(keys, values, place_BS, cache.filled + length)

    @nn.compact
    def _blocks(
        self,
        x_BTD: Array,
        row: Row,
        cache: Cache | None,
        deterministic: bool,
        last: int,
        at_BQ: Array | None,
        below: int,
    ) -> tuple[Array, Any, Any]:
        """Run all blocks, one by one or as a scan: (residual stream, keys of the cache, values of the cache).

        Args:
          below: exclusive upper bound of the positions, or 0 if unknown.
        """
        config = self.config
        kind: Any = Block
        if config.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            kind = nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
        layers = _layers(config)
        if config.scan_layers:
            windows, rates, amplitudes = (np.array(column) for column in zip(*layers, strict=True))
            stacked = Layer(
                window=jnp.asarray(windows, jnp.int32),
                frequency=jnp.asarray(rates, jnp.float32),
                amplitude=jnp.asarray(amplitudes, jnp.float32),
                number=jnp.arange(config.layers, dtype=jnp.int32),
            )

            def body(block: Any, carry: tuple[Array, Any, Any], row: Row, layer: Layer) -> tuple[Any, None]:
                x_BTD, keys, values = carry
                x_BTD, buffers = block(x_BTD, row, dataclasses.replace(layer, keys=keys, values=values))
                return (x_BTD, *((None, None) if buffers is None else buffers)), None

            loop = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=config.layers,
            )
            caches = (None, None) if cache is None else (cache.keys, cache.values)
            (x_BTD, *buffers), _ = loop(kind(config, deterministic, name="blocks"), (x_BTD, *caches), row, stacked)
            return dataclasses.replace(row, at_BQ=at_BQ).select_columns(x_BTD, last), buffers[0], buffers[1]
        keys, values = [], []
        use_table = config.positions == "rotary" and below * config.rotary_width <= TURN_TABLE
        table: dict[tuple[bytes, float], Any] = {}
        for i, (window, frequency, amplitude) in enumerate(layers):
            table_key = (frequency.tobytes(), amplitude)
            if below and use_table and table_key not in table:
                table[table_key] = turns(row.positions_BT, frequency, amplitude, below=below)
            cached = (None, None) if cache is None else (cache.keys[i], cache.values[i])
            final = i == config.layers - 1
            block = kind(config, deterministic, last if final else 0, name=f"block_{i}")
            if final:
                row = dataclasses.replace(row, at_BQ=at_BQ)
            x_BTD, buffer = block(
                x_BTD, row, Layer(window, frequency, amplitude, cached[0], cached[1], turn=table.get(table_key))
            )
            if buffer is not None:
                keys.append(buffer[0])
                values.append(buffer[1])
        return x_BTD, tuple(keys), tuple(values)

    def head(self, hidden_BTD: Array) -> Array:
        """Apply the head to hidden states [..., D]: logits [..., V] or scores [...], float32."""
        if self.scalar:
            return self.score(hidden_BTD)[..., 0]
        config = self.config
        weights = self.embedding.T if config.tied else self.unembedding
        logits = as_matrix_product(
            hidden_BTD.astype(config.dtype), weights.astype(config.dtype), preferred_element_type=jnp.float32
        )
        logits = constrain(logits, "batch", *("none",) * (logits.ndim - 2), "vocabulary")
        if config.logit_softcap:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits[..., : config.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, key: Array) -> Params:
    """Initialize parameters: a nested dict of float32 arrays."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def to_scalar_head(params: Params, model: Transformer, key: Array) -> Params:
    """Initialize a scalar-head `model`, such as a reward model, with the backbone of `params` and a fresh head."""
    fresh = init_params(model, key)
    return {name: value if name == "score" else params[name] for name, value in fresh.items()}


def stack_blocks(params: Params, config: ModelConfig) -> Params:
    """Stack the blocks of parameters (or of an adapter) for scanned layers, under "blocks", [layers, …].

    Raises:
      ValueError: if some of the blocks are missing.
    """
    names = [f"block_{i}" for i in range(config.layers)]
    missing = [name for name in names if name not in params]
    if len(missing) == len(names):
        return params
    if missing:
        raise ValueError(f"{missing[0]} is missing: expected all {len(names)} blocks, got {len(names) - len(missing)}")
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {name: value for name, value in params.items() if name not in names} | {"blocks": blocks}


def unstack_blocks(params: Params, config: ModelConfig) -> Params:
    """The inverse of `stack_blocks`."""
    if "blocks" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "blocks"}
    for i in range(config.layers):
        rest[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    return rest
