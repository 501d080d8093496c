"""Softmax attention behind one function: plain products anywhere, a blockwise kernel where a platform has one.

On TPU that is splash attention (Pallas), on GPU cuDNN's flash attention: neither holds the scores of a row. On CPU it
is always the plain form, which is also what the others are tested against. The kernels were run in interpret mode and
compiled for TPU, and the call of cuDNN was run through XLA's own form of it; **neither ran on a TPU or a GPU yet**.
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

# Finite, so that a row whose every key is masked gives a uniform softmax and no NaN.
MASKED = -1e30
# Rows and columns of the scores that splash attention holds at a time, where a row has so many. By the TPU compiler's
# own schedule smaller blocks are slower a score, and larger ones compute more of what the mask then hides
# (docs/pods.md).
BLOCK = 512
# What the kernel's registers hold in their last axis: the least block.
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
    """softmax(c tanh(scale q·k / c)) v over the keys that each query may see, [B, H, Q, d]; no tanh where c is 0.

    Args:
      query: [B, H, Q, d], those of the last Q of S tokens for splash. key, value: [B, G, S, d], each for H / G
        neighbouring query heads.
      allowed_BQS: True for keys that a query may see.
      segments_BS: the same by segments, for splash: a token sees those of its own that do not stand behind it. What a
        token of segment 0, padding, gets is left open.
      softcap: c.
      kind: what computes it, by `choose`.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); groups: Ainslie et al. 2023 (arXiv:2305.13245); cap: Gemma 2
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
    """The kind of attention for shapes, on the devices that the program being traced is for.

    Args:
      queries: Q. head: d.
      by_segments: whether segments alone say what a token may see: no window, no shared prompt, no chosen columns.
      cached: whether keys come from a cache, whose few queries gain nothing.
    """
    if wanted == "plain" or cached or queries < LANES:
        return "plain"
    here = platform()
    # The compiler cannot cut the kernel: without a mesh (held-out figures of a run on many chips) it stays plain.
    if here == "tpu" and by_segments and (parts_are_known() or jax.device_count() == 1):
        return "splash"
    if here == "gpu" and dtype in ("bfloat16", "float16") and not softcap and head % 8 == 0 and head <= 128:
        return "cudnn" if _ampere() else "plain"
    return "plain"


def platform() -> str:
    """Of the devices that the program being traced is for: "cpu", "gpu", "tpu".

    They are those of the mesh that is set, which need not be here (a plan's are not), else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def _ampere() -> bool:
    """Whether the GPU is one of those that cuDNN's flash attention wants: NVIDIA's, compute capability 8 or more."""
    major = re.match(r"(\d+)\.", str(jax.devices()[0].compute_capability))
    return major is not None and int(major[1]) >= 8


def plain(query: Array, key: Any, value: Any, allowed_BQS: Array, *, scale: float, softcap: float = 0.0) -> Array:
    """`attend` by two products and a softmax in float32, the scores [B, H, Q, S] held.

    Args:
      key, value: arrays, or one block's buffers of a cache (cache.py).
    """
    rows, heads, length, head = query.shape
    groups = jax.tree.leaves(key)[0].shape[1]
    # Fold the query heads of a group into its rows: one product a key head, and no copy of the keys.
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
    """`attend` by cuDNN's flash attention; it holds the mask, [B, 1, Q, S] of the queries' type, and no scores.

    Args:
      implementation: xla computes the same without a GPU, for tests.
    """
    queries = query.shape[2]
    # The backward pass wants even lengths where there is a mask.
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
    """`attend` by the TPU kernel that JAX carries, each device its rows and key heads, all of those that do not divide.

    Rows are filled up to whole blocks with padding behind them. The scale is in the queries, so they are rounded to
    their type after it; `plain` multiplies float32 scores.

    Args:
      interpret: run the kernel's program operation by operation, on any platform, for tests.
    Source: jax.experimental.pallas.ops.tpu.splash_attention; Dao 2023 (arXiv:2307.08691).
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
    """Of a device's rows: query [B, G, H/G, Q, d] as `splash` takes it."""
    # Here, so that only programs for TPUs pay for the import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, groups, share, queries, head = query.shape
    slots = key.shape[2]
    block = block_of(slots)
    behind = -slots % block
    # Queries stand at the end of whole blocks as the keys do, so that the triangle falls into the fewest blocks.
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
    """Rows and columns of the scores that are computed at a time: the power of two that holds the length, or BLOCK."""
    block = LANES
    while block < min(length, BLOCK):
        block *= 2
    return block


def _padded(x: Array, multiple: int, axis: int) -> Array:
    """Filled up with zeros (False) behind the end of an axis to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
