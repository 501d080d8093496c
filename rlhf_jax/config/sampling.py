"""Sampling settings, used from the command line to the compiled loop."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from rlhf_jax.errors import UserError

CacheDtype = Literal["model", "bfloat16", "int8"]
"""Dtype of a KV cache: the model's compute dtype, or one with fewer bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings."""

    max_new_tokens: int
    """Maximum number of tokens sampled per row, R."""
    stop_ids: tuple[int, ...]
    """Token ids that end a row, such as the end-of-text token; the stop token is part of the response."""
    pad_id: int
    """Token id that pads a row after its end."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. PPO leaves top_k and top_p at their defaults: otherwise the probability ratio
    and the KL would refer to a distribution other than the one sampled from."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose total probability reaches p; 1 keeps all."""
    samples: int = 1
    """Number of responses per prompt, n; the prompt is computed once for all of them. slots must be a multiple of 4
    n."""
    slots: int = 0
    """Slots of continuous batching: rows computed at a time. A finished row frees its slot for the next prompt; when no
    prompt is left, the unfinished rows are compacted. Pays off where lengths differ. 0 computes all rows until the last
    has ended."""
    segments: int = 1
    """Number of KV cache lengths, used in turn: the last has room for R tokens and each is half the next. A token
    attends over the current length only, so that a large R costs nothing while responses are short. Each is compiled;
    with slots there is one."""
    cache_dtype: CacheDtype = "model"
    """Dtype of the KV cache: the model's, bfloat16, or int8 (one scale per token and key head) to store and read fewer
    bytes. Rounding shifts the logits, so the sampled distribution is not exactly the model's."""
    decode_parts: int = 0
    """Number of devices along the mesh axis fsdp that share one copy of the weights during sampling, gathered once
    instead of at each token; 0 keeps the fsdp sharding."""

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise UserError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: expected 0 or more, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: expected above 0, at most 1, got {self.top_p}")
        if self.segments < 1:
            raise UserError(f"segments: expected 1 or more, got {self.segments}")
        if self.slots < 0:
            raise UserError(f"slots: expected 0 or more, got {self.slots}")
        if self.slots and self.segments > 1:
            raise UserError(
                f"segments: expected 1 with slots {self.slots}, got {self.segments}; use one of the two, as slots use "
                "a ring buffer"
            )
        if self.samples < 1 or (self.slots and self.samples > 1 and self.slots % (4 * self.samples)):
            raise UserError(
                "samples: expected 1 or more, and slots a multiple of 4 times it, got "
                f"samples {self.samples} with slots {self.slots}"
            )
        if self.cache_dtype not in get_args(CacheDtype):
            raise UserError(f"cache_dtype: expected one of {', '.join(get_args(CacheDtype))}, got {self.cache_dtype!r}")

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of response tokens the cache has room for in each segment, ascending; the last is max_new_tokens."""
        return tuple(sorted({-(-self.max_new_tokens // 2**half) for half in range(self.segments)}))
