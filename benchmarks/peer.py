"""The peers' side of a comparison: torch, transformers and TRL, as their documentation shows them.

python benchmarks/peer.py --job NAME --size S --rows FILE

Run by compare.py in an environment that has torch 2.13, transformers 5, TRL 1.11 or 1.12 and datasets. float32 and no
gradient checkpointing on both sides: TRL's defaults would be slower here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
warnings.filterwarnings("ignore")

import torch
import transformers
from gauge import Gauge, Worker
from shapes import EOS, JOBS, SIZES, read_rows, stop_ids

THREADS = len(os.sched_getaffinity(0))
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def config(size: str, **fields: Any) -> transformers.GPT2Config:
    layers, width, heads, vocabulary, context = SIZES[size]
    return transformers.GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        **fields,
    )


def tokenizer(size: str, extra: int = 0) -> transformers.PreTrainedTokenizerFast:
    """TRL wants one. Nothing is tokenized: its last id is the padding, the others are words that never occur."""
    from tokenizers import Tokenizer, models

    vocabulary = SIZES[size][3] + extra
    words = {"<eos>": EOS, "<pad>": vocabulary - 1} | {f"w{i}": i for i in range(1, vocabulary - 1)}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


class Steps(transformers.TrainerCallback):
    """Holds a trainer at the end of each step until the next sample is asked for."""

    def __init__(self, worker: Worker, work: Callable[[], float], facts: dict[str, Any], warm_up: int = 2) -> None:
        self.worker, self.work, self.facts, self.left = worker, work, facts, warm_up
        self.gauge: Gauge | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        work = self.work()
        self.left -= 1
        if self.left > 0:
            return
        if self.gauge is None:
            self.worker.ready(self.facts)
        else:
            self.worker.done(self.gauge, work)
        if not self.worker.wait():
            control.should_training_stop = True
            os._exit(0)
        self.gauge = Gauge()


def lm(size: str, job: dict[str, Any], worker: Worker) -> None:
    """A training step of transformers' GPT-2 with torch's fused AdamW and no trainer around it."""
    rows, length = job["batch"], job["length"]
    model = transformers.GPT2LMHeadModel(config(size, use_cache=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    batches = [torch.randint(1, SIZES[size][3], (rows, length)) for _ in range(4)]
    turn = 0

    def step() -> float:
        nonlocal turn
        ids = batches[turn % 4]
        turn += 1
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return float(rows * length)

    worker.serve(step, VERSIONS)


def trl_arguments(steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        "learning_rate": 3e-4,
    }


MANY = 400  # steps that a trainer is made for; it ends when no sample is asked for


def sft(
    size: str, job: dict[str, Any], worker: Worker, dataset: Any, work: Callable[[Any], float], **fields: Any
) -> None:
    """TRL's SFTTrainer."""
    import trl

    arguments = trl.SFTConfig(
        per_device_train_batch_size=job["batch"], max_length=job["length"], **trl_arguments(MANY), **fields
    )
    seen: list[float] = []

    class Trainer(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            seen.append(work(inputs))
            return super().training_step(model, inputs, *rest, **more)

    facts = VERSIONS | {"trl": trl.__version__}
    trainer = Trainer(
        model=transformers.GPT2LMHeadModel(config(size)),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer(size),
        callbacks=[Steps(worker, lambda: seen[-1], facts)],
    )
    trainer.train()


def lm_installed(size: str, job: dict[str, Any], worker: Worker) -> None:
    from datasets import Dataset

    ids = torch.randint(1, SIZES[size][3] - 1, (MANY * job["batch"], job["length"])).tolist()
    skip = {"skip_prepare_dataset": True}
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    sft(size, job, worker, dataset, lambda inputs: inputs["input_ids"].numel(), dataset_kwargs=skip)


def sft_varied(size: str, job: dict[str, Any], worker: Worker, rows: str) -> None:
    from datasets import Dataset

    found = read_rows(rows)
    dataset = Dataset.from_dict({name: [row[name] for row in found] for name in ("input_ids", "completion_mask")})
    sft(
        size,
        job,
        worker,
        dataset,
        lambda inputs: int((inputs["input_ids"] != SIZES[size][3] - 1).sum()),
        packing=True,
        completion_only_loss=True,
    )


def reward(size: str, job: dict[str, Any], worker: Worker) -> None:
    """TRL's RewardTrainer, which takes pairs: of K = 4 responses two pairs, so that it computes each response once."""
    import trl
    from datasets import Dataset

    if "pairs" in job:
        pairs, length, work = job["pairs"], job["length"], job["pairs"]
    else:
        work = job["prompts"] * job["responses"]
        pairs, length = work // 2, job["prompt"] + job["response"]
    ids = torch.randint(1, SIZES[size][3] - 1, (2, MANY * pairs, length))
    ids[:, :, -1] = EOS
    made = tokenizer(size)
    trainer = trl.RewardTrainer(
        model=transformers.GPT2ForSequenceClassification(
            config(size, num_labels=1, pad_token_id=made.pad_token_id, use_cache=False)
        ),
        args=trl.RewardConfig(per_device_train_batch_size=pairs, max_length=length, **trl_arguments(MANY)),
        train_dataset=Dataset.from_dict({"chosen_ids": ids[0].tolist(), "rejected_ids": ids[1].tolist()}),
        processing_class=made,
        callbacks=[Steps(worker, lambda: float(work), VERSIONS | {"trl": trl.__version__})],
    )
    trainer.train()


def sample(size: str, job: dict[str, Any], worker: Worker, varied: bool) -> None:
    """transformers' generate in batches, of the whole distribution."""
    rows, new = job["batch"], job["response"]
    vocabulary = SIZES[size][3]
    ends = stop_ids(vocabulary) if varied else None
    model = transformers.GPT2LMHeadModel(config(size)).eval()
    model.generation_config.eos_token_id = ends
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=EOS, eos_token_id=ends
    )
    queue = job.get("queue", rows)
    prompts = torch.randint(1, vocabulary, (queue, job["prompt"]))
    lengths: list[float] = []

    def run() -> float:
        tokens = 0
        with torch.inference_mode():
            for start in range(0, queue, rows):
                ids = prompts[start : start + rows]
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                answers = out[:, job["prompt"] :]
                if ends is None:
                    tokens += answers.numel()
                else:
                    ended = (answers < len(ends)).int()
                    before = ended.cumsum(1) - ended
                    tokens += int((before == 0).sum())
        lengths.append(tokens / queue)
        return float(tokens)

    worker.serve(run, VERSIONS)


