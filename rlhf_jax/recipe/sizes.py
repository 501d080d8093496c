"""Sizes of the recipe (--size): model shapes and hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rlhf_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """Model and hyperparameters of a size; small is tuned for two CPU cores, the larger ones are for a GPU."""

    model: ModelConfig
    prompt_tokens: int
    response_tokens: int
    pretrain_steps: int
    pretrain_batch: int
    row_length: int
    pretrain_rate: float
    sft_steps: int
    sft_batch: int  # packed rows of row_length, each with as many demonstrations as fit
    sft_rate: float
    sft_dropout: float
    rankings: int  # with fewer prompts, prompts are sampled again
    reward_batch: int
    reward_rate: float
    iterations: int
    episodes: int
    minibatches: int
    epochs: int
    pack: int  # packed rows of episodes per pass, on one device; 0 pads each episode instead
    policy_rate: float
    critic_rate: float
    kl_coef: float
    pretraining_coef: float


def shape(vocab_size: int, context: int, width: int, layers: int, heads: int, **changes: Any) -> ModelConfig:
    """Llama block with Gemma's embedding scale, Qwen3's query-key norm, and a rotary base for short rows.

    The effect of each is measured in docs/lab-notebook.md.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        context=context,
        width=width,
        layers=layers,
        heads=heads,
        rope_base=1000.0,
        qk_norm=True,
        embedding_scale=math.sqrt(width),
        **changes,
    )


SIZES = {
    "tiny": Size(
        model=shape(512, 128, 64, 2, 2),
        prompt_tokens=20,
        response_tokens=24,
        pretrain_steps=150,
        pretrain_batch=8,
        row_length=64,
        pretrain_rate=3e-3,
        sft_steps=100,
        sft_batch=8,
        sft_rate=2e-3,
        sft_dropout=0.0,
        rankings=128,
        reward_batch=16,
        reward_rate=1e-3,
        iterations=6,
        episodes=32,
        minibatches=2,
        epochs=1,
        pack=0,
        policy_rate=3e-4,
        critic_rate=1e-3,
        kl_coef=0.1,
        pretraining_coef=0.1,
    ),
    "small": Size(
        model=shape(4096, 128, 128, 3, 8),
        prompt_tokens=16,
        response_tokens=20,
        pretrain_steps=2200,
        pretrain_batch=8,
        row_length=64,
        pretrain_rate=3e-3,
        sft_steps=1400,
        sft_batch=8,
        sft_rate=2e-3,
        sft_dropout=0.1,
        rankings=8000,
        reward_batch=16,
        reward_rate=1.4e-3,
        iterations=140,
        episodes=64,
        minibatches=2,
        epochs=1,
        pack=8,
        policy_rate=7e-4,
        critic_rate=1.4e-3,
        kl_coef=0.13,
        pretraining_coef=0.02,
    ),
    "base": Size(
        model=shape(4096, 256, 512, 8, 8, dtype="bfloat16"),
        prompt_tokens=16,
        response_tokens=20,
        pretrain_steps=6000,
        pretrain_batch=32,
        row_length=128,
        pretrain_rate=1e-3,
        sft_steps=1500,
        sft_batch=8,
        sft_rate=3e-4,
        sft_dropout=0.1,
        rankings=8000,
        reward_batch=64,
        reward_rate=1e-4,
        iterations=150,
        episodes=256,
        minibatches=8,
        epochs=1,
        pack=0,
        policy_rate=5e-5,
        critic_rate=1e-4,
        kl_coef=0.05,
        pretraining_coef=0.1,
    ),
    "large": Size(
        model=shape(8192, 512, 1024, 16, 16, dtype="bfloat16"),
        prompt_tokens=16,
        response_tokens=20,
        pretrain_steps=8000,
        pretrain_batch=64,
        row_length=256,
        pretrain_rate=5e-4,
        sft_steps=2000,
        sft_batch=4,
        sft_rate=1e-4,
        sft_dropout=0.2,
        rankings=9000,
        reward_batch=64,
        reward_rate=3e-5,
        iterations=200,
        episodes=512,
        minibatches=8,
        epochs=1,
        pack=0,
        policy_rate=1e-5,
        critic_rate=3e-5,
        kl_coef=0.05,
        pretraining_coef=0.1,
    ),
}
