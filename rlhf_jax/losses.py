"""Losses of the recipe: arrays in, arrays out, float32, unreduced.

They are independent of parameters, model, batch mask and device. Where an input is NaN or infinite, the loss is NaN and
its gradient 0, so that `masked_mean` can drop the slot without a trace, while a slot that is kept still gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.arrays import Array
from rlhf_jax.masked import EXP_LIMIT, at_least_float32, elementwise, same_shape

# exp of it is far enough below the largest float32 to be scaled by β and divided by α.
_SLOPE_LIMIT = 80.0


def next_token_loss(logits: Array, targets: Array) -> Array:
    """Cross-entropy loss of each target: -log softmax(logits)[target].

    Args:
      logits: [..., V], any float dtype; -inf excludes an id.
      targets: [...], integer ids. An id outside [0, V) gives NaN.

    Returns:
      The loss in nats, [...], float32.

    Raises:
      ValueError: if the leading shapes differ.

    Source:
      Ouyang et al. 2022, stages 1 and 2 (arXiv:2203.02155).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"shapes differ: logits {logits.shape} without the last axis, targets {targets.shape}")
    logits, targets = at_least_float32(logits), jnp.asarray(targets)
    if targets.dtype.itemsize < 4:
        # The ids compared with below take this dtype; in uint8 they would wrap around at 256.
        targets = targets.astype(jnp.int32)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # max propagates NaN, so this finds it without another pass over the vocabulary; -inf means that all logits are.
    undefined = ~jnp.isfinite(peak)
    shifted = jnp.where(undefined, 0.0, logits - peak)
    ids = jax.lax.broadcasted_iota(targets.dtype, shifted.shape, shifted.ndim - 1)
    # A masked sum instead of a gather: its gradient needs no scatter, and it works where V is sharded.
    selected = jnp.sum(jnp.where(ids == targets[..., None], shifted, 0.0), axis=-1)
    loss = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - selected
    return jnp.where(undefined[..., 0] | (targets < 0) | (targets >= logits.shape[-1]), jnp.nan, loss)


def pairwise_loss(chosen: Array, rejected: Array) -> Array:
    """Reward model loss of each comparison: -log σ(chosen - rejected).

    Args:
      chosen, rejected: scores of the winning and the losing response, the same shape.

    Returns:
      The loss in nats, the same shape.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ouyang et al. 2022, eq. 1 (arXiv:2203.02155).
    """
    return _per_pair(lambda win, lose: -jax.nn.log_sigmoid(win - lose), chosen, rejected)


def ranking_loss(scores: Array, ranks: Array, mask: Array) -> Array:
    """Reward model loss of each prompt: -log σ(r_w - r_l), averaged over the untied pairs of its K responses.

    Args:
      scores: r, [B, K].
      ranks: [B, K] integers, 1 is best; pairs with equal ranks are ties and are dropped.
      mask: [B, K] bool, True where a response exists; prompts may have fewer than K responses.

    Returns:
      The loss in nats, [B]; 0 for a prompt without an ordered pair (exclude it from the mean with `ordered_pairs`).

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ouyang et al. 2022, eq. 1 (arXiv:2203.02155): all pairs of a prompt form one batch element.
    """
    same_shape(scores=scores, ranks=ranks, mask=mask)
    scores = jnp.where(mask, at_least_float32(scores), 0.0)
    wins = ordered_pairs(ranks, mask)
    loss = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
    total = jnp.sum(jnp.where(wins, loss, 0.0), axis=(1, 2))
    return total / jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1).astype(total.dtype)


