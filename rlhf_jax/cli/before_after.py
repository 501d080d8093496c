"""Answers to a few prompts before and after a stage, and the command that comes next, for the end of the stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.cli.completion import Speaker
from rlhf_jax.cli.generate import Config as SpeakerConfig
from rlhf_jax.config import PretrainConfig, RewardConfig, RunConfig
from rlhf_jax.data import Prompt, RankingRows, prompt_ids
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.commands import generate_command, path_word, program
from rlhf_jax.evaluation.heldout import scores_of
from rlhf_jax.pretrained.source import LANGUAGE, on_base, open_source
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import Finished

LONGEST = 48  # tokens of an answer
SHOWN = 240  # characters of a text
FILE = "samples.json"


def samples_of(finished: Finished, config: RunConfig) -> list[dict[str, Any]]:
    """The samples in the run's samples.json, written first if the stage has just ended.

    A sample of a reward model is {"prompt", "preferred", "other"} with a score for each, of any other stage {"prompt",
    "before", "after"}, with the messages of a prompt that was given as such; before is absent for fresh weights.
    """
    path, mesh = finished.run.path / FILE, config.mesh_shape
    if path.exists():
        rows: list[dict[str, Any]] = read_json(path)["samples"]
        return rows
    if not config.examples or not finished.examples or mesh["fsdp"] * mesh["tensor"] > 1:
        return []  # a model that is cut over devices may not fit on one
    if isinstance(finished.examples, RankingRows):
        rows = scored(finished.run, finished.examples, config.examples)
    else:
        rows = answered(finished.run, config, finished.examples)
    write_json(path, {"samples": rows})
    return rows


def answered(run: RunFolder, config: RunConfig, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Answers of the initial and of the trained model, sampled with the same random numbers."""
    length = min(LONGEST, int(run.model["context"]) // 4)
    fitting = [
        (prompt, ids)
        for prompt in prompts
        if 0 < len(ids := prompt_ids(prompt, run.tokenizer)) <= int(run.model["context"]) - length
    ][: config.examples]
    if not fitting:
        return []
    init = str(dataclasses.asdict(config)["init"])
    answers = {}
    for name, model in (("before", init), ("after", str(run.path))):
        if model:
            first = name == "before"
            base = config.base if first and model.startswith("peft:") else ""
            template = config.chat_template if first else ""
            speaker = Speaker(SpeakerConfig(run=model, max_new_tokens=length, base=base, chat_template=template))
            answers[name] = speaker.answers([ids for _, ids in fitting])
    return [
        {"prompt": prompt.prompt}
        | ({"messages": [list(turn.stored()) for turn in prompt.turns]} if prompt.turns else {})
        | {name: texts[place] for name, texts in answers.items()}
        for place, (prompt, _) in enumerate(fitting)
    ]


def scored(run: RunFolder, rankings: RankingRows, count: int) -> list[dict[str, Any]]:
    """Scores of the best and of the worst response to a few prompts."""
    source = open_source(str(run.path), stages=("reward",))
    few = dataclasses.replace(rankings, rows=rankings.rows[:count], sources=())
    scores_NK = scores_of(source.network(), source.params(), few, batch_size=len(few))
    rows = []
    decode = run.tokenizer.decode
    for at, ((responses, ranks), scores_K) in enumerate(zip(few.rows, scores_NK)):
        if at < len(rankings.sources):
            start = len(prompt_ids(rankings.sources[at], run.tokenizer))
        else:  # rows that were given as ids: what they share
            columns = zip(*responses, strict=False)
            start = next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, responses)))
        row: dict[str, Any] = {"prompt": decode(responses[0][:start])}
        for name, place in (("preferred", int(np.argmin(ranks))), ("other", int(np.argmax(ranks)))):
            row |= {name: decode(responses[place][start:]), f"{name}_score": float(scores_K[place])}
        rows.append(row)
    return rows


def lines_of(samples: Sequence[dict[str, Any]]) -> list[str]:
    """The samples as lines for the console."""
    lines = []
    for sample in samples:
        lines.append(f"prompt: {_line(sample['prompt'])}")
        for name in ("before", "after", "preferred", "other"):
            if name in sample:
                score = f" {sample[f'{name}_score']:+.2f}" if f"{name}_score" in sample else ""
                lines.append(f"  {name}{score}: {_line(sample[name])}")
    return lines


def next_command(run: RunFolder, config: RunConfig, samples: Sequence[dict[str, Any]]) -> str:
    """The command that comes after a stage, to be pasted into a shell."""
    if run.stage in ("ppo", "preference"):
        prompts = [sample["prompt"] for sample in samples]
        return generate_command(run.path, prompts, chat=any("messages" in sample for sample in samples))
    path, settings = path_word(run.path), dataclasses.asdict(config)
    lora = f" --lora.rank {settings['lora']['rank']}" if settings["lora"]["rank"] else ""
    start = program()
    if isinstance(config, PretrainConfig):
        return f"{start} sft --name answers --init {path} --data answers.jsonl{lora}"
    if isinstance(config, RewardConfig):
        init, flags = policy_of(config)
        return f"{start} ppo --name aligned --init {init} --reward {path} --data prompts.jsonl{flags}{lora}"
    return f"{start} reward --name judge --init {path} --data comparisons.jsonl{lora}"


def policy_of(config: RewardConfig) -> tuple[str, str]:
    """The model for PPO to start from after a reward model, and the flags that this model needs.

    A reward model may continue another one, and has its place in turn from the first of them.
    """
    init, seen = config.init, set()
    source = open_source(on_base(init, config.base), stages=(*LANGUAGE, "reward"))
    if not source.scalar:
        given = (("base", config.base), ("chat-template", config.chat_template))
        return path_word(init), "".join(f" --{name} {path_word(value)}" for name, value in given if value)
    while source.stage == "reward" and init not in seen:
        seen.add(init)
        init = str(RunFolder.open(init, stages=("reward",)).config.get("init", ""))
        try:
            source = open_source(init, stages=(*LANGUAGE, "reward"))
        except UserError:  # moved or deleted since
            break
        if not source.scalar:
            return path_word(init), ""
    return "runs/answers", ""


def _line(text: str) -> str:
    """A text on one line, without control characters, cut at SHOWN characters."""
    shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text.strip())
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
