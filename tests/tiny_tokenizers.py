"""Tokenizers of the published kinds, trained here in a moment, and chat templates like those that models come with."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlhf_jax.tokenizers import merges
from rlhf_jax.tokenizers.huggingface import HuggingFaceTokenizer

CORPUS = [
    "The cat sat on the mat, and the other cat didn't. It's the 1234th time we've said I'LL.\n\n\tif x == 10:\r\n  y\n",
    "naïve café — 你好世界 0123 العربية हिन्दी テキスト 🙂👩‍👩‍👧 e\u0301 ½ ٣٤ ǅ WORD Word word    //\n!!!\n",
    "<|im_start|>user\n\n<|start_header_id|> [INST] \t\t\tz\t\t\tz <start_of_turn>model </s> <|endoftext|> <think>\n",
]
SPECIAL = [
    *("<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
BYTE_LEVEL = ("gpt2", "digits", "digit runs", "llama3", "qwen2", "o200k", "uncut")
SENTENCEPIECE = ("llama2", "metaspace", "gemma")


@functools.cache
def byte_level(kind: str, size: int = 700, start: str = "", ignore_merges: bool = False) -> str:
    """tokenizer.json of a byte-level BPE; start: the special token that it puts before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "digits", "digit runs"))
    if kind.startswith("digit"):
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=kind == "digits"), level])
    elif kind not in ("gpt2", "uncut"):
        pattern = {"llama3": merges.LLAMA3, "qwen2": merges.QWEN2, "o200k": merges.O200K}.get(kind, kind)
        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    tokenizer.pre_tokenizer = level
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    # Plain added tokens, as Qwen3 and Pythia have them: one looked for in the text as it is, others once composed.
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    "), AddedToken("  ")])
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return tokenizer.to_str()


@functools.cache
def sentencepiece(kind: str) -> str:
    """tokenizer.json of a SentencePiece BPE with a token for each byte, bos before a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [(left, right) for left, right in model["merges"]]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ["<unk>", *SPECIAL]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer.to_str()


def content_of(kind: str, **settings: Any) -> dict[str, Any]:
    return json.loads(sentencepiece(kind) if kind in SENTENCEPIECE else byte_level(kind, **settings))


def load(kind: str, config: dict[str, Any] | None = None, **settings: Any) -> HuggingFaceTokenizer:
    """The tokenizer as ours. config: tokenizer_config.json."""
    config = {"eos_token": "<|endoftext|>"} if config is None else config
    return HuggingFaceTokenizer.from_content(content_of(kind, **settings), config, rows=2000, name=kind)


def package(content: dict[str, Any]) -> Tokenizer:
    """The package's own tokenizer, to which the texts of special tokens are plain text."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


_PARTS = [
    *SPECIAL,
    *"<think>¦<|im_¦_end|>¦\r\n¦\n\n\n¦\t¦\t\t\t5¦   ¦         ¦\u3000¦\u2028¦\u0085¦\x1c¦\0¦ 's¦  12¦1234567".split(
        "¦"
    ),
    *"'LL¦'ſ¦don't¦'Re¦٣٤٥¦½²¦\U00011de1¦\U00016ff5¦7\U00011de1 ¦e\u0301¦a\u0323\u0307¦\u0344¦\u1e9b\u0323".split("¦"),
    *"क\u093c¦가¦a\u0898\u0301¦\U00011935\U00011930¦ǅ¦İ¦ﷺ¦ word¦Word¦WORDS¦你好¦テスト¦👩‍👩‍👧¦\u200d¦\ufeff¦▁".split(
        "¦"
    ),
    *"\ud7ff¦\U0010ffff¦...¦!!\n¦//\n¦a/b\r\n¦def f(x):\n        return x".split("¦"),
]


def strings(count: int, seed: int = 0) -> Iterator[str]:
    """Random strings of all that tokenizers trip over."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 9)):
            start = rng.randrange(60)
            any_character = chr(
                rng.choice([rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            )
            parts.append(rng.choice([rng.choice(_PARTS), any_character, rng.choice(CORPUS)[start : start + 12]]))
        yield "".join(parts)


# Each says by {% generation %} what the assistant wrote; `unmarked` takes that out.
CHATML = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\n' }}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ '<start_of_turn>user\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Like Qwen3's: only the last answer is shown with its thoughts.
THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% set parts = message.content.split('</think>') %}{% if loop.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].strip() }}{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With tools, in the manner of Hermes and Qwen 2.5: listed in the system message, calls and results between tags.
TOOLS_CHATML = """{%- set first = messages[0].content if messages[0].role == 'system' else 'Help.' %}
{{- '<|im_start|>system\n' + first }}
{%- if tools %}
    {{- '\n\nYou may call these, each described in <tools>:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{% endfor %}
    {{- '\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}' }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not loop.first or message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# With tools, in the manner of Llama 3.1: described in the first question, one call a turn, results as JSON.
TOOLS_LLAMA = """{{- bos_token }}
{%- macro turn(role, text) %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text + '<|eot_id|>' }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'user' and tools and not messages[:loop.index0] | selectattr('role', 'eq', 'user') | list %}
        {%- set listed %}
            {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{% endfor %}
        {%- endset %}
        {{- turn('user', 'Answer with a call of one of these as JSON.\n\n' + listed + message.content | trim) }}
    {%- elif message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('only one call a turn') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- turn('assistant', '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}') }}
    {%- elif message.role == 'tool' %}
        {{- turn('ipython', message.content | tojson) }}
    {%- else %}
        {{- turn(message.role, message.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def unmarked(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation %\}", "", template)
