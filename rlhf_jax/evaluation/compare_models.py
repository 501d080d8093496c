"""Comparison of models on one set of prompts: sample, score, compare, and write evaluation.json and report.html."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.config.evaluation import EvaluationConfig, is_file
from rlhf_jax.data import Ledger, Prompt, Text, encode_text, pack_text, read_records
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import (
    Answer,
    Key,
    Language,
    key_of,
    matched,
    read_answers,
    room_of,
    sample_answers,
    unfit,
)
from rlhf_jax.evaluation.arms import Arm, best_arm, figures, scored_prompts, win_rates
from rlhf_jax.evaluation.evaluation_files import LEDGER, SHOWN, refuse_other, write_answered, write_evaluation
from rlhf_jax.evaluation.frontier import best_of_curve, plain, policies_curve
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.evaluation.reward_accuracy import reward_accuracy
from rlhf_jax.evaluation.scorers import Scorer, function_scorer, model_scorer
from rlhf_jax.pretrained.source import LANGUAGE, Source, longest_answer, open_source, same_tokenizer, with_prefix
from rlhf_jax.reward_functions.loading import RewardFunction, load_function, make_terms, spec_of

Path = str | os.PathLike[str]
TEXT_ROW = 512  # tokens of a row of held-out text, if the context has room for it


def evaluate(
    models: Path | Sequence[Path] = (),
    prompts: Path | Sequence[Path] = (),
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare models and write evaluation.json, answers.jsonl and report.html, as `rlhf-jax evaluate` does.

    evaluate(["runs/sft", "runs/aligned"], "prompts.jsonl", reward="runs/judge", reference="runs/sft")

    Args:
      models: run folders, published models or JSONL files of answers, the baseline first.
      prompts: JSONL files of prompts.
      reward_funcs: functions that score answers, f(prompts, completions, **columns), after those of the settings.
      say: called with lines about the progress.
      **settings: further fields of `EvaluationConfig`; a single text stands for a tuple of one.

    Returns:
      The content of evaluation.json.

    Raises:
      UserError: for settings, models or files that do not fit.
    """
    lists = {field.name for field in dataclasses.fields(EvaluationConfig) if field.default == ()}
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in ({"models": models, "prompts": prompts} | settings).items()
    }
    config = EvaluationConfig(**{name: _several(v) if name in lists else v for name, v in given.items()})
    return run(config, reward_funcs, say=say)


