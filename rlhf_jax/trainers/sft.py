"""Stage 2, supervised fine-tuning: files of demonstrations or dialogues in, a run folder out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax

from rlhf_jax.arrays import Params, TokenBatch
from rlhf_jax.data import (
    Demonstration,
    Dialogue,
    Ledger,
    batch_at,
    encode_demonstrations,
    have_messages,
    new_lengths,
    read_records,
)
from rlhf_jax.data.batches import Rows
from rlhf_jax.data.packing import pack_rows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, count_parameters
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.pretrained.source import open_for, start_from
from rlhf_jax.runs.lifecycle import (
    Finished,
    complete,
    create_run,
    fingerprint_of,
    hold_out,
    longest_row,
    refuse_empty,
    say,
    train,
)
from rlhf_jax.stages.sft import STAGE, Config, make_update


def run(
    config: Config,
    *,
    records: Sequence[Demonstration | Dialogue] | None = None,
    heldout: Sequence[Demonstration | Dialogue] | None = None,
) -> Finished:
    """Fine-tune the model of config.init and write a run folder; resumes from the latest checkpoint of the same run.

    Args:
      config: settings of the stage.
      records: records in place of the files (or the embedded corpus) that the config names.
      heldout: held-out records, likewise.

    Raises:
      UserError: for settings or files that do not fit.
    """
    if not config.init:
        raise UserError("init: expected a pretrained model, got nothing; use --init FOLDER or --init hf:FOLDER")
    source = open_for(config, config.init, stages=("pretrain", "sft", "ppo"))
    ledger = Ledger()
    if records is None:
        records, heldout = _records(config, ledger)
    elif heldout is None:
        records, heldout = hold_out(records, config.heldout_fraction)
    tokenizer = source.tokenizer
    trained = Transformer(dataclasses.replace(source.model, dropout=config.dropout))
    model = Transformer(dataclasses.replace(source.model, dropout=0.0))
    inputs = {"init": source.fingerprint, "records": fingerprint_of(records), "heldout": fingerprint_of(heldout)}
    limit = longest_row(config.max_tokens, config.buckets, model.config.context)
    if config.pack is not None:
        if config.pack > model.config.context:
            raise UserError(f"pack: expected at most the context of {model.config.context} tokens, got {config.pack}")
        limit = min(limit, config.pack)
    rows = encode_demonstrations(records, tokenizer, max_tokens=limit, ledger=ledger, buckets=config.buckets)
    refuse_empty(rows, "demonstrations", ledger)
    start = start_from(source, config.lora, lambda: jax.random.fold_in(jax.random.key(config.seed), 1))
    folder = create_run(
        config,
        stage=STAGE,
        model=model.config,
        tokenizer=tokenizer,
        inputs=inputs,
        origin=source.origin,
        base=start.record,
    )
    if folder.finished:
        return Finished(folder, folder.summary)
    heldout_rows = encode_demonstrations(heldout, tokenizer, max_tokens=limit, ledger=Ledger(), buckets=config.buckets)
    optimizer = make_optimizer(config.optimizer, config.steps)
    say(ledger.summary(count_parameters(start.base or start.params)))
    if start.base is not None:
        say(f"adapters of {count_parameters(start.params):,} parameters")

    training: Rows[TokenBatch] = rows if config.pack is None else pack_rows(rows, length=config.pack + 1)

    def heldout_loss(params: Params) -> float | None:
        if not len(heldout_rows):
            return None
        full_params = attach(start.base, params, config.lora.scale)
        return mean_loss(model, full_params, heldout_rows, batch_size=config.batch)[0]

    before = heldout_loss(start.params)
    state = train(
        folder,
        config,
        lambda: new_state(start.params, jax.jit(optimizer.init)(start.params), config.seed),
        lambda axis: make_update(
            trained, optimizer, microbatches=config.microbatches, axis_name=axis, lora_scale=config.lora.scale
        ),
        lambda step, **share: batch_at(training, batch_size=config.batch, seed=config.seed, step=step, **share),
        new_shapes=lambda first: new_lengths(
            training, batch_size=config.batch, seed=config.seed, first=first, steps=config.steps
        ),
        frozen=() if start.base is None else (start.base,),
        evaluate=(lambda state: {"loss": heldout_loss(state.params)}) if len(heldout_rows) else None,
        flops_per_token=config.lora.passes * model.config.flops_per_token(limit),
        best_metric="eval/loss" if len(heldout_rows) else None,
    )
    summary = {
        "dialogues": source.dialogues or have_messages(rows.sources),
        "demonstrations": len(rows),
        "response_tokens": rows.targets,
        "heldout_response_nll": heldout_loss(state.params),
        "heldout_response_nll_before": before,
    }
    return complete(folder, summary, ledger)


def _records(
    config: Config, ledger: Ledger
) -> tuple[Sequence[Demonstration | Dialogue], Sequence[Demonstration | Dialogue]]:
    if not config.data:
        corpus = load_corpus()
        return corpus.demonstrations, corpus.heldout_demonstrations
    records = _read(config.data, config.kind, ledger)
    if config.heldout:
        return records, _read(config.heldout, config.kind, Ledger())
    return hold_out(records, config.heldout_fraction, ledger)


def _read(
    paths: Sequence[str], kind: Literal["demonstrations", "dialogues"], ledger: Ledger
) -> Sequence[Demonstration | Dialogue]:
    if kind == "dialogues":
        return read_records(paths, "dialogues", ledger)
    return read_records(paths, "demonstrations", ledger)
