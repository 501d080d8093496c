"""The whole recipe with one command: pretrain → SFT → reward model → PPO on the embedded corpus, and what it gained.

Each stage is a run of its own under runs/NAME, as the stage scripts make it; stopped at any point, the same command
goes on. People are simulated by a written-down gold score with noise (rlhf_jax/data/labeller.py); the held-out figures
are by the gold score itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

if __name__ == "__main__":
    from scripts.huge_pages import use_huge_pages

    use_huge_pages()

import jax
import numpy as np
import rich.console
import rich.table
import rich.text

from rlhf_jax import distributed
from rlhf_jax.arrays import TrainState
from rlhf_jax.bigram import bigram_nats
from rlhf_jax.config import RunConfig, at_least
from rlhf_jax.data import Ledger, Prompt, PromptRows, RankingRows, encode_prompts, ranking_rows
from rlhf_jax.data.embedded import Corpus, load_corpus
from rlhf_jax.data.labeller import gold_score, noise_for_agreement, rank, words_mentioned
from rlhf_jax.durable import write_json
from rlhf_jax.episodes import EpisodeConfig
from rlhf_jax.model import Transformer
from rlhf_jax.optim import OptimConfig
from rlhf_jax.report import write_report
from rlhf_jax.runs import Finished, model_of, released_params
from rlhf_jax.sampling import distinct_share, sample_responses, sequence_kl, win_rate
from rlhf_jax.stages import ppo, pretrain, reward, sft
from rlhf_jax.tokenizer import TextTokenizer
from scripts import cli
from scripts.recipe_sizes import SIZES, Size
from scripts.recipe_tables import figures_table, print_summary

RESPONSES = 4
# Of the answers that the table and the report show.
SHOWN_TEMPERATURE = 0.7
# Answers to each held-out prompt behind a win rate: one more or less good draw moves it by little.
ANSWERS = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the whole recipe."""

    name: str = "recipe"
    """Name of the run; its folder is runs/NAME."""
    out: str = ""
    """Folder of the run, instead of runs/NAME."""
    seed: int = 0
    """Seed of everything: parameters, order of the data, samples, the labeller's noise."""
    seeds: int = 1
    """How many seeds to run, from seed up, each in a folder seedN below this one; medians at the end."""
    size: Literal["tiny", "small", "base", "large"] = "small"
    """tiny tries the wiring in a minute, small is for two CPU cores, base and large are for a GPU."""
    devices: int = 1
    """How many devices share a batch."""
    pmap: bool = False
    """Replicate by pmap instead of sharding by jit."""

    def __post_init__(self) -> None:
        # Refuses at once what a stage would refuse.
        RunConfig(name=self.name, out=self.out, seed=self.seed, devices=self.devices, batch=self.devices, steps=0)
        at_least(self, "seeds", 1)

    @property
    def folder(self) -> Path:
        """The recipe's folder; the stages' are below it."""
        return Path(self.out) if self.out else Path("runs") / self.name


