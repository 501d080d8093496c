"""The full recipe on the embedded corpus: pretrain → SFT → reward model → PPO, and its measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from rlhf_jax.arrays import TrainState
from rlhf_jax.config import EpisodeConfig, OptimConfig
from rlhf_jax.data import RankingRows
from rlhf_jax.demo.python_docs import Corpus, load_corpus
from rlhf_jax.evaluation.commands import generate_command
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.model import Transformer
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import use_cpu_devices
from rlhf_jax.recipe.labels import Judge, Sampler, gold_rankings, label, prompt_rows, some
from rlhf_jax.recipe.measure import measure, nested
from rlhf_jax.recipe.settings import RecipeConfig
from rlhf_jax.recipe.sizes import SIZES, Size
from rlhf_jax.recipe.tables import figures_table, print_summary
from rlhf_jax.runs.atomic_files import write_json
from rlhf_jax.runs.lifecycle import Finished, model_of, released_params
from rlhf_jax.runs.locks import hold
from rlhf_jax.trainers import ppo, pretrain, reward, sft


def stage_settings(config: RecipeConfig, name: str) -> dict[str, Any]:
    """Settings that every stage's config takes from the recipe's."""
    return {"out": str(config.folder / name), "seed": config.seed, "devices": config.devices, "pmap": config.pmap}


def adamw(rate: float, **changes: Any) -> OptimConfig:
    """AdamW with ten steps of warm-up, and a cosine schedule down to a tenth of the learning rate."""
    return OptimConfig(**({"learning_rate": rate, "warmup_steps": 10} | changes))


def run(config: RecipeConfig) -> None:
    """Runs the recipe with one seed, or with several and reports the medians."""
    run_seeds(config, run_seed, figures_table)


def run_seeds(
    config: RecipeConfig,
    run_seed: Callable[[RecipeConfig], None],
    figures_table: Callable[[dict[str, Any], str], rich.table.Table],
) -> None:
    """Runs a recipe with each of its seeds, and reports the medians of several.

    Args:
      config: settings.
      run_seed: the recipe with one seed, which writes summary.json.
      figures_table: the table of a summary, under a title.
    """
    with hold(config.folder) if processes.is_first() else contextlib.nullcontext():
        use_cpu_devices(config.devices)
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
        if not processes.is_first():
            return
        write_json(
            config.folder / "summary.json", medians | nested(medians) | {"seeds": [s["seed"] for s in summaries]}
        )
        rich.console.Console().print(figures_table(medians, f"medians over {config.seeds} seeds"))


def run_seed(config: RecipeConfig) -> None:
    """Runs the stages that are not finished yet, then reports the results."""
    size, console = SIZES[config.size], rich.console.Console(quiet=not processes.is_first())
    config.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(config.folder / "seconds.json")

    def announce(text: str) -> None:
        console.rule(f"[bold]{text}", align="left")

    announce("corpus: the documentation of this Python")
    corpus = load_corpus()
    clock.lap("start")

    announce("1  pretrain: every token of raw text")
    pretrained = _pretrain(config, size, corpus)
    clock.lap("pretrain")

    announce("2  SFT: demonstrations, response tokens only")
    tuned = _tune(config, size, pretrained, corpus)
    clock.lap("sft")

    announce("3.1  reward model: four responses to a prompt, ranked")
    tokenizer = tuned.run.tokenizer
    model = Transformer(model_of(tuned.run))
    sampler, judge = Sampler(model, tokenizer, size.response_tokens), Judge(corpus, tokenizer)
    sft_params = released_params(tuned.run)
    train_prompts = prompt_rows(corpus.prompts, tokenizer, size.prompt_tokens)
    # The test part is read by `measure` alone, at the end.
    development_prompts = prompt_rows(corpus.development.prompts, tokenizer, size.prompt_tokens)
    rankings, agreement = label(
        sampler, judge, sft_params, train_prompts, rankings=size.rankings, seed=config.seed, folder=config.folder
    )
    development_rankings = gold_rankings(sampler, judge, sft_params, development_prompts, config.seed)
    longer = len(corpus.prompts) - len(train_prompts)
    console.print(
        f"{len(rankings):,} rankings over {len(train_prompts):,} prompts ({longer:,} are longer than "
        f"{size.prompt_tokens} tokens); two labellers agree on {agreement:.1%} of pairs (InstructGPT's: 73%)"
    )
    clock.lap("labels")
    judged = train_reward(config, size, tuned, rankings, development_rankings, corpus)
    clock.lap("reward")

    announce("3.2  PPO: maximise the reward, stay near the SFT model")
    watched = some(development_prompts, 128)

    def watch(state: TrainState) -> dict[str, float]:
        responses = sampler(state.params["policy"], watched, config.seed + 3)
        return {"gold": float(judge.scores(list(watched.sources), responses).mean())}

    settings = _ppo_config(config, size, tuned, judged)
    optimised = ppo.run(settings, prompts=list(train_prompts.sources), texts=corpus.texts, evaluate=watch)
    clock.lap("ppo")

    announce("results")
    runs = {"pretrain": pretrained, "sft": tuned, "reward": judged, "ppo": optimised}
    summary = measure(runs, corpus, sampler, judge, size=size, seed=config.seed, folder=config.folder)
    summary |= {"reward.labeller_agreement": agreement, "seed": config.seed}
    clock.lap("measure")
    processes.by_first(lambda: tell(config, console, clock, summary))
    command = generate_command(optimised.run.path, [" find longest match (a, b) ->"])
    # Neither wrapped nor read as markup, so that it survives a paste.
    console.print(f"try it: {command}", soft_wrap=True, markup=False, emoji=False, highlight=False)


def _pretrain(config: RecipeConfig, size: Size, corpus: Corpus) -> Finished:
    return pretrain.run(
        pretrain.Config(
            **stage_settings(config, "pretrain"),
            save_every=400,
            batch=size.pretrain_batch,
            steps=size.pretrain_steps,
            row_length=size.row_length,
            optimizer=adamw(size.pretrain_rate),
            model=size.model,
        ),
        texts=corpus.texts,
        heldout=corpus.development.texts,
    )


def _tune(config: RecipeConfig, size: Size, pretrained: Finished, corpus: Corpus) -> Finished:
    return sft.run(
        sft.Config(
            **stage_settings(config, "sft"),
            save_every=400,
            init=str(pretrained.run.path),
            batch=size.sft_batch,
            steps=size.sft_steps,
            # Sentences improve after the held-out loss has begun to rise (docs/lab-notebook.md).
            release="last",
            max_tokens=size.prompt_tokens + size.response_tokens,
            pack=size.row_length,
            dropout=size.sft_dropout,
            optimizer=adamw(size.sft_rate),
        ),
        records=corpus.demonstrations,
        heldout=corpus.development.demonstrations,
    )


def _ppo_config(config: RecipeConfig, size: Size, tuned: Finished, judged: Finished) -> ppo.Config:
    return ppo.Config(
        **stage_settings(config, "ppo"),
        save_every=20,
        init=str(tuned.run.path),
        reward=str(judged.run.path),
        batch=size.episodes,
        steps=size.iterations,
        minibatches=size.minibatches,
        epochs=size.epochs,
        log_every=1,
        eval_every=max(min(15, size.iterations // 3), 1),
        prompt_length=size.prompt_tokens,
        kl_coef=size.kl_coef,
        alarms="warn",  # the recipe continues with its measurement, which shows what is wrong
        pretraining_coef=size.pretraining_coef,
        pretraining_batch=size.minibatches * 2 if size.pretraining_coef else 0,
        pretraining_row_length=size.row_length,
        policy=adamw(size.policy_rate, schedule="linear", epsilon=1e-5),
        critic=adamw(size.critic_rate, schedule="linear", epsilon=1e-5),
        episode=EpisodeConfig(
            response_length=size.response_tokens, missing_end="subtract", pack=size.pack if config.devices == 1 else 0
        ),
    )


def tell(config: RecipeConfig, console: rich.console.Console, clock: Clock, summary: dict[str, Any]) -> None:
    """Writes and prints the results."""
    summary |= {"wall_seconds": clock.total, "stage_seconds": clock.seconds}
    write_json(config.folder / "summary.json", summary | nested(summary))
    print_summary(console, config.folder, summary)
    report = write_report(config.folder)
    console.print(f"report: {report}   figures: {config.folder / 'summary.json'}", markup=False, emoji=False)


class Clock:
    """Seconds spent in each part, kept over restarts: a part finished by an earlier start keeps its time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = processes.from_first(
            lambda: json.loads(path.read_text()) if path.exists() else {}
        )
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Marks the end of a part."""
        now = time.monotonic()
        self.seconds[part] = max(self.seconds.get(part, 0.0), now - self._last)
        self._last = now
        if processes.is_first():
            write_json(self.path, self.seconds)

    @property
    def total(self) -> float:
        """Seconds spent in all parts."""
        return sum(self.seconds.values())


def train_reward(
    config: RecipeConfig, size: Size, tuned: Finished, rankings: RankingRows, heldout: RankingRows, corpus: Corpus
) -> Finished:
    """Trains a reward model that starts from the SFT model."""
    steps = max(len(rankings) // size.reward_batch, 1)
    return reward.run(
        reward.Config(
            **stage_settings(config, "reward"),
            save_every=0,
            init=str(tuned.run.path),
            batch=size.reward_batch,
            steps=steps,
            optimizer=adamw(size.reward_rate, warmup_steps=min(10, steps // 2)),
            max_tokens=rankings.limit,
            buckets=rankings.buckets,
            share_prompts=True,
        ),
        rankings=rankings,
        heldout=heldout,
        demonstrations=corpus.demonstrations[:512],
    )
