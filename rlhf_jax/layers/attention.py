"""Softmax attention: explicit matrix products on any platform, a blockwise kernel where the platform has one.

The kernel is splash attention (Pallas) on TPU and cuDNN's flash attention on GPU; neither materializes the scores of a
row. On CPU the plain implementation is always used, against which the others are tested. The TPU kernel was run in
interpret mode and compiled for TPU, and the cuDNN call was run with XLA's implementation; **neither has run on a TPU or
a GPU yet**.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.layers.kv_cache import mixture, products
from rlhf_jax.parallel.sharding import on_each_device, parts_are_known

# Finite, so that a row with all keys masked gives a uniform softmax instead of NaN.
MASKED = -1e30
# Block size of splash attention, for rows at least that long. By the TPU compiler's own schedule, smaller blocks are
# slower per score, and larger ones compute more scores that the mask then hides (docs/pods.md).
BLOCK = 512
# Last axis of the TPU's vector registers, and so the smallest block.
LANES = 128

Kind = Literal["plain", "splash", "cudnn"]


def attend(
    query: Array,
    key: Any,
    value: Any,
    allowed_BQS: Array,
    segments_BS: Array | None,
    *,
    scale: float,
    softcap: float = 0.0,
    kind: Kind = "plain",
) -> Array:
    """Grouped-query attention: softmax(c tanh(scale q·k / c)) v over the allowed keys, [B, H, Q, d].

    Args:
      query: [B, H, Q, d]; for splash, the queries of the last Q of S tokens.
      key: [B, G, S, d], each key head shared by H / G consecutive query heads.
      value: [B, G, S, d], likewise.
      allowed_BQS: True for keys that a query may attend to.
      segments_BS: segment ids, used by splash in place of allowed_BQS: a token attends to itself and the preceding
        tokens of its segment. The output of padding, segment 0, is unspecified.
      scale: factor of q·k.
      softcap: c; 0 omits the tanh.
      kind: implementation, as returned by `choose`.

    Source:
      Vaswani et al. 2017 (arXiv:1706.03762); groups: Ainslie et al. 2023 (arXiv:2305.13245); cap: Gemma 2
      (arXiv:2408.00118).
    """
    if kind == "splash" and segments_BS is not None:
        return splash(query, key, value, segments_BS, scale=scale, softcap=softcap)
    if kind == "cudnn":
        return cudnn(query, key, value, allowed_BQS, scale=scale)
    return plain(query, key, value, allowed_BQS, scale=scale, softcap=softcap)


def choose(
    wanted: Literal["auto", "plain"],
    *,
    queries: int,
    head: int,
    dtype: str,
    softcap: float,
    by_segments: bool,
    cached: bool,
) -> Kind:
    """Choose the attention implementation for given shapes and the devices that the traced program runs on.

    Args:
      wanted: "auto", or "plain" to disable kernels.
      queries: Q.
      head: d.
      dtype: dtype of queries and keys.
      softcap: c, 0 for none.
      by_segments: True if segment ids alone determine the mask: no window, no shared prompt, no selected columns.
      cached: True if keys come from a KV cache, where a kernel gains nothing for the few queries.
    """
    if wanted == "plain" or cached or queries < LANES:
        return "plain"
    here = platform()
    # The compiler cannot partition the kernel, so without a mesh (e.g. held-out evaluation on many chips) use plain.
    if here == "tpu" and by_segments and (parts_are_known() or jax.device_count() == 1):
        return "splash"
    if here == "gpu" and dtype in ("bfloat16", "float16") and not softcap and head % 8 == 0 and head <= 128:
        return "cudnn" if _ampere() else "plain"
    return "plain"


def platform() -> str:
    """Platform of the devices that the traced program runs on: "cpu", "gpu" or "tpu".

    These are the devices of the current mesh, which need not be present (as when planning), or else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def _ampere() -> bool:
    """True for a GPU that supports cuDNN's flash attention: NVIDIA, compute capability 8 or higher."""
    major = re.match(r"(\d+)\.", str(jax.devices()[0].compute_capability))
    return major is not None and int(major[1]) >= 8


