"""The cost of a trivial reward function: an iteration with sampling, text and update apart, beside one whole program.

python benchmarks/reward_function.py --iterations 20

Both run PPO's default batch on a random model of the recipe's size, in turn, without a reward model: the whole program
scores each response 0. Times are medians, on the clock and of the processor (all threads of this process); on a
busy machine only the second says something.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Ledger, Prompt, encode_prompts
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.parallel.host_step import with_host_step
from rlhf_jax.parallel.mesh import copied, jit_update, make_mesh, place
from rlhf_jax.reward_functions.loading import make_terms
from rlhf_jax.stages.ppo import Batch, Config, Frozen, Networks, initial_state, make_sampling, make_update
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers.ppo_rewards import host_step, rewards_of


def commas(completions: list[str], **_: Any) -> list[float]:
    return [-float(completion.count(",")) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    iterations = parser.parse_args().iterations
    tokenizer, config = Tokenizer.bytes(), Config()
    model = ModelConfig(vocab_size=tokenizer.vocab_size, context=128, width=128, layers=4, heads=4)
    networks = Networks(Transformer(model), Transformer(model, scalar=True))
    policy, value = (init_params(network, jax.random.key(0)) for network in networks)
    prompts = [Prompt(f"name_{number}(", columns={"id": number}) for number in range(config.batch)]
    rows = encode_prompts(prompts, tokenizer, max_tokens=config.prompt_length, ledger=Ledger())
    indices = np.arange(config.batch)
    batch, mesh = Batch(rows.batch(indices), None), make_mesh()
    frozen = place(Frozen(policy, None, jnp.zeros(()), jnp.ones(())), mesh)
    ids: dict[str, Any] = {"eos_id": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    terms = make_terms([commas], (), model=False)
    apart = host_step(
        lambda axis: make_sampling(networks, config, **ids, axis_name=axis),
        rewards_of([commas], terms, rows, config.reward_timeout),
        rows,
        tokenizer,
        config.episode.response_length,
    )
    numbered = Batch(batch.prompts, None, indices.astype(np.int32))  # type: ignore[arg-type]
    ways: dict[str, Any] = {
        "one program": (jit_update(make_update(networks, config, **ids), mesh), batch),
        "function": (
            with_host_step(
                jit_update(make_update(networks, config, **ids, terms=terms), mesh), apart, mesh, pmap=False
            ),
            numbered,
        ),
    }
    states = {way: copied(place(initial_state(config, policy, value), mesh), mesh) for way in ways}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(iterations + 2):
        for way, (update, given) in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            states[way], metrics = update(states[way], given, frozen)
            jax.block_until_ready((states[way].params, metrics))
            times[way].append((time.perf_counter() - clock, time.process_time() - processor))
    for way, found in times.items():
        clocks, processors = zip(*found[2:], strict=True)  # the first two compile
        print(f"{way:12s} {statistics.median(clocks):.3f} s, processor {statistics.median(processors):.3f} s")


if __name__ == "__main__":
    main()
