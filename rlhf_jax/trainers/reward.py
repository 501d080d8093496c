"""Stage 3.1, the reward model: files of comparisons or rankings in, a run folder out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.data import (
    Demonstration,
    Dialogue,
    Ledger,
    RaggedRows,
    RankingRows,
    encode_demonstrations,
    have_messages,
    read_records,
)
from rlhf_jax.data.batches import PackedRankingRows, Rows
from rlhf_jax.data.encode import ordered_rankings
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import pair_accuracy, row_scores, scores_of
from rlhf_jax.evaluation.warnings import reward_warnings
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, init_params, to_scalar_head
from rlhf_jax.pretrained.source import LANGUAGE, Source, Start, open_for, start_from
from rlhf_jax.runs.length import run_length
from rlhf_jax.runs.lifecycle import Finished, complete, exclusive, fingerprint_of, longest_row, refuse_empty, release
from rlhf_jax.stages.reward import STAGE, Config, make_update
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.trainers.inputs import Data, fingerprint_of_rankings, ranking_rows
from rlhf_jax.trainers.one_network import heldout_figures, once_a_step, open_folder, train

# Most prompts used to estimate mean and scale of the scores: the scale to 1%, in seconds for many rankings too; and the
# fewest responses, which give the scale to 9%. With fewer, PPO measures both on samples of its starting policy.
REFERENCE_PROMPTS = 2048
FEWEST_RESPONSES = 64
# Most responses that are scored without their ends.
ENDS = 128
# Default number of passes over the data.
EPOCHS = 1.0


@exclusive
def run(
    config: Config,
    *,
    rankings: RankingRows | None = None,
    heldout: RankingRows | None = None,
    demonstrations: Sequence[Demonstration | Dialogue] | None = None,
) -> Finished:
    """Train a reward model from the model of config.init; resumes from the latest checkpoint of the same run.

    Args:
      config: settings of the stage.
      rankings: ranked token rows in place of the files that the config names, such as sampled responses, which must not
        be decoded and encoded again.
      heldout: held-out ranked token rows, likewise.
      demonstrations: records in place of the files of config.demonstrations.

    Raises:
      UserError: for settings or files that do not fit.
    """
    if not config.init:
        raise UserError("init: expected a fine-tuned model, got nothing; use --init FOLDER or --init hf:FOLDER")
    source = open_for(config, config.init, stages=(*LANGUAGE, "reward"))
    tokenizer = source.tokenizer
    model = Transformer(source.model, scalar=True)
    limit = longest_row(config.max_tokens, config.buckets, model.config.context)
    ledger, aside = Ledger(), Ledger()
    if rankings is None:
        data = ranking_rows(config, source, limit)
    else:
        data = Data(ordered_rankings(rankings, ledger), heldout or RankingRows([], limit), ledger, Ledger(), False)
    rankings, heldout = data.rows, data.heldout if len(data.heldout) else None
    refuse_empty(rankings, "rankings", data.ledger)
    demonstrations, demonstration_rows = _demonstrations(config, demonstrations, tokenizer, limit, aside)
    inputs = {
        "init": source.fingerprint,
        "rankings": fingerprint_of_rankings(rankings),
        "heldout": fingerprint_of_rankings(heldout),
        "demonstrations": fingerprint_of(demonstrations),
    }
    length = run_length(config, len(rankings), epochs=EPOCHS, what="rankings")
    # Written out, so that a run that resumes on other devices has the same batches.
    config = dataclasses.replace(config, epochs=None, steps=length.steps, batch=length.batch)
    start = first_parameters(config, source, model)
    folder = open_folder(config, STAGE, model.config, source, start, inputs)
    if folder.finished:
        return Finished(folder, folder.summary)
    data.say(start, length.lines, demonstrations=aside)
    pack = config.pack or int(config.share_prompts)
    rows: Rows[Any] = PackedRankingRows(rankings, pack) if pack else rankings

    def attached(params: Params) -> Params:
        return attach(start.base, params, config.lora.scale)

    @once_a_step
    def held_out(state: TrainState) -> tuple[float | None, int]:
        if heldout is None:
            return None, 0
        return accuracy(model, attached(state.params), heldout, length.batch, pack)

    state = train(
        folder,
        config,
        start,
        rows,
        functools.partial(make_update, model, microbatches=config.microbatches, lora_scale=config.lora.scale),
        evaluate=lambda state: {} if heldout is None else {"accuracy": held_out(state)[0]},
        flops_per_token=config.lora.passes * model.config.flops_per_token(limit, language_head=False),
        show=("loss", "accuracy"),
        best_metric="eval/accuracy" if heldout is not None else None,
        best_mode="max",
    )
    params, shift = centred(
        model, state.params, demonstration_rows, length.batch, base=start.base, lora_scale=config.lora.scale
    )
    mean, scale = score_mean_and_scale(model, attached(params), heldout, length.batch, pack)
    unended = None
    if heldout is not None and scale is not None:
        unended = without_end(model, attached(params), heldout, tokenizer.stop_ids, scale, length.batch)
    release(folder, params, length.steps)
    # Centering shifts all scores equally, so the accuracy of the last step still holds.
    right, pairs = held_out(state)
    judged = 0 if heldout is None else heldout.ordered
    accuracies = heldout_figures(right if judged else None, pairs, judged)
    summary = {
        "dialogues": source.dialogues or have_messages(rankings.sources),
        "prompts": len(rankings),
        "steps": length.steps,
        "epochs": length.epochs,
        **accuracies,
        "shift": shift,
        "score_mean": mean,
        "score_scale": scale,
        "without_end": unended,
        "warnings": reward_warnings(
            accuracies["heldout_accuracy"], accuracies["heldout_accuracy_interval"], judged, steps=length.steps
        ),
    }
    ledgers = {"ledger": data.ledger, "heldout": data.heldout_ledger, "demonstrations": aside}
    return complete(folder, summary, heldout or rankings, **ledgers)


def _demonstrations(
    config: Config,
    given: Sequence[Demonstration | Dialogue] | None,
    tokenizer: TextTokenizer,
    limit: int,
    ledger: Ledger,
) -> tuple[Sequence[Demonstration | Dialogue], RaggedRows]:
    """Demonstrations to center the scores on, given or read from the files that the config names, and their rows."""
    paths = config.demonstrations
    if given is None:
        given = read_records(paths, "demonstrations", ledger) if paths else []
    rows = encode_demonstrations(given, tokenizer, max_tokens=limit, ledger=ledger)
    if paths and not len(rows):
        raise UserError(
            f"demonstrations: expected some of at most {limit} tokens to center the scores on, with prompt and "
            f"completion, got none in {', '.join(paths)}"
        )
    return given, rows


def accuracy(
    model: Transformer, params: Params, rankings: RankingRows, batch_size: int, pack: int = 0
) -> tuple[float, int]:
    """Held-out accuracy: (fraction of ordered pairs that the scores order correctly, number of pairs)."""
    return pair_accuracy(_scores(model, params, rankings, batch_size, pack), *rankings.padded_ranks)


def score_mean_and_scale(
    model: Transformer, params: Params, rankings: RankingRows | None, batch_size: int, pack: int = 0
) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the scores of held-out responses; (None, None) for too few to tell.

    They are those of at most REFERENCE_PROMPTS evenly spaced prompts. On responses that the model was trained on,
    over-fitting would inflate the scale, and with it the unit of β in PPO.
    """
    if rankings is None or sum(len(ranks) for _, ranks in rankings.rows) < FEWEST_RESPONSES:
        return None, None
    taken = np.linspace(0, len(rankings) - 1, min(len(rankings), REFERENCE_PROMPTS)).round().astype(int)
    some = dataclasses.replace(rankings, rows=[rankings.rows[i] for i in taken], sources=())
    scores = _scores(model, params, some, batch_size, pack)
    exists = some.padded_ranks[1]
    return float(scores[exists].mean()), float(scores[exists].std())


