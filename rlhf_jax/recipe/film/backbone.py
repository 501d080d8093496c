"""The lower layers of a model as a model of their own, on which a reward model takes a fraction of the time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.source import Source
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder


def write_lower_layers(source: Source, layers: int, folder: Path) -> RunFolder:
    """Write a run folder with the first `layers` blocks of a model, its embedding and its last norm.

    In a language model the sentiment of a text is read best from about half-way up: the last layers turn to the next
    token. A reward model of the lower half learns as well or better there in half the time.

    Args:
      source: the model.
      layers: blocks to keep, 1 to those of the model.
      folder: of the run; one that is finished is taken as it is.

    Raises:
      UserError: for more layers than the model has, and if the folder holds another run.
    """
    if not 1 <= layers <= source.model.layers:
        raise UserError(f"layers: expected 1 to {source.model.layers}, the layers of {source.where}, got {layers}")
    model = dataclasses.replace(source.model, layers=layers, windows=source.model.windows[:layers])
    run = RunFolder.create(
        folder,
        stage="pretrain",
        config={"source": source.spec, "layers": layers},
        model=to_plain(model),
        tokenizer=source.tokenizer,
        inputs={"source": source.fingerprint},
    )
    if run.finished:
        return run
    params = dict(source.params())
    for at in range(layers, source.model.layers):
        params.pop(f"block_{at}", None)
    if "blocks" in params:
        params["blocks"] = jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.random.key(0), {})
    Checkpoints(run.checkpoints, keep_last=1).save(0, state, {})
    run.finish({"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "dialogues": source.dialogues})
    return run
