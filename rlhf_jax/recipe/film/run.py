"""The film task: SFT → reward model → PPO on a published model and people's judgements, and its measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

from rlhf_jax.arrays import TrainState
from rlhf_jax.data import Ledger, Prompt, encode_prompts, read_records
from rlhf_jax.evaluation.answers import Language
from rlhf_jax.evaluation.commands import generate_command
from rlhf_jax.evaluation.evaluation_files import FILE
from rlhf_jax.evaluation.report.evaluation import write_evaluation_report
from rlhf_jax.files import write_file
from rlhf_jax.lora import attach
from rlhf_jax.parallel import processes
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_source, start_from, with_prefix
from rlhf_jax.recipe.film.backbone import write_lower_layers
from rlhf_jax.recipe.film.judge import WordJudge, fit_judge
from rlhf_jax.recipe.film.measure import JUDGE, Measurement, measure, shown_rows
from rlhf_jax.recipe.film.parts import Records, from_ratings, from_records
from rlhf_jax.recipe.film.ratings import is_archive, read_ratings
from rlhf_jax.recipe.film.settings import DataConfig
from rlhf_jax.recipe.film.stages import Settings
from rlhf_jax.recipe.film.summary import SHOWN, figures_table, summary_of
from rlhf_jax.recipe.measure import nested
from rlhf_jax.recipe.run import Clock, run_seeds, stage_settings
from rlhf_jax.recipe.settings import RecipeConfig
from rlhf_jax.recipe.tables import answers_table
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.lifecycle import Finished
from rlhf_jax.trainers import ppo, reward, sft


def run(config: RecipeConfig) -> None:
    """Runs the task with one seed, or with several and reports the medians."""
    run_seeds(config, run_seed, figures_table)


def run_seed(config: RecipeConfig) -> None:
    """Runs the stages that are not finished yet, then reports the results."""
    settings, console = Settings(config.configs), rich.console.Console(quiet=not processes.is_first())
    config.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(config.folder / "seconds.json")

    def announce(text: str) -> None:
        console.rule(f"[bold]{text}", align="left")

    announce("data: people's judgements, divided by sentence")
    init = open_source(with_prefix(config.init), stages=LANGUAGE)
    records, ledger = records_of(config.data, settings.data, init, config.seed)
    files = write_records(config.folder / "data", records, ledger)
    console.print(ledger.counts(), markup=False, highlight=False)
    judge = fit_judge(records.judge)
    clock.lap("data")
    stages = train(config, settings, init, files, announce, clock, judge, records.openings)
    announce("results")
    ppo_config = settings.ppo()
    measurement = Measurement(
        settings.measure,
        read_records([str(files["heldout_prompts"])], "prompts", Ledger()),
        init.tokenizer,
        prompt_length=ppo_config.prompt_length,
        episode=ppo_config.episode,
        openings=records.openings,
        seed=config.seed,
    )
    about = dataclasses.asdict(settings.measure) | {
        "temperature": 1.0,
        "seed": config.seed,
        "heldout": hashlib.sha256(files["heldout"].read_bytes()).hexdigest(),
        **{f"{name} run": finished.run.fingerprint for name, finished in stages.items()},
    }
    content = measured(config.folder, about)
    if content is None:
        content = measure(
            measurement,
            judge,
            runs={name: finished.run.path for name, finished in stages.items()},
            init=init,
            heldout=files["heldout"],
            rankings=records.rankings,
            human=records.human,
            folder=config.folder,
        ) | {"settings": about}
    clock.lap("measure")
    processes.by_first(lambda: tell(config, console, clock, content, stages, measurement.prompts))
    command = generate_command(stages["ppo"].run.path, [prompt.prompt for prompt in measurement.prompts[:1]])
    console.print(f"try it: {command}", soft_wrap=True, markup=False, emoji=False, highlight=False)


def train(
    config: RecipeConfig,
    settings: Settings,
    init: Source,
    files: Mapping[str, Path],
    announce: Callable[[str], None],
    clock: Clock,
    judge: WordJudge,
    openings: bool,
) -> dict[str, Finished]:
    """The runs sft, reward and ppo; those that are finished are taken as they are.

    Args:
      config: settings of the recipe.
      settings: of the stages.
      init: the model to start from.
      files: rows that the stages read.
      announce: prints the title of a stage.
      clock: takes the time of each.
      judge: for the curve of PPO; it has no part in the training.
      openings: as of `Records`.
    """
    announce("2  SFT: sentences as people wrote them, liked or not")
    tuned = sft.run(settings.sft(**stage_settings(config, "sft"), init=init.spec, data=[str(files["demonstrations"])]))
    clock.lap("sft")
    announce("3.1  reward model: people's rankings")
    backbone = init.spec
    if settings.layers:
        backbone = str(write_lower_layers(init, settings.layers, config.folder / "backbone").path)
    judged = reward.run(
        settings.reward(**stage_settings(config, "reward"), init=backbone, data=[str(files["rankings"])])
    )
    clock.lap("reward")
    announce("3.2  PPO: maximise the reward, stay near the SFT model")
    optimised = ppo.run(
        settings.ppo(
            **stage_settings(config, "ppo"),
            init=str(tuned.run.path),
            reward=str(judged.run.path),
            data=[str(files["prompts"])],
            pretraining_data=[str(files["text"])],
        ),
        evaluate=watch(tuned, judge, openings, settings, files["prompts"], config.seed),
    )
    clock.lap("ppo")
    return {"sft": tuned, "reward": judged, "ppo": optimised}


def records_of(data: str, config: DataConfig, init: Source, seed: int) -> tuple[Records, Ledger]:
    """The parts of the data, and the ledger of its rows.

    Args:
      data: archive of ratings, or a file of comparisons or rankings.
      config: settings.
      init: the model, whose tokenizer must cut a sentence after its opening.
      seed: of who is ranked beside whom.
    """
    tokenizer, ledger = init.tokenizer, Ledger()

    def whole(opening: str, rest: str) -> bool:
        return [*tokenizer.encode(opening), *tokenizer.encode_continuation(rest)] == tokenizer.encode(opening + rest)

    if is_archive(data):
        return from_ratings(read_ratings(data, ledger), config, whole, seed), ledger
    return from_records(read_records([data], "rankings", ledger), config, whole, ledger), ledger


def write_records(folder: Path, records: Records, ledger: Ledger) -> dict[str, Path]:
    """Writes the rows that the stages read, one file for each kind; returns their paths."""
    files = {name: folder / f"{name}.jsonl" for name in records.files}
    if processes.is_first():
        folder.mkdir(exist_ok=True)
        for name, rows in records.files.items():
            write_file(files[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        ledger.save(folder / "ledger.json")
    processes.by_first(lambda: None)
    return files


def watch(
    tuned: Finished, judge: WordJudge, openings: bool, settings: Settings, prompts: Path, seed: int
) -> Callable[[TrainState], dict[str, float]]:
    """The judge's mean score of a policy's answers to some training prompts, for the curve of PPO."""
    source = open_source(str(tuned.run.path), stages=LANGUAGE)
    config, tokenizer = settings.ppo(), source.tokenizer
    rows = encode_prompts(
        read_records([str(prompts)], "prompts", Ledger()), tokenizer, max_tokens=config.prompt_length, ledger=Ledger()
    )
    places = np.linspace(0, len(rows) - 1, min(settings.measure.watched, len(rows))).round().astype(int)
    measurement = Measurement(
        settings.measure,
        [rows.sources[i] for i in places],
        tokenizer,
        prompt_length=config.prompt_length,
        episode=config.episode,
        openings=openings,
        seed=seed,
    )
    base = start_from(source, config.lora, lambda: jax.random.key(0)).base

    def evaluate(state: TrainState) -> dict[str, float]:
        policy = attach(base, state.params["policy"], config.lora.scale)
        sampled = measurement.sampled(Language(source, source.network(), policy), seed=3)
        return {JUDGE: float(measurement.judged(judge, measurement.answers(sampled)).mean())}

    return evaluate


def measured(folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The measurement of an earlier start, if it was of the same models with the same settings."""
    path = folder / FILE

    def found() -> dict[str, Any] | None:
        content: dict[str, Any] | None = read_json(path) if path.exists() else None
        return content if content is not None and content["settings"] == about else None

    return processes.from_first(found)


def tell(
    config: RecipeConfig,
    console: rich.console.Console,
    clock: Clock,
    content: dict[str, Any],
    stages: dict[str, Finished],
    prompts: list[Prompt],
) -> None:
    """Writes and prints the results."""
    folder = config.folder
    summary = summary_of(content, {name: finished.summary for name, finished in stages.items()})
    summary |= {"seed": config.seed, "wall_seconds": clock.total, "stage_seconds": clock.seconds}
    rows = shown_rows(content, prompts, folder / "samples.jsonl")
    write_json(folder / FILE, content)
    write_json(folder / "summary.json", summary | nested(summary))
    write_evaluation_report(folder / "report.html", content, rows[:SHOWN])
    names = [model["name"] for model in content["models"]]
    cells = [
        (row["prompt"].strip(), *(row["answers"][name][0]["answer"][:200] for name in names))
        for row in rows[: SHOWN // 2]
    ]
    console.print(answers_table("the same held-out prompts, answered by each model", names, cells))
    console.print(figures_table(summary, "results on held-out prompts and comparisons"))
    console.print(
        f"report: {folder / 'report.html'}   figures: {folder / 'summary.json'}   answers: {folder / 'samples.jsonl'}",
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
