"""Lifecycle of a run, from a stage's state and update to a finished folder: devices, resume, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import rich.console

from rlhf_jax.arrays import Params, TrainState
from rlhf_jax.config import ModelConfig, RunConfig, from_plain, to_plain
from rlhf_jax.data.batches import RankingRows
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import processes
from rlhf_jax.parallel.host_step import HostStep, with_host_step
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
from rlhf_jax.runs.checkpoint import Checkpoints, first_bad, load_params
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.locks import hold, lock
from rlhf_jax.runs.loop import Ended, Watch, fit
from rlhf_jax.runs.metrics import Console, JsonLines, TensorBoard, Writer, Writers
from rlhf_jax.runs.sealed import RELEASED, seal_run
from rlhf_jax.runs.weights_and_biases import WeightsAndBiases
from rlhf_jax.tokenizers.protocol import TextTokenizer

C = TypeVar("C", bound=RunConfig)
P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A complete run: its folder, the content of summary.json, and prompts to show it by, held out if any are."""

    run: RunFolder
    summary: dict[str, Any]
    examples: Sequence[Prompt] | RankingRows = ()


def exclusive(run: Callable[Concatenate[C, P], Finished]) -> Callable[Concatenate[C, P], Finished]:
    """Makes run(config, …) hold the lock of the run's folder from its first line to its last.

    Raises:
      UserError: immediately, if another process has locked the folder.
    """

    @functools.wraps(run)
    def locked(config: C, *arguments: P.args, **options: P.kwargs) -> Finished:
        with hold(config.folder) if processes.is_first() else contextlib.nullcontext():
            return run(config, *arguments, **options)

    return locked


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
    """Creates the run folder of a stage, or opens it to resume the run.

    Raises:
      UserError: as `RunFolder.create`, and if the processes of a run have read different inputs.
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
                may_change=config.may_change,
                defaults={field.name: field.default for field in dataclasses.fields(config)},
            )
        )

    processes.by_first(create)
    if created:
        return created[0]
    run = RunFolder.open(config.folder, stages=(stage,))
    for name, got in inputs.items():
        expected = run.inputs.get(name, "nothing")
        if got != expected:
            raise UserError(
                f"inputs.{name}: expected {expected[:12]} as in the first process, got {got[:12]}; all processes of a "
                "run must read the same files"
            )
    return run


def model_of(run: RunFolder) -> ModelConfig:
    """Model config stored in a run folder."""
    return from_plain(ModelConfig, run.model, where=f"{run.path}/config.json: model")


def train(
    run: RunFolder,
    config: RunConfig,
    make_state: Callable[[], TrainState],
    make_update: Callable[[str | None], Update],
    batch_at: Callable[..., Any],
    *,
    frozen: Sequence[Any] = (),
    host_step: HostStep | None = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_first: bool = False,
    flops_per_token: float | None = None,
    show: Sequence[str] = ("loss",),
    new_shapes: Callable[[int], Iterable[int]] | None = None,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
    watch: Watch | None = None,
) -> TrainState:
    """Trains until config.steps, resuming from the run's last checkpoint if there is one.

    Args:
      config: settings, with a number of steps.
      make_state: makes the initial state; called only after compilation, so that the compiler's memory and the
        optimizer state are never held together.
      make_update: axis name (None under jit) -> the stage's pure update(state, batch, *frozen).
      batch_at: step -> its batch; with several processes, called with places=… for this process's rows.
      frozen: networks that the update reads; placed on the mesh and not saved.
      evaluate_first: with config.eval_every, also evaluate the initial state, in a row of step 0.
      host_step: work of the host before the update, on what the devices compute for it; None for none.
      new_shapes: first step -> the steps at which a batch shape occurs for the first time; None if all batches have one
        shape.
      watch: called with the metrics of each step; see `runs.loop.Watch`.

    Returns:
      The final state.

    Raises:
      UserError: for a setting that does not fit the devices.
      Stopped: after SIGTERM, with the state saved.
      Ended: by `watch`, with the newest state from before its reason; the initial one if none is saved.
    """
    steps, eval_every = config.steps, config.eval_every or 0
    if steps is None:
        raise TypeError("config.steps: expected a number, got None; derive it with runs.length.run_length")
    mesh = make_mesh(**config.mesh_shape)
    use_all(mesh)
    places = row_places(mesh)
    if config.pmap and places is not None:
        raise UserError("pmap: expected --no-pmap with several processes, which gives the same results, got --pmap")
    update = pmap_update(make_update(DATA), config.device_count) if config.pmap else jit_update(make_update(None), mesh)
    if host_step is not None:
        update = with_host_step(update, host_step, mesh, pmap=config.pmap)
    held = tuple(place(network, mesh) for network in frozen)
    checkpoints = Checkpoints(run.checkpoints, config.keep_last, best_metric, best_mode)
    writers = Writers(tuple(_writers(run, config, show)) if processes.is_first() else ())
    replicated = is_replicated(mesh)

    def figures(state: TrainState) -> Mapping[str, Any]:
        # With a replicated model each process evaluates its own copy: the others would only wait.
        here = near(state, mesh) if replicated and places is not None else state
        return {} if evaluate is None else evaluate(here)

    read = batch_at if places is None else functools.partial(batch_at, places=places)

    def begin() -> TrainState:
        return checkpoints.restore(copied(place(make_state(), mesh), mesh))

    with lock(run.path) if processes.is_first() else contextlib.nullcontext():
        # A resumed run restores before it compiles, so that a checkpoint that does not match fails early.
        fresh = steps > 0 and processes.from_first(lambda: not checkpoints.steps())
        state = outline(make_state, mesh) if fresh else begin()

        def prepare(state: TrainState) -> TrainState:
            first = int(state.step)
            for step in (first,) if new_shapes is None else new_shapes(first):
                update.prepare(state, read(step), *held)
            if fresh:
                state = begin()
            if 0 < eval_every < steps and not (fresh and evaluate_first):
                figures(state)
            return state

        ended: Ended | None = None
        try:
            state = fit(
                state,
                lambda state, batch: update(state, batch, *held),
                read,
                steps=steps,
                writers=writers,
                checkpoints=checkpoints,
                save_every=config.save_every,
                log_every=config.log_every,
                evaluate=None if evaluate is None else figures,
                eval_every=eval_every,
                evaluate_first=evaluate_first,
                flops_per_token=flops_per_token,
                prepare=prepare,
                watch=watch,
            )
        except Ended as end:
            # Without the frames of the loop, which hold the last state.
            ended = end.with_traceback(None)
        if ended is not None:
            good = processes.from_first(lambda: checkpoints.newest_until(ended.good))
            initial = copied(place(make_state(), mesh), mesh)
            ended.state = initial if good is None else checkpoints.restore(initial, good)
            raise ended
        checkpoints.close()
    processes.barrier("trained")
    # Evaluation and the next stage need only one copy on the first device, if it fits there.
    return near(state, mesh) if replicated else state


def _writers(run: RunFolder, config: RunConfig, show: Sequence[str]) -> Iterator[Writer]:
    """Writers of the metrics to the console, the run's folder and the services that the config names."""
    yield Console(run.stage, show)
    yield JsonLines(run.metrics)
    if config.tensorboard:
        yield TensorBoard(run.path / "tensorboard")
    if config.wandb:
        yield WeightsAndBiases(config.wandb, run.path, run.config)


