"""Losses of preferences and of policies beside TRL's own: values and gradients on random log-probabilities.

TRL computes a loss in a trainer's method, from a model's outputs: the trainers here are made without their
constructors, and the model returns drawn log-probabilities of tokens.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from rlhf_jax.kl import kl_estimate
from rlhf_jax.losses import (
    apo_down_loss,
    apo_zero_loss,
    asymmetric_surrogate,
    cispo_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    sequence_log_ratio,
    simpo_loss,
)
from rlhf_jax.masked import masked_mean

PAIRS, TOKENS = 32, 7
DRAWS = np.random.default_rng(0)
# Rows of different lengths, each with a log-probability per token: chosen ones, then rejected ones.
LENGTHS = DRAWS.integers(1, TOKENS + 1, 2 * PAIRS)
MASK = np.arange(TOKENS) < LENGTHS[:, None]
LOGP = np.where(MASK, -DRAWS.gamma(1.0, 1.0, MASK.shape), 0.0).astype(np.float32)
REFERENCE = (LOGP.sum(axis=1) + DRAWS.normal(0, 3, 2 * PAIRS)).astype(np.float32)
BETA = 0.3

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    gather_for_metrics=lambda x: x,
    gather=lambda x: x,
    reduce=lambda x, reduction: x,
    num_processes=1,
)


class Model(torch.nn.Module):
    """Outputs of a model with a fused head, for the rows of a batch in order."""

    def __init__(self, logp: torch.Tensor) -> None:
        super().__init__()
        self.logp = logp

    def forward(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logp)
        return SimpleNamespace(log_probs=self.logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer(cls: Any, **attributes: Any) -> Any:
    """A trainer of TRL without its constructor."""
    made = cls.__new__(cls)
    shared = {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "beta": BETA,
        "label_smoothing": 0.0,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (shared | attributes).items():
        setattr(made, name, value)
    return made


def inputs(**columns: Any) -> dict[str, torch.Tensor]:
    """A batch whose first token is the prompt."""
    completion = torch.tensor(np.pad(MASK, ((0, 0), (1, 0))).astype(np.int64))
    ids = torch.ones_like(completion)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": completion, **columns}


def dpo(loss_type: str, **attributes: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """TRL's loss of the token log-probabilities, a mean over pairs."""
    settings = {
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    }

    def loss(logp: torch.Tensor) -> torch.Tensor:
        model = Model(logp)
        made = trainer(DPOTrainer, model=model, **(settings | attributes))
        chosen, rejected = (torch.tensor(x) for x in np.split(REFERENCE, 2))
        result: torch.Tensor = made._compute_loss(
            model, inputs(ref_chosen_logps=chosen, ref_rejected_logps=rejected), return_outputs=False
        )
        return result

    return loss


