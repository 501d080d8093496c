"""LoRA adapters in PEFT's folder layout: adapter_config.json and adapter_model.safetensors.

Where a published model has one fused matrix for queries, keys and values, PEFT has one adapter for it. The three
adapters of this library are stacked into that one (A on top of A, B block-diagonal, at three times the rank) and split
again on reading, without rounding.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, flattened, nested
from rlhf_jax.config import PLACES, LoraConfig, ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.files import UNFINISHED, sync_folder
from rlhf_jax.pretrained.config_fields import Fields
from rlhf_jax.pretrained.families import FAMILIES
from rlhf_jax.pretrained.huggingface import parameter_shapes
from rlhf_jax.pretrained.safetensors_files import open_file, write_file
from rlhf_jax.pretrained.weights import Tensor, join, shape_in_file, split, tensors_of
from rlhf_jax.runs.atomic_files import read_json, write_json
from rlhf_jax.runs.checkpoint import first_bad

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS = "rlhf_jax.json"
"""File for the score's bias, which PEFT has no key for; an extra key in PEFT's file makes it warn, or old ones fail."""

_BASE = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_SCORE = re.compile(r"score(\.modules_to_save)?(\.default)?\.weight")
# Fields that are read here, and fields that do not affect what the adapter computes.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
_NO_MATTER = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_NO_MATTER |= {"lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules", "modules_to_save"}
_NO_MATTER |= {"layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "qalora_group_size"}
_NO_MATTER |= {"eva_config", "ensure_weight_tying"}
# The other initialisations subtract something from the base's weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def write_adapter(
    folder: str | Path,
    adapter: Params,
    lora: LoraConfig,
    model: ModelConfig,
    model_type: str,
    *,
    base: str,
    dtype: str = "float32",
    extra_files: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter that PEFT can apply to the published model `base`.

    Args:
      folder: must not exist, or be empty; it appears once it is complete.
      adapter: lora_a and lora_b, whose rank may differ between modules, and a score head for a reward model.
      lora: settings of the adapter.
      model: configuration of the base.
      model_type: key of FAMILIES.
      base: folder or name of the published model.
      dtype: of the tensors.
      extra_files: writes the tokenizer's files into the folder it is given.

    Raises:
      UserError: for a folder in use, and for parameters that PEFT has no place for.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder, got an existing file or a folder with files")
    flat = {path: np.asarray(leaf) for path, leaf in flattened(adapter).items()}
    sites, scalar = _sites(model_type, model), "score" in adapter
    tensors, ranks, bias = _to_peft(flat, sites, model)
    if flat:
        raise UserError(
            f"{folder}: parameter {min(flat)!r} has no place in an adapter of a {model_type}; expected lora_a and "
            "lora_b of its kernels, and score"
        )
    if not ranks or not lora.rank:
        raise UserError(f"{folder}: expected an adapter of rank 1 or more, got no LoRA parameters")
    kind = np.dtype(jnp.dtype(dtype))
    # safetensors writes an array's buffer and ignores its strides: a transposed view would come out wrong.
    tensors = {_BASE + name: np.ascontiguousarray(value.astype(kind)) for name, value in tensors.items()}
    config = {"base_model_name_or_path": base, **_settings(ranks, lora, sites, scalar)}

    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_file(unfinished / TENSORS, tensors)
    write_json(unfinished / CONFIG, config)
    if bias:
        write_json(unfinished / OURS, {"score_bias": bias})
    if extra_files is not None:
        extra_files(unfinished)
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    sync_folder(folder.parent)


def read_adapter(folder: str | Path, model: ModelConfig, model_type: str) -> tuple[Params, LoraConfig]:
    """Read an adapter in float32, and its settings.

    The tensors decide which modules have an adapter, not the config. A scale that differs between modules is folded
    into lora_b. Blocks are separate; for a model with stacked blocks, all blocks get the same modules and ranks, padded
    with zeros.

    Args:
      folder: with PEFT's two files.
      model: configuration of the base.
      model_type: key of FAMILIES.

    Raises:
      UserError: for files that are missing or truncated, for methods other than LoRA, and for tensors that have no
        partner, another shape, or no place in the model.
    """
    folder = Path(folder)
    fields = _config(folder)
    sites = _sites(model_type, model)
    _refuse_other_methods(fields, sites)
    rank, alpha, rooted = fields.integer("r"), fields.number("lora_alpha"), fields.flag("use_rslora", False)
    if alpha <= 0:
        raise fields.wrong("lora_alpha", "more than 0")
    ranks, alphas = fields.inner("rank_pattern"), fields.inner("alpha_pattern")
    # rsLoRA scales by alpha / sqrt(r), which is LoRA's alpha / r with alpha sqrt(r) for alpha.
    lora = LoraConfig(rank=rank, alpha=alpha * math.sqrt(rank) if rooted else alpha)
    pairs, score = _sorted_out(folder / TENSORS, sites, model_type, model)

    flat: dict[str, np.ndarray] = {}
    for name, halves in pairs.items():
        site, own = sites[name], ranks.integer(_pattern_of(ranks, name), rank)
        for half, expected in (("A", (own, site.inside)), ("B", (site.outside, own))):
            _check_shape(folder / TENSORS, *halves[half], expected)
        a, b = (halves[half][1].astype(np.float32) for half in "AB")
        scale = alphas.number(_pattern_of(alphas, name), alpha) / (math.sqrt(own) if rooted else own)
        b = b * np.float32(scale / lora.scale)  # exactly 1 where the module uses the default scale
        for place, (a_place, b_place) in _cut(site, a, b, rank, model):
            flat |= {f"{place}.lora_a": a_place, f"{place}.lora_b": b_place}
    if model.scan_layers:
        flat = _evened(flat, model.layers)
    found = {path.split(".")[-2] for path in flat}
    if score is not None:
        ours = folder / OURS
        bias = Fields(read_json(ours), str(ours)).number("score_bias", 0.0) if ours.exists() else 0.0
        flat |= {"score.kernel": score.astype(np.float32).T, "score.bias": np.full(1, bias, np.float32)}
    elif fields.values.get("task_type") == "SEQ_CLS":
        raise UserError(
            f"{folder / TENSORS}: tensor '{_BASE}score.weight' is missing, but {CONFIG} has task_type SEQ_CLS"
        )
    adapter = nested({path: jnp.asarray(leaf) for path, leaf in flat.items()})
    return adapter, dataclasses.replace(lora, targets=tuple(place for place in PLACES if place in found))


def base_of(folder: str | Path) -> str:
    """Folder or name of the published model that an adapter belongs to.

    Raises:
      UserError: if the config does not name one.
    """
    fields = _config(Path(folder))
    base = fields.values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise fields.wrong("base_model_name_or_path", "the folder of a published model (or use --base FOLDER)")
    return base


@dataclasses.dataclass(frozen=True)
class _Site:
    """A matrix of the published model that may have an adapter, [outside, inside] in PEFT's terms.

    Attributes:
      tensor: name and layout in the file.
      places: dotted paths of the kernels that it holds.
      in_first: True if the file has it as [inside, outside].
      inside: input features.
      outside: output features.
    """

    tensor: Tensor
    places: tuple[str, ...]
    in_first: bool
    inside: int
    outside: int


def _sites(model_type: str, model: ModelConfig) -> dict[str, _Site]:
    """All matrices that may have an adapter, by the name of their module."""
    shapes = parameter_shapes(dataclasses.replace(model, scan_layers=False), False)
    sites = {}
    for tensor in tensors_of(model_type, model, scalar=False):
        if tensor.ours[0].endswith(".kernel"):
            places = tuple(path.removesuffix(".kernel") for path in tensor.ours)
            in_first = tensor.layout in ("same", "gpt2_qkv")
            shape = shape_in_file(tensor, tuple(shapes[path] for path in tensor.ours), 0)
            inside, outside = shape if in_first else shape[::-1]
            sites[tensor.name.removesuffix(".weight")] = _Site(tensor, places, in_first, inside, outside)
    return sites


def _to_peft(
    flat: dict[str, np.ndarray], sites: Mapping[str, _Site], model: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, int], float]:
    """Move the parameters that PEFT has a place for out of `flat`: (tensors, rank of each module, the score's bias)."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, site in sites.items():
        pairs = []
        for place in site.places:
            there = f"{place}.lora_a" in flat and f"{place}.lora_b" in flat
            pairs.append((flat.pop(f"{place}.lora_a"), flat.pop(f"{place}.lora_b")) if there else None)
        if any(pair is not None for pair in pairs):
            a, b = _stacked(site, pairs, model)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            ranks[name] = len(a)
    bias = 0.0
    if "score.kernel" in flat:
        tensors["score.weight"] = flat.pop("score.kernel").T
        bias = float(flat.pop("score.bias", np.zeros(1))[0])
    return tensors, ranks, bias


def _settings(ranks: Mapping[str, int], lora: LoraConfig, sites: Mapping[str, _Site], scalar: bool) -> dict[str, Any]:
    """Content of adapter_config.json, except for the base."""
    patterns = {
        end: rank
        for rank in sorted(set(ranks.values()) - {lora.rank})
        for end in _endings({name for name in ranks if ranks[name] == rank}, ranks)
    }
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "rank_pattern": patterns,
        # PEFT scales each module by its own alpha / r.
        "alpha_pattern": {end: _plain(lora.alpha * rank / lora.rank) for end, rank in patterns.items()},
        "target_modules": _endings(ranks, sites),
        "modules_to_save": ["score"] if scalar else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.in_first for site in sites.values()),
    }


