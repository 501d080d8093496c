"""Best-of-n: sample n answers and keep the one with the highest score."""

from __future__ import annotations

import math

import numpy as np

from rlhf_jax.evaluation.intervals import Floats


def best_of_n(scores_NK: Floats) -> np.ndarray:
    """Index of the best of the K answers to each prompt, the first of equals, [N].

    Raises:
      ValueError: for a score that is not a number.
    """
    if np.isnan(scores_NK).any():
        raise ValueError("scores: expected a score for every answer, got NaN")
    return np.argmax(scores_NK, axis=1)


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n sampling from the model that it samples from, in nats: log n − (n − 1) / n.

    It is exact for scores without ties and an upper bound with ties (Beirami et al. 2024, arXiv:2401.01879).

    Source: Stiennon et al. 2020, appendix G.3 (arXiv:2009.01325).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(samples: int) -> Floats:
    """Probability that the i-th lowest of N scores is the highest among n of them, drawn without replacement.

    w[n − 1, i − 1] = C(i − 1, n − 1) / C(N, n); each row sums to 1.

    Args:
      samples: N.

    Returns:
      [N, N].
    """
    n = np.arange(1, samples + 1, dtype=np.float64)
    weights = np.zeros((samples, samples))
    column = n / samples  # the highest of all is among the n with probability n / N
    for i in range(samples, 0, -1):
        weights[:, i - 1] = column
        # C(i - 2, n - 1) = C(i - 1, n - 1) (i - n) / (i - 1)
        column = column * np.maximum(i - n, 0.0) / max(i - 1, 1)
    return weights


def expected_best_of_n(proxy_PN: Floats, gold_PN: Floats | None = None) -> Floats:
    """Expected gold score of the best of n answers by the proxy, for every n up to N, from one set of N samples.

    It is the mean over all subsets of n samples, which is unbiased, where a best of the first n would waste most of the
    samples. Of equal proxy scores each is the best equally often.

    Args:
      proxy_PN: scores that choose the answer, of N samples to each of P prompts.
      gold_PN: scores that are reported; by default the proxy's own.

    Returns:
      [P, N]: column n − 1 is for best-of-n.

    Source: Nakano et al. 2021, appendix I (arXiv:2112.09332).
    """
    prompts, samples = proxy_PN.shape
    order_PN = np.argsort(proxy_PN, axis=1, kind="stable")
    proxy_PN, gold_PN = (
        np.take_along_axis(np.asarray(x, np.float64), order_PN, axis=1)
        for x in (proxy_PN, proxy_PN if gold_PN is None else gold_PN)
    )
    # Runs of equal proxy scores, each with the mean of its gold scores.
    starts_PN = np.concatenate([np.ones((prompts, 1), bool), np.diff(proxy_PN, axis=1) != 0], axis=1)
    run_PN = np.cumsum(starts_PN.ravel()).reshape(prompts, samples) - 1
    means = np.bincount(run_PN.ravel(), gold_PN.ravel()) / np.bincount(run_PN.ravel())
    return means[run_PN] @ best_of_n_weights(samples).T
