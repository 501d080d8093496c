"""Sampled responses of a model and their statistics: win rates, distinct answers, KL to a reference."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Array, Params
from rlhf_jax.data.batches import PromptRows
from rlhf_jax.evaluation.preferences import outcomes
from rlhf_jax.generate import generate
from rlhf_jax.logprobs import response_logits
from rlhf_jax.losses import next_token_loss
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.processes import fetch


def sample_responses(
    model: Transformer,
    params: Params,
    prompts: PromptRows,
    key: Array,
    *,
    samples: int = 1,
    batch_size: int = 256,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    slots: int = 0,
) -> list[list[list[int]]]:
    """Sample `samples` responses to each prompt, as token ids that include the EOS of a finished response.

    Args:
      model: network.
      params: parameters.
      prompts: N prompts.
      key: typed; each batch folds its number in.
      samples: responses per prompt.
      batch_size: rows sampled at once; the last batch is padded to it, so that one program serves all.
      max_new_tokens: maximum length of a response.
      eos_id: id of EOS, or a tuple of ids that end a response.
      pad_id: id of the pad token.
      temperature: of sampling.
      slots: rows computed at a time in continuous batching, as for `generate`; 0 for all.

    Returns:
      Token ids of each response of each prompt.
    """
    # If batches consist of whole prompts, each prompt is prefilled once for all its samples.
    together = 1 if batch_size % samples or slots % (4 * samples) else samples
    rows = np.repeat(np.arange(len(prompts)), samples)
    flat: list[list[int]] = []
    for number, start in enumerate(range(0, len(rows), batch_size)):
        batch = prompts.batch(rows[np.arange(start, start + batch_size, together) % len(rows)])
        out = generate(
            model,
            params,
            batch.tokens_BP,
            batch.mask_BP,
            jax.random.fold_in(key, number),
            max_new_tokens=max_new_tokens,
            stop_ids=eos_id if isinstance(eos_id, tuple) else (eos_id,),
            pad_id=pad_id,
            temperature=temperature,
            slots=slots,
            samples=together,
        )
        tokens, mask = fetch(out.tokens), fetch(out.mask)
        flat += [tokens[i][mask[i]].tolist() for i in range(min(batch_size, len(rows) - start))]
    return [flat[i * samples : (i + 1) * samples] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("model", "length", "temperature"))
def _response_logp(
    model: Transformer, params: Params, tokens_BT: Array, mask_BT: Array, *, length: int, temperature: float
) -> Array:
    logits = response_logits(model, params, tokens_BT, mask_BT, response_length=length, temperature=temperature)
    logp = -next_token_loss(logits, tokens_BT[:, -length:])
    return jnp.sum(jnp.where(mask_BT[:, -length:], logp, 0.0), axis=1)


def sequence_kl(
    model: Transformer,
    params: Params,
    reference: Params,
    prompts: PromptRows,
    responses: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
) -> np.ndarray:
    """k1 estimate of KL(π, π_ref) of each response: Σ_t log π(a_t) - log π_ref(a_t).

    Args:
      model: network.
      params: parameters of π.
      reference: parameters of π_ref.
      prompts: N prompts.
      responses: one per prompt, sampled from `params` at this temperature.
      max_new_tokens: maximum length of a response.
      temperature: of sampling.
      batch_size: rows per forward pass.

    Returns:
      The estimates in nats, [N].
    """
    out = np.zeros(len(prompts))
    for start in range(0, len(prompts), batch_size):
        indices = np.arange(start, start + batch_size) % len(prompts)
        batch = prompts.batch(indices)
        tokens = np.full((batch_size, max_new_tokens), prompts.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for place, index in enumerate(indices.tolist()):
            tokens[place, : len(responses[index])] = responses[index]
            mask[place, : len(responses[index])] = True
        whole = (np.concatenate([batch.tokens_BP, tokens], axis=1), np.concatenate([batch.mask_BP, mask], axis=1))
        logp, ref_logp = (
            _response_logp(model, network, *whole, length=max_new_tokens, temperature=temperature)
            for network in (params, reference)
        )
        count = min(batch_size, len(prompts) - start)
        out[start : start + count] = np.asarray(logp - ref_logp)[:count]
    return out


def win_rate(scores: np.ndarray, other: np.ndarray) -> tuple[float, list[float]]:
    """Win rate of `scores` over `other`, paired by prompt; ties count half.

    The 95% interval is the mean ± 1.96 standard errors of the per-prompt outcomes, clipped to [0, 1]. With several
    answers per prompt, a prompt's outcome is the mean over all pairs of answers.

    Args:
      scores: [N], or [N, K] for K answers per prompt.
      other: [N], or [N, L].

    Returns:
      (win rate, [low, high]).
    """
    of_prompt = outcomes(scores, other).mean(axis=1)
    rate = float(of_prompt.mean())
    margin = 1.96 * float(of_prompt.std(ddof=1)) / math.sqrt(len(of_prompt))
    return rate, [max(rate - margin, 0.0), min(rate + margin, 1.0)]


def distinct_share(texts: Sequence[str]) -> float:
    """Share of answers that occur only once."""
    counts = Counter(texts)
    return sum(counts[text] == 1 for text in texts) / len(texts)