def complete(
    run: RunFolder,
    summary: Mapping[str, Any],
    examples: Sequence[Prompt] | RankingRows,
    ledger: Ledger,
    **others: Ledger,
) -> Finished:
    """Marks a run as finished, with its summary and ledger, and says the summary's warnings.

    Args:
      examples: prompts to show the run by.
      others: ledgers of data that is not trained on as such, each saved as ledger_NAME.json unless it is empty.
    """

    def write() -> None:
        ledger.save(run.path / "ledger.json")
        for name, other in others.items():
            if other.total:
                other.save(run.path / f"ledger_{name}.json")
        run.finish(summary)

    processes.by_first(write)
    for warning in summary.get("warnings", ()):
        say(f"warning: {warning}")
    return Finished(run, dict(summary), examples)


def fingerprint_of(records: Iterable[Any]) -> str:
    """Hex SHA-256 over the content of the records, regardless of their source."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_content(record))
    return digest.hexdigest()


def longest_row(max_tokens: int | None, buckets: Sequence[int], context: int) -> int:
    """Maximum row length in tokens: the least of the user's limit, the largest bucket and the context."""
    allowed = context if max_tokens is None else max_tokens
    return min(allowed, context, max(buckets, default=context))


def refuse_empty(rows: Sized, what: str, ledger: Ledger, *, field: str = "data", use: str = "train on") -> None:
    """Raises UserError if no row is left to use, with the most common reason in the ledger."""
    if len(rows):
        return
    dropped = ledger.reasons().get("dropped", {})
    if not dropped:
        raise UserError(f"{field}: expected at least 1 of the {what}, got none")
    reason, count = next(iter(dropped.items()))
    first = next(decision.where for decision in ledger.decisions if decision.reason == reason)
    # A chat template with its default system message can exceed the default limit by itself.
    hint = "; --prompt-length allows more" if what == "prompts" and reason.startswith("longer than") else ""
    raise UserError(
        f"{field}: none of {ledger.total:,} {what} is left to {use}; {count:,} dropped, the first at {first}: "
        f"{reason}{hint}"
    )