def cpo(loss_type: str, **attributes: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    made = trainer(CPOTrainer, loss_type=loss_type, alpha=0.0, **attributes)

    def loss(logp: torch.Tensor) -> torch.Tensor:
        sums = logp.sum(dim=1)
        if loss_type == "simpo":
            sums = sums / torch.tensor(LENGTHS)
        found: torch.Tensor = made.cpo_loss(*sums.chunk(2))[0].mean()
        return found

    return loss


def orpo(logp: torch.Tensor) -> torch.Tensor:
    means = logp.sum(dim=1) / torch.tensor(LENGTHS)
    found: torch.Tensor = -trainer(ORPOTrainer).odds_ratio_loss(*means.chunk(2))[0].mean()
    return found


# Half of the rows are desirable; the baseline is of rows of their own.
LABELS = np.arange(2 * PAIRS) < PAIRS
UNRELATED = np.float32(0.7)


def kto(logp: torch.Tensor) -> torch.Tensor:
    model = Model(logp)
    made = trainer(
        KTOTrainer,
        model=model,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: torch.full((2 * PAIRS,), float(UNRELATED)),
    )
    columns = {"label": torch.tensor(LABELS), "ref_logps": torch.tensor(REFERENCE), "ref_KL_logps": torch.zeros(1)}
    found: torch.Tensor = made._compute_loss(model, inputs(**columns), return_outputs=False)
    return found


Numbers = Callable[[jax.Array], jax.Array]


def log_ratios(logp: jax.Array) -> jax.Array:
    return jnp.sum(logp, axis=1) - REFERENCE


def mean_log_ratios(logp: jax.Array) -> jax.Array:
    return log_ratios(logp) / LENGTHS


def sums(logp: jax.Array) -> jax.Array:
    return jnp.sum(logp, axis=1)


def means(logp: jax.Array) -> jax.Array:
    return sums(logp) / LENGTHS


def ours(loss: Callable[..., jax.Array], numbers: Numbers = log_ratios, **settings: Any) -> Numbers:
    def mean(logp: jax.Array) -> jax.Array:
        return jnp.mean(loss(*jnp.split(numbers(logp), 2), **({"beta": BETA} | settings)))

    return mean


def our_kto(logp: jax.Array) -> jax.Array:
    losses = kto_loss(
        log_ratios(logp),
        jnp.asarray(LABELS),
        jnp.asarray(UNRELATED),
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    return jnp.mean(losses)


# Of the policy that sampled, of the reference model, and advantages of responses.
OLD, KL_REFERENCE = (np.where(MASK, LOGP + DRAWS.normal(0, 0.4, MASK.shape), 0.0).astype(np.float32) for _ in range(2))
ADVANTAGE = DRAWS.normal(0, 1, (len(LOGP), 1)).astype(np.float32)


def grpo(loss_type: str, *, delta: float | None = None, **attributes: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "max_completion_length": TOKENS,
        "_entropy_bonus_enabled": False,
        "args": SimpleNamespace(delta=delta, use_bias_correction_kl=False),
    }
    batch = {
        "prompt_ids": torch.ones((len(LOGP), 1)),
        "prompt_mask": torch.ones((len(LOGP), 1)),
        "completion_ids": torch.ones(MASK.shape),
        "completion_mask": torch.tensor(MASK.astype(np.int64)),
        "advantages": torch.tensor(ADVANTAGE[:, 0]),
        "old_per_token_logps": torch.tensor(OLD),
        "ref_per_token_logps": torch.tensor(KL_REFERENCE),
        "num_items_in_batch": torch.tensor(float(MASK.sum())),
    }

    def loss(logp: torch.Tensor) -> torch.Tensor:
        made = trainer(GRPOTrainer, model=SimpleNamespace(training=False), **(settings | attributes))
        made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
        found: torch.Tensor = made._compute_loss(made.model, batch)
        return found

    return loss


def over_tokens(losses: jax.Array) -> jax.Array:
    return masked_mean(losses, jnp.asarray(MASK))


def over_sequences(losses: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.where(MASK, losses, 0.0), axis=1) / LENGTHS)


def by_length(losses: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(MASK, losses, 0.0)) / MASK.size


def surrogate(
    reduced: Numbers, *, sequence: bool = False, dual_clip: float | None = None, beta: float = 0.0
) -> Numbers:
    def mean(logp: jax.Array) -> jax.Array:
        log_ratio = logp - OLD
        log_ratio = sequence_log_ratio(log_ratio, jnp.asarray(MASK)) if sequence else log_ratio
        advantage = jnp.broadcast_to(ADVANTAGE, logp.shape)
        losses = asymmetric_surrogate(log_ratio, advantage, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
        return reduced(losses + beta * kl_estimate(logp, jnp.asarray(KL_REFERENCE), estimator="k3"))

    return mean


def our_cispo(logp: jax.Array) -> jax.Array:
    return over_tokens(cispo_loss(logp - OLD, logp, jnp.broadcast_to(ADVANTAGE, logp.shape), ratio_max=1.5))


CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Numbers]] = {
    "dpo": (dpo("sigmoid"), ours(dpo_loss)),
    "forward_kl": (dpo("sigmoid", f_divergence_type="forward_kl"), ours(dpo_loss, divergence="forward_kl")),
    "js": (dpo("sigmoid", f_divergence_type="js_divergence"), ours(dpo_loss, divergence="js")),
    # TRL's coefficient is 1 - α.
    "alpha": (
        dpo("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
        ours(dpo_loss, divergence="alpha", alpha=0.3),
    ),
    "robust": (dpo("robust", label_smoothing=0.2), ours(robust_dpo_loss, label_smoothing=0.2)),
    # TRL counts the completion's tokens.
    "ipo": (dpo("ipo"), ours(ipo_loss, mean_log_ratios)),
    "hinge": (dpo("hinge"), ours(hinge_loss)),
    "exo": (dpo("exo_pair", label_smoothing=0.01), ours(exo_loss, label_smoothing=0.01)),
    "nca": (dpo("nca_pair"), ours(nca_loss)),
    "apo_zero": (dpo("apo_zero"), ours(apo_zero_loss)),
    "apo_down": (dpo("apo_down"), ours(apo_down_loss)),
    "cpo": (cpo("sigmoid", label_smoothing=0.1), ours(dpo_loss, sums, label_smoothing=0.1)),
    "simpo": (cpo("simpo", simpo_gamma=0.5), ours(simpo_loss, means, margin=0.5)),
    "orpo": (orpo, ours(orpo_loss, means)),
    "kto": (kto, our_kto),
    "clip-higher": (grpo("bnpo"), surrogate(over_tokens)),
    "dual clip": (grpo("bnpo", delta=1.6), surrogate(over_tokens, dual_clip=1.6)),
    "sequence": (grpo("grpo"), surrogate(over_sequences)),
    "constant": (grpo("dr_grpo"), surrogate(by_length)),
    "KL in the loss": (grpo("bnpo", beta=BETA), surrogate(over_tokens, beta=BETA)),
    "gspo": (grpo("grpo", importance_sampling_level="sequence"), surrogate(over_sequences, sequence=True)),
    # TRL's epsilon_high bounds the ratio itself.
    "cispo": (grpo("cispo", epsilon_high=1.5), our_cispo),
}


def test_value_and_gradient_are_trls() -> None:
    for name, (theirs, mine) in CASES.items():
        logp = torch.tensor(LOGP, requires_grad=True)
        expected = theirs(logp)
        expected.backward()
        assert logp.grad is not None
        value, gradient = jax.jit(jax.value_and_grad(mine))(jnp.asarray(LOGP))
        np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-6, err_msg=name)
        wanted = logp.grad.numpy() * MASK
        assert np.abs(wanted).max() > 1e-3, name
        np.testing.assert_allclose(gradient * MASK, wanted, rtol=1e-5, atol=1e-7, err_msg=name)
