"""Models that nobody trained: in a source, as stages are given them, and in the folder of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.config import ModelConfig, to_plain
from rlhf_jax.pretrained.source import Source
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import release
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from tests.made_params import random_params


def random_source(model: ModelConfig, spec: str = "tiny", *, scalar: bool = False, seed: int = 0) -> Source:
    """A model to start from, which reads bytes."""
    params = jax.tree.map(jnp.asarray, random_params(model, scalar, seed))
    return Source(
        where=spec,
        spec=spec,
        stage="sft",
        model=model,
        tokenizer=Tokenizer.bytes(),
        scalar=scalar,
        origin=None,
        own=lambda: params,
        identify=lambda: spec,
    )


def write_run(
    folder: Path,
    stage: str,
    params: Params,
    model: ModelConfig,
    tokenizer: TextTokenizer,
    *,
    released: Params | None = None,
    base: dict[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    **summary: Any,
) -> RunFolder:
    """The folder of a finished run. base: beside what the parameters, an adapter, stand."""
    run = RunFolder.create(
        folder,
        stage=stage,
        config=config or {},
        model=to_plain(model),
        tokenizer=tokenizer,
        inputs=inputs or {},
        base=base,
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.random.key(0), {})
    Checkpoints(run.checkpoints, keep_last=1).save(0, state, {})
    if released is not None:
        release(run, released, 0)
    run.finish(summary)
    return run
