"""Size and price a stage on a TPU pod, from its programs compiled for that pod on this machine. No TPU is needed.

.venv-pods/bin/rlhf-jax plan --model llama3-8b --stage ppo --topology v5e:16x16 --mesh fsdp=256

libtpu, the compiler, is in an environment of its own: `sh .ci/setup-pods` makes it.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from rlhf_jax.config import CacheDtype, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a plan."""

    model: str
    """llama3-8b, llama3-70b, gpt2, smollm2-135m, a config.json of ours or of Hugging Face, or hf:FOLDER."""
    stage: Literal["pretrain", "sft", "reward", "ppo"] = "ppo"
    """Which stage."""
    topology: str
    """Kind of chip and chips along each axis, such as v5e:16x16 or v5p:4x4x8."""
    mesh: str = ""
    """Axes of devices, such as data=2,fsdp=128; fsdp over all chips if not given."""
    batch: int = 0
    """Rows of a step over all chips (PPO: episodes of an iteration); one row (PPO: two) a chip and part if 0."""
    row_length: int = 0
    """Tokens of a row outside PPO; up to 2,048 if 0."""
    prompt_length: int = 512
    """Tokens of a prompt of PPO."""
    response_length: int = 512
    """Tokens of a response of PPO; every response is taken to be that long."""
    responses: int = 2
    """Responses to a prompt of the reward model."""
    pretraining_batch: int = -1
    """Rows of pretraining text in an iteration of PPO, as long as its episodes; as many as episodes if -1."""
    minibatches: int = 2
    """Optimizer steps of an epoch of PPO."""
    microbatches: int = 1
    """Parts of each, one after the other."""
    epochs: int = 1
    """Of PPO."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """What a layer computes anew in the backward pass; auto: all but matrix products (dots) if that fits, else all
    (full)."""
    head_chunk: int = 512
    """Positions of a row whose logits are held at a time; 0 holds all."""
    decode_parts: int = -1
    """Devices of the axis fsdp among which one copy of the weights lies while sampling; 0 leaves them cut by fsdp; one
    for each key head if -1."""
    cache_dtype: CacheDtype = "model"
    """Of keys and values while sampling: as the model computes them, or fewer bytes."""
    price: float = 0.0
    """Of a chip for an hour, in any currency."""
    tokens: float = 0.0
    """Tokens of the whole run, prompts and padding included; for chip-hours and the bill."""
    json: str = ""
    """File for the figures."""
    search: bool = False
    """Try meshes, and with --remat auto rematerialisations, and rank those that fit."""
    only: Literal["", "memory", "time"] = ""
    """Leave out the other half of the compilations; empty for both. memory gives the time of the whole programs'
    schedules as well, but nothing of decoding."""

    def __post_init__(self) -> None:
        for field in ("batch", "row_length", "price", "tokens", "head_chunk"):
            at_least(self, field, 0)
        for field in ("prompt_length", "response_length", "responses", "minibatches", "microbatches", "epochs"):
            at_least(self, field, 1)
        for field in ("pretraining_batch", "decode_parts"):
            at_least(self, field, -1)


def run(config: Config) -> None:
    """Plans and prints."""
    # Before jax is imported: the compiler is asked for a pod that is not there, and nobody for its address.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No chip is opened, so two plans need not wait for each other.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from rlhf_jax.cli import planning

    planning.run(config)
