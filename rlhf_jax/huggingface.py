"""Models in Hugging Face's folder layout: config.json, *.safetensors with their index, tokenizer, chat template.

Reading goes a tensor at a time straight to its place on the devices; writing goes a shard at a time. What is read and
written back is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params
from rlhf_jax.durable import UNFINISHED, read_json, sync_folder, write_json
from rlhf_jax.errors import UserError
from rlhf_jax.families import FAMILIES, Fields
from rlhf_jax.layouts import BUFFERS, Tensor, join, shape_in_file, split, tensors_of
from rlhf_jax.model import Transformer
from rlhf_jax.model_config import ModelConfig

SHARD_BYTES = 2 * 2**30
OURS = "rlhf_jax"  # the key of config.json under which stands what transformers has no word for
_INSTALL = 'wants the package {}; install it with: pip install "rlhf_jax[hf]"'


class Tensors(Protocol):
    """Named tensors of a file or of a folder of files, read one at a time."""

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> np.ndarray: ...

    def where(self, name: str) -> str:
        """The file that a tensor is in."""
        ...


class SafetensorsFolder:
    """The tensors of a folder's safetensors files. Raises: UserError for a file that is missing or cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            listed = read_json(index)
            files = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{index}: field 'weight_map': found {files!r}, wanted tensor names and their files")
            self._files = {name: folder / file for name, file in files.items()}
        elif single.exists():
            self._files = dict.fromkeys(_opened(single).keys(), single)
        else:
            old = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {old[0]} is a pickle, which runs code: save it as safetensors first" if old else ""
            raise UserError(f"{folder}: found neither model.safetensors nor model.safetensors.index.json{hint}")
        for file in sorted(set(self._files.values())):
            if not file.is_file():
                raise UserError(f"{file}: missing, but named in {index.name}; copy the folder again")
            held = set(_opened(file).keys())
            for name in (name for name, at in self._files.items() if at == file and name not in held):
                raise UserError(f"{file}: tensor {name!r} is missing, but named in {index.name}")

    def names(self) -> list[str]:
        return list(self._files)

    def tensor(self, name: str) -> np.ndarray:
        tensor: np.ndarray = _opened(self._files[name]).get_tensor(name)
        return tensor

    def where(self, name: str) -> str:
        return str(self._files[name])

    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(set(self._files.values()))


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model: where it is, what it is, and its tensors, not yet read.

    where: as errors name it. model_type: key of FAMILIES. origin: what `write_folder` needs to write it as it was.
    model: its vocab_size is the file's until `for_tokenizer` narrows it. scalar: it has one score, no language head.
    """

    where: str
    model_type: str
    model: ModelConfig
    scalar: bool
    origin: dict[str, Any]
    tensors: Tensors

    def for_tokenizer(self, vocab_size: int, pad_id: int) -> Pretrained:
        """The same with logits for the tokenizer's ids alone, and a row for a pad that the model does not know.

        Rows that were added for the hardware thus get no probability.
        Raises: UserError where the tokenizer has ids that the model has no row for.
        """
        rows = self.model.vocab_rows
        if vocab_size > rows:
            raise UserError(
                f"{self.where}: its tokenizer has ids up to {vocab_size - 1}, its embedding has {rows} rows"
            )
        model = dataclasses.replace(self.model, vocab_size=vocab_size, embedding_rows=max(rows, pad_id + 1))
        return dataclasses.replace(self, model=model)

    def load(self, place: Callable[[str, np.ndarray], jax.Array] | None = None, dtype: str = "float32") -> Params:
        """The parameters, nested dicts.

        Args:
          place: (dotted path, host array) -> where and how it lies on the devices; the default device if not given.
            The host holds one tensor at a time.
          dtype: of the parameters.
        Raises: UserError for a tensor that is missing, of another shape, or of no use to the model.
        """
        table = tensors_of(self.model_type, self.model, scalar=self.scalar)
        shapes = parameter_shapes(self.model, self.scalar)
        held = _known_names(self.tensors, self.model_type)
        wanted = {tensor.name for tensor in table}
        missing = [tensor.name for tensor in table if tensor.name not in held]
        if missing:
            raise UserError(
                f"{self.where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(table)} are); "
                f"config.json says {self.model_type} with {self.model.layers} layers"
            )
        # A tied model's file may hold its head a second time, and a language model's is not a reward model's.
        extra = [name for name in held if name not in wanted and not name.startswith(("lm_head.", "embed_out."))]
        if self.scalar:
            extra = [name for name in extra if not name.startswith("score.")]
        if extra:
            raise UserError(
                f"{self.tensors.where(held[extra[0]])}: tensor {extra[0]!r} has no place in the model of config.json "
                f"({len(extra)} such tensors)"
            )
        flat: dict[str, Any] = {}
        for tensor in table:
            value = self.tensors.tensor(held[tensor.name])
            rows = self.origin["rows"]
            expected = shape_in_file(tensor, tuple(shapes[path] for path in tensor.ours), rows)
            if value.shape != expected:
                at = f"{self.tensors.where(held[tensor.name])}: tensor {tensor.name!r}"
                raise UserError(f"{at}: found shape {list(value.shape)}, wanted {list(expected)} by config.json")
            for path, part in zip(tensor.ours, split(tensor, value, self.model), strict=True):
                host = np.ascontiguousarray(part).astype(dtype)
                flat[path] = jnp.asarray(host) if place is None else place(path, host)
        if self.scalar:
            bias = np.full(1, self.origin["config"].get(OURS, {}).get("score_bias", 0.0), dtype)
            flat["score.bias"] = jnp.asarray(bias) if place is None else place("score.bias", bias)
        return nested(flat)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of config.json's content and of every file of tensors."""
        digest = hashlib.sha256(json.dumps(self.origin["config"], sort_keys=True).encode())
        for path in sorted({self.tensors.where(name) for name in self.tensors.names()}):
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def read_folder(folder: str | Path) -> Pretrained:
    """The model in a folder. Raises: UserError for an unknown kind, and for files that are missing, cut or not JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted one with a config.json and safetensors files")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json in it; wanted a model's folder in Hugging Face's layout")
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    tensors = SafetensorsFolder(folder)
    return pretrained(
        str(folder), config, tensors, generation_config=read_json(generation) if generation.exists() else None
    )


def pretrained(
    where: str, config: Any, tensors: Tensors, *, generation_config: dict[str, Any] | None = None
) -> Pretrained:
    """A model from the content of its config.json and its tensors, wherever they come from."""
    at = f"{where}/config.json" if Path(where).is_dir() else where
    if not isinstance(config, dict):
        raise UserError(f"{at}: found {type(config).__name__}, wanted an object")
    fields = Fields(config, at)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        hint = "; its text part has model_type 'gemma3_text'" if model_type == "gemma3" else ""
        raise UserError(
            f"{at}: field 'model_type': found {model_type!r}, wanted one of {', '.join(sorted(FAMILIES))}{hint}"
        )
    if "quantization_config" in fields:
        raise UserError(f"{at}: field 'quantization_config': found one, wanted weights that are not quantised")
    architectures = config.get("architectures") or [FAMILIES[model_type].architecture]
    scalar = architectures == [FAMILIES[model_type].classifier]
    if not scalar and architectures != [FAMILIES[model_type].architecture]:
        family = FAMILIES[model_type]
        raise UserError(
            f"{at}: field 'architectures': found {architectures}, wanted [{family.architecture!r}] or "
            f"[{family.classifier!r}]"
        )
    model = FAMILIES[model_type].read(fields)
    names = tensors.names()
    if not names:
        raise UserError(f"{where}: found no tensor")
    origin = {
        "model_type": model_type,
        "config": config,
        "generation_config": generation_config,
        "dtype": str(tensors.tensor(min(names, key=len)).dtype),
        "rows": model.vocab_rows,
    }
    return Pretrained(where, model_type, model, scalar, origin, tensors)


def write_folder(
    folder: str | Path,
    params: Params,
    model: ModelConfig,
    *,
    origin: Mapping[str, Any] | None = None,
    special_ids: Mapping[str, int] | None = None,
    extra_files: Callable[[Path], None] | None = None,
    dtype: str | None = None,
    extras: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a model so that transformers, vLLM or llama.cpp's converter can read it; returns its architecture.

    Args:
      folder: must not exist, or be empty; it appears when it is whole.
      params: of a language model, or with a `score` head.
      origin: of the published model that these parameters started from; a model of our own gets the first family
        that can hold it.
      special_ids: bos, eos, pad; those that are given stand in config.json.
      extra_files: writes the tokenizer's files into the folder it is given.
      dtype: of the tensors; the origin's, or the parameters' own.
      extras: figures that transformers has no word for, under "rlhf_jax" in config.json.
      shard_bytes: most bytes of a file.
    Raises: UserError for a folder in use, and for a model that no family can hold.
    """
    safetensors = _module("safetensors.numpy")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: found something there, wanted a new or empty folder")
    scalar = "score" in params
    if origin is None:
        params, model, origin = as_published(params, model)
    family = FAMILIES[origin["model_type"]]
    rows = origin["rows"]
    if scalar and special_ids is not None and rows <= special_ids.get("pad", 0) < model.vocab_rows:
        rows = model.vocab_rows  # the class finds a row's last token by its pad, which so needs a row of its own
    shapes = parameter_shapes(model, scalar)
    flat = flattened(params)
    kind = np.dtype(jnp.dtype(dtype or origin["dtype"]))
    table = tensors_of(origin["model_type"], model, scalar=scalar)
    for path in {path for tensor in table for path in tensor.ours} - set(flat):
        raise UserError(f"{folder}: parameter {path!r} is missing, which {family.architecture} has")

    config = dict(origin["config"])
    config["architectures"] = [family.classifier if scalar else family.architecture]
    config["vocab_size"] = rows
    config.pop("torch_dtype", None)
    config["dtype"] = str(kind)
    given = {f"{role}_token_id": id for role, id in (special_ids or {}).items() if id < rows}
    if scalar:
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} | given
        bias = float(np.asarray(flat["score.bias"])[0]) if "score.bias" in flat else 0.0
        extras = {"score_bias": bias, **(extras or {})}
    elif not origin["config"].get("architectures"):
        config |= given
    if extras:
        config[OURS] = {**config.get(OURS, {}), **extras}

    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shards = _shards(table, shapes, rows, kind.itemsize, shard_bytes)
    width = max(len(str(len(shards))), 5)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        values = {}
        for tensor in shard:
            parts = tuple(np.asarray(flat[path]) for path in tensor.ours)
            # safetensors writes the memory behind an array as it lies: a transposed view would come out wrong.
            values[tensor.name] = np.ascontiguousarray(join(tensor, parts, model, rows).astype(kind))
        single = f"model-{number:0{width}}-of-{len(shards):0{width}}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else single
        safetensors.save_file(values, unfinished / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
        total += sum(value.nbytes for value in values.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(unfinished / "model.safetensors.index.json", index)
    write_json(unfinished / "config.json", config)
    generation = origin.get("generation_config")
    if generation is None and not scalar and special_ids is not None:
        generation = given
    if generation is not None and not scalar:
        write_json(unfinished / "generation_config.json", generation)
    if extra_files is not None:
        extra_files(unfinished)
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    sync_folder(folder.parent)
    return str(config["architectures"][0])


def as_published(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig, dict[str, Any]]:
    """A model of our own as one of a published family: (parameters, config, origin).

    Raises: UserError if no family has its parts.
    """
    if model.embedding_scale != 1.0 and not model.post_norms:
        # Only Gemma scales embeddings. For the others: a scaled table on the way in, the plain one on the way out.
        params = dict(params)
        if model.tied:
            params["unembedding"] = np.asarray(params["embedding"]).T
        params["embedding"] = np.asarray(params["embedding"]) * np.float32(model.embedding_scale)
        model = dataclasses.replace(model, tied=False, embedding_scale=1.0)
    plain = dataclasses.replace(
        model,
        vocab_size=model.vocab_rows,
        vocab_multiple=1,
        embedding_rows=None,
        dropout=0.0,
        dtype="float32",
        kv_heads=model.key_heads,
        head_width=model.head_size,
        ffn_width=model.hidden_width,
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
        ffn_bias=model.bias if model.ffn_bias is None else model.ffn_bias,
        query_scale=None,
    )
    for model_type, family in FAMILIES.items():
        config = {"model_type": model_type, **family.write(model)}
        read = family.read(Fields(config, model_type))
        normal = dataclasses.replace(
            read,
            head_width=read.head_size,
            kv_heads=read.key_heads,
            ffn_width=read.hidden_width,
            qkv_bias=read.bias if read.qkv_bias is None else read.qkv_bias,
            ffn_bias=read.bias if read.ffn_bias is None else read.ffn_bias,
            query_scale=None,
        )
        scales = [m.head_size**-0.5 if m.query_scale is None else m.query_scale for m in (model, read)]
        if normal == plain and math.isclose(*scales, rel_tol=1e-6):
            dtype = str(np.asarray(params["embedding"]).dtype)
            return (
                params,
                model,
                {
                    "model_type": model_type,
                    "config": config,
                    "generation_config": None,
                    "dtype": dtype,
                    "rows": model.vocab_rows,
                },
            )
    raise UserError(
        "no published family has this model's parts together: "
        + ", ".join(f"{k}={v}" for k, v in _parts(model).items())
    )


def _parts(model: ModelConfig) -> dict[str, Any]:
    """The settings of a model that are not the default's, sizes left out."""
    sizes = {"vocab_size", "context", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "rope_base"}
    usual = ModelConfig()
    fields = [field.name for field in dataclasses.fields(model) if field.name not in sizes]
    values, defaults = dataclasses.asdict(model), dataclasses.asdict(usual)
    return {name: values[name] for name in fields if values[name] != defaults[name]}


def parameter_shapes(model: ModelConfig, scalar: bool) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter."""
    module = Transformer(model, scalar=scalar)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict of dotted paths."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(tree, ""))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return tree


def _known_names(tensors: Tensors, model_type: str) -> dict[str, str]:
    """Name with the base model's prefix -> name in the file, constants that no model needs left out."""
    prefix = FAMILIES[model_type].prefix
    heads = ("lm_head.", "embed_out.", "score.")
    known = {}
    for name in tensors.names():
        full = name if name.startswith((prefix, *heads)) else prefix + name
        if not full.endswith(BUFFERS):
            known[full] = name
    return known


def _shards(
    table: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], rows: int, itemsize: int, most: int
) -> list[list[Tensor]]:
    """The table in files of at most so many bytes; a larger tensor has a file of its own."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in table:
        size = math.prod(shape_in_file(tensor, tuple(shapes[path] for path in tensor.ours), rows)) * itemsize
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _opened(path: Path) -> Any:
    """A safetensors file, its header read. Raises: UserError for a cut or damaged one."""
    safetensors = _module("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path}: cut or damaged ({size:,} bytes): {error}; copy it again") from None


def _module(name: str) -> Any:
    """An optional package. Raises: UserError saying how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError("reading and writing safetensors " + _INSTALL.format(error.name)) from None
