"""Stage 2, supervised fine-tuning: files of demonstrations or dialogues in, a run folder out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Params, TokenBatch
from rlhf_jax.data import Demonstration, Dialogue, Ledger, encode_demonstrations, have_messages, read_records
from rlhf_jax.data.batches import Rows
from rlhf_jax.data.packing import pack_rows
from rlhf_jax.demo.python_docs import load_corpus
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.heldout import mean_loss
from rlhf_jax.evaluation.warnings import sft_warnings
from rlhf_jax.lora import attach
from rlhf_jax.model import Transformer, count_parameters
from rlhf_jax.optim import first_key
from rlhf_jax.parallel import processes
from rlhf_jax.pretrained.source import LANGUAGE, open_for, start_from
from rlhf_jax.runs.checkpoint import best_step, load_step
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.length import run_length
from rlhf_jax.runs.lifecycle import Finished, complete, exclusive, fingerprint_of, longest_row, release
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.sft import STAGE, Config, make_update
from rlhf_jax.trainers.inputs import encoded, prompts_of, wants_embedded
from rlhf_jax.trainers.one_network import open_folder, train

# Default number of passes over the data, and of evaluations in a run.
EPOCHS, EVALUATIONS = 3.0, 10


@exclusive
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
    source = open_for(config, config.init, stages=LANGUAGE)
    ledger, heldout_ledger = Ledger(), Ledger()
    if records is None:
        records, heldout = _records(config, ledger, heldout_ledger)
    trained = Transformer(dataclasses.replace(source.model, dropout=config.dropout))
    model = Transformer(dataclasses.replace(source.model, dropout=0.0))
    limit = longest_row(config.max_tokens, config.buckets, model.config.context)
    if config.pack is not None:
        if config.pack > model.config.context:
            raise UserError(f"pack: expected at most the context of {model.config.context} tokens, got {config.pack}")
        limit = min(limit, config.pack)
    encode = functools.partial(
        encode_demonstrations, tokenizer=source.tokenizer, max_tokens=limit, buckets=config.buckets
    )
    data = encoded(config, encode, (records, heldout), (ledger, heldout_ledger), "demonstrations")
    rows, heldout_rows = data.rows, data.heldout
    inputs = {
        "init": source.fingerprint,
        "records": fingerprint_of(rows.sources),
        "heldout": fingerprint_of(heldout_rows.sources),
    }
    training: Rows[TokenBatch] = rows if config.pack is None else pack_rows(rows, length=config.pack + 1)
    what = "demonstrations" if config.pack is None else f"rows of {len(rows):,} packed demonstrations"
    length = run_length(config, len(training), epochs=EPOCHS, what=what)
    eval_every = max(-(-length.steps // EVALUATIONS), 1) if config.eval_every is None else config.eval_every
    # Written out, so that a run that resumes on other devices has the same batches and evaluations.
    config = dataclasses.replace(config, epochs=None, steps=length.steps, batch=length.batch, eval_every=eval_every)
    start = start_from(source, config.lora, lambda: first_key(config.seed))
    folder = open_folder(config, STAGE, model.config, source, start, inputs)
    if folder.finished:
        return Finished(folder, folder.summary)
    adapters = [] if start.base is None else [f"adapters of {count_parameters(start.params):,} parameters"]
    data.say(start, [*adapters, *length.lines])

    def heldout_loss(params: Params) -> float | None:
        if not len(heldout_rows):
            return None
        full_params = attach(start.base, params, config.lora.scale)
        return mean_loss(model, full_params, heldout_rows, batch_size=length.batch)[0]

    before = heldout_loss(start.params)
    state = train(
        folder,
        config,
        start,
        training,
        functools.partial(make_update, trained, microbatches=config.microbatches, lora_scale=config.lora.scale),
        evaluate=(lambda state: {"loss": heldout_loss(state.params)}) if len(heldout_rows) else None,
        flops_per_token=config.lora.passes * model.config.flops_per_token(limit),
        best_metric="eval/loss" if len(heldout_rows) else None,
    )
    chosen, params = length.steps, state.params
    if config.release == "best":
        chosen, params = _best(folder, length.steps, state.params)
    summary = {
        "dialogues": source.dialogues or have_messages(rows.sources),
        "demonstrations": len(rows),
        "response_tokens": rows.targets,
        "steps": length.steps,
        "epochs": length.epochs,
        "released_step": chosen,
        "heldout_response_nll": heldout_loss(params),
        "heldout_response_nll_before": before,
        "warnings": sft_warnings(read_rows(folder.metrics), before, release=config.release),
    }
    examples = prompts_of(heldout_rows.sources or rows.sources)
    return complete(folder, summary, examples, ledger, heldout=heldout_ledger)


def _best(folder: RunFolder, steps: int, last: Params) -> tuple[int, Params]:
    """(step, parameters) with the lowest held-out loss, released for later stages if they are not the last ones."""
    best = processes.from_first(lambda: best_step(folder.checkpoints))
    if best is None or best == steps:
        return steps, last
    # If the best one is damaged, another.
    found, params = load_step(folder.checkpoints, "best")
    if found == steps:
        return steps, last
    release(folder, jax.tree.map(jnp.asarray, params), found)
    return found, jax.tree.map(jnp.asarray, params)


def _records(
    config: Config, ledger: Ledger, heldout_ledger: Ledger
) -> tuple[Sequence[Demonstration | Dialogue], Sequence[Demonstration | Dialogue] | None]:
    """Training and held-out records; None if those are to be held out from the training records."""
    embedded = wants_embedded("data", config.data, "demonstrations")
    if embedded and config.kind == "dialogues":
        raise UserError("kind: expected demonstrations with --data embedded, which has no dialogues, got dialogues")

    def read(paths: Sequence[str], ledger: Ledger) -> Sequence[Demonstration | Dialogue]:
        return read_records(paths, config.kind, ledger, columns=config.columns)

    records = load_corpus().demonstrations if embedded else read(config.data, ledger)
    if config.heldout:
        return records, read(config.heldout, heldout_ledger)
    return records, load_corpus().development.demonstrations if embedded else None
