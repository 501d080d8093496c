"""Estimate memory, time and cost of a stage on a TPU pod, by compiling its programs for that pod. No TPU is needed.

.venv-pods/bin/rlhf-jax plan --model llama3-8b --stage ppo --topology v5e:16x16 --mesh fsdp=256

The compiler, libtpu, needs no TPU: `pip install libtpu`, or `sh .ci/setup-pods` in a checkout, which makes .venv-pods.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from rlhf_jax.config import CacheDtype, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the estimate."""

    model: str
    """Model: llama3-8b, llama3-70b, gpt2, smollm2-135m, a config.json (of a run or of Hugging Face), or hf:FOLDER."""
    stage: Literal["pretrain", "sft", "reward", "ppo"] = "ppo"
    """Stage to estimate."""
    topology: str
    """Chip type and chips along each axis, such as v5e:16x16 or v5p:4x4x8."""
    mesh: str = ""
    """Mesh axes, such as data=2,fsdp=128; by default fsdp over all chips."""
    batch: int = 0
    """Rows per step over all chips (PPO: episodes per iteration); 0 means 1 (PPO: 2) per chip and microbatch."""
    row_length: int = 0
    """Tokens per row, except in PPO; 0 means the model's context, at most 2,048."""
    prompt_length: int = 512
    """Tokens per prompt in PPO."""
    response_length: int = 512
    """Tokens per response in PPO; every response is assumed to be this long."""
    responses: int = 2
    """Responses per prompt in the reward model's data."""
    pretraining_batch: int = -1
    """Rows of pretraining text per PPO iteration, each as long as an episode; -1 means one per episode."""
    minibatches: int = 2
    """Optimizer steps per PPO epoch."""
    microbatches: int = 1
    """Microbatches per optimizer step, accumulated one after the other."""
    epochs: int = 1
    """PPO epochs per rollout batch."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """Rematerialisation: activations that a layer recomputes in the backward pass. dots: all but matrix products; full:
    all; auto: dots if that fits in memory, else full."""
    head_chunk: int = 512
    """Positions of a row whose logits are held in memory at a time; 0 holds all."""
    decode_parts: int = -1
    """Devices of the fsdp axis over which one copy of the weights is sharded while sampling; 0 keeps the fsdp sharding;
    -1 means one device per key head."""
    cache_dtype: CacheDtype = "model"
    """Dtype of the KV cache while sampling: the model's own, or a smaller one."""
    price: float = 0.0
    """Price per chip-hour, in any currency."""
    tokens: float = 0.0
    """Tokens of the full run, including prompts and padding; gives chip-hours and the total cost."""
    json: str = ""
    """JSON file for the estimate."""
    search: bool = False
    """Try several meshes (and remat settings, with --remat auto) and rank those that fit in memory."""
    only: Literal["", "memory", "time"] = ""
    """Estimate only memory or only time, for half of the compilations; by default both. memory also gives the scheduled
    time of the full programs, but none for decoding."""

    def __post_init__(self) -> None:
        for field in ("batch", "row_length", "price", "tokens", "head_chunk"):
            at_least(self, field, 0)
        for field in ("prompt_length", "response_length", "responses", "minibatches", "microbatches", "epochs"):
            at_least(self, field, 1)
        for field in ("pretraining_batch", "decode_parts"):
            at_least(self, field, -1)


def run(config: Config) -> None:
    """Prints the estimate."""
    # Set before jax is imported: the pod is only a compilation target, so its metadata server must not be queried.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No chip is opened, so several plans may run at once.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from rlhf_jax.cli import planning

    planning.run(config)
