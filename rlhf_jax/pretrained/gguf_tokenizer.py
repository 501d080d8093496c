"""Conversion of a GGUF file's tokenizer to Hugging Face's tokenizer.json: byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.gguf_file import GgufFields
from rlhf_jax.tokenizers.merges import O200K

# Token types of the specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
END_TOKENS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The pre-tokenizer that a value of tokenizer.ggml.pre names; each of its patterns cuts what the last left."""

    patterns: tuple[str, ...] = ()  # none for GPT-2's, which ByteLevel has built in
    digits: bool = False  # split digits into single pieces
    nfc: bool = False  # normalise to Unicode NFC first; the file does not say so, only the model's tokenizer.json
    whole: bool = False  # a piece that is a token skips the merges
    bos: bool = False  # add BOS where the file has no add_bos_token


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"


def _words(digits: str, word: str = _LETTERS, end: str = r"[\r\n]*", letters: str = r"\p{L}") -> str:
    """Pre-tokenizer pattern like cl100k's: words with one leading character, digits, punctuation, white space.

    Args:
      digits: pattern of a piece of digits.
      word: of a word.
      end: of what ends a piece of punctuation.
      letters: characters that are not punctuation, besides digits.
    """
    return rf"{word}|{digits}| ?[^\s{letters}\p{{N}}]+{end}|\s*[\r\n]+|\s+(?!\S)|\s+"


# Words split at capitals, as in o200k and Mistral's Tekken.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BY_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_WITH_MARKS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+"
_ONE_DIGIT = _words(r"\p{N}")
_GPT2 = _Cut()
_DIGITS = _Cut(digits=True)
_LLAMA3 = _Cut((_words(r"\p{N}{1,3}"),))
_LLAMA3_WHOLE = dataclasses.replace(_LLAMA3, whole=True, bos=True)
_QWEN2 = _Cut((_ONE_DIGIT,), nfc=True)
_O200K = _Cut((O200K,))
# As in BLOOM: runs of anything but white space, brackets, bars and the full stops and commas of several scripts.
_RUNS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CHINESE_JAPANESE = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = _Cut(
    (
        r"\p{N}{1,3}",
        _CHINESE_JAPANESE,
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_BAILING = _Cut(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)
# Values of tokenizer.ggml.pre. Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models, from whose
# patterns llama.cpp's differ for a few characters.
CUTS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "exaone4", "gigachat", "a.x-4.0", "mellum", "modern-bert"), _GPT2),
    **dict.fromkeys(("jais", "trillion", "granite-docling", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), _GPT2),
    **dict.fromkeys(("mpt", "olmo"), _Cut(nfc=True)),  # the tokenizer of GPT-NeoX and Pythia
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    "command-r": _Cut(digits=True, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3_WHOLE),
    **dict.fromkeys(("lfm2", "jina-v5-nano"), _LLAMA3_WHOLE),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _LLAMA3),
    "minicpm5": _Cut((r"\p{N}{1,3}", _words(r"\p{N}+")), whole=True),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("megrez", "kormo", "f2llmv2", "hunyuan", "solar-open", "grok-2"), _Cut((_ONE_DIGIT,))),
    "qwen35": _Cut((_words(r"\p{N}", _WITH_MARKS, letters=r"\p{L}\p{M}"),), nfc=True),
    "seed-coder": _Cut((_words(r"\p{N}", end=""),)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "tekken": _Cut((_words(r"\p{N}", _BY_CASE, r"[\r\n/]*"),), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _O200K),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "deepseek-coder": _Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _Cut((_RUNS,))),
    "viking": _Cut((_RUNS, r"\p{N}")),
}


