"""Training of one network on rows, as pretraining, SFT, the reward model and preference optimization do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import ModelConfig, PretrainConfig, RowsConfig, RunConfig
from rlhf_jax.data import batch_at, new_lengths
from rlhf_jax.data.batches import Rows
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.pretrained.source import Source, Start
from rlhf_jax.runs import lifecycle
from rlhf_jax.runs.folder import RunFolder

T = TypeVar("T")


def open_folder(
    config: RunConfig, stage: str, model: ModelConfig, source: Source, start: Start, inputs: Mapping[str, str]
) -> RunFolder:
    """Create the folder of a run that starts from a source, or open it to resume the run; see `create_run`."""
    return lifecycle.create_run(
        config,
        stage=stage,
        model=model,
        tokenizer=source.tokenizer,
        inputs=inputs,
        origin=source.origin,
        base=start.record,
    )


def train(
    folder: RunFolder,
    config: PretrainConfig | RowsConfig,
    start: Start,
    rows: Rows[Any],
    make_update: Callable[..., Any],
    *,
    frozen: Sequence[Any] | None = None,
    **options: Any,
) -> TrainState:
    """Train on rows in random order, epoch by epoch, resuming from the run's last checkpoint if there is one.

    Args:
      folder: run folder.
      config: settings of the stage, with the batch and the steps of the run.
      start: initial parameters, and the frozen ones under an adapter.
      rows: rows to train on.
      make_update: (optimizer=…, axis_name=…) -> the stage's pure update(state, batch, *frozen).
      frozen: networks that the update reads; by default the parameters under an adapter, if there is one.
      **options: as for `lifecycle.train`.

    Returns:
      The final state.
    """
    steps = config.steps or 0
    optimizer = make_optimizer(config.optimizer, steps)
    order: dict[str, Any] = {"batch_size": config.batch, "seed": config.seed}
    if frozen is None:
        frozen = () if start.base is None else (start.base,)
    return lifecycle.train(
        folder,
        config,
        lambda: new_state(start.params, jax.jit(optimizer.init)(start.params), config.seed),
        lambda axis: make_update(optimizer=optimizer, axis_name=axis),
        lambda step, **share: batch_at(rows, **order, step=step, **share),
        new_shapes=lambda first: new_lengths(rows, **order, first=first, steps=steps),
        frozen=frozen,
        **options,
    )


def heldout_figures(accuracy: float | None, pairs: int, prompts: int) -> Mapping[str, Any]:
    """Part of the summary: share of held-out pairs in the right order, None if there are none, and its interval."""
    summary = {
        "heldout_accuracy": accuracy,
        "heldout_accuracy_interval": None if accuracy is None else wilson(accuracy, prompts),
        "heldout_pairs": pairs,
        "heldout_prompts": prompts,
    }
    return summary


def once_a_step(measure: Callable[[TrainState], T]) -> Callable[[TrainState], T]:
    """The measurement, made once for each step: the summary has the figures of the last evaluation."""
    known: dict[int, T] = {}

    def measured(state: TrainState) -> T:
        step = int(state.step)
        if step not in known:
            known.clear()
            known[step] = measure(state)
        return known[step]

    return measured
