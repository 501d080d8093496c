"""Complete prompts, or chat, with the model of a run's folder or a published one.

rlhf-jax generate runs/aligned --prompt "The sun" --samples 3

rlhf-jax generate runs/aligned --chat

rlhf-jax generate hf:SmolLM2-135M-Instruct --chat
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.config import CacheDtype, at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of sampling."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Folder of a pretrain, sft or ppo run; or hf:FOLDER, gguf:FILE or pypi:PACKAGE, a published model."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to complete; may be given more than once. None means the lines of standard input."""
    chat: bool = False
    """Hold a dialogue: a line is a message; /quit or the end of the input ends it."""
    max_new_tokens: int = 64
    """Most tokens of a response."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that have this probability together; 1 among all."""
    samples: int = 1
    """Responses to each prompt."""
    segments: int = 1
    """Lengths that the cache has while sampling, the last with room for max_new_tokens and each half the next: for a
    large limit that few responses reach. Each is compiled."""
    cache_dtype: CacheDtype = "model"
    """Of keys and values: as the model computes them, or in fewer bytes, which changes what is sampled a little."""
    seed: int = 0
    """Of what is sampled."""

    def __post_init__(self) -> None:
        for field in ("max_new_tokens", "samples", "segments"):
            at_least(self, field, 1)
        for field in ("temperature", "top_k", "seed"):
            at_least(self, field, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: found {self.top_p}, wanted more than 0 and at most 1")
        if self.chat and (self.prompt or self.samples > 1):
            raise UserError("chat: found --prompt or --samples beside it, wanted messages from standard input alone")


def run(config: Config) -> None:
    """Prints completions of the prompts, or holds a dialogue."""
    from rlhf_jax.cli import completion

    completion.run(config)
