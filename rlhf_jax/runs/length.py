"""Length of a run over a fixed set of rows: its batch, and its steps from epochs or as given."""

from __future__ import annotations

import dataclasses

from rlhf_jax.config import RowsConfig
from rlhf_jax.config.checks import ceil_product

LARGEST, SMALLEST = 32, 4
# An epoch of fewer steps leaves the optimizer too few to move the parameters.
STEPS_PER_EPOCH = 16


@dataclasses.dataclass(frozen=True)
class Length:
    """Batch size in rows, number of updates, the passes over the rows that they make, and lines that tell the user."""

    batch: int
    steps: int
    epochs: float
    lines: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def run_length(config: RowsConfig, rows: int, *, epochs: float, what: str) -> Length:
    """Batch and steps of a run, and lines that say both, and if a batch larger than the data was replaced.

    An epoch visits every row once: steps = ⌈epochs × rows / batch⌉. With packed rows, rows are those of a batch, so an
    epoch visits every demonstration once too.

    Args:
      config: settings of the stage; its batch, epochs and steps may be None.
      rows: rows to train on, at least 1.
      epochs: default number of epochs.
      what: name of the rows in messages.
    """
    lines: list[str] = []
    batch = fitting_batch(rows, config.shares) if config.batch is None else config.batch
    if config.batch is not None and config.batch > max(rows, config.shares):
        batch = fitting_batch(rows, config.shares)
        lines.append(
            f"warning: batch {config.batch} is more than the {rows:,} {what} to train on; using --batch {batch}"
        )
    if config.steps is not None:
        steps = config.steps
    else:
        # Rounded up from the exact product: -(-a // b) is ⌈a / b⌉.
        steps = -(-ceil_product(epochs if config.epochs is None else config.epochs, rows) // batch)
    epochs = steps * batch / rows
    lines.append(f"{rows:,} {what}, batch {batch}: {steps:,} steps, {epochs:.3g} epochs")
    return Length(batch, steps, epochs, tuple(lines))


def fitting_batch(rows: int, shares: int = 1) -> int:
    """Default batch: 32, halved down to 4 while an epoch has fewer than 16 steps; never more than the rows.

    Args:
      rows: rows to train on.
      shares: devices × microbatches; the batch is a multiple of it, and at least it.
    """
    batch = LARGEST
    while batch > SMALLEST and rows < batch * STEPS_PER_EPOCH:
        batch //= 2
    batch = min(batch, rows)
    return max(batch - batch % shares, shares)