class Judge:
    """The simulated labeller: gold scores of sampled token ids."""

    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = frozenset(
            word for text in corpus.texts for word in re.findall(r"[a-z][a-z0-9]*", text.text.lower())
        )

    def scores(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> np.ndarray:
        """Gold scores [prompts, K]; a response without an end never finished, whatever it looks like."""
        return np.array(
            [
                [
                    gold_score(p.prompt, self.tokenizer.decode(ids), self.vocabulary, ended=self.ended(ids))
                    for ids in row
                ]
                for p, row in zip(prompts, responses, strict=True)
            ]
        )

    def topic_share(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> float:
        """Share of the responses that mention a word of the function asked about."""
        told = [
            words_mentioned(p.prompt, self.tokenizer.decode(ids))[0] > 0
            for p, row in zip(prompts, responses, strict=True)
            for ids in row
        ]
        return float(np.mean(told))

    def ended(self, ids: list[int]) -> bool:
        """Whether a response has its end-of-text token."""
        return bool(ids) and ids[-1] == self.tokenizer.eos_id


class Sampler:
    """Responses of a run's model, by the pure distribution; at temperature 1 unless said."""

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, response_tokens: int) -> None:
        self.model, self.response_tokens = model, response_tokens
        self.options: dict[str, Any] = {
            "max_new_tokens": response_tokens,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }

    def __call__(
        self, params: Any, prompts: PromptRows, seed: int, samples: int = 1, temperature: float = 1.0
    ) -> list[list[list[int]]]:
        key = jax.random.key(seed)
        return sample_responses(
            self.model, params, prompts, key, samples=samples, temperature=temperature, **self.options
        )


def stage_settings(config: Config, name: str, *, save_every: int) -> dict[str, Any]:
    """What every stage's config takes from the recipe's."""
    return {
        "out": str(config.folder / name),
        "seed": config.seed,
        "devices": config.devices,
        "pmap": config.pmap,
        "save_every": save_every,
    }


def cosine(rate: float, **changes: Any) -> OptimConfig:
    """AdamW from a learning rate down to a tenth."""
    return OptimConfig(**({"learning_rate": rate} | changes))


def run(config: Config) -> None:
    """The recipe with one seed, or with several and the medians of their figures."""
    cli.use_cpu_devices(config.devices)
    if config.seeds == 1:
        run_seed(config)
        return
    summaries = []
    for seed in range(config.seed, config.seed + config.seeds):
        folder = config.folder / f"seed{seed}"
        run_seed(dataclasses.replace(config, seed=seed, seeds=1, out=str(folder)))
        summaries.append(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    medians = {
        key: float(np.median([summary[key] for summary in summaries]))
        for key, value in summaries[0].items()
        if isinstance(value, int | float) and key != "seed"
    }
    if not distributed.is_first():
        return
    write_json(config.folder / "summary.json", medians | nested(medians) | {"seeds": [s["seed"] for s in summaries]})
    rich.console.Console().print(figures_table(medians, f"medians over {config.seeds} seeds"))


def run_seed(config: Config) -> None:
    """Runs what is not done yet, then tells what came out."""
    size, console = SIZES[config.size], rich.console.Console(quiet=not distributed.is_first())
    config.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(config.folder / "seconds.json")

    def announce(text: str) -> None:
        console.rule(f"[bold]{text}", align="left")

    announce("corpus: the documentation of this Python")
    corpus = load_corpus()
    clock.lap("start")

    announce("1  pretrain: every token of raw text")
    pretrained = pretrain.run(
        pretrain.Config(
            **stage_settings(config, "pretrain", save_every=400),
            batch=size.pretrain_batch,
            steps=size.pretrain_steps,
            row_length=size.row_length,
            optimizer=cosine(size.pretrain_rate),
            model=size.model,
        ),
        texts=corpus.texts,
        heldout=corpus.heldout_texts,
    )
    clock.lap("pretrain")

    announce("2  SFT: demonstrations, response tokens only")
    limit = size.prompt_tokens + size.response_tokens
    tuned = sft.run(
        sft.Config(
            **stage_settings(config, "sft", save_every=400),
            init=str(pretrained.run.path),
            batch=size.sft_batch,
            steps=size.sft_steps,
            max_tokens=limit,
            buckets=(limit,),
            dropout=size.sft_dropout,
            optimizer=cosine(size.sft_rate),
        ),
        records=corpus.demonstrations,
        heldout=corpus.heldout_demonstrations,
    )
    clock.lap("sft")

    announce("3.1  reward model: four responses to a prompt, ranked")
    tokenizer = tuned.run.tokenizer
    model = Transformer(model_of(tuned.run))
    sampler, judge = Sampler(model, tokenizer, size.response_tokens), Judge(corpus, tokenizer)
    sft_params = released_params(tuned.run)
    train_prompts = prompt_rows(corpus.prompts, tokenizer, size.prompt_tokens)
    heldout_prompts = prompt_rows(corpus.heldout_prompts, tokenizer, size.prompt_tokens)
    rankings, agreement = label(config, size, sampler, judge, sft_params, train_prompts, config.folder)
    heldout_rankings = gold_rankings(sampler, judge, sft_params, heldout_prompts, config.seed)
    console.print(
        f"{len(rankings):,} prompts ranked; two labellers agree on {agreement:.1%} of pairs (InstructGPT's: 73%)"
    )
    clock.lap("labels")
    judged = train_reward(config, size, tuned, rankings, heldout_rankings, corpus, "reward", "init")
    clock.lap("reward")
    announce("3.1  the same from scratch, to see what the SFT model gave")
    scratch = train_reward(config, size, tuned, rankings, heldout_rankings, corpus, "reward_scratch", "scratch")
    clock.lap("reward_scratch")

    announce("3.2  PPO: maximise the reward, stay near the SFT model")
    watched = some(heldout_prompts, 128)

    def watch(state: TrainState) -> dict[str, float]:
        responses = sampler(state.params["policy"], watched, config.seed + 3)
        return {"gold": float(judge.scores(list(watched.sources), responses).mean())}

    optimised = ppo.run(
        ppo.Config(
            **stage_settings(config, "ppo", save_every=20),
            init=str(tuned.run.path),
            reward=str(judged.run.path),
            batch=size.episodes,
            steps=size.iterations,
            minibatches=size.minibatches,
            epochs=size.epochs,
            log_every=1,
            eval_every=10,
            prompt_length=size.prompt_tokens,
            kl_coef=size.kl_coef,
            pretraining_coef=size.pretraining_coef,
            pretraining_batch=size.minibatches * 2 if size.pretraining_coef else 0,
            pretraining_row_length=size.row_length,
            policy=OptimConfig(learning_rate=size.policy_rate, schedule="linear", epsilon=1e-5),
            critic=OptimConfig(learning_rate=size.critic_rate, schedule="linear", epsilon=1e-5),
            episode=EpisodeConfig(response_length=size.response_tokens, missing_end="subtract"),
        ),
        prompts=list(train_prompts.sources),
        texts=corpus.texts,
        evaluate=watch,
    )
    clock.lap("ppo")

    announce("what came out")
    summary = measure(
        config, corpus, sampler, judge, heldout_prompts, pretrained, tuned, judged, scratch, optimised
    ) | {"reward.labeller_agreement": agreement, "seed": config.seed}
    clock.lap("measure")
    distributed.by_first(lambda: tell(config, console, clock, summary))
    console.print(f"try it: python scripts/generate.py {optimised.run.path} --prompt ' find longest match (a, b) ->'")


def tell(config: Config, console: rich.console.Console, clock: Clock, summary: dict[str, Any]) -> None:
    """Writes and prints what came out."""
    summary |= {"wall_seconds": clock.total, "stage_seconds": clock.seconds}
    write_json(config.folder / "summary.json", summary | nested(summary))
    print_summary(console, config.folder, summary)
    report = write_report(config.folder)
    console.print(f"report: {report}   figures: {config.folder / 'summary.json'}")


class Clock:
    """Seconds spent in each part, kept over restarts: a part that an earlier start finished keeps its time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = distributed.from_first(
            lambda: json.loads(path.read_text()) if path.exists() else {}
        )
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """The part ends now."""
        now = time.monotonic()
        self.seconds[part] = max(self.seconds.get(part, 0.0), now - self._last)
        self._last = now
        if distributed.is_first():
            write_json(self.path, self.seconds)

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.seconds.values())


def prompt_rows(prompts: list[Prompt], tokenizer: TextTokenizer, width: int) -> PromptRows:
    """The prompts that fit in `width` tokens, in the order of a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = [prompts[i] for i in order]
    rows = encode_prompts(shuffled, tokenizer, max_tokens=width, ledger=Ledger())
    return PromptRows(rows.rows, width, tokenizer.pad_id, rows.sources)


def some(prompts: PromptRows, count: int) -> PromptRows:
    """The first `count` prompts, and where there are fewer, again from the first."""
    places = [i % len(prompts) for i in range(count)]
    return PromptRows(
        [prompts.rows[i] for i in places], prompts.width, prompts.pad_id, [prompts.sources[i] for i in places]
    )


def label(
    config: Config, size: Size, sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, folder: Path
) -> tuple[RankingRows, float]:
    """(rankings of sampled responses by a noisy labeller, how often two of them agree on a pair).

    The labeller's rankings also stand in rankings.jsonl, as a person's would; training reads the sampled ids.
    """
    chosen = some(prompts, size.ranked_prompts)
    responses = sampler(params, chosen, config.seed + 1, RESPONSES)
    gold = judge.scores(list(chosen.sources), responses)
    noise = noise_for_agreement(gold)
    random = np.random.default_rng([config.seed, 1])
    ranks, second = rank(gold, noise, random), rank(gold, noise, random)
    first, other = np.triu_indices(RESPONSES, 1)
    differ = gold[:, first] != gold[:, other]
    same = (ranks[:, first] < ranks[:, other]) == (second[:, first] < second[:, other])
    rows = [
        (ranking_rows(ids, row), row_ranks.tolist())
        for ids, row, row_ranks in zip(chosen.rows, responses, ranks, strict=True)
    ]
    lines = [
        json.dumps({"prompt": p.prompt, "responses": [judge.tokenizer.decode(ids) for ids in row], "ranks": r.tolist()})
        for p, row, r in zip(chosen.sources, responses, ranks, strict=True)
    ]
    if distributed.is_first():
        (folder / "rankings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    limit = prompts.width + sampler.response_tokens
    return RankingRows(rows, limit, judge.tokenizer.pad_id, (limit,)), float(same[differ].mean())


def gold_rankings(sampler: Sampler, judge: Judge, params: Any, prompts: PromptRows, seed: int) -> RankingRows:
    """Held-out rankings by the noise-free gold score; equal scores are ties."""
    responses = sampler(params, prompts, seed + 2, RESPONSES)
    gold = judge.scores(list(prompts.sources), responses)
    ranks = 1 + (gold[:, None, :] > gold[:, :, None]).sum(axis=2)
    rows = [
        (ranking_rows(ids, row), row_ranks.tolist())
        for ids, row, row_ranks in zip(prompts.rows, responses, ranks, strict=True)
    ]
    limit = prompts.width + sampler.response_tokens
    return RankingRows(rows, limit, judge.tokenizer.pad_id, (limit,))


def train_reward(
    config: Config,
    size: Size,
    tuned: Finished,
    rankings: RankingRows,
    heldout: RankingRows,
    corpus: Corpus,
    name: str,
    backbone: Literal["init", "scratch"],
) -> Finished:
    """A reward model on the SFT model's backbone or on a fresh one."""
    return reward.run(
        reward.Config(
            **stage_settings(config, name, save_every=0),
            init=str(tuned.run.path),
            backbone=backbone,
            batch=size.reward_batch,
            optimizer=cosine(size.reward_rate),
            max_tokens=rankings.limit,
            buckets=rankings.buckets,
            share_prompts=True,
        ),
        rankings=rankings,
        heldout=heldout,
        demonstrations=corpus.demonstrations[:512],
    )


def measure(
    config: Config,
    corpus: Corpus,
    sampler: Sampler,
    judge: Judge,
    prompts: PromptRows,
    pretrained: Finished,
    tuned: Finished,
    judged: Finished,
    scratch: Finished,
    optimised: Finished,
) -> dict[str, Any]:
    """The figures that the recipe stands by, all on held-out text and prompts; samples.json beside them."""
    tokenizer = tuned.run.tokenizer
    params = {
        "pretrain": released_params(pretrained.run),
        "sft": released_params(tuned.run),
        "ppo": released_params(optimised.run),
    }
    answers = {name: sampler(params[name], prompts, config.seed + 4, ANSWERS) for name in params}
    gold = {name: judge.scores(list(prompts.sources), answers[name]) for name in params}
    texts = {name: [tokenizer.decode(row[0]).strip() for row in answers[name]] for name in params}
    distinct = {name: distinct_share(texts[name]) for name in texts}
    against_sft, sft_interval = win_rate(gold["ppo"], gold["sft"])
    against_pretrained, pretrained_interval = win_rate(gold["sft"], gold["pretrain"])
    kl = sequence_kl(
        sampler.model,
        params["ppo"],
        params["sft"],
        prompts,
        [row[0] for row in answers["ppo"]],
        max_new_tokens=sampler.response_tokens,
    )
    row_length = SIZES[config.size].row_length
    training, heldout = (
        pretrain.pack(t, tokenizer, row_length, Ledger()) for t in (corpus.texts, corpus.heldout_texts)
    )
    heldout_bytes = sum(len(text.text.encode()) for text in corpus.heldout_texts)
    sentences = {d.prompt: d.completion.strip() for d in corpus.heldout_demonstrations}
    # What people read, they sample cooler; every figure is at temperature 1, the distribution that PPO trained.
    shown = {name: sampler(params[name], prompts, config.seed + 5, temperature=SHOWN_TEMPERATURE) for name in params}
    shown_gold = {name: judge.scores(list(prompts.sources), shown[name])[:, 0] for name in params}
    samples = [
        {
            "prompt": prompt.prompt.strip(),
            **{name: tokenizer.decode(shown[name][i][0]).strip() for name in params},
            "docstring": sentences.get(prompt.prompt),
            "gold": {name: round(float(shown_gold[name][i]), 3) for name in params},
            "temperature": SHOWN_TEMPERATURE,
        }
        for i, prompt in enumerate(prompts.sources)
    ]
    (config.folder / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return {
        "pretrain.heldout_bits_per_byte": pretrained.summary["heldout_bits_per_byte"],
        "pretrain.bigram_bits_per_byte": bigram_nats(training, heldout, tokenizer.vocab_size)
        / math.log(2)
        / heldout_bytes,
        "pretrain.heldout_response_nll": tuned.summary["heldout_response_nll_before"],
        "sft.heldout_response_nll": tuned.summary["heldout_response_nll"],
        "sft.win_rate_vs_pretrained": against_pretrained,
        "sft.win_rate_vs_pretrained_interval": pretrained_interval,
        "sft.distinct_share": distinct["sft"],
        "sft.topic_share": judge.topic_share(list(prompts.sources), answers["sft"]),
        "sft.topic_share_shown": judge.topic_share(list(prompts.sources), shown["sft"]),
        "sft.gold_mean": float(gold["sft"].mean()),
        "pretrain.gold_mean": float(gold["pretrain"].mean()),
        "pretrain.distinct_share": distinct["pretrain"],
        "reward.heldout_accuracy": judged.summary["heldout_accuracy"],
        "reward.heldout_pairs": judged.summary["heldout_pairs"],
        "reward.scratch_heldout_accuracy": scratch.summary["heldout_accuracy"],
        "ppo.win_rate_vs_sft": against_sft,
        "ppo.win_rate_vs_sft_interval": sft_interval,
        "ppo.heldout_prompts": len(prompts),
        "ppo.kl_nats": float(kl.mean()),
        "ppo.distinct_share": distinct["ppo"],
        "ppo.distinct_share_of_sft": distinct["ppo"] / max(distinct["sft"], 1e-9),
        "ppo.topic_share": judge.topic_share(list(prompts.sources), answers["ppo"]),
        "ppo.topic_share_shown": judge.topic_share(list(prompts.sources), shown["ppo"]),
        "ppo.gold_mean": float(gold["ppo"].mean()),
        "ppo.first_ratio_error": optimised.summary["first_ratio_error"],
        "ppo.first_kl": optimised.summary["first_kl"],
    }


def nested(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The dotted keys once more as a dict for each stage."""
    stages: dict[str, dict[str, Any]] = {}
    for key, value in summary.items():
        stage, dot, name = key.partition(".")
        if dot:
            stages.setdefault(stage, {})[name] = value
    return stages


if __name__ == "__main__":
    cli.use_compilation_cache()
    cli.main(run, Config, __doc__ or "")