def _stacked(
    site: _Site, pairs: list[tuple[np.ndarray, np.ndarray] | None], model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """A [n r, in] and B [out, n r] of a matrix that holds n kernels, with zeros for kernels without an adapter."""
    count = len(pairs)
    rank = max(pair[0].shape[1] for pair in pairs if pair is not None)
    a = np.zeros((site.inside, count, rank), np.float32)
    parts = [np.zeros((count, rank, site.outside // count), np.float32) for _ in pairs]
    for i, pair in enumerate(pairs):
        if pair is not None:
            own = pair[0].shape[1]
            a[:, i, :own], parts[i][i, :own] = pair
    b = join(site.tensor, tuple(part.reshape(count * rank, -1) for part in parts), model, 0)
    return a.reshape(site.inside, -1).T, b.T if site.in_first else b


def _cut(
    site: _Site, a: np.ndarray, b: np.ndarray, rank: int, model: ModelConfig
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The inverse of `_stacked`; if B is not block-diagonal, all kernels get the whole A.

    Args:
      site: the matrix.
      a: A, [n r, in].
      b: B, [out, n r].
      rank: default rank of the adapter. An all-zero B counts as block-diagonal only at n times this rank.
      model: configuration of the base.
    """
    parts = split(site.tensor, b.T if site.in_first else b, model)
    own, count = len(a), len(parts)
    rows = [slice(i * (own // count), (i + 1) * (own // count)) for i in range(count)]
    inside = sum(np.count_nonzero(part[row]) for part, row in zip(parts, rows, strict=True))
    blocks = own % count == 0 and inside == np.count_nonzero(b) and (inside or own == count * rank)
    for place, part, row in zip(site.places, parts, rows, strict=True):
        if count == 1 or not blocks:
            yield place, (a.T, part)
        # With zeros in both A and B no gradient flows, so this kernel has no adapter.
        elif a[row].any() or part[row].any():
            yield place, (a[row].T, part[row])


def _evened(flat: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Pad with zeros to the same shapes in every block; zeros in both A and B change nothing and get no gradient."""
    most: dict[str, tuple[int, ...]] = {}
    for path, leaf in flat.items():
        inner = path.partition(".")[2]
        most[inner] = tuple(map(max, leaf.shape, most.get(inner, leaf.shape)))
    even = {}
    for inner, shape in most.items():
        for path in (f"block_{i}.{inner}" for i in range(layers)):
            leaf = flat.get(path, np.zeros((0, 0), np.float32))
            even[path] = np.pad(leaf, [(0, wide - own) for wide, own in zip(shape, leaf.shape, strict=True)])
    return even


def _sorted_out(
    path: Path, sites: Mapping[str, _Site], model_type: str, model: ModelConfig
) -> tuple[dict[str, dict[str, tuple[str, np.ndarray]]], np.ndarray | None]:
    """Group a file's tensors: module -> "A" and "B" -> (name in the file, tensor), and the score's weight.

    Raises:
      UserError: for tensors that have no partner or no place in the model.
    """
    prefix = FAMILIES[model_type].prefix
    pairs: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    score = None
    for full, value in _tensors(path).items():
        name = full.removeprefix(_BASE)
        if _SCORE.fullmatch(name):
            _check_shape(path, full, value, (1, model.width))
            score = value
            continue
        match = _NAME.fullmatch(name if name.startswith(prefix) else prefix + name)
        if match is None or match["module"] not in sites:
            known = ", ".join(dict.fromkeys(site.rpartition(".")[2] for site in sites))
            raise UserError(
                f"{path}: tensor {full!r}: expected lora_A and lora_B of {known}, and score, got a tensor that has no "
                f"place in a {model_type} of {model.layers} layers"
            )
        halves = pairs.setdefault(match["module"], {})
        if match["half"] in halves:
            raise UserError(f"{path}: tensor {full!r}: expected it once, got {halves[match['half']][0]!r} too")
        halves[match["half"]] = full, value
    if not pairs:
        raise UserError(f"{path}: expected LoRA tensors, got none")
    for halves in pairs.values():
        if len(halves) < 2:
            ((half, (full, _)),) = halves.items()
            raise UserError(f"{path}: tensor {full!r}: expected its lora_{'B' if half == 'A' else 'A'} too, got none")
    return pairs, score


def _refuse_other_methods(fields: Fields, sites: Mapping[str, _Site]) -> None:
    fields.refuse("bias", unless="none")
    if "init_lora_weights" in fields and fields.values["init_lora_weights"] not in _STARTS:
        raise fields.wrong("init_lora_weights", "true (other values change the base's own weights)")
    for name, value in fields.values.items():
        if name not in _READ | _NO_MATTER and value:
            raise fields.wrong(name, "nothing (only plain LoRA is supported)")
    # Names of the lists of blocks: "layers" in model.layers.0.mlp.up_proj.
    lists = sorted({found[1] for found in (re.search(r"(\w+)\.\d+\.", name) for name in sites) if found})
    pattern = fields.values.get("layers_pattern") or []
    names = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(names, list) or any(name not in lists for name in names):
        raise fields.wrong("layers_pattern", f"nothing or {lists}")


def _pattern_of(patterns: Fields, module: str) -> str:
    """The first pattern that matches the end of a module's name, as in PEFT; the name itself if none does."""
    for pattern in patterns.values:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise UserError(f"{patterns.where}: expected a regular expression, got {pattern!r}: {error}") from None
    return module


def _endings(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest suffixes of the chosen names that no other name has; PEFT matches all modules with a suffix."""
    rest = [f".{name}" for name in every if name not in chosen]
    found: dict[str, None] = {}
    for name in sorted(chosen):
        words = name.split(".")
        ends = [".".join(words[i:]) for i in range(len(words) - 1, -1, -1) if not words[i].isdigit()]
        found[next((end for end in ends if not any(other.endswith(f".{end}") for other in rest)), name)] = None
    return list(found)


def _config(folder: Path) -> Fields:
    """Open the adapter_config.json of a LoRA adapter."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with {CONFIG} and {TENSORS}")
    if not path.exists():
        raise UserError(f"{folder}: no {CONFIG} in it; expected an adapter's folder in PEFT's layout")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, got {type(config).__name__}")
    fields = Fields(config, str(path))
    if config.get("peft_type") != "LORA":
        raise fields.wrong("peft_type", "'LORA'")
    return fields


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        pickles = path.with_suffix(".bin").exists()
        hint = f"; {path.stem}.bin is a pickle, which runs code: save it as safetensors first" if pickles else ""
        raise UserError(f"{path}: no such file{hint}")
    with open_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _check_shape(path: Path, name: str, value: np.ndarray, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise UserError(f"{path}: tensor {name!r}: expected shape {list(expected)}, got {list(value.shape)}")
    if bad := first_bad(value):
        raise UserError(f"{path}: tensor {name!r}: expected finite numbers, got {bad}; copy the file again")


def _plain(number: float) -> float:
    """Whole numbers as int, as in PEFT: 16 instead of 16.0."""
    return int(number) if float(number).is_integer() else number