def without_end(
    model: Transformer, params: Params, rankings: RankingRows, stop_ids: Sequence[int], scale: float, batch_size: int
) -> float | None:
    """Mean change of a held-out response's score when its end token is taken off, in units of `scale`.

    A reward model that has seen complete responses alone may like one better that does not end, and then PPO learns not
    to end. None for fewer than FEWEST_RESPONSES responses that end.
    """
    whole = [list(ids) for responses, _ in rankings.rows for ids in responses if ids[-1] in stop_ids and len(ids) > 1]
    if len(whole) < FEWEST_RESPONSES:
        return None
    places = np.linspace(0, len(whole) - 1, min(len(whole), ENDS)).round().astype(int)
    some = [whole[place] for place in places]
    rows = [(ids, [True] * len(ids)) for ids in (*some, *(ids[:-1] for ids in some))]
    scores = row_scores(model, params, RaggedRows(rows, rankings.limit, rankings.pad_id), batch_size=batch_size)
    return float((scores[len(some) :] - scores[: len(some)]).mean() / scale)


def _scores(model: Transformer, params: Params, rankings: RankingRows, batch_size: int, pack: int) -> np.ndarray:
    rows = PackedRankingRows(rankings, pack) if pack else rankings
    return scores_of(model, params, rows, batch_size=batch_size)


def first_parameters(config: Config, source: Source, model: Transformer) -> Start:
    """Initial parameters: the source's backbone, an adapter to it, or a fresh backbone, with a fresh score head.

    A reward model is continued with its own score head.
    """
    start_key, head_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    if config.backbone == "scratch":
        return Start(init_params(model, start_key), None, None)
    start = start_from(source, config.lora, lambda: start_key)
    if source.scalar:
        return start
    if start.base is None:
        return Start(to_scalar_head(start.params, model, head_key), None, None)
    head = to_scalar_head(start.base, model, head_key)["score"]
    return dataclasses.replace(start, params={**start.params, "score": head})


def centred(
    model: Transformer,
    params: Params,
    demonstrations: RaggedRows,
    batch_size: int,
    *,
    base: Params | None = None,
    lora_scale: float = 0.0,
) -> tuple[Params, float]:
    """Center the scores: (parameters with mean score 0 over the demonstrations, shift added to the bias).

    Args:
      model: scalar-head model.
      params: trained parameters.
      demonstrations: rows whose mean score becomes 0; no change if empty.
      batch_size: rows scored at a time.
      base: parameters that `params` is an adapter to, or None.
      lora_scale: scale of the adapter.
    """
    if not len(demonstrations):
        return params, 0.0
    full_params = attach(base, params, lora_scale)
    shift = -float(row_scores(model, full_params, demonstrations, batch_size=batch_size).mean())
    score = {**params["score"], "bias": params["score"]["bias"] + shift}
    return {**params, "score": score}, shift
