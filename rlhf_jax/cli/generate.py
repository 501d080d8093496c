"""Complete prompts, or chat, with the model of a run folder or a published model.

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
    """Sampling settings."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Model: folder of a pretrain, sft, ppo or preference run, or a published model as hf:FOLDER, gguf:FILE or
    pypi:PACKAGE."""
    base: str = ""
    """Model under an adapter given as peft:FOLDER, in place of the one that the adapter names."""
    chat_template: str = ""
    """File of a chat template, in Jinja, in place of the model's own."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Prompt to complete; may be repeated. By default each line of standard input is a prompt."""
    chat: bool = False
    """Chat: each line is a message, /tool RESULT the result of a call; /quit or end of input ends the chat."""
    start: str = ""
    """Start of a chat: JSONL file with one dialogue in any of the forms of prompts, with its system message and tools;
    the model answers its last turn first."""
    max_new_tokens: int = 64
    """Maximum number of tokens in a response."""
    temperature: float = 0.7
    """Sampling temperature, which divides the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Top-k sampling: sample among the k most likely tokens; 0 disables it."""
    top_p: float = 1.0
    """Top-p (nucleus) sampling: sample among the most likely tokens with this total probability; 1 disables it."""
    samples: int = 1
    """Responses per prompt."""
    segments: int = 1
    """Number of KV cache lengths used while sampling, each half the next, the last with room for max_new_tokens; saves
    time with a large limit that few responses reach. Each length is compiled."""
    cache_dtype: CacheDtype = "model"
    """Dtype of the KV cache: the model's own, or a smaller one, which changes the samples slightly."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        for field in ("max_new_tokens", "samples", "segments"):
            at_least(self, field, 1)
        for field in ("temperature", "top_k", "seed"):
            at_least(self, field, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.base and not self.run.startswith("peft:"):
            raise UserError(f"base: expected an adapter, peft:FOLDER, as the model, got {self.run!r}")
        if self.chat and (self.prompt or self.samples > 1):
            raise UserError("chat: expected messages from standard input alone, got --prompt or --samples as well")
        if self.start and not self.chat:
            raise UserError(f"start: expected a chat that {self.start!r} is the start of, got none; use --chat")


def run(config: Config) -> None:
    """Prints completions of the prompts, or starts a chat."""
    from rlhf_jax.cli import completion

    completion.run(config)
