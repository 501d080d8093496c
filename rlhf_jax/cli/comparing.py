"""Runs side by side, for `rlhf-jax report`: reads their folders, samples their answers and scores them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.cli.before_after import FILE, LONGEST
from rlhf_jax.cli.scoring import left_out
from rlhf_jax.data import Demonstration, Ledger, Prompt, prompt_ids, read_records
from rlhf_jax.data.dialogues import FullMessage
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.report.compare import Answers, Compared, write_comparison
from rlhf_jax.evaluation.report.html import STAGES
from rlhf_jax.evaluation.report.run import warnings_of
from rlhf_jax.inference import Sampler, load
from rlhf_jax.pretrained.source import LANGUAGE, open_source
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import say
from rlhf_jax.runs.metrics import read_rows

if TYPE_CHECKING:
    from rlhf_jax.cli.report import Config


def run(config: Config) -> None:
    """Writes the report."""
    if not Path(config.out).parent.is_dir():
        raise UserError(f"out: expected a file in a folder that exists, got {config.out!r}")
    paths = [path for given in config.runs for path in runs_below(Path(given))]
    twice = next((path for place, path in enumerate(paths) if path in paths[:place]), None)
    if twice is not None:
        raise UserError(f"runs: expected each run once, got {twice} twice")
    folders = dict(zip(names_of(paths), (RunFolder.open(path, stages=tuple(STAGES)) for path in paths)))
    answers = answers_of(config, folders) if config.examples else None
    recipes = [Path(given) for given in config.runs if (Path(given) / "summary.json").exists()]
    recipes = [path for path in recipes if not (path / "config.json").exists()]
    write_comparison(
        Path(config.out),
        [_compared(name, folder) for name, folder in folders.items()],
        answers,
        {name: read_json(path / "summary.json") for name, path in zip(names_of(recipes), recipes)},
    )
    print(f"report: {config.out}")


def runs_below(path: Path) -> list[Path]:
    """The run in a folder, or the runs below it: those of a recipe in the order of its stages.

    Raises:
      UserError: if there is none.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: expected the folder of a run or of a recipe, got {got}")
    if (path / "config.json").exists():
        return [path]
    # With several seeds, a recipe has a folder of runs for each.
    found = {config.parent for depth in ("*", "*/*") for config in path.glob(f"{depth}/config.json")}
    if not found:
        raise UserError(f"{path}: expected the folder of a run or of a recipe, got one without a run in it")
    order = list(STAGES)
    return sorted(
        found, key=lambda run: (run.parent, order.index(run.name) if run.name in order else len(order), run.name)
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names of folders: their paths below the folder that all are in."""
    absolute = [path.absolute() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in absolute])) if paths else Path()
    return [str(path.relative_to(common)) for path in absolute]


def _compared(name: str, folder: RunFolder) -> Compared:
    return Compared(
        name=name,
        stage=folder.stage,
        settings=folder.config | {"model": folder.model, "inputs": folder.inputs},
        summary=folder.summary if folder.finished else None,
        rows=read_rows(folder.metrics),
        warnings=warnings_of(folder) if folder.finished else (),
        samples=samples_in(folder.path) if folder.stage == "reward" else (),
    )


def samples_in(path: Path) -> list[Mapping[str, Any]]:
    """The samples of a run, or of a recipe."""
    content = read_json(path / FILE) if (path / FILE).exists() else []
    samples: list[Mapping[str, Any]] = content["samples"] if isinstance(content, dict) else content
    return samples


def answers_of(config: Config, folders: Mapping[str, RunFolder]) -> Answers | None:
    """Answers of the finished language models, None if there is no such model or no prompt.

    Raises:
      UserError: if no prompt fits all models.
    """
    models = {
        name: open_source(str(folder.path), stages=LANGUAGE)
        for name, folder in folders.items()
        if folder.stage in LANGUAGE and folder.finished
    }
    prompts = prompts_of(config, list(folders.values()))
    if not models or not prompts:
        if models:
            say("no answers are shown, as the runs have no samples.json; use --data FILE with prompts")
        return None
    quarter = min(source.model.context for source in models.values()) // 4
    limit = config.max_new_tokens or max(min(LONGEST, quarter), 1)
    rows = {name: [prompt_ids(prompt, source.tokenizer) for prompt in prompts] for name, source in models.items()}
    room = min(source.model.context for source in models.values()) - limit
    fits = [at for at in range(len(prompts)) if all(0 < len(ids[at]) <= room for ids in rows.values())]
    if not fits:
        raise UserError(
            f"data: expected prompts of at most {max(room, 0)} tokens, got none in these; use shorter ones, or a lower "
            "--max-new-tokens"
        )
    if len(fits) < len(prompts):
        say(f"{len(prompts) - len(fits):,} of {len(prompts):,} prompts are left out: too long for one of the models")
    fits = fits[: config.examples]
    chosen = [prompts[at] for at in fits]
    found = {}
    for name, source in models.items():  # one after the other, so that one model is in memory at a time
        sampler = Sampler(source, seed=0, max_new_tokens=limit, temperature=config.temperature)
        found[name] = sampler.responses([rows[name][at] for at in fits])
    texts = {name: [text for text, _ in each] for name, each in found.items()}
    scores, judged = _scores(config, folders, chosen, found)
    own = "" if config.data else ", those that the runs’ own reports show (--data gives others)"
    return Answers(
        prompts=[prompt.prompt for prompt in chosen],
        texts=texts,
        tokens={name: [len(models[name].tokenizer.encode(text)) for text in each] for name, each in texts.items()},
        scores=scores,
        about=f"{len(chosen):,} prompts{own}. Answers of at most {limit} tokens at temperature {config.temperature:g}, "
        f"with the same random numbers. {judged}",
    )


def prompts_of(config: Config, folders: Sequence[RunFolder]) -> list[Prompt]:
    """The prompts to answer, each once: those of the files, or those in samples.json of runs and recipes."""
    if config.data:
        ledger = Ledger()
        found: list[Prompt] = read_records(config.data, "prompts", ledger, columns=config.columns)
        for line in left_out(ledger, "prompts left out"):
            say(line)
        return list(dict.fromkeys(found))
    if config.columns:
        raise UserError("columns: expected --data with it, got no files")
    places = [Path(given) for given in config.runs]
    places += [folder.path for folder in folders if folder.stage in LANGUAGE]
    return list(
        dict.fromkeys(
            Prompt(sample["prompt"], "", tuple(FullMessage.of(turn) for turn in sample.get("messages", ())))
            for path in dict.fromkeys(places)
            for sample in samples_in(path)
            if "preferred" not in sample
        )
    )


def _scores(
    config: Config,
    folders: Mapping[str, RunFolder],
    prompts: Sequence[Prompt],
    found: Mapping[str, Sequence[tuple[str, bool]]],
) -> tuple[dict[str, list[float | None]], str]:
    """Scores of the answers by the judge, none without one; and a sentence about the judge."""
    named = {str(folder.config.get("reward") or "") for folder in folders.values() if folder.stage == "ppo"}
    trained = next(iter(named)) if len(named) == 1 else ""
    judge = config.reward or (trained if (Path(trained) / "summary.json").exists() else "")
    if not judge:
        return {}, "There is no judge; --reward names one, for win rates."
    model = load(judge)
    if not model.source.scalar:
        raise UserError(f"reward: expected a reward model, got the language model {judge}")
    scores = {
        name: model.record_scores(
            [
                Demonstration(prompt.prompt, answer, f"{name}:{place}", prompt.turns, ended=ended)
                for place, (prompt, (answer, ended)) in enumerate(zip(prompts, each), start=1)
            ],
            Ledger(),
        )
        for name, each in found.items()
    }
    told = f"Scored by {judge}, in deviations from its mean."
    if model.source.warnings and judge not in named:
        told += f" {judge}: {'; '.join(model.source.warnings)}."
    if judge in named:
        told += " It is what PPO was trained to please, so that a higher score is no proof of better answers."
    return scores, told
