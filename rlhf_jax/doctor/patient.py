"""A model under examination: its parameters, the metrics of its run, and its data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from rlhf_jax import logprobs
from rlhf_jax.arrays import Array, Params
from rlhf_jax.config import PPOConfig, from_plain
from rlhf_jax.data import Ledger, encode_demonstrations, encode_rankings, prompt_ids
from rlhf_jax.doctor.records import Records, records_of
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.huggingface import read_folder
from rlhf_jax.pretrained.source import LANGUAGE, Source, open_source, with_prefix
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.tokenizers.protocol import TextTokenizer

Row = tuple[Sequence[int], Sequence[bool]]
"""Token ids of a row, and its loss mask."""
# Rows on which the network is checked, and their most tokens: enough for a mistake to show, few enough for a minute.
ROWS, LONGEST = 8, 64
# Rows of metrics of which the first and the last quarter are compared, and iterations in which PPO learns.
FEWEST = 20
# Records of which such rows are chosen.
AMONG = 256


class LeftOut(Exception):
    """A check that cannot be made, with the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patient:
    """A model under examination.

    Attributes:
      where: the model as the user named it.
      stage: stage of its run, "published" for a published model.
      tokenizer: its tokenizer.
      scalar: True for a score head instead of a language head.
      run: its run; None for a published model.
      source: the model with its parameters; None if they cannot be read.
      unread: why they cannot be read; "" if they can.
      metrics: rows of metrics.jsonl.
      records: rows of data.
    """

    where: str
    stage: str
    tokenizer: TextTokenizer
    scalar: bool
    run: RunFolder | None
    source: Source | None
    unread: str
    metrics: Sequence[dict[str, Any]]
    records: Records

    @property
    def kinds(self) -> set[str]:
        """The stage, and "language" or "scalar"."""
        return {self.stage, "scalar" if self.scalar else "language"}

    @property
    def opened(self) -> Source:
        """The model.

        Raises:
          LeftOut: if its parameters cannot be read.
        """
        if self.source is None:
            raise LeftOut(self.unread)
        return self.source

    @functools.cached_property
    def network(self) -> Transformer:
        """The network, which computes in float32: a check looks for mistakes, not for rounding."""
        return exact(self.opened)

    @functools.cached_property
    def params(self) -> Params:
        """All parameters."""
        return self.opened.params()

    @functools.cached_property
    def losses(self) -> Callable[..., Array]:
        """losses(params, batch): loss of each token but the first, [B, T-1] in nats, compiled."""
        return jax.jit(lambda params, batch: logprobs.target_losses(self.network, params, batch)[0])

    @functools.cached_property
    def scores(self) -> Callable[..., Array]:
        """scores(params, tokens_BT, mask_BT): score of each row, [B], compiled."""
        return jax.jit(lambda params, *rows: logprobs.last_token_scores(self.network, params, *rows))

    @functools.cached_property
    def ppo(self) -> PPOConfig:
        """Settings of a PPO run; the defaults for other models."""
        if self.run is None or self.stage != "ppo":
            return PPOConfig()
        return from_plain(PPOConfig, self.run.config, where=f"{self.run.path}/config.json: config")

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; {} for a run that is not finished and for a published model."""
        return {} if self.run is None or not self.run.finished else self.run.summary

    @property
    def normalization(self) -> tuple[float, float]:
        """Mean and scale by which a PPO run normalizes scores; 0 and 1 for other models."""
        path = None if self.run is None else self.run.path / "scores.json"
        found = read_json(path) if path is not None and path.exists() else self.summary
        mean, scale = found.get("score_mean"), found.get("score_scale")
        return 0.0 if mean is None else float(mean), 1.0 if scale is None else float(scale)

    @functools.cached_property
    def width(self) -> int:
        """Most tokens of the rows on which the network is checked."""
        return min(LONGEST, self.opened.model.context // 2)

    @functools.cached_property
    def rows(self) -> list[Row]:
        """ROWS rows of (token ids, loss mask) of different lengths, from the data; drawn at random without data."""
        rows = [row for row in self._some_rows() if len(row[0]) > 1]
        short = [row for row in rows if len(row[0]) <= self.width]
        rows = short if len(short) >= ROWS else [(ids[: self.width], mask[: self.width]) for ids, mask in rows]
        if not rows:
            rows = self._random_rows()
        rows = sorted(rows, key=lambda row: len(row[0]))
        chosen = [rows[place] for place in np.linspace(0, len(rows) - 1, ROWS).round().astype(int)]
        if len({len(ids) for ids, _ in chosen}) == 1 and len(chosen[0][0]) > 3:
            # Of one length, none would have padding.
            half = len(chosen[0][0]) // 2
            chosen = [*chosen[: ROWS // 2], *((ids[:half], mask[:half]) for ids, mask in chosen[ROWS // 2 :])]
        return [(ids, mask if any(mask[1:]) else [False] + [True] * (len(ids) - 1)) for ids, mask in chosen]

    def _some_rows(self) -> list[Row]:
        records, tokenizer, context = self.records, self.tokenizer, self.opened.model.context
        if records.demonstrations:
            some = records.demonstrations[:AMONG]
            return list(encode_demonstrations(some, tokenizer, max_tokens=context, ledger=Ledger()).rows)
        if records.comparisons:
            rankings = encode_rankings(records.comparisons[:AMONG], tokenizer, max_tokens=context, ledger=Ledger())
            return [(ids, [False] + [True] * (len(ids) - 1)) for responses, _ in rankings.rows for ids in responses]
        if records.texts:
            texts = [[*tokenizer.start_ids, *tokenizer.encode(text.text[:400])] for text in records.texts[:AMONG]]
        else:
            texts = [list(prompt_ids(prompt, tokenizer)) for prompt in records.prompts[:AMONG]]
        return [(ids, [False] + [True] * (len(ids) - 1)) for ids in texts]

    @functools.cached_property
    def usual_ids(self) -> NDArray[np.int64]:
        """Ids of the tokens that are not special."""
        return np.setdiff1d(np.arange(self.tokenizer.vocab_size), sorted(self.tokenizer.special_ids))

    def _random_rows(self) -> list[Row]:
        draws = np.random.default_rng(0)
        rows = [
            draws.choice(self.usual_ids, length).tolist() for length in np.linspace(4, self.width, ROWS).astype(int)
        ]
        return [(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]


def exact(source: Source) -> Transformer:
    """The network of a source, computing in float32, without dropout."""
    model = dataclasses.replace(source.model, dtype="float32", dropout=0.0)
    return Transformer(model, scalar=source.scalar)


def open_patient(spec: str, *, data: Sequence[str] = (), columns: Sequence[str] = ()) -> Patient:
    """Open a run's folder, finished or not, or a published model, with its data.

    Args:
      spec: a run's folder, or a published model in the forms of `rlhf_jax.load`.
      data: files of data, in place of those that the run was trained on.
      columns: fields of these files under other names.

    Raises:
      UserError: if there is no such model, if its files are damaged, or for files of data that cannot be read.
    """
    spec = with_prefix(spec)
    prefix, _, path = spec.partition(":")
    if prefix in ("hf", "gguf", "pypi", "peft") and path:
        scalar = prefix == "hf" and read_folder(Path(path)).scalar
        published = open_source(spec, stages=("reward",) if scalar else LANGUAGE)
        records = records_of(None, published.tokenizer, data, columns, scalar=scalar)
        return Patient(spec, "published", published.tokenizer, scalar, None, published, "", (), records)
    run = RunFolder.open(spec, stages=(*LANGUAGE, "reward"))
    scalar, unread = run.stage == "reward", ""
    source: Source | None = None
    try:
        source = open_source(spec, stages=(run.stage,))
        # Read here, so that a run without a checkpoint is one without a model and not an error in each check.
        source.own()
    except UserError as error:
        source, unread = None, str(error) if run.finished else f"the run is not finished: {error}"
    records = records_of(run, run.tokenizer, data, columns, scalar=scalar)
    return Patient(spec, run.stage, run.tokenizer, scalar, run, source, unread, read_rows(run.metrics), records)
