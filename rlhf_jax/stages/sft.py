"""Stage 2, supervised fine-tuning: minimize -log p(next token) over the response tokens of demonstrations.

The objective is pretraining's. What differs is the batch: its `loss_mask_BT` is True for response tokens alone, EOS
included.
"""

from __future__ import annotations

from collections.abc import Callable

import optax

from rlhf_jax.arrays import Array, Params, TokenBatch, TrainState
from rlhf_jax.config import SFTConfig
from rlhf_jax.model import Transformer
from rlhf_jax.optim import global_count
from rlhf_jax.stages import pretrain

STAGE = "sft"
Config = SFTConfig
objective = pretrain.objective


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
    lora_scale: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make the update as a pure function: update(state, batch, base=None) -> (state, metrics).

    It is `pretrain.make_update`'s; the metric "tokens" counts prompts as well.
    """
    step = pretrain.make_update(model, optimizer, microbatches=microbatches, axis_name=axis_name, lora_scale=lora_scale)

    def update(state: TrainState, batch: TokenBatch, base: Params | None = None) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = step(state, batch, base)
        return state, metrics | {"tokens": global_count(batch.segment_ids_BT > 0, axis_name)}

    return update