def refuse_unevaluated(rows: Sized, ledger: Ledger) -> None:
    """Raises UserError if held-out data was given and no row of it is left to evaluate on."""
    if ledger.total:
        refuse_empty(rows, "held-out rows", ledger, field="heldout", use="evaluate on")


def _content(record: Any) -> bytes:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.compare}
    return f"{type(record).__name__} {values}\n".encode("utf-8", "surrogatepass")


def say_data(ledger: Ledger, parameters: int | None = None, **others: Ledger) -> None:
    """Prints the summary of the training data's ledger, and the counts of others that are not empty, by name."""
    say(ledger.summary(parameters))
    for name, other in others.items():
        if other.total:
            say(f"{name}: {other.counts()}")


def say_epochs(rows: Sized, *, batch: int, steps: int, what: str = "rows") -> None:
    """Prints how often a run visits its rows."""
    drawn = steps * batch
    never = f"; {len(rows) - drawn:,} of them are never drawn" if drawn < len(rows) else ""
    epochs = drawn / max(len(rows), 1)
    many = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    say(f"{steps:,} steps of {batch:,} {what} are {many} epochs of {len(rows):,} {what}{never}")


def say_unheld(heldout: Sized) -> None:
    """Prints a warning if rows were to be held out and none is."""
    if not len(heldout):
        say(
            "warning: nothing is held out, as all rows have the same prompt: nothing is evaluated, and no checkpoint "
            "is the best; use --heldout FILES, or --heldout-fraction 0"
        )


def say(text: str) -> None:
    """Prints a line for the user on standard error, where the progress is shown."""
    if processes.is_first():
        rich.console.Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def release(run: RunFolder, params: Params, step: int) -> None:
    """Saves the parameters for later stages, if they differ from those of the last checkpoint."""
    state = TrainState(jnp.asarray(step, jnp.int32), params, {}, jax.random.key(0), {})
    released = Checkpoints(run.path / RELEASED, keep_last=1)
    if processes.from_first(lambda: step not in released.steps()):
        released.save(step, state, {})
    # Also for one that a start saved that was killed before it sealed it.
    processes.by_first(lambda: seal_run(run.path, parts=(RELEASED,)))


def released_params(run: RunFolder) -> Params:
    """Loads a run's final parameters: the released ones, else those of the last checkpoint (PPO: the policy's).

    For a run with an adapter these are the adapter alone: `pretrained.source.open_source` finds its base.

    Raises:
      UserError: for a parameter that is not finite, by its name; a sampler would make text of it without an error.
    """
    if (run.path / RELEASED).exists():
        params = load_params(run.path / RELEASED)
    else:
        params = run.load_params()
        params = params.get("policy", params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if bad := first_bad(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"{run.path}: parameter {name!r}: expected finite numbers, got {bad}; train the model again"
            )
    return jax.tree.map(jnp.asarray, params)