def run(
    config: EvaluationConfig,
    reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
    *,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """`evaluate` with settings as one object."""
    refuse_other(config.folder)
    comparison = _Comparison(
        config, [reward_funcs] if callable(reward_funcs) else list(reward_funcs), say or (lambda _: None)
    )
    config.folder.mkdir(parents=True, exist_ok=True)
    content = comparison.content()
    if comparison.ledger.total:
        comparison.ledger.save(config.folder / LEDGER)
    if comparison.prompts:
        write_answered(config.folder, comparison.rows())
    write_evaluation(config.folder, content, list(comparison.rows(most=SHOWN)))
    return content


class _Comparison:
    """The models, scorers and prompts of one evaluation, and what was found so far."""

    def __init__(
        self, config: EvaluationConfig, functions: Sequence[RewardFunction], say: Callable[[str], None]
    ) -> None:
        self.config, self.say = config, say
        self.ledger, self.unscored = Ledger(), Ledger()
        self.notes: list[str] = []
        self.functions = [*map(load_function, config.reward_function), *functions]
        if config.best_of and not (config.reward or self.functions):
            raise UserError("best_of: expected a scorer to choose by, got none; use --reward or --reward-function")
        names = short_names([*config.models, *config.reward])
        self.names = dict(zip(config.models, names, strict=False))
        self.judge_names = names[len(config.models) :]
        self.sources = {
            spec: open_source(with_prefix(spec), stages=LANGUAGE) for spec in config.models if not is_file(spec)
        }
        self.judges = [open_source(with_prefix(spec), stages=("reward",)) for spec in config.reward]
        self.reference = self._reference()
        sampled = [one for one in (*self.sources.values(), self.reference) if one is not None]
        self.longest = longest_answer(sampled, config.max_new_tokens)
        self.files = {spec: read_answers(spec, self.ledger) for spec in config.models if is_file(spec)}
        self.prompts, self.places = self._prompts()
        self.arms: list[Arm] = []

    def _reference(self) -> Source | None:
        if not self.config.reference:
            return None
        reference = open_source(with_prefix(self.config.reference), stages=LANGUAGE)
        # The same object if it is compared as well, however its path is written: its parameters are read once.
        return next((one for one in self.sources.values() if one.spec == reference.spec), reference)

    def _prompts(self) -> tuple[list[Prompt], list[int]]:
        """The distinct prompts that fit all models, and the number of each among those that were read."""
        if self.config.prompts:
            read = read_records(self.config.prompts, "prompts", self.ledger)
        else:
            read = [prompt for prompt, _ in next(iter(self.files.values()), [])]
        if not self.files and not self.config.prompts:
            return [], []  # an evaluation on text or on comparisons alone
        sources = {one.where: one for one in (*self.sources.values(), self.reference) if one is not None}
        rooms = [(one, room_of(one, self.longest)) for one in sources.values()]
        seen: set[Key] = set()
        kept: list[Prompt] = []
        places: list[int] = []
        for place, prompt in enumerate(read):
            reason = next(filter(None, (unfit(prompt, one, room) for one, room in rooms)), "")
            again = key_of(prompt) in seen
            if self.config.prompts:
                if again or reason:
                    self.ledger.drop(prompt.where, "the same prompt as in an earlier row" if again else reason)
                else:
                    self.ledger.keep(prompt.where)
            if not again and not reason:
                kept.append(prompt)
                places.append(place)
            seen.add(key_of(prompt))
        if not kept:
            raise UserError(
                f"prompts: expected a prompt that all models can answer, got none among {len(read)} rows; the first "
                f"reason: {next(iter(self.ledger.reasons().get('dropped', {})), 'no answer with a prompt')}"
            )
        return kept, places

    def content(self) -> dict[str, Any]:
        """Samples, scores and compares: the content of evaluation.json."""
        config = self.config
        texts = read_records(config.text, "text", self.ledger) if config.text else []
        pairs = read_records(config.comparisons, "rankings", self.ledger) if config.comparisons else []
        samples = self._sampled(texts)
        scored = self._scored(samples)
        self.arms = [whole if pool is None else own for whole, own, pool in scored]
        pools = [pool for _, _, pool in scored if pool is not None]
        proxy = next(iter(self.arms[0].scores), "") if self.arms else ""
        self.arms += [best_arm(pool, proxy) for pool in pools]
        found: dict[str, Any] = {"models": [], "win_rates": [], "best_of_n": [], "policies": None}
        if self.prompts:
            masks = scored_prompts(self.arms)
            for name, mask in masks.items():
                if not mask.all():
                    self.notes.append(f"{name}: {int((~mask).sum())} prompts are left out, as an answer has no score")
            found["models"] = [figures(arm, masks, seed=config.seed) for arm in self.arms]
            found["win_rates"] = win_rates(self.arms, masks, seed=config.seed)
            found["best_of_n"] = [c for pool in pools if (c := best_of_curve(pool, proxy, seed=config.seed))]
            start = next(
                (arm for arm in self.arms if self.reference and self.sources.get(arm.model) is self.reference), None
            )
            found["policies"] = policies_curve(self.arms, start, seed=config.seed) if start else None
        else:
            found["models"] = [{"name": self.names[spec], "model": spec, "text": text} for spec, text in samples]
        rewards = []
        for judge in self.judges if pairs else []:
            self.say(f"{judge.where}: {len(pairs):,} comparisons")
            own = Ledger()
            rewards.append(reward_accuracy(judge, pairs, own, batch=config.batch))
            for reason, count in own.reasons().get("dropped", {}).items():
                self.notes.append(f"{judge.where}: {count:,} comparisons are left out: {reason}")
        about = {"prompts": len(self.prompts), "scorers": list(self.arms[0].scores) if self.arms else []}
        for reason, count in self.ledger.reasons().get("dropped", {}).items():
            self.notes.append(f"{count:,} rows are left out: {reason}")
        settings = dataclasses.asdict(config) | {"longest_answer": self.longest}
        settings |= {"reward_funcs": [spec_of(f) for f in self.functions]}
        rest = {"reward_models": [one for one in rewards if one], "notes": self.notes, "settings": settings}
        content: dict[str, Any] = plain(about | {"reference": config.reference or None} | found | rest)
        return content

    def _sampled(self, texts: Sequence[Text]) -> list[tuple[str, Any]]:
        """(model, (answers, figures on text)) of each model; without prompts, (model, figures on text)."""
        config = self.config
        found: list[tuple[str, Any]] = []
        reference = Language.of(self.reference) if self.reference and self.prompts else None
        for spec in config.models:
            source, text = self.sources.get(spec), None
            if source is None:
                if self.prompts:
                    answers = matched(spec, self.files[spec], self.prompts, self.ledger)
                    found.append((spec, (answers, None)))
                continue
            same = reference is not None and reference.source is source
            language = reference if same and reference is not None else Language.of(source)
            if texts:
                self.say(f"{spec}: {len(texts):,} texts")
                text = text_figures(language, texts, batch=config.batch)
            found.append((spec, (self._answers(language, reference), text) if self.prompts else text))
        return found

    def _answers(self, language: Language, reference: Language | None) -> list[list[Answer]]:
        source, config = language.source, self.config
        if reference is not None:
            try:
                same_tokenizer(reference.source, source)
            except UserError as error:
                self.notes.append(f"no KL to the reference: {error}")
                reference = None
        self.say(f"{source.where}: {len(self.prompts):,} prompts")
        answers: list[list[Answer]] = [[] for _ in self.prompts]
        for at, several in sample_answers(
            language,
            self.prompts,
            self.places,
            samples=config.samples + config.best_of,
            max_new_tokens=self.longest,
            temperature=config.temperature,
            batch=config.batch,
            seed=config.seed,
            reference=reference,
        ):
            answers[at] = several
        return answers

    def _scored(self, samples: Sequence[tuple[str, Any]]) -> list[tuple[Arm, Arm, Arm | None]]:
        """(the arm with all its answers, with those of its own, with those that best-of-n chooses from) by model.

        Reward models are in memory one at a time.
        """
        if not self.prompts:
            return []
        scores: dict[str, dict[str, Any]] = {spec: {} for spec, _ in samples}
        for name, make in self._scorers():
            scorer = make()
            for spec, (answers, _) in samples:
                scores[spec][name] = scorer(self.prompts, answers)
        for reason, count in self.unscored.reasons().get("dropped", {}).items():
            self.notes.append(f"{count:,} answers have no score by a reward model: {reason}")
        found = []
        samples_and_pool = self.config.samples + self.config.best_of
        for spec, (answers, text) in samples:
            kind: Any = "model" if spec in self.sources else "file"
            arm = Arm(self.names[spec], spec, kind, answers, scores[spec], text=text)
            pool = None
            if self.config.best_of and len(answers[0]) >= samples_and_pool:
                pool = arm.columns(self.config.samples, self.config.best_of)
            elif self.config.best_of:
                self.notes.append(
                    f"{arm.name}: no best of {self.config.best_of}, which takes {samples_and_pool} answers to each "
                    f"prompt with those of its own, got {len(answers[0])}"
                )
            found.append((arm, arm.columns(0, self.config.samples), pool))
        return found

    def _scorers(self) -> list[tuple[str, Callable[[], Scorer]]]:
        names = [*self.judge_names]
        for name in make_terms(self.functions, (), model=False).names:
            names.append(name if name not in names else f"{name} (function)")
        makes: list[Callable[[], Scorer]] = [
            functools.partial(model_scorer, judge, self.unscored, batch=self.config.batch) for judge in self.judges
        ]
        for function, name in zip(self.functions, names[len(self.judges) :], strict=True):
            makes.append(functools.partial(function_scorer, function, name, timeout=self.config.reward_timeout))
        return list(zip(names, makes, strict=True))

    def rows(self, most: int | None = None) -> Any:
        """Rows of answers.jsonl: each prompt with the answers of every model and their scores."""
        for at, prompt in enumerate(self.prompts[:most]):
            asked = prompt_row(prompt.turns) if prompt.turns else {"prompt": prompt.prompt}
            answers = {
                arm.name: [
                    {"answer": answer.text, "ended": answer.ended}
                    | {"scores": {name: plain(x[at, k]) for name, x in arm.scores.items()}}
                    for k, answer in enumerate(arm.answers[at])
                ]
                for arm in self.arms
            }
            yield {"where": prompt.where, **asked, "answers": answers}


def text_figures(language: Language, texts: Sequence[Text], *, batch: int) -> dict[str, float]:
    """Loss of a model on held-out text: nats per token, perplexity, and bits per byte, which tokenizers have in common.

    Args:
      language: the model.
      texts: documents.
      batch: rows at a time.
    """
    tokenizer = language.source.tokenizer
    length = min(language.source.model.context, TEXT_ROW) + 1
    docs = encode_text(texts, tokenizer, ledger=Ledger())
    rows = pack_text(docs, length=length, start_ids=tokenizer.start_ids, eos_id=tokenizer.eos_id)
    loss, targets = mean_loss(language.network, language.params, rows, batch_size=min(batch, max(len(rows), 1)))
    total = sum(len(text.text.encode()) for text in texts)
    return {
        "nats_per_token": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * targets / math.log(2) / max(total, 1),
        "tokens": targets,
        "bytes": total,
    }


def short_names(specs: Sequence[str]) -> list[str]:
    """The last part of each spec's path, or all of the spec where that is not unique."""
    last = [pathlib.PurePath(spec.rpartition(":")[2]).name or spec for spec in specs]
    return [name if last.count(name) == 1 else spec for name, spec in zip(last, specs, strict=True)]


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(map(os.fspath, value))
