"""From a stage's state and update to a finished run folder: devices, resume, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.config import ModelConfig, RunConfig, from_plain, to_plain
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.mesh import (
    Update,
    copied,
    is_replicated,
    jit_update,
    make_mesh,
    near,
    outline,
    place,
    pmap_update,
    row_places,
    use_all,
)
from rlhf_jax.parallel.sharding import DATA
from rlhf_jax.runs.checkpoint import Checkpoints, load_params
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.loop import fit
from rlhf_jax.runs.metrics import Console, JsonLines, TensorBoard, Writer, Writers
from rlhf_jax.tokenizers.protocol import TextTokenizer

_RELEASED = "released"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that is complete: its folder, and the figures of summary.json."""

    run: RunFolder
    summary: dict[str, Any]


def create_run(
    config: RunConfig,
    *,
    stage: str,
    model: ModelConfig,
    tokenizer: TextTokenizer,
    inputs: Mapping[str, str],
    origin: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> RunFolder:
    """The folder of a stage's run, new or to be gone on with.

    Raises: UserError as `RunFolder.create`, and where processes of one run have not read the same.
    """
    created: list[RunFolder] = []

    def create() -> None:
        created.append(
            RunFolder.create(
                config.folder,
                stage=stage,
                config=to_plain(config),
                model=to_plain(model),
                tokenizer=tokenizer,
                inputs=inputs,
                origin=origin,
                base=base,
            )
        )

    processes.by_first(create)
    if created:
        return created[0]
    run = RunFolder.open(config.folder, stages=(stage,))
    for name, found in inputs.items():
        wanted = run.inputs.get(name, "nothing")
        if found != wanted:
            raise UserError(
                f"inputs.{name}: found {found[:12]} in this process, wanted {wanted[:12]} as in the first; all "
                "processes of a run read the same files"
            )
    return run


def model_of(run: RunFolder) -> ModelConfig:
    """The model's configuration in a run's folder."""
    return from_plain(ModelConfig, run.model, where=f"{run.path}/config.json: model")


def train(
    run: RunFolder,
    config: RunConfig,
    make_state: Callable[[], TrainState],
    make_update: Callable[[str | None], Update],
    batch_at: Callable[..., Any],
    *,
    frozen: Sequence[Any] = (),
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    flops_per_token: float | None = None,
    show: Sequence[str] = ("loss",),
    new_shapes: Callable[[int], Iterable[int]] | None = None,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
    writers: Sequence[Writer] = (),
) -> TrainState:
    """Takes the state from wherever the run's folder left it to config.steps.

    Args:
      make_state: makes the state before the first step; called only once the programs are compiled, so that what the
        compiler needs and what the optimizer holds never take memory together.
      make_update: axis name (None under jit) -> the stage's pure update(state, batch, *frozen).
      batch_at: step -> its batch; of several processes, with places=… -> the rows of it that are this one's.
      frozen: networks that the update reads; they lie on every device and are not saved.
      new_shapes: first step -> the steps whose batch is of a shape that none from there on had; None: all have one.
      writers: further writers beside the console and metrics.jsonl.
    Raises: UserError for a setting that does not fit the devices; Stopped after SIGTERM, with the state saved.
    """
    mesh = make_mesh(**config.mesh_shape)
    use_all(mesh)
    places = row_places(mesh)
    if config.pmap and places is not None:
        raise UserError("pmap: found it with several processes, wanted --no-pmap, which gives the same results")
    if config.pmap:
        update = pmap_update(make_update(DATA), config.device_count)
    else:
        update = jit_update(make_update(None), mesh)
    held = tuple(place(network, mesh) for network in frozen)
    checkpoints = Checkpoints(run.checkpoints, config.keep_last, best_metric, best_mode)
    outputs: list[Writer] = []
    if processes.is_first():
        outputs += [Console(run.stage, show), JsonLines(run.metrics), *writers]
        if config.tensorboard:
            outputs.append(TensorBoard(run.path / "tensorboard"))
    replicated = is_replicated(mesh)

    def figures(state: TrainState) -> Mapping[str, Any]:
        # Each process for itself, where it can: the others would only wait.
        here = near(state, mesh) if replicated and places is not None else state
        return {} if evaluate is None else evaluate(here)

    read = batch_at if places is None else functools.partial(batch_at, places=places)

    def begin() -> TrainState:
        return checkpoints.restore(copied(place(make_state(), mesh), mesh))

    with run.lock() if processes.is_first() else contextlib.nullcontext():
        # A run that goes on refuses a checkpoint that does not fit before it compiles anything.
        fresh = config.steps > 0 and processes.from_first(lambda: not checkpoints.steps())
        state = outline(make_state, mesh) if fresh else begin()

        def prepare(state: TrainState) -> TrainState:
            first = int(state.step)
            for step in (first,) if new_shapes is None else new_shapes(first):
                update.prepare(state, read(step), *held)
            if fresh:
                state = begin()
            if 0 < config.eval_every < config.steps:
                figures(state)
            return state

        state = fit(
            state,
            lambda state, batch: update(state, batch, *held),
            read,
            steps=config.steps,
            writers=Writers(outputs),
            checkpoints=checkpoints,
            save_every=config.save_every,
            log_every=config.log_every,
            evaluate=None if evaluate is None else figures,
            eval_every=config.eval_every,
            flops_per_token=flops_per_token,
            prepare=prepare,
        )
        checkpoints.close()
    processes.barrier("trained")
    # One copy on the first device is what evaluation and the next stage want, where it has room for it.
    return near(state, mesh) if replicated else state


def complete(run: RunFolder, summary: Mapping[str, Any], ledger: Ledger) -> Finished:
    """Marks a run as finished, with its figures and its ledger."""

    def write() -> None:
        ledger.save(run.path / "ledger.json")
        run.finish(summary)

    processes.by_first(write)
    return Finished(run, dict(summary))


def fingerprint_of(records: Iterable[Any]) -> str:
    """SHA-256 of records by content, wherever they came from."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_content(record))
    return digest.hexdigest()


def hold_out(records: Sequence[Any], fraction: float, ledger: Ledger | None = None) -> tuple[list[Any], list[Any]]:
    """(kept, held out): about a fraction of the records, chosen by a hash of their content alone.

    Args:
      ledger: of the training data, in which the rows held out are dropped.
    """
    out = [int.from_bytes(hashlib.sha256(_content(record)).digest()[:6]) < fraction * 2**48 for record in records]
    if ledger is not None:
        for record, held in zip(records, out, strict=True):
            if held:
                ledger.drop(record.where, "held out, to evaluate on")
    return [r for r, o in zip(records, out, strict=True) if not o], [r for r, o in zip(records, out, strict=True) if o]


def longest_row(max_tokens: int | None, buckets: Sequence[int], context: int) -> int:
    """Tokens of the longest row that can be trained on: what the user allows, the largest bucket, the context."""
    allowed = context if max_tokens is None else max_tokens
    return min(allowed, context, max(buckets, default=context))


def refuse_empty(rows: Sized, what: str, ledger: Ledger) -> None:
    """Raises UserError if no row is left to train on, with the commonest reason in the ledger."""
    if len(rows):
        return
    dropped = ledger.reasons().get("dropped", {})
    if not dropped:
        raise UserError(f"data: found no {what}, wanted 1 or more")
    reason, count = next(iter(dropped.items()))
    first = next(decision.where for decision in ledger.decisions if decision.reason == reason)
    # A chat template alone, with its system message, can be longer than the default.
    hint = "; --prompt-length allows more" if what == "prompts" and reason.startswith("longer than") else ""
    raise UserError(
        f"data: none of {ledger.total:,} {what} is left to train on; {count:,} dropped, the first at {first}: "
        f"{reason}{hint}"
    )


def _content(record: Any) -> bytes:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.compare}
    return f"{type(record).__name__} {values}\n".encode("utf-8", "surrogatepass")


def say(text: str) -> None:
    """A line for the person at the console, on standard error like the progress."""
    if processes.is_first():
        rich.console.Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def release(run: RunFolder, params: Params, step: int) -> None:
    """Stores the parameters that later stages take, where they are not those of the last checkpoint."""
    state = TrainState(jnp.asarray(step, jnp.int32), params, {}, jax.random.key(0), {})
    released = Checkpoints(run.path / _RELEASED, keep_last=1)
    if processes.from_first(lambda: step not in released.steps()):
        released.save(step, state, {})


def released_params(run: RunFolder) -> Params:
    """The parameters a run hands on: the released ones, else the last checkpoint's; of a PPO run the policy's.

    Of a run with an adapter they are the adapter: `sources.open_source` knows what it stands beside.
    """
    if (run.path / _RELEASED).exists():
        params = load_params(run.path / _RELEASED)
    else:
        params = run.load_params()
        params = params.get("policy", params)
    return jax.tree.map(jnp.asarray, params)
