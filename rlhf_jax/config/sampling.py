"""Settings of sampling, from the command line to the compiled loop."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from rlhf_jax.errors import UserError

CacheDtype = Literal["model", "bfloat16", "int8"]
"""What a KV cache holds: the dtype that the model computes in, or fewer bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: int
    """R, the most tokens sampled a row."""
    stop_ids: tuple[int, ...]
    """Ids that end a row (the end-of-text token); the stop token is part of the response."""
    pad_id: int
    """Written behind a row's end."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy. PPO leaves top_k and top_p at their defaults, or the probability ratio and the
    KL would be of another distribution than the one that was sampled."""
    top_k: int = 0
    """Keep the k most likely ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely ids whose probability reaches p; 1 keeps all."""
    samples: int = 1
    """n, responses to each prompt, which is computed once for all of them; slots must be a multiple of 4 n."""
    slots: int = 0
    """Rows computed at a time: one that has ended frees its slot for the next prompt, and when no prompt is left the
    live rows move together. It pays where lengths differ. 0 computes all rows until the last has ended."""
    segments: int = 1
    """Lengths that the cache has, one after the other, the last R and each half the next: a token attends to the slots
    there are, so that a large R costs nothing while responses are short. Each is compiled; with slots there is one."""
    cache_dtype: CacheDtype = "model"
    """Of keys and values: as they are computed, or bfloat16 or int8 (one scale for a token and key head), for fewer
    bytes to hold and read. It moves the logits, so the distribution sampled from is not quite the model's."""
    decode_parts: int = 0
    """Of the mesh axis fsdp, devices among which one copy of the weights lies while sampling, gathered once and not at
    each token; 0 leaves them where they are."""

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise UserError(f"temperature {self.temperature}: wanted 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: wanted 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: wanted above 0, at most 1")
        if self.segments < 1:
            raise UserError(f"segments {self.segments}: wanted 1 or more")
        if self.slots < 0:
            raise UserError(f"slots: found {self.slots}, wanted 0 or more")
        if self.slots and self.segments > 1:
            raise UserError(f"segments {self.segments} with slots {self.slots}: wanted one of them; slots write a ring")
        if self.samples < 1 or (self.slots and self.samples > 1 and self.slots % (4 * self.samples)):
            raise UserError(
                f"samples {self.samples} with slots {self.slots}: wanted 1 or more, slots a multiple of 4 times it"
            )
        if self.cache_dtype not in get_args(CacheDtype):
            raise UserError(f"cache_dtype {self.cache_dtype!r}: wanted one of {', '.join(get_args(CacheDtype))}")

    @property
    def ends(self) -> tuple[int, ...]:
        """Response tokens that the cache has room for in each segment, the last all of them."""
        return tuple(sorted({-(-self.max_new_tokens // 2**half) for half in range(self.segments)}))