def token_id(fields: GgufFields, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    found = fields.values.get(key, -1)
    if found in (-1, 2**32 - 1):  # llama.cpp's value for "none", which may be stored without its sign
        return None
    if type(found) is not int or not 0 <= found < len(fields.texts("tokenizer.ggml.tokens")):
        raise fields.wrong(key, "the id of a token")
    return found


def tokenizer_of(fields: GgufFields) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build tokenizer.json and tokenizer_config.json.

    Tokens of type unused (the converter's padding) have no entry in either, so that no text encodes to them.

    Raises:
      UserError: for a tokenizer that cannot be rebuilt exactly.
    """
    tokens = fields.texts("tokenizer.ggml.tokens")
    types = [int(kind) for kind in fields.reals("tokenizer.ggml.token_type")]
    if len(types) != len(tokens):
        raise fields.wrong("tokenizer.ggml.token_type", f"one type for each of {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    for at, (token, kind) in enumerate(zip(tokens, types)):
        if kind != _UNUSED and vocab.setdefault(token, at) != at:
            raise UserError(f"{fields.path}: tokenizer.ggml.tokens: ids {vocab[token]} and {at} are both {token!r}")
    model = fields.text("tokenizer.ggml.model")
    if model == "gpt2":
        parts, add_bos = _byte_level(fields, vocab)
    elif model == "llama":
        parts, add_bos = _sentencepiece(fields, vocab, types), True
    else:
        raise fields.wrong("tokenizer.ggml.model", "'gpt2' (byte-level) or 'llama' (SentencePiece)")

    ids = {name: token_id(fields, key) for name, key in NAMED_TOKENS.items()}
    config: dict[str, Any] = {f"{name}_token": None if id is None else tokens[id] for name, id in ids.items()}
    ends: dict[str, list[tuple[str, int]]] = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        id = ids[name]
        adds = id is not None and fields.flag(f"tokenizer.ggml.add_{name}_token", default)
        ends[name] = [(tokens[id], id)] if id is not None and adds else []
        config[f"add_{name}_token"] = adds
    config["chat_template"] = fields.text("tokenizer.chat_template") if fields.has("tokenizer.chat_template") else None
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}

    added = [
        {"id": id, "content": tokens[id], "special": kind != _USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _template(ends["bos"], ends["eos"]),
        **parts,
    }, config


def _template(first: Sequence[tuple[str, int]], last: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor that adds special tokens around a text (around both texts of a pair), None for no tokens."""
    if not first and not last:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": token, "type_id": number}} for token, _ in ends] for ends in (first, last)]
        return [*special[0], {"Sequence": {"id": name, "type_id": number}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in (*first, *last)},
    }


def _byte_level(fields: GgufFields, vocab: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """Parts of tokenizer.json for byte-level BPE, whose merges the file has, and the default of add_bos_token."""
    key = "tokenizer.ggml.pre"
    # Files from before May 2024 lack the key; only for GPT-2 is the pre-tokenizer certain without it.
    cut = CUTS.get(fields.text(key, "gpt-2" if fields.architecture == "gpt2" else None))
    if cut is None:
        raise fields.wrong(key, f"one of {', '.join(CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in fields.texts("tokenizer.ggml.merges")]
    for index, merge in enumerate(merges):
        if len(merge) != 2 or any(token not in vocab for token in (*merge, "".join(merge))):
            raise UserError(f"{fields.path}: tokenizer.ggml.merges[{index}]: {' '.join(merge)!r} joins no two tokens")
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = not cut.patterns
    before: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
    for pattern in cut.patterns:
        before.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    return {
        "normalizer": {"type": "NFC"} if cut.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, byte_level]} if before else byte_level,
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(vocab, merges, ignore_merges=cut.whole),
    }, cut.bos


def _sentencepiece(fields: GgufFields, vocab: dict[str, int], types: list[int]) -> dict[str, Any]:
    """Parts of tokenizer.json for SentencePiece BPE, with merges in the order of the scores.

    SentencePiece joins the pair whose token has the highest score. A space is added before the text and after each
    special token, as in llama.cpp.

    Raises:
      UserError: if no order of merges gives the same result.
    """
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if fields.has(key) and fields.values[key] is not False:
            raise fields.wrong(key, "none (such a normalisation is not supported)")
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    tokens = fields.texts("tokenizer.ggml.tokens")
    scores = fields.reals("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise fields.wrong("tokenizer.ggml.scores", f"one score for each of {len(tokens)} tokens")
    bytes_found = sum(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if bytes_found not in (0, 256):
        raise UserError(
            f"{fields.path}: tokenizer.ggml.tokens: expected all 256 byte tokens or none, got {bytes_found}"
        )
    for id, (token, kind) in enumerate(zip(tokens, types)):
        # tokenizers matches these before the leading space is added, SentencePiece after it.
        if prefix and kind == _USER_DEFINED and (" " in token or _SPACE in token):
            raise UserError(f"{fields.path}: tokenizer.ggml.tokens[{id}]: user-defined {token!r} with a space in it")

    normal = {token: id for token, id in vocab.items() if types[id] == _NORMAL}
    vocab = dict(vocab)
    for token in [token for token in normal if len(token) > 1]:
        for character in token:
            if character in vocab:
                continue
            if not character.isascii() or not bytes_found:
                raise UserError(
                    f"{fields.path}: tokenizer.ggml.tokens: {token!r} contains {character!r}, which is not a token"
                )
            # SentencePiece also joins characters that are not tokens; alone, an ASCII one falls back to this byte.
            normal[character] = vocab[character] = vocab[f"<0x{ord(character):02X}>"]
    merges = _merges(fields, normal, scores)
    unknown = [tokens[id] for id, kind in enumerate(types) if kind == _UNKNOWN]
    named = token_id(fields, "unknown")
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, from_space]}
        if prefix
        else from_space,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            merges,
            unk_token=tokens[named] if named is not None else (unknown[0] if unknown else None),
            fuse_unk=True,
            byte_fallback=bytes_found == 256,
        ),
    }


