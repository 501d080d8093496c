"""Our side of a comparison: the updates and the sampler that the stages themselves compile.

python benchmarks/ours.py --job NAME --size S --rows FILE
python benchmarks/ours.py --prepare FILE --data demonstrations.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from gauge import Worker
from shapes import EOS, JOBS, SIZES, read_rows, stop_ids

from rlhf_jax.arrays import PromptBatch, TokenBatch, TrainState
from rlhf_jax.cli.process import give_back_what_compiling_took
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig
from rlhf_jax.data import Demonstration, Ledger, encode_demonstrations
from rlhf_jax.data.batches import PackedRankingRows, RaggedRows, RankingRows, batch_at
from rlhf_jax.data.jsonl import read_rows as read_lines
from rlhf_jax.data.packing import pack_rows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.generate import generate
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.parallel.mesh import CompiledUpdate, jit_update, make_mesh, outline, place
from rlhf_jax.stages import ppo, pretrain, reward, sft
from rlhf_jax.stages.ppo import Frozen, Networks
from rlhf_jax.tokenizers.bpe import Tokenizer

FACTS = {"jax": jax.__version__}
LONGEST = 256
PACKED_ROWS = 2


def model(size: str, scalar: bool = False) -> Transformer:
    layers, width, heads, vocabulary, context = SIZES[size]
    shape = {"layers": layers, "width": width, "heads": heads, "vocab_size": vocabulary, "context": context}
    return Transformer(ModelConfig.gpt2(**shape), scalar=scalar)


def near_uniform(params: Any) -> Any:
    """Embeddings of GPT-2's own size, 0.02, whose logits are small: lengths then follow the geometric law."""
    scale = 0.02 * params["embedding"].shape[1] ** 0.5
    return {**params, "embedding": params["embedding"] * scale}


def trained(make: Callable[[Any], Any], params: Any, batch: Callable[[int], Any], work: Callable[[Any], float]) -> Any:
    """A sample that is one compiled update of the next batch."""
    optimizer = make_optimizer(OptimConfig(learning_rate=3e-4), 1000)
    mesh = make_mesh()
    update = jit_update(make(optimizer), mesh)
    state = compiled(update, lambda: new_state(params, optimizer.init(params), 0), mesh, batch(0))
    turn = 0

    def step() -> float:
        nonlocal state, turn
        rows = batch(turn)
        turn += 1
        state, metrics = update(state, rows)
        float(metrics["loss"])
        return work(rows)

    return step


def compiled(update: CompiledUpdate, make: Callable[[], TrainState], mesh: Any, batch: Any, *frozen: Any) -> Any:
    """The first state, made once its update is compiled, as `runs.train` does."""
    update.prepare(outline(make, mesh), batch, *frozen)
    return place(make(), mesh)


def lm(size: str, job: dict[str, Any], random: np.random.Generator) -> Any:
    network = model(size)
    rows, length = job["batch"], job["length"]
    # One token more: each of `length` places predicts the next one, where the peer's last predicts nothing.
    shape = (rows, length + 1)
    batches = []
    for _ in range(4):
        tokens = random.integers(1, network.config.vocab_size, shape).astype(np.int32)
        batches.append(TokenBatch(*(tokens, np.ones(shape, np.int32), np.ones(shape, bool))))  # type: ignore[arg-type]
    params = init_params(network, jax.random.key(0))
    return trained(
        lambda optimizer: pretrain.make_update(network, optimizer),
        params,
        lambda step: batches[step % 4],
        lambda _: float(rows * length),
    )


def sft_varied(size: str, job: dict[str, Any], path: str) -> Any:
    network = model(size)
    found = [(row["input_ids"], [bool(x) for x in row["completion_mask"]]) for row in read_rows(path)]
    rows = pack_rows(RaggedRows(found, job["length"]), length=job["length"] + 1)
    params = init_params(network, jax.random.key(0))
    return trained(
        lambda optimizer: sft.make_update(network, optimizer),
        params,
        lambda step: batch_at(rows, batch_size=job["batch"], seed=0, step=step),
        lambda batch: float(np.sum(batch.segment_ids_BT > 0)),
    )


def ranked(size: str, job: dict[str, Any], random: np.random.Generator) -> Any:
    network = model(size, scalar=True)
    if "pairs" in job:
        shape, work = (job["pairs"], 2, job["length"]), job["pairs"]
    else:
        shape = (job["prompts"], job["responses"], job["prompt"] + job["response"])
        work = shape[0] * shape[1]

    def batch(step: int) -> Any:
        tokens = random.integers(1, network.config.vocab_size, shape).astype(np.int32)
        tokens[:, 1:, : job.get("prompt", 0)] = tokens[:, :1, : job.get("prompt", 0)]
        ranks = list(range(1, shape[1] + 1))
        rows = RankingRows([(prompt.tolist(), ranks) for prompt in tokens], shape[2])
        # Pairs without a prompt share nothing; a row of its own for each is what the stage does by default.
        shared = PackedRankingRows(rows) if "prompt" in job else rows
        return shared.batch(np.arange(shape[0]))

    params = init_params(network, jax.random.key(0))
    return trained(lambda optimizer: reward.make_update(network, optimizer), params, batch, lambda _: float(work))