def ordered_pairs(ranks: Array, mask: Array) -> Array:
    """Ordered pairs of responses, [B, K, K] bool: True at (w, l) where both exist and w is ranked better than l."""
    same_shape(ranks=ranks, mask=mask)
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def clipped_surrogate(log_ratio: Array, advantage: Array, *, clip: float) -> Array:
    """PPO policy loss of each token: -min(r A, clip(r, 1-ε, 1+ε) A), r = exp(log_ratio).

    Args:
      log_ratio: log π_new(a) - log π_old(a) in nats, any shape.
      advantage: A, the same shape, treated as data.
      clip: ε, e.g. 0.2.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ (broadcasting would hide a bug).

    Source:
      Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    return asymmetric_surrogate(log_ratio, advantage, clip_low=clip, clip_high=clip)


def asymmetric_surrogate(
    log_ratio: Array, advantage: Array, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Array:
    """Clipped surrogate with two bounds: L = -min(r A, clip(r, 1-ε_low, 1+ε_high) A), r = exp(log_ratio).

    With a dual clip c, the loss of a token with A < 0 is min(L, -c A): a ratio that has run away no longer decides the
    gradient.

    Args:
      log_ratio: log π_new(a) - log π_old(a) in nats, any shape; for a loss of sequences see `sequence_log_ratio`.
      advantage: A, the same shape, treated as data.
      clip_low: ε_low, e.g. 0.2.
      clip_high: ε_high, e.g. 0.28; above ε_low, unlikely tokens have room to become likely.
      dual_clip: c, more than 1 + ε_high, e.g. 3; None for none.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Yu et al. 2025, DAPO, eq. 10 (arXiv:2503.14476); Ye et al. 2020, dual clip, eq. 5 (arXiv:1912.09729).
    """

    def loss(log_ratio: Array, advantage: Array) -> Array:
        ratio = jnp.exp(jnp.minimum(log_ratio, EXP_LIMIT))
        found = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
        return (
            found if dual_clip is None else jnp.where(advantage < 0, jnp.minimum(found, -dual_clip * advantage), found)
        )

    return elementwise(loss, log_ratio=log_ratio, advantage=jax.lax.stop_gradient(advantage))


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """Log-ratio of each response for GSPO, at each of its tokens: log s = mean of log π_new(a) - log π_old(a).

    The clipped surrogate of it, averaged over a response's tokens and then over responses, is GSPO's loss.

    Args:
      log_ratio: [B, R] in nats; masked slots may hold anything.
      mask: [B, R] bool, True for response tokens.

    Returns:
      log s, [B, R], equal along a row, 0 in masked slots.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Zheng et al. 2025, eq. 7 (arXiv:2507.18071).
    """
    same_shape(log_ratio=log_ratio, mask=mask)
    total = jnp.sum(jnp.where(mask, at_least_float32(log_ratio), 0.0), axis=1, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(total.dtype)
    return jnp.where(mask, mean, 0.0)


def cispo_loss(log_ratio: Array, logp: Array, advantage: Array, *, ratio_max: float) -> Array:
    """CISPO policy loss of each token: -sg(min(r, c)) A log π(a), r = exp(log_ratio), sg without gradient.

    The importance weight is bounded; every token keeps its gradient.

    Args:
      log_ratio: log π_new(a) - log π_old(a) in nats, any shape, treated as data.
      logp: log π_new(a) in nats, the same shape.
      advantage: A, the same shape, treated as data.
      ratio_max: c, the upper bound of the weight, e.g. 5.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ.

    Source:
      MiniMax 2025, eq. 4 (arXiv:2506.13585); without a lower bound as in Khatri et al. 2025 (arXiv:2510.13786).
    """

    def loss(log_ratio: Array, logp: Array, advantage: Array) -> Array:
        return -jnp.exp(jnp.minimum(log_ratio, jnp.log(ratio_max))) * advantage * logp

    ratio, advantage = jax.lax.stop_gradient((log_ratio, advantage))
    return elementwise(loss, log_ratio=ratio, logp=logp, advantage=advantage)


def importance_weight(log_ratio: Array, *, most: float) -> Array:
    """Truncated importance weight of each token: min(π(a) / μ(a), c), for tokens that another policy μ has sampled.

    As a factor of the advantage in the surrogate around π, it makes that the decoupled objective of an update that is
    off policy. Truncation bounds the variance; tokens that became much more likely count for less than they should.

    Args:
      log_ratio: log π(a) - log μ(a) in nats, any shape, treated as data; π is the policy before the update.
      most: c, at least 1.

    Returns:
      The weight, the same shape, without gradient.

    Source:
      Hilton et al. 2021, eq. 8 (arXiv:2110.00641); truncated as in Espeholt et al. 2018 (arXiv:1802.01561).
    """

    def weight(log_ratio: Array) -> Array:
        return jnp.exp(jnp.minimum(log_ratio, jnp.log(most)))

    return elementwise(weight, log_ratio=jax.lax.stop_gradient(log_ratio))


def clipped_value_loss(value: Array, old_value: Array, target: Array, *, clip: float) -> Array:
    """PPO value loss of each token: 1/2 max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²).

    Args:
      value: v, current output of the value network, any shape.
      old_value: v_old, the value at rollout time, the same shape, treated as data.
      target: R, the return, the same shape, treated as data.
      clip: ε, in units of the value, e.g. 0.2.

    Returns:
      The loss, the same shape, unreduced.

    Raises:
      ValueError: if the shapes differ.

    Source:
      Ziegler et al. 2019, code openai/lm-human-preferences.
    """

    def loss(value: Array, old_value: Array, target: Array) -> Array:
        near = jnp.clip(value, old_value - clip, old_value + clip)
        return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))

    old_value, target = jax.lax.stop_gradient((old_value, target))
    return elementwise(loss, value=value, old_value=old_value, target=target)


# Preference losses. Each takes a number of the chosen response and one of the rejected response, of any one shape:
# h = log π(y|x) - log π_ref(y|x) in nats, or where a method has no reference model, log π(y|x); for some both are means
# over the response's tokens. They return the loss, the same shape, and raise ValueError if the shapes differ.


def _per_pair(loss: Callable[[Array, Array], Array], chosen: Array, rejected: Array) -> Array:
    return elementwise(loss, chosen=chosen, rejected=rejected)


def divergence_slope(log_ratio: Array, *, divergence: str, alpha: float = 0.5) -> Array:
    """Slope f'(u) of a divergence at u = π/π_ref, up to a constant, by which f-DPO replaces log u.

    reverse_kl: log u; forward_kl: 1 - 1/u; js: log(2u / (1 + u)); alpha: (1 - u^-α) / α, which is the reverse KL in the
    limit of α = 0 and the forward KL at α = 1.

    Args:
      log_ratio: log u in nats, any shape.
      divergence: "reverse_kl", "forward_kl", "js" or "alpha".
      alpha: α, more than 0.

    Returns:
      The slope, the same shape.

    Raises:
      ValueError: for any other divergence.

    Source:
      Wang et al. 2023, table 1 (arXiv:2309.16240).
    """

    def slope(log_ratio: Array) -> Array:
        if divergence == "reverse_kl":
            return log_ratio
        if divergence == "forward_kl":
            return -jnp.expm1(jnp.minimum(-log_ratio, _SLOPE_LIMIT))
        if divergence == "js":
            return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
        if divergence == "alpha":
            return -jnp.expm1(jnp.minimum(-alpha * log_ratio, _SLOPE_LIMIT)) / alpha
        raise ValueError(f"divergence: expected 'reverse_kl', 'forward_kl', 'js' or 'alpha', got {divergence!r}")

    return elementwise(slope, log_ratio=log_ratio)


def dpo_loss(
    chosen: Array,
    rejected: Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Array:
    """DPO loss of each comparison: -(1-ε) log σ(β d) - ε log σ(-β d), d = f'(u_w) - f'(u_l).

    Label smoothing makes it cDPO, another divergence f-DPO, and log-probabilities in place of log-ratios CPO without
    its likelihood term.

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, the strength of the pull to the reference model, e.g. 0.1.
      label_smoothing: ε, the probability that a label is wrong, below 0.5.
      divergence, alpha: as in `divergence_slope`.

    Source:
      Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); cDPO: Mitchell 2023, ericmitchell.ai/cdpo.pdf; f-DPO: Wang et al.
      2023 (arXiv:2309.16240); CPO: Xu et al. 2024, eq. 3 (arXiv:2401.08417).
    """
    win, lose = (divergence_slope(x, divergence=divergence, alpha=alpha) for x in (chosen, rejected))
    return _per_pair(lambda win, lose: _smoothed(beta * (win - lose), label_smoothing), win, lose)


def robust_dpo_loss(chosen: Array, rejected: Array, *, beta: float, label_smoothing: float) -> Array:
    """Robust DPO loss: (-(1-ε) log σ(β d) + ε log σ(-β d)) / (1 - 2ε), d = h_w - h_l.

    Its mean over labels that are flipped with probability ε is DPO's loss on the true ones.

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, as in `dpo_loss`.
      label_smoothing: ε, the probability that a label is wrong, below 0.5.

    Source:
      Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409).
    """

    def loss(win: Array, lose: Array) -> Array:
        return _smoothed(beta * (win - lose), -label_smoothing / (1.0 - 2.0 * label_smoothing))

    return _per_pair(loss, chosen, rejected)


def ipo_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """IPO loss of each comparison: (h_w - h_l - 1/(2β))².

    Args:
      chosen, rejected: log π - log π_ref in nats, means over the response's tokens, the same shape.
      beta: β, the paper's τ, e.g. 0.1.

    Source:
      Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """
    return _per_pair(lambda win, lose: jnp.square(win - lose - 0.5 / beta), chosen, rejected)


def hinge_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """SLiC hinge loss of each comparison: max(0, 1 - β (h_w - h_l)).

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β; 1/β is the margin in nats.

    Source:
      Zhao et al. 2023 (arXiv:2305.10425), with a reference model as in Liu et al. 2023 (arXiv:2309.06657).
    """
    return _per_pair(lambda win, lose: jax.nn.relu(1.0 - beta * (win - lose)), chosen, rejected)


def exo_loss(chosen: Array, rejected: Array, *, beta: float, label_smoothing: float) -> Array:
    """EXO loss of each comparison: KL(q, p) of q = (σ(β d), σ(-β d)) and p = (1-ε, ε), d = h_w - h_l.

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, as in `dpo_loss`.
      label_smoothing: ε, more than 0, e.g. 0.001.

    Source:
      Ji et al. 2024, eq. 16 (arXiv:2402.00856).
    """

    def loss(win: Array, lose: Array) -> Array:
        z = beta * (win - lose)
        right = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-label_smoothing))
        return right + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(label_smoothing))

    return _per_pair(loss, chosen, rejected)


def nca_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """NCA loss of each comparison: -log σ(β h_w) - ½ log σ(-β h_w) - ½ log σ(-β h_l).

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, as in `dpo_loss`.

    Source:
      Chen et al. 2024, eq. 11 (arXiv:2402.05369).
    """

    def loss(win: Array, lose: Array) -> Array:
        absolute = 0.5 * (jax.nn.log_sigmoid(-beta * win) + jax.nn.log_sigmoid(-beta * lose))
        return -jax.nn.log_sigmoid(beta * win) - absolute

    return _per_pair(loss, chosen, rejected)


def apo_zero_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """APO-zero loss of each comparison: 1 - σ(β h_w) + σ(β h_l); for chosen responses better than the model's own.

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, as in `dpo_loss`.

    Source:
      D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
    """
    return _per_pair(lambda win, lose: jax.nn.sigmoid(-beta * win) + jax.nn.sigmoid(beta * lose), chosen, rejected)


def apo_down_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """APO-down loss of each comparison: σ(β h_w) + 1 - σ(β (h_w - h_l)); for chosen ones worse than the model's own.

    Args:
      chosen, rejected: log π - log π_ref of the responses in nats, the same shape.
      beta: β, as in `dpo_loss`.

    Source:
      D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266).
    """
    return _per_pair(
        lambda win, lose: jax.nn.sigmoid(beta * win) + jax.nn.sigmoid(beta * (lose - win)), chosen, rejected
    )


def kto_loss(
    log_ratio: Array,
    desirable: Array,
    baseline: Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """KTO loss of each response: λ_D (1 - σ(β (h - z))) if it is desirable, else λ_U (1 - σ(β (z - h))).

    Args:
      log_ratio: h = log π - log π_ref of the response in nats, any shape.
      desirable: bool, the same shape.
      baseline: z, an estimate of KL(π, π_ref) per response, scalar, treated as data: the mean h of responses to other
        prompts, or 0 if that is negative.
      beta: β, as in `dpo_loss`.
      desirable_weight, undesirable_weight: λ_D, λ_U.

    Source:
      Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306).
    """
    same_shape(log_ratio=log_ratio, desirable=desirable)

    def loss(log_ratio: Array, baseline: Array) -> Array:
        z = beta * (log_ratio - baseline)
        better, worse = desirable_weight * jax.nn.sigmoid(-z), undesirable_weight * jax.nn.sigmoid(z)
        return jnp.where(desirable, better, worse)

    baseline = jax.lax.stop_gradient(jnp.broadcast_to(at_least_float32(baseline), log_ratio.shape))
    return elementwise(loss, log_ratio=log_ratio, baseline=baseline)


def orpo_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """ORPO's odds-ratio loss of each comparison: -β log σ(log(odds_w / odds_l)), odds = p / (1 - p).

    The method's loss adds the negative log-likelihood of the chosen response.

    Args:
      chosen, rejected: log p in nats, means over the response's tokens, the same shape; at most -1e-7 counts.
      beta: β, the paper's λ, e.g. 0.1.

    Source:
      Hong et al. 2024, eq. 6 and 7 (arXiv:2403.07691).
    """

    def log_odds(logp: Array) -> Array:
        logp = jnp.minimum(logp, -1e-7)
        near = logp > -0.5  # where 1 - p loses digits
        rest = jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0)))
        return logp - jnp.where(near, rest, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp))))

    return _per_pair(lambda win, lose: -beta * jax.nn.log_sigmoid(log_odds(win) - log_odds(lose)), chosen, rejected)


def simpo_loss(chosen: Array, rejected: Array, *, beta: float, margin: float) -> Array:
    """SimPO loss of each comparison: -log σ(β (log p_w - log p_l) - γ).

    Args:
      chosen, rejected: log p in nats, means over the response's tokens, the same shape.
      beta: β, e.g. 2.
      margin: γ, e.g. 1.

    Source:
      Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """
    return _per_pair(lambda win, lose: -jax.nn.log_sigmoid(beta * (win - lose) - margin), chosen, rejected)


def _smoothed(z: Array, label_smoothing: float) -> Array:
    """-(1-ε) log σ(z) - ε log σ(-z)."""
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
