"""The toy languages: a model of a few thousand parameters learns, in seconds, which of two languages it is in."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.data import batch_at, pack_text
from rlhf_jax.model import Transformer
from rlhf_jax.optim import make_optimizer, new_state
from rlhf_jax.parallel.mesh import jit_update, make_mesh, place
from rlhf_jax.stages import pretrain
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.random_params import initialized

pytestmark = pytest.mark.core

LINES = ("0101", "010101", "01010101", "0011", "00110011", "001100110011")
STEPS = 120


@pytest.fixture(scope="module")
def trained() -> tuple:
    """(tokenizer, log-probabilities of what follows each token of a row) of a model pretrained on the lines."""
    tokenizer = Tokenizer.bytes()
    rows = pack_text(
        [tokenizer.encode(line) for line in LINES], length=31, start_ids=[tokenizer.bos_id], eos_id=tokenizer.eos_id
    )
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context=32, width=32, layers=2, heads=2)
    model, mesh = Transformer(config), make_mesh(1)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), STEPS)
    params = initialized(model, jax.random.key(0))
    state = place(new_state(params, jax.jit(optimizer.init)(params), 0), mesh)
    step = jit_update(pretrain.make_update(model, optimizer), mesh)
    for number in range(STEPS):
        state, _ = step(state, batch_at(rows, batch_size=len(rows), seed=0, step=number))
    forward = jax.jit(lambda params, tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)))
    return tokenizer, functools.partial(forward, state.params)


def probability(trained: tuple, start: str, continuation: str, *, ending: bool = True) -> float:
    """p(continuation | start); without `ending`, given that the line goes on where `start` ends."""
    tokenizer, forward = trained
    before = [tokenizer.bos_id, *tokenizer.encode(start)]
    ids = before + tokenizer.encode(continuation)
    row = np.full((1, 32), tokenizer.pad_id, np.int32)
    row[0, : len(ids)] = ids
    logp = np.asarray(forward(row))[0]
    total = sum(logp[at - 1, ids[at]] for at in range(len(before), len(ids)))
    end = np.exp(logp[len(before) - 1, tokenizer.eos_id])
    return float(np.exp(total) / (1 if ending else 1 - end))


def test_after_01_it_goes_on_with_01(trained: tuple) -> None:
    assert probability(trained, "01", "01") >= 0.95


def test_after_0011_where_it_goes_on_with_0011(trained: tuple) -> None:
    assert probability(trained, "0011", "0011", ending=False) >= 0.95
    assert probability(trained, "00110011", "0011", ending=False) >= 0.95


def test_it_ends_as_often_as_the_lines_do(trained: tuple) -> None:
    # One of three lines ends at each: the model has learnt the frequencies, and not by heart one continuation.
    for start in ("0101", "0011"):
        assert 0.2 < 1 - probability(trained, start, "0") < 0.47
    assert probability(trained, "", "0") >= 0.95