def sampled(size: str, job: dict[str, Any], random: np.random.Generator, varied: bool) -> Any:
    network = model(size)
    params = near_uniform(init_params(network, jax.random.key(0)))
    queue = job.get("queue", job["batch"])
    prompts = random.integers(1, network.config.vocab_size, (queue, job["prompt"])).astype(np.int32)
    ends = tuple(stop_ids(network.config.vocab_size)) if varied else ()
    turn = 0

    def run() -> float:
        nonlocal turn
        turn += 1
        key = jax.random.fold_in(jax.random.key(1), turn)
        out = generate(
            network,
            params,
            jnp.asarray(prompts),
            jnp.ones(prompts.shape, bool),
            key,
            max_new_tokens=job["response"],
            stop_ids=ends,
            pad_id=EOS,
            slots=job["batch"] if varied else 0,
        )
        return float(np.sum(np.asarray(out.mask)))

    return run


def ppo_iteration(size: str, job: dict[str, Any], random: np.random.Generator, varied: bool) -> Any:
    networks = Networks(model(size), model(size, scalar=True))
    vocabulary = networks.policy.config.vocab_size
    policy = near_uniform(init_params(networks.policy, jax.random.key(0)))
    judge = near_uniform(init_params(networks.scorer, jax.random.key(1)))
    config = ppo.Config(
        batch=job["batch"],
        steps=1000,
        init="-",
        reward="-",
        name="-",
        prompt_length=job["prompt"],
        epochs=job["epochs"],
        minibatches=job["minibatches"],
        episode=EpisodeConfig(
            response_length=job["response"], slots=job["batch"] if varied else 0, pack=PACKED_ROWS if varied else 0
        ),
    )
    mesh = make_mesh()
    frozen = place(Frozen(policy, judge, jnp.zeros(()), jnp.ones(())), mesh)
    # No id of the vocabulary ends a response of the fixed length, as in TRL, whose end token lies past it.
    ends = tuple(stop_ids(vocabulary)) if varied else (vocabulary,)
    update = jit_update(ppo.make_update(networks, config, eos_id=ends, pad_id=EOS), mesh)

    def batch() -> ppo.Batch:
        shape = (job["batch"], job["prompt"])
        tokens = random.integers(1, vocabulary, shape).astype(np.int32)
        return ppo.Batch(PromptBatch(*(tokens, np.ones(shape, bool))), None)  # type: ignore[arg-type]

    def make() -> TrainState:
        return ppo.initial_state(config, *jax.tree.map(jnp.copy, (policy, judge)))

    state = compiled(update, make, mesh, batch(), frozen)

    def step() -> float:
        nonlocal state
        state, metrics = update(state, batch(), frozen)
        float(metrics["policy_loss"])
        return float(job["batch"])

    return step


def prepare(path: str, data: str, size: str) -> None:
    """Writes the rows of the job sft_varied, which both sides train on."""
    if data:
        records = []
        for where, row in read_lines(data):
            if "definition" in row:  # WordNet's definitions as questions and answers
                row = {"prompt": f"What does {row['words'][0]} mean?", "completion": row["definition"]}
            records.append(Demonstration(row["prompt"], row["completion"], where))
    else:
        records = list(load_corpus().demonstrations)
    records = [records[i] for i in np.random.default_rng(0).permutation(len(records))[:20_000]]
    tokenizer = Tokenizer.train((f"{r.prompt} {r.completion}" for r in records), vocab_size=SIZES[size][3] - 1)
    rows = encode_demonstrations(records, tokenizer, max_tokens=LONGEST, ledger=Ledger())
    with open(path, "w", encoding="utf-8") as file:
        for ids, mask in rows.rows:
            file.write(json.dumps({"input_ids": list(ids), "completion_mask": [int(x) for x in mask]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--rows", default="")
    parser.add_argument("--prepare", default="")
    parser.add_argument("--data", default="")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare, given.data, given.size)
        return
    give_back_what_compiling_took()
    worker, job, random = Worker(), JOBS[given.job], np.random.default_rng(0)
    varied = given.job.endswith("varied")
    if given.job.startswith("lm"):
        sample = lm(given.size, job, random)
    elif given.job == "sft_varied":
        sample = sft_varied(given.size, job, given.rows)
    elif given.job in ("reward", "rankings"):
        sample = ranked(given.size, job, random)
    elif given.job.startswith("sample"):
        sample = sampled(given.size, job, random, varied)
    else:
        sample = ppo_iteration(given.size, job, random, varied)
    worker.serve(sample, FACTS)


if __name__ == "__main__":
    main()
