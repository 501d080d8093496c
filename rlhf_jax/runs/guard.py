"""What a run ends at: losses, scores or parameters that are not finite or absurd, and steps that are all skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.runs.metrics import Writer

if TYPE_CHECKING:
    from rlhf_jax.runs.checkpoint import Checkpoints

# Consecutive steps with a bad metric or without any optimizer step, after which the run ends.
PATIENCE = 3
# Endings of the names of metrics that must be finite and at most this large, causes before what follows from them. A
# loss may be the square of a value.
GUARDED = {"score": 1e6, "value": 1e6, "kl": 1e6, "reward": 1e6, "_loss": 1e12, "loss": 1e12}
# Largest root mean square of the parameters, and largest growth since the start.
LARGEST_PARAMS = 100.0


class Guard:
    """Ends a run that is lost: its losses, rewards or state are not finite, or its optimizer steps are all skipped."""

    def __init__(self, writers: Writer, checkpoints: Checkpoints | None, patience: int) -> None:
        self.writers = writers
        self.checkpoints = checkpoints
        self.patience = patience
        self.in_a_row = 0
        self.start_norm, self.largest_norm = 0.0, math.inf

    def check_metrics(self, step: int, rows: list[dict[str, float]]) -> None:
        """Checks the metrics of each step; `rows` are those of the steps up to `step`."""
        for at, row in enumerate(rows, start=step - len(rows) + 1):
            self._check_params(at, row)
            bad = {name: value for name, value in row.items() if not math.isfinite(value)}
            lost = [
                name
                for ending, largest in GUARDED.items()
                for name, value in row.items()
                if name.endswith(ending) and (name in bad or abs(value) > largest)
            ]
            share = max((row[name] for name in row if name.endswith("skipped") and "/" not in name), default=0.0)
            self.in_a_row = self.in_a_row + 1 if lost or share == 1 else 0
            if not lost and not share:
                continue
            causes = lost[:1] or [name for name in bad if name.endswith("_norm")]
            # A score that is replaced, since its response has no end, is in no metric but this count.
            cause = ", ".join(f"{name} is {row[name]:.6g}" for name in causes)
            cause = cause or f"nonfinite is {row.get('nonfinite', 0.0):g}"
            skips = f"; {f'{share:.0%} of its optimizer steps were' if share < 1 else 'the step was'} skipped"
            self.writers.event(at, cause + skips if share else cause)
            if self.in_a_row == self.patience:
                what = f"no optimizer step was made, as {cause},"
                if lost:
                    what = f"{lost[0]} was {'not finite' if lost[0] in bad else f'absurd ({row[lost[0]]:.3g})'}"
                self._end(f"{what} for {self.patience} consecutive steps, last at step {at}")

    def check_start(self, state: TrainState) -> None:
        """Raises UserError if training would start from a parameter that is not finite."""
        params_finite, _, norm = _sound(state)
        if not bool(params_finite):
            raise UserError("a parameter is not finite before the first step; the model to start from is damaged")
        self.start_norm = float(norm)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self.largest_norm = LARGEST_PARAMS * max(self.start_norm, math.sqrt(count))

    def _check_params(self, step: int, row: Mapping[str, float]) -> None:
        """Raises UserError if the parameters have exploded."""
        for name, norm in row.items():
            if name.endswith("param_norm") and math.isfinite(norm) and norm > self.largest_norm:
                self._end(
                    f"the parameters have exploded: {name} is {norm:.3g} after step {step}, and was at most "
                    f"{self.start_norm:.3g} at the start"
                )

    def check_state(self, step: int, state: TrainState) -> None:
        """Raises UserError if a parameter is not finite or anything else in the state is NaN."""
        params_finite, rest_defined, _ = jax.device_get(_sound(state))
        if not params_finite:
            self._end(f"a parameter is not finite after step {step}; this state is not saved")
        if not rest_defined:
            self._end(f"the optimizer's state is undefined (NaN) after step {step}; this state is not saved")

    def _end(self, what: str) -> None:
        latest = None
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
        good = "no checkpoint was saved" if latest is None else f"the last good checkpoint is that of step {latest}"
        raise UserError(f"{what}; {good}; try a lower learning rate under another --name")


@jax.jit
def _sound(state: TrainState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the parameters are finite, the rest of the state has no NaN, norm of the parameters)."""

    def every(keep: Callable[[jax.Array], jax.Array], tree: Any) -> jax.Array:
        floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.all(jnp.asarray([jnp.all(keep(leaf)) for leaf in floats], bool))

    # An optimizer may hold an infinity by design, such as the initial best loss.
    rest_defined = every(lambda x: ~jnp.isnan(x), (state.opt_state, state.extras))
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.params))
    return every(jnp.isfinite, state.params), rest_defined, norm
