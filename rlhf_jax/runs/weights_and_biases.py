"""Metric writer for Weights & Biases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, install_command
from rlhf_jax.files import write_file

ID = "wandb_id"


class WeightsAndBiases:
    """Writer of a run in a project of Weights & Biases; WANDB_MODE=offline writes to the folder alone.

    The id of the W&B run is kept in the folder, so that a resumed run continues its curves. W&B cannot take back what a
    killed run logged after its last checkpoint: those steps occur twice, and metrics.jsonl has them once.

    Args:
      project: name of the project.
      folder: of the run; its name is the W&B run's.
      config: settings, shown by W&B.

    Raises:
      UserError: if the package wandb is not installed.
    """

    def __init__(self, project: str, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(f"wandb: the package wandb is not installed; run: {install_command('wandb')}") from None
        self.project, self.folder, self.config = project, Path(folder), dict(config)
        self._init = wandb.init
        self._run: Any = None

    def start(self, step: int, steps: int) -> None:
        self.close()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._open().log({"step": step} | {name: float(value) for name, value in values.items()})

    def event(self, step: int, message: str) -> None:
        self._open().log({"step": step, "event": message})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> Any:
        if self._run is None:
            path = self.folder / ID
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(path, secrets.token_hex(4) + "\n")
            self._run = self._init(
                project=self.project,
                name=self.folder.resolve().name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(self.folder),
                config=self.config,
            )
            # W&B's own step counts calls, events among them, and only rises; ours is the number of updates.
            self._run.define_metric("*", step_metric="step")
        return self._run