def ppo(size: str, job: dict[str, Any], worker: Worker, varied: bool) -> None:
    """TRL's PPOTrainer. It samples every response to the end and cuts it at the first end token afterwards."""
    import trl
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    vocabulary = SIZES[size][3]
    # The padding is one past the model's vocabulary: it is never sampled.
    made = tokenizer(size, extra=1)
    shape = config(size, num_labels=1)
    policy, reference = transformers.GPT2LMHeadModel(shape), transformers.GPT2LMHeadModel(shape)
    reference.load_state_dict(policy.state_dict())
    judge, value = (transformers.GPT2ForSequenceClassification(shape) for _ in range(2))
    rows = job["batch"]
    dataset = Dataset.from_dict({"input_ids": torch.randint(1, vocabulary, (rows * MANY, job["prompt"])).tolist()})
    fields: dict[str, Any] = {}
    if varied:
        # TRL knows one stop token. The ids that stop a response here become that one right after sampling, so that its
        # own code cuts and pads the rest.
        ends, generate = len(stop_ids(vocabulary)), module.batch_generation

        def batch_generation(*arguments: Any, **more: Any) -> Any:
            answers, logits = generate(*arguments, **more)
            tail = answers[:, job["prompt"] :]
            tail[tail < ends] = EOS
            return answers, logits

        module.batch_generation = batch_generation
        fields["stop_token_id"] = EOS
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["epochs"],
        total_episodes=rows * MANY,
        response_length=job["response"],
        local_rollout_forward_batch_size=rows,
        temperature=1.0,
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-5,
        **fields,
    )
    PPOTrainer(
        args=arguments,
        processing_class=made,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(rows)),
        callbacks=[Steps(worker, lambda: float(rows), VERSIONS | {"trl": trl.__version__}, warm_up=1)],
    ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--rows", default="")
    given = parser.parse_args()
    worker = Worker()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    job = JOBS[given.job]
    if given.job == "lm":
        lm(given.size, job, worker)
    elif given.job == "lm_installed":
        lm_installed(given.size, job, worker)
    elif given.job == "sft_varied":
        sft_varied(given.size, job, worker, given.rows)
    elif given.job in ("reward", "rankings"):
        reward(given.size, job, worker)
    elif given.job.startswith("sample"):
        sample(given.size, job, worker, varied=given.job.endswith("varied"))
    else:
        ppo(given.size, job, worker, varied=given.job.endswith("varied"))


if __name__ == "__main__":
    main()