def plain(query: Array, key: Any, value: Any, allowed_BQS: Array, *, scale: float, softcap: float = 0.0) -> Array:
    """Attention as in `attend`, by two matrix products and a float32 softmax; materializes the scores [B, H, Q, S].

    Args:
      query: [B, H, Q, d].
      key: array, or one block's buffer of a KV cache (kv_cache.py).
      value: likewise.
      allowed_BQS: True for keys that a query may attend to.
      scale: factor of q·k.
      softcap: c; 0 omits the tanh.
    """
    rows, heads, length, head = query.shape
    groups = jax.tree.leaves(key)[0].shape[1]
    # Fold the query heads of a group into the query axis: one product per key head, and no copy of the keys.
    query = query.reshape(rows, groups, (heads // groups) * length, head)
    scores = products(query, key) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(rows, heads, length, -1)
    weights = jax.nn.softmax(jnp.where(allowed_BQS[:, None], scores, MASKED), axis=-1)
    weights = weights.reshape(rows, groups, (heads // groups) * length, -1)
    return mixture(weights, value, query.dtype).reshape(rows, heads, length, head)


def cudnn(
    query: Array,
    key: Array,
    value: Array,
    allowed_BQS: Array,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Attention as in `attend`, by cuDNN's flash attention.

    Materializes the mask [B, 1, Q, S] in the queries' dtype, but no scores.

    Args:
      query: [B, H, Q, d].
      key: [B, G, S, d].
      value: [B, G, S, d].
      allowed_BQS: True for keys that a query may attend to.
      scale: factor of q·k.
      implementation: "xla" computes the same without a GPU, for tests.
    """
    queries = query.shape[2]
    # With a mask, the backward pass requires even lengths.
    query, key, value = (_padded(x, 2, axis=2).transpose(0, 2, 1, 3) for x in (query, key, value))
    mask = _padded(_padded(allowed_BQS, 2, axis=1), 2, axis=2)[:, None]
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)
    return mixed.transpose(0, 2, 1, 3)[:, :, :queries]


def splash(
    query: Array,
    key: Array,
    value: Array,
    segments_BS: Array,
    *,
    scale: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """Attention as in `attend`, by JAX's TPU kernel, on each device for its shard of rows and key heads.

    An axis that the devices do not divide is replicated. Rows are padded at the end to a multiple of the block size.
    The queries are multiplied by the scale and rounded to their dtype, whereas `plain` multiplies the float32 scores.

    Args:
      query: [B, H, Q, d], the queries of the last Q of S tokens.
      key: [B, G, S, d].
      value: [B, G, S, d].
      segments_BS: segment ids; a token attends to itself and the preceding tokens of its segment.
      scale: factor of q·k.
      softcap: c; 0 omits the tanh.
      interpret: run the kernel in interpret mode, on any platform, for tests.

    Source:
      jax.experimental.pallas.ops.tpu.splash_attention; Dao 2023 (arXiv:2307.08691).
    """
    rows, heads, queries, head = query.shape
    groups = key.shape[1]
    query = (query * scale).astype(query.dtype).reshape(rows, groups, heads // groups, queries, head)
    mixed = on_each_device(
        functools.partial(_splash_rows, softcap=softcap, interpret=interpret),
        (
            (query, ("batch", "heads", "none", "none", "none")),
            (key, ("batch", "heads", "none", "none")),
            (value, ("batch", "heads", "none", "none")),
            (segments_BS, ("batch", "none")),
        ),
        out=0,
    )
    return mixed.reshape(rows, heads, queries, head)


def _splash_rows(
    query: Array, key: Array, value: Array, segments_BS: Array, *, softcap: float, interpret: bool
) -> Array:
    """Run the kernel of `splash` on one device's rows, with scaled queries [B, G, H/G, Q, d]."""
    # Imported here, so that only programs for TPUs pay for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, groups, share, queries, head = query.shape
    slots = key.shape[2]
    block = block_of(slots)
    behind = -slots % block
    # Align the ends of queries and keys to the same block, so that the causal triangle covers the fewest blocks.
    ahead = -(queries + behind) % block
    query = query.reshape(rows, groups * share, queries, head)
    query = jnp.pad(query, ((0, 0), (0, 0), (ahead, behind), (0, 0)))
    key, value, segments_BS = _padded(key, block, 2), _padded(value, block, 2), _padded(segments_BS, block, 1)
    mask = masks.CausalMask((query.shape[2], key.shape[2]), offset=key.shape[2] - query.shape[2])
    segments = kernel.SegmentIds(segments_BS[:, -query.shape[2] :], segments_BS)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * (groups * share)),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap if softcap else None,
        interpret=interpret,
    )
    mixed = jax.vmap(lambda q, k, v, ids: run(q, k, v, segment_ids=ids))(query, key, value, segments)
    return mixed[:, :, ahead : ahead + queries].reshape(rows, groups, share, queries, head)


def block_of(length: int) -> int:
    """Block size for a length: the smallest power of two from LANES that covers it, at most BLOCK."""
    block = LANES
    while block < min(length, BLOCK):
        block *= 2
    return block


def _padded(x: Array, multiple: int, axis: int) -> Array:
    """Pad the end of an axis with zeros (False) to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