def _merges(fields: GgufFields, normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All merges that make a token of two parts, by descending score, then longer left part first.

    Where two tokens share a score, SentencePiece joins the leftmost pair, which an order of merges cannot express.
    The runs of spaces of Llama and Mistral share a score; for such runs of one character, both rules are compared.

    Raises:
      UserError: if tokens share a score and the two rules could differ.
    """
    ways = []
    by_score: dict[float, dict[str, None]] = {}
    for token, id in normal.items():
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                ways.append((-scores[id], -cut, cut - len(token), token[:cut], token[cut:]))
                by_score.setdefault(scores[id], {})[token] = None
    runs: dict[str, dict[int, float]] = {}
    for score, tied in by_score.items():
        for token in tied:
            if len(set(token)) == 1:
                runs.setdefault(token[0], {})[len(token)] = score
    shared = {score: tied for score, tied in by_score.items() if len(tied) > 1}
    harmless = {token[0] for tied in shared.values() for token in tied if len(set(token)) == 1}
    harmless = {character for character in harmless if _joined_alike(runs[character])}
    for score, tied in shared.items():
        for token in tied:
            if len(set(token)) > 1 or token[0] not in harmless:
                raise UserError(
                    f"{fields.path}: tokenizer.ggml.scores: {len(tied)} tokens share {score}, {token!r} among them, so"
                    " the order of the merges cannot be rebuilt; use the tokenizer.json of the original model"
                )
    ways.sort(key=lambda way: way[:3])
    return [(left, right) for *_, left, right in ways]


def _joined_alike(runs: dict[int, float]) -> bool:
    """True if joining runs of one character by score (leftmost first) and by the order of `_merges` agree.

    Lengths up to three times the longest run are tried; beyond that the joins repeat.

    Args:
      runs: length of each run that is a token -> its score.
    """
    longest = max(runs)
    if longest > 64:
        return False  # comparing would take too long, and no known tokenizer has such a token

    def joined(length: int, parts: bool) -> list[int]:
        pieces = [1] * length
        while True:
            pairs = [(a, b, -at) for at, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in runs]
            if not pairs:
                return pieces
            a, b, at = max(pairs, key=lambda pair: (runs[pair[0] + pair[1]], *(pair if parts else pair[2:])))
            pieces[-at : 2 - at] = [a + b]

    return all(joined(length, True) == joined(length, False) for length in range(2, 3 * longest))


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]], **settings: Any) -> dict[str, Any]:
    nothing = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **nothing, **flags, **settings, "vocab": vocab, "merges": [list(merge) for merge in merges]}
